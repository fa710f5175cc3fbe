"""`align-tf demo`: a web page to classify and search by pictures and words."""

import argparse
import threading
from typing import Any

from align_tf.cli.common import add_model_argument, import_tensorflow, load, port, say


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
    parser.add_argument(
        "--pictures",
        metavar="DIR",
        help="show the pictures below it (the folder that was embedded, of an index of yours)",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=7860)


def run(arguments: Any) -> int:
    from align_tf.search.index import Index
    from align_tf.search.required import require_faiss, require_gradio

    require_gradio()
    require_faiss()
    index = arguments.index and Index(arguments.index, arguments.pictures)
    import_tensorflow()
    from align_tf.client.align_client import AlignServerError
    from align_tf.search import demo

    try:
        name, encoder, searcher = _open(arguments, index)
        searcher = searcher or demo.example_searcher(encoder)
        demo.warm_up(encoder, searcher)
    except AlignServerError as error:
        raise ValueError(f"{arguments.server}: {error}") from error
    page = demo.build_page(encoder, searcher, name)
    url, stop = demo.serve(page, arguments.host, arguments.port)
    print(url, flush=True)
    say("Serving the page there; Ctrl-C stops it.")
    try:
        threading.Event().wait()
    finally:
        stop()
    return 0


def _open(arguments: Any, index: Any) -> tuple[str, Any, Any]:
    """Returns the name of the model, what encodes, and the searcher of an index if there is one."""
    from align_tf.client.align_client import AlignClient
    from align_tf.search.encoder import Encoder
    from align_tf.search.searcher import Searcher

    if arguments.server:
        protocol = "grpc" if arguments.server.startswith("grpc:") else "rest"
        client = AlignClient(arguments.server, model_name=arguments.model_name, protocol=protocol)
        client.metadata()
        name = f"{arguments.model_name} at {arguments.server}"
        return name, client, index and Searcher(index, client=client)
    model, processor = load(arguments.model)
    searcher = index and Searcher(index, model=model, processor=processor)
    return arguments.model, Encoder(model, processor), searcher
