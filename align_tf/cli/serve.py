"""`align-tf serve`: SavedModels over gRPC and REST, on one machine."""

import argparse
import dataclasses
import os
from typing import Any

from align_tf.cli.common import import_tensorflow, port, setting_help
from align_tf.server.limits import Limits
from align_tf.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a SavedModel folder")
    parser.add_argument("--model-name", default="align")
    parser.add_argument("--model-config-file", metavar="FILE", help="a model_config_list")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--grpc-port", type=port, default=8500)
    parser.add_argument("--rest-port", type=port, default=8501)
    parser.add_argument(
        "--enable-batching", action="store_true", help="merge requests of different callers"
    )
    parser.add_argument(
        "--batching-parameters-file", metavar="FILE", help="TensorFlow Serving's, in text"
    )
    parser.add_argument(
        "--monitoring-config-file", metavar="FILE", help="TensorFlow Serving's, in text"
    )
    for field in dataclasses.fields(Limits):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=field.type, default=field.default, metavar="N", help=setting_help(field)
        )


def run(arguments: Any) -> int:
    if (arguments.directory is None) == (arguments.model_config_file is None):
        raise ValueError("expected a SavedModel folder or --model-config-file, one of them")
    if arguments.batching_parameters_file is not None and not arguments.enable_batching:
        raise ValueError("--batching-parameters-file is for --enable-batching")
    names = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    import_tensorflow()
    from align_tf.server.batching import BatchingParameters, read_batching_parameters
    from align_tf.server.model_server import ModelServer, serve
    from align_tf.server.prometheus import read_monitoring_config

    parameters = None
    if arguments.batching_parameters_file is not None:
        parameters = read_batching_parameters(arguments.batching_parameters_file)
    elif arguments.enable_batching:
        parameters = BatchingParameters()
    metrics_path = None
    if arguments.monitoring_config_file is not None:
        metrics_path = read_monitoring_config(arguments.monitoring_config_file)
    model_server = ModelServer(
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
    if at_work := serve(model_server):
        left = " and ".join(at_work)
        say(f"align-tf: broken off {limits.grace_seconds:g} s after the signal to stop: {left}")
        os._exit(0)  # Python would wait for their threads
    return 0
