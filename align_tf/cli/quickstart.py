"""`align-tf quickstart`: the main job, end to end, on the bundled checkpoint."""

import argparse
import json
import pathlib
import tempfile
from typing import Any

from align_tf.addresses import place
from align_tf.cli.common import (
    hint,
    import_tensorflow,
    load,
    print_table,
    probabilities,
    say,
)
from align_tf.files import check_folder, check_local

# Offered beside the names of the bundled pictures.
DISTRACTORS = ("dog", "cup of coffee", "airplane", "house", "clock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "--output", metavar="DIR", help="where the SavedModel goes (a temporary folder)"
    )
    parser.add_argument(
        "--keep-serving", action="store_true", help="leave the server up until Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: Any) -> int:
    if arguments.output is not None:
        check_local(arguments.output)
        check_folder(place(arguments.output))
    import_tensorflow()
    from align_tf.export.saved_model import export_saved_model
    from align_tf.hub import BUNDLED
    from align_tf.server.model_server import ModelServer  # before the model: it may lack an extra

    pictures = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    names = [picture.stem.replace("_", " ") for picture in pictures]
    labels = [*names, *DISTRACTORS]
    model, processor = load("align-tiny")
    say(f"Classifying {len(pictures)} pictures in Keras ...")
    local = probabilities(model, processor, pictures, labels)
    output = pathlib.Path(arguments.output or tempfile.mkdtemp(prefix="align-tiny-"))
    say("Exporting the SavedModel ...")
    version = export_saved_model(model, processor, output)
    say("Starting the embedded server ...")
    with ModelServer(output, model_name="align") as running:
        served = {}
        for protocol, port in (("gRPC", running.grpc_port), ("REST", running.rest_port)):
            say(f"Asking it over {protocol} ...")
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
    say(f"The SavedModel stays in {output} until you remove it.")
    hint("align-tf serve", str(output))
    return 0


def _ask(protocol: str, port: int, pictures: list, labels: list[str]) -> Any:
    from align_tf.client.align_client import AlignClient

    with AlignClient(f"127.0.0.1:{port}", protocol=protocol.lower()) as client:
        return client.classify(pictures, labels).probs


def _print_quickstart(results: list[dict], version: pathlib.Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"saved_model": str(version), "results": results}, indent=2))
        return
    print_table(
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
