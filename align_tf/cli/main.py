"""The command `align-tf`."""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from align_tf.server.limits import Limits
from align_tf.training.recipe import Recipe, read_recipe

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
HEATMAP_PICTURE = 96  # pixels, of an image beside its row

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
    # TensorFlow takes oneDNN's kernels by itself on newer processors alone (AVX512_VNNI), and they
    # are faster with AVX2 too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # TensorFlow, models and graphs are a million objects that stay. Python's collector would go
    # through them again and again while they are made, and once more at the end.
    gc.set_threshold(100_000, 20, 10)
    atexit.register(gc.freeze)
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

    export = command("export", _export, "write a SavedModel for TensorFlow Serving, or for a phone")
    _add_model(export)
    export.add_argument("--output", required=True, metavar="DIR", help="the model's folder")
    export.add_argument(
        "--format",
        choices=("saved_model", "litert"),
        default="saved_model",
        help="litert: each tower as a .tflite file, for phones",
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="weights of the SavedModel (float32)",
    )
    export.add_argument("--quantize", choices=("int8",), help="weights of --format litert")

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

    _add_collection_commands(command)
    _add_plot_commands(command)
    _add_demo_command(command)

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


def _add_collection_commands(command: Any) -> None:
    embed = command("embed", _embed, "embed a collection of images into Parquet shards")
    embed.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of images, tar or TFRecord shards, a table of paths, Parquet, a glob",
    )
    embed.add_argument("--output", required=True, metavar="DIR", help="the folder of the shards")
    _add_model(embed)
    embed.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    embed.add_argument("--batch-size", type=int, metavar="N", help="images embedded at a time")
    embed.add_argument("--shard-size", type=int, metavar="N", help="records of a shard")
    embed.add_argument(
        "--engine",
        choices=("default", "ray"),
        default="default",
        help="this process, or Ray Data: the cluster of RAY_ADDRESS, or this machine",
    )
    embed.add_argument("--workers", type=int, default=2, metavar="N", help="processes of Ray (2)")
    embed.add_argument("--image-key", metavar="NAME", help="the image's column, feature or key")
    embed.add_argument("--caption-key", metavar="NAME", help="the caption's")
    embed.add_argument("--json", action="store_true", help="print the summary as JSON")

    index = command("index", _index, "build a FAISS index over embedded images")
    index.add_argument("embeddings", metavar="DIR", help="the folder that embed wrote")
    index.add_argument("--output", required=True, metavar="DIR", help="the folder of the index")
    index.add_argument(
        "--kind", choices=("flat", "ivf"), help="flat up to 100,000 images, ivf above"
    )
    index.add_argument("--json", action="store_true", help="print the summary as JSON")

    search = command("search", _search, "find images by a text, an image, or both")
    search.add_argument("index", metavar="INDEX", help="the folder that index wrote")
    search.add_argument("text", nargs="?", metavar="TEXT", help="what the images show")
    search.add_argument("--image", metavar="FILE", help="a picture like them")
    for sign, what in (("add", "towards"), ("subtract", "away from")):
        search.add_argument(
            f"--{sign}",
            nargs="+",
            default=[],
            action="extend",
            metavar="TEXT",
            help=f"move the query {what} these texts",
        )
    search.add_argument("-k", type=int, default=10, metavar="N", help="how many (10)")
    search.add_argument(
        "--model", metavar="DIR_OR_ID", help="the model that embedded the collection (its name)"
    )
    search.add_argument("--html", metavar="FILE", help="also write a page with the pictures")
    search.add_argument("--montage", metavar="FILE", help="also write the pictures as a PNG")
    search.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_plot_commands(command: Any) -> None:
    plot = command("plot", None, "draw similarities, embeddings or the curves of a training")
    kinds = plot.add_subparsers(title="plots", metavar="PLOT", required=True)

    def kind(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = kinds.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--output", required=True, metavar="FILE", help="a .png or .svg file")
        return added

    heatmap = kind("heatmap", _plot_heatmap, "the similarity of images and texts")
    heatmap.add_argument("--images", nargs="+", required=True, metavar="IMAGE")
    heatmap.add_argument("--texts", nargs="+", required=True, metavar="TEXT")
    _add_model(heatmap)

    embeddings = kind("embeddings", _plot_embeddings, "the images of a collection in the plane")
    embeddings.add_argument("embeddings", metavar="DIR", help="the folder that embed wrote")
    embeddings.add_argument("--method", choices=("pca", "tsne"), default="pca")
    embeddings.add_argument(
        "--color-by",
        choices=("folder", "caption"),
        help="what the labels are (the folders of the images if they differ, else the captions)",
    )
    embeddings.add_argument(
        "--max-images", type=int, default=5000, metavar="N", help="drawn at most (5000)"
    )

    curves = kind("curves", _plot_curves, "the curves of a training")
    curves.add_argument("log", metavar="DIR", help="the folder that train wrote")


def _add_demo_command(command: Any) -> None:
    demo = command("demo", _demo, "a web page: classify and search by pictures and words")
    _add_model(demo)
    demo.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="ask TensorFlow Serving's REST there, or gRPC at grpc://HOST:PORT, not a model here",
    )
    demo.add_argument("--model-name", default="align", help="the server's name of it (align)")
    demo.add_argument(
        "--index", metavar="DIR", help="what index wrote (without it, six example pictures)"
    )
    demo.add_argument("--host", default="127.0.0.1")
    demo.add_argument("--port", type=int, default=7860)


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
    _check_files(arguments.images)
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


def _check_files(paths: list[str]) -> None:
    missing = [path for path in paths if not pathlib.Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file")


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
    from align_tf.training.run import train

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
    from align_tf.evaluation import tasks as tasks_module
    from align_tf.files import write_text

    report = {
        "task": arguments.task,
        "model": arguments.model,
        "data": arguments.data,
        **tasks_module.evaluate(model, processor, arguments),
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
    prometheus = report["metrics"]
    ways = {"_i2t": "image to text", "_t2i": "text to image"}
    if report["task"] != "retrieval":
        ways = {"": report["task"]}
    shown = [row for row in FIGURES if any(row[0] + way in prometheus for way in ways)]
    rows = [
        [name, *(form.format(prometheus[figure + way]) for figure, _, form in shown)]
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
    if arguments.quantize and arguments.format != "litert":
        raise ValueError(f"--quantize {arguments.quantize}: only with --format litert")
    if arguments.dtype and arguments.format == "litert":
        raise ValueError(f"--dtype {arguments.dtype}: not with --format litert")
    model, processor = _load(arguments.model)
    if arguments.format == "litert":
        return _export_litert(model, processor, arguments.output, arguments.quantize)
    from align_tf import export_saved_model

    _say("Exporting ...")
    print(export_saved_model(model, processor, arguments.output, dtype=arguments.dtype))
    return 0


def _export_litert(model: Any, processor: Any, output: str, quantize: str | None) -> int:
    from align_tf.export import litert

    folder = litert.export_litert(model, processor, output, quantize=quantize, progress=True)
    try:
        figures = litert.compare_litert(folder, model, processor)
    except ModuleNotFoundError as error:
        _say(f"Note: not compared with the model; {error}")
        figures = {}
    for file, row in figures.items():
        size, cosine = row["bytes"] / 1e6, row["cosine"]
        _say(f"{file}: {size:.1f} MB, cosine to the model {cosine:.5f} or more on six examples")
    print(folder)
    return 0


def _convert(arguments: Any) -> int:
    _say(f"Converting {arguments.source} ...")
    _import_tensorflow()
    from align_tf import files
    from align_tf.export import convert as convert_module

    config = arguments.config and files.read_json(pathlib.Path(arguments.config))
    summary = convert_module.convert(
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
    print(json.dumps(summary, indent=2) if arguments.json else convert_module.describe(summary))
    return 0


def _serve(arguments: Any) -> int:
    if (arguments.directory is None) == (arguments.model_config_file is None):
        raise ValueError("expected a SavedModel folder or --model-config-file, one of them")
    if arguments.batching_parameters_file is not None and not arguments.enable_batching:
        raise ValueError("--batching-parameters-file is for --enable-batching")
    _import_tensorflow()
    from align_tf.server.model_server import (
        batching,
        prometheus,
    )
    from align_tf.server.model_server import (
        model_server as model_server_module,
    )

    parameters = None
    if arguments.batching_parameters_file is not None:
        parameters = batching.read_batching_parameters(arguments.batching_parameters_file)
    elif arguments.enable_batching:
        parameters = batching.BatchingParameters()
    metrics_path = None
    if arguments.monitoring_config_file is not None:
        metrics_path = prometheus.read_monitoring_config(arguments.monitoring_config_file)
    names = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    model_server = model_server_module.ModelServer(
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
    # The weights of what is served stay, so that oneDNN may keep them in the layout it computes in.
    os.environ.setdefault("TF_ONEDNN_ASSUME_FROZEN_WEIGHTS", "1")
    model_server_module.serve(model_server)
    return 0


# --- embed, index and search ---------------------------------------------------------------


def _embed(arguments: Any) -> int:
    _say(f"Loading {arguments.model} ...")
    _import_tensorflow()
    from align_tf.search.embedding import embed

    names = ("model", "dtype", "engine", "workers", "image_key", "caption_key")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("batch_size", "shard_size"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    summary = embed(arguments.source, arguments.output, **options)
    if summary["skipped"]:
        _say(f"align-tf: warning: left out {summary['skipped']} of {summary['records']} records")
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(f"{arguments.output}: {summary['images']:,} images, {summary['dim']} dimensions")
    return 0


def _index(arguments: Any) -> int:
    _import_tensorflow()
    from align_tf.search.index import build_index

    about = build_index(arguments.embeddings, arguments.output, kind=arguments.kind, progress=True)
    how = "flat: each vector is compared"
    if about["kind"] == "ivf":
        how = f"ivf: {about['nprobe']} of {about['nlist']} lists are searched"
    _say(f"Chose {how}")
    if arguments.json:
        print(json.dumps(about, indent=2))
    else:
        recall = ", ".join(f"{v:.1%} ({name})" for name, v in about["recall_at_10"].items())
        print(f"{arguments.output}: {about['rows']:,} images, recall@10 {recall}")
    return 0


def _search(arguments: Any) -> int:
    query = {name: getattr(arguments, name) for name in ("text", "image", "add", "subtract")}
    if arguments.text is None and arguments.image is None:
        raise ValueError("expected a TEXT or --image, or both")
    _import_tensorflow()
    from align_tf.search import gallery
    from align_tf.search.index import Index
    from align_tf.search.searcher import Searcher

    index = Index(arguments.index)
    _say(f"Loading {arguments.model or index.about['model']} ...")
    hits = Searcher(index, model=arguments.model).search(**query, k=arguments.k)
    said = gallery.describe(**query)
    if arguments.html:
        gallery.write_html(arguments.html, said, hits)
    if arguments.montage:
        gallery.write_montage(arguments.montage, said, hits)
    if arguments.json:
        fields = ("score", "id", "path", "caption")
        results = [{name: getattr(hit, name) for name in fields} for hit in hits]
        print(json.dumps({"query": said, "results": results}, indent=2))
    else:
        rows = [
            [f"{hit.score:.3f}", hit.id, hit.caption or "", _short(hit.path or "")] for hit in hits
        ]
        _table(said, ["cosine", "id", "caption", "file"], rows)
    return 0


def _short(path: str) -> str:
    """Writes a path as seen from here, where that is shorter."""
    return min(path, os.path.relpath(path), key=len) if path else ""


# --- plot ----------------------------------------------------------------------------------


def _plot_heatmap(arguments: Any) -> int:
    _check_files(arguments.images)
    plots = _plots(arguments.output)
    model, processor = _load(arguments.model)
    from align_tf.search.encoder import Encoder

    encoder = Encoder(model, processor)
    images = encoder.embed_images(arguments.images)
    similarities = images @ encoder.embed_texts(arguments.texts).T
    from align_tf.search.thumbnail import thumbnail

    pictures = [thumbnail(path, HEATMAP_PICTURE) for path in arguments.images]
    names = [pathlib.Path(path).stem for path in arguments.images]
    figure = plots.heatmap(similarities, names, arguments.texts, pictures)
    return _save_plot(figure, arguments.output)


def _plot_embeddings(arguments: Any) -> int:
    plots = _plots(arguments.output)
    _import_tensorflow()
    from align_tf.search.collection import Collection

    collection = Collection(arguments.embeddings)
    embeds, labels = collection.labelled(arguments.max_images, arguments.color_by)
    if len(embeds) < collection.rows:
        _say(f"Drawing {len(embeds):,} of {collection.rows:,} images")
    return _save_plot(plots.embeddings(embeds, labels, arguments.method), arguments.output)


def _plot_curves(arguments: Any) -> int:
    plots = _plots(arguments.output)
    lines = plots.read_metrics(arguments.log)
    figure = plots.curves(lines, title=os.path.basename(os.path.abspath(arguments.log)))
    return _save_plot(figure, arguments.output)


def _plots(output: str) -> Any:
    from align_tf import plots

    plots.check_suffix(output)
    return plots


def _save_plot(figure: Any, output: str) -> int:
    from align_tf import plots

    plots.save(figure, output)
    print(output)
    return 0


# --- demo ----------------------------------------------------------------------------------


def _demo(arguments: Any) -> int:
    _import_tensorflow()
    from align_tf.client.align_client import AlignClient, AlignServerError
    from align_tf.search import demo
    from align_tf.search.encoder import Encoder
    from align_tf.search.searcher import Searcher

    demo.require_gradio()
    if arguments.server:
        name = f"{arguments.model_name} at {arguments.server}"
        protocol = "grpc" if arguments.server.startswith("grpc:") else "rest"
        encoder = AlignClient(arguments.server, model_name=arguments.model_name, protocol=protocol)
        try:
            encoder.metadata()
        except AlignServerError as error:
            raise ValueError(f"{arguments.server}: {error}") from error
        searcher = arguments.index and Searcher(arguments.index, client=encoder)
    else:
        name = arguments.model
        model, processor = _load(name)
        encoder = Encoder(model, processor)
        searcher = arguments.index and Searcher(arguments.index, model=model, processor=processor)
    page = demo.build_page(encoder, searcher or demo.example_searcher(encoder), name)
    url, stop = demo.serve(page, arguments.host, arguments.port)
    print(url, flush=True)
    _say("Serving the page there; Ctrl-C stops it.")
    try:
        threading.Event().wait()
    finally:
        stop()
    return 0


# --- quickstart ----------------------------------------------------------------------------


def _quickstart(arguments: Any) -> int:
    _import_tensorflow()
    from align_tf import export_saved_model
    from align_tf.hub import BUNDLED
    from align_tf.server.model_server import (
        model_server as model_server_module,  # first, so that a missing extra is told
    )

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
    with model_server_module.ModelServer(output, model_name="align") as running:
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
            running.wait(lambda: _print_curl(running, pictures[0], labels[:3]))
    return 0


def _ask(protocol: str, port: int, pictures: list, labels: list[str]) -> Any:
    from align_tf.client.align_client import AlignClient

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
