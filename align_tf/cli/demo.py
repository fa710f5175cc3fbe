"""`align-tf demo`: a web page to classify and search by pictures and words."""

import argparse
import threading
from typing import Any

from align_tf.cli.common import add_model_argument, import_tensorflow, load, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_model_argument(parser)
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="ask TensorFlow Serving's REST there, or gRPC at grpc://HOST:PORT, not a model here",
    )
    parser.add_argument("--model-name", default="align", help="the server's name of it (align)")
    parser.add_argument(
        "--index", metavar="DIR", help="what index wrote (without it, six example pictures)"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)


def run(arguments: Any) -> int:
    import_tensorflow()
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
        model, processor = load(name)
        encoder = Encoder(model, processor)
        searcher = arguments.index and Searcher(arguments.index, model=model, processor=processor)
    page = demo.build_page(encoder, searcher or demo.example_searcher(encoder), name)
    url, stop = demo.serve(page, arguments.host, arguments.port)
    print(url, flush=True)
    say("Serving the page there; Ctrl-C stops it.")
    try:
        threading.Event().wait()
    finally:
        stop()
    return 0
