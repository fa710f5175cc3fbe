"""The command `align-tf`."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from align_tf.limits import Limits
from align_tf.recipe import Recipe, read_recipe

# Nothing heavy is imported here: `align-tf --help` answers at once.

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

BATCH_SIZE = 32  # images classified at a time

EVALUATION_TASKS = ("retrieval", "zero-shot", "knn", "linear-probe")
# option: the tasks it is for
EVALUATION_OPTIONS = {
    "labels": ("zero-shot",),
    "templates": ("zero-shot",),
    "train_data": ("knn", "linear-probe"),
}
# figure, column, how it is written
FIGURES = (
    ("r1", "R@1", "{:.1%}"),
    ("r5", "R@5", "{:.1%}"),
    ("r10", "R@10", "{:.1%}"),
    ("median_rank", "median rank", "{:g}"),
    ("mean_rank", "mean rank", "{:.1f}"),
    ("top1", "top-1", "{:.1%}"),
    ("top5", "top-5", "{:.1%}"),
    ("mean_per_class", "mean per class", "{:.1%}"),
    ("C", "C", "{:.3g}"),
)
SKIPPED_NAMED = 5  # of the images that are left out

# Offered beside the names of the bundled pictures.
QUICKSTART_DISTRACTORS = ("dog", "cup of coffee", "airplane", "house", "clock")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        Exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("align-tf: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        sys.stdout = None
        return 0
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"align-tf: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align-tf",
        description="ALIGN for TensorFlow and Keras: classify, train, export and serve.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(run=lambda arguments: _print_version_or_help(parser, arguments))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    quickstart = command(
        "quickstart", _quickstart, "the main job, end to end, on the bundled checkpoint"
    )
    quickstart.add_argument(
        "--output", metavar="DIR", help="where the SavedModel goes (a temporary folder)"
    )
    quickstart.add_argument(
        "--keep-serving", action="store_true", help="leave the server up until Ctrl-C"
    )
    quickstart.add_argument("--json", action="store_true", help="print the results as JSON")

    classify = command("classify", _classify, "zero-shot classification of image files")
    classify.add_argument("images", nargs="+", metavar="IMAGE")
    classify.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    classify.add_argument(
        "--template", default="{}", help='wraps each label, such as "a photo of a {}"'
    )
    _add_model(classify)
    classify.add_argument("--json", action="store_true", help="print the results as JSON")

    evaluate = command("evaluate", _evaluate, "retrieval, zero-shot, kNN or linear-probe figures")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="for retrieval, images with captions (a folder with a .txt beside each, tar or "
        "TFRecord shards, a table); for the other tasks, a folder with a sub-folder for each class",
    )
    evaluate.add_argument("--task", choices=EVALUATION_TASKS, default=EVALUATION_TASKS[0])
    evaluate.add_argument(
        "--train-data",
        metavar="SOURCE",
        help="what kNN and the linear probe learn from (without it, four fifths of each class)",
    )
    evaluate.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="the classes of zero-shot (the sub-folders); or a file, one a line, "
        "FOLDER<TAB>LABEL where the two differ",
    )
    evaluate.add_argument(
        "--templates",
        metavar="FILE",
        help='wrap each label, one a line, such as "a photo of a {}."; '
        "imagenet takes the 80 of CLIP",
    )
    evaluate.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")

    export = command("export", _export, "write a SavedModel for TensorFlow Serving")
    _add_model(export)
    export.add_argument("--output", required=True, metavar="DIR", help="the model's folder")

    convert = command("convert", _convert, "convert a checkpoint into another format")
    convert.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="SOURCE",
        help="a checkpoint folder or id, align-tiny, a .keras file, or the folder or prefix of a "
        "checkpoint of the original training code",
    )
    convert.add_argument(
        "--to",
        required=True,
        choices=("hf", "keras", "savedmodel"),
        help="a folder for transformers, a .keras file, or a folder for TensorFlow Serving",
    )
    convert.add_argument("--output", required=True, metavar="PATH", help="the folder or file")
    convert.add_argument(
        "--config", metavar="FILE", help="keys of config.json that go before the checkpoint's own"
    )
    convert.add_argument(
        "--processor",
        metavar="DIR_OR_ID",
        help="where the tokenizer and image settings come from if not from the checkpoint, such "
        "as bert-base-uncased; image settings that neither has are align-base's",
    )
    convert.add_argument(
        "--image-mode",
        choices=("hf", "original"),
        help="resize as transformers does (the default for an original checkpoint), or as the "
        "original training code did",
    )
    convert.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights written"
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that is there"
    )
    convert.add_argument(
        "--dry-run", action="store_true", help="read and check everything, write nothing"
    )
    convert.add_argument("--json", action="store_true", help="print the summary as JSON")

    train = command("train", _train, "train by a recipe, or go on with a training")
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file of the settings")
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        train.add_argument(flag, metavar="VALUE", help=_setting_help(field))

    serve = command("serve", _serve, "serve SavedModels over gRPC and REST, on one machine")
    serve.add_argument("directory", nargs="?", metavar="DIR", help="a SavedModel folder")
    serve.add_argument("--model-name", default="align")
    serve.add_argument("--model-config-file", metavar="FILE", help="a model_config_list")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--grpc-port", type=int, default=8500)
    serve.add_argument("--rest-port", type=int, default=8501)
    serve.add_argument(
        "--enable-batching", action="store_true", help="merge requests of different callers"
    )
    serve.add_argument(
        "--batching-parameters-file", metavar="FILE", help="TensorFlow Serving's, in text"
    )
    serve.add_argument(
        "--monitoring-config-file", metavar="FILE", help="TensorFlow Serving's, in text"
    )
    for field in dataclasses.fields(Limits):
        flag = f"--{field.name.replace('_', '-')}"
        serve.add_argument(
            flag, type=field.type, default=field.default, metavar="N", help=_setting_help(field)
        )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="align-tiny",
        metavar="DIR_OR_ID",
        help="a checkpoint folder, a Hugging Face id such as kakaobrain/align-base, or align-tiny",
    )


def _print_version_or_help(parser: argparse.ArgumentParser, arguments: Any) -> int:
    if arguments.version:
        from align_tf import __version__

        print(__version__)
        return 0
    parser.print_help(sys.stderr)
    return EXIT_USER_ERROR


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _import_tensorflow() -> None:
    """Imports TensorFlow without the lines that its libraries write to stderr as they start."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with _late_interrupt():
            import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _late_interrupt() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block, as some libraries swallow what stops an import."""
    if threading.current_thread() is not threading.main_thread():  # gets no signals
        yield
        return
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def _load(name: str) -> tuple[Any, Any]:
    _say(f"Loading {name} ...")
    _import_tensorflow()
    from align_tf import AlignModel, AlignProcessor

    return AlignModel.from_pretrained(name), AlignProcessor.from_pretrained(name)


def _probabilities(model: Any, processor: Any, images: list, labels: list[str]) -> Any:
    """Returns (images, labels), the softmax of each image's logits."""
    import keras

    output = model(processor(images=images, text=labels, padding="longest"))
    return keras.ops.convert_to_numpy(keras.ops.softmax(output.logits_per_image, axis=-1))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


# --- classify ------------------------------------------------------------------------------


def _classify(arguments: Any) -> int:
    if "{}" not in arguments.template:
        raise ValueError(f"--template {arguments.template!r}: expected a {{}} for the label")
    missing = [path for path in arguments.images if not pathlib.Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file")
    model, processor = _load(arguments.model)
    prompts = [arguments.template.format(label) for label in arguments.labels]
    results, broken = [], []
    for path, probs in _classified(model, processor, arguments.images, prompts):
        if isinstance(probs, ValueError):
            broken.append(str(probs))
        else:
            ranked = dict(zip(arguments.labels, map(float, probs), strict=True))
            results.append({"image": path, "probs": ranked})
    if arguments.json:
        print(json.dumps(results, indent=2))
    elif results:
        _print_probabilities(results)
    for message in broken:
        _say(f"align-tf: error: {message}")
    return EXIT_USER_ERROR if broken else 0


def _classified(model: Any, processor: Any, paths: list, prompts: list[str]) -> Iterator[tuple]:
    """Yields each path with its probabilities, or with the error that its file gave."""
    from align_tf.progress import track

    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    for batch in track(batches, "Classifying", show=len(batches) > 1):
        try:
            yield from zip(batch, _probabilities(model, processor, batch, prompts), strict=True)
        except ValueError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:  # one file is broken: the others are answered all the same
                for path in batch:
                    yield from _classified(model, processor, [path], prompts)


def _print_probabilities(results: list[dict]) -> None:
    rows = []
    for result in results:
        ranked = sorted(result["probs"].items(), key=lambda item: -item[1])
        lines = "\n".join(f"{prob:6.1%}  {label}" for label, prob in ranked[:5])
        rows.append([result["image"], lines])
    _table("Zero-shot classification", ["image", "probability and label"], rows)


# --- train ---------------------------------------------------------------------------------


def _setting_help(field: dataclasses.Field) -> str:
    default = "" if field.default is None else f" ({field.default})"
    return field.metadata["help"] + default


def _train(arguments: Any) -> int:
    flags = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    given = {key: value for key, value in flags.items() if value is not None}
    recipe = read_recipe(arguments.recipe, given)
    _import_tensorflow()
    from align_tf.training import train

    print(train(recipe))
    return 0


# --- evaluate ------------------------------------------------------------------------------


def _evaluate(arguments: Any) -> int:
    for option, tasks in EVALUATION_OPTIONS.items():
        if getattr(arguments, option) and arguments.task not in tasks:
            raise ValueError(
                f"--{option.replace('_', '-')}: of no use to --task {arguments.task}, "
                f"but to {' and '.join(tasks)}"
            )
    output = arguments.output and pathlib.Path(arguments.output)
    if output and output.is_dir():
        raise ValueError(f"--output {output}: a folder, expected a file")
    model, processor = _load(arguments.model)
    from align_tf import evaluate_command
    from align_tf.checkpoint import write_text

    report = {
        "task": arguments.task,
        "model": arguments.model,
        "data": arguments.data,
        **evaluate_command.evaluate(model, processor, arguments),
    }
    if output:
        write_text(output, json.dumps(report, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_figures(report)
    _say_skipped(report["skipped"])
    return 0


def _print_figures(report: dict) -> None:
    metrics = report["metrics"]
    ways = {"_i2t": "image to text", "_t2i": "text to image"}
    if report["task"] != "retrieval":
        ways = {"": report["task"]}
    shown = [row for row in FIGURES if any(row[0] + way in metrics for way in ways)]
    rows = [
        [name, *(form.format(metrics[figure + way]) for figure, _, form in shown)]
        for way, name in ways.items()
    ]
    counts = [f"{value} {name}" for name, value in report.items() if isinstance(value, int)]
    title = f"{report['model']} on {report['data']}: {', '.join(counts).replace('_', ' ')}"
    _table(title, ["", *(title for _, title, _ in shown)], rows)


def _say_skipped(skipped: dict[str, str]) -> None:
    if not skipped:
        return
    named = [f"{key} ({reason})" for key, reason in list(skipped.items())[:SKIPPED_NAMED]]
    more = f" and {len(skipped) - len(named)} more" if len(skipped) > len(named) else ""
    images = "1 image" if len(skipped) == 1 else f"{len(skipped)} images"
    _say(f"align-tf: warning: left out {images}: {', '.join(named)}{more}")


# --- export and serve ----------------------------------------------------------------------


def _export(arguments: Any) -> int:
    model, processor = _load(arguments.model)
    from align_tf import export_saved_model

    _say("Exporting ...")
    print(export_saved_model(model, processor, arguments.output))
    return 0


def _convert(arguments: Any) -> int:
    _say(f"Converting {arguments.source} ...")
    _import_tensorflow()
    from align_tf import checkpoint, conversion

    config = arguments.config and checkpoint.read_json(pathlib.Path(arguments.config))
    summary = conversion.convert(
        arguments.source,
        arguments.to,
        arguments.output,
        config=config,
        processor=arguments.processor,
        image_mode=arguments.image_mode,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
    )
    for note in summary["notes"]:
        _say(f"Note: {note}")
    print(json.dumps(summary, indent=2) if arguments.json else conversion.describe(summary))
    return 0


def _serve(arguments: Any) -> int:
    if (arguments.directory is None) == (arguments.model_config_file is None):
        raise ValueError("expected a SavedModel folder or --model-config-file, one of them")
    if arguments.batching_parameters_file is not None and not arguments.enable_batching:
        raise ValueError("--batching-parameters-file is for --enable-batching")
    _import_tensorflow()
    from align_tf import batching, metrics, server

    parameters = None
    if arguments.batching_parameters_file is not None:
        parameters = batching.read_batching_parameters(arguments.batching_parameters_file)
    elif arguments.enable_batching:
        parameters = batching.BatchingParameters()
    metrics_path = None
    if arguments.monitoring_config_file is not None:
        metrics_path = metrics.read_monitoring_config(arguments.monitoring_config_file)
    names = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    server.serve(
        server.ModelServer(
            arguments.directory,
            model_name=arguments.model_name,
            model_config_file=arguments.model_config_file,
            host=arguments.host,
            grpc_port=arguments.grpc_port,
            rest_port=arguments.rest_port,
            batching=parameters,
            limits=limits,
            metrics_path=metrics_path,
        )
    )
    return 0


# --- quickstart ----------------------------------------------------------------------------


def _quickstart(arguments: Any) -> int:
    _import_tensorflow()
    from align_tf import export_saved_model, server  # first, so that a missing extra is told
    from align_tf.checkpoint import BUNDLED

    pictures = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    names = [picture.stem.replace("_", " ") for picture in pictures]
    labels = [*names, *QUICKSTART_DISTRACTORS]
    model, processor = _load("align-tiny")
    _say(f"Classifying {len(pictures)} pictures in Keras ...")
    local = _probabilities(model, processor, pictures, labels)
    output = pathlib.Path(arguments.output or tempfile.mkdtemp(prefix="align-tiny-"))
    _say("Exporting the SavedModel ...")
    version = export_saved_model(model, processor, output)
    _say("Starting the embedded server ...")
    with server.ModelServer(output, model_name="align") as running:
        served = {}
        for protocol, port in (("gRPC", running.grpc_port), ("REST", running.rest_port)):
            _say(f"Asking it over {protocol} ...")
            served[protocol] = _ask(protocol, port, pictures, labels)
        results = [
            {
                "image": picture.name,
                "label": labels[int(local[i].argmax())],
                "keras": float(local[i].max()),
                "grpc": float(served["gRPC"][i][local[i].argmax()]),
                "rest": float(served["REST"][i][local[i].argmax()]),
            }
            for i, picture in enumerate(pictures)
        ]
        _print_quickstart(results, version, arguments.json)
        if arguments.keep_serving:
            _print_curl(running, pictures[0], labels[:3])
            running.wait()
    return 0


def _ask(protocol: str, port: int, pictures: list, labels: list[str]) -> Any:
    from align_tf.client import AlignClient

    with AlignClient(f"127.0.0.1:{port}", protocol=protocol.lower()) as client:
        return client.classify(pictures, labels).probs


def _print_quickstart(results: list[dict], version: pathlib.Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"saved_model": str(version), "results": results}, indent=2))
        return
    _table(
        "align-tiny, asked three ways",
        ["picture", "label", "Keras", "gRPC", "REST"],
        [
            [row["image"], row["label"], *(f"{row[way]:.1%}" for way in ("keras", "grpc", "rest"))]
            for row in results
        ],
    )
    print(f"SavedModel: {version}")


def _print_curl(running: Any, picture: pathlib.Path, labels: list[str]) -> None:
    instance = f'{{"image_bytes": {{"b64": "$(base64 -w0 {picture})"}}, "labels": '
    instance += f"{json.dumps(labels)}}}"
    print(
        f"Serving gRPC on port {running.grpc_port}, REST on port {running.rest_port}; "
        "Ctrl-C stops it. Try:\n\n"
        f"curl http://127.0.0.1:{running.rest_port}/v1/models/align:predict -d @- <<END\n"
        f'{{"instances": [{instance}]}}\n'
        "END\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
