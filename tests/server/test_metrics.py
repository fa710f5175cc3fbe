"""Health, and metrics as Prometheus reads them."""

import re

import grpc
import numpy as np
import pytest
from asking import (
    PROBE,
    ROW,
    ask,
    grpc_request,
    stub,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from align_tf.server import ModelServer
from align_tf.server.prometheus import DEFAULT_PATH, Metrics, read_monitoring_config


def test_health(server):
    with stub(server, health_pb2_grpc.HealthStub) as checks:
        for service in ("", "tensorflow.serving.PredictionService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert checks.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            checks.Check(health_pb2.HealthCheckRequest(service="none"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_metrics_are_those_of_tensorflow_serving():
    with ModelServer(PROBE, metrics_path=DEFAULT_PATH) as server, stub(server) as predictions:
        for body in (ROW, ROW, b"{"):
            ask(server.rest_port, body=body)
        ask(server.rest_port, path="/v1/models/made-up:predict")
        for path in ("/v1/models/align", "/v1/models/align/metadata"):
            ask(server.rest_port, "GET", path)
        predictions.Predict(grpc_request(np.float32([[1, 2, 3, 4]])))
        page = ask(server.rest_port, "GET", DEFAULT_PATH)[1].decode()
    count = ":tensorflow:serving:request_count"
    probes = 'model_name="align",API="",entrypoint="REST"'
    assert f":tensorflow:serving:request_latency_count{{{probes}}} 2\n" in page
    assert f"# TYPE {count} counter" in page
    assert f'{count}{{model_name="align",status="OK"}} 5\n' in page
    assert f'{count}{{model_name="align",status="INVALID_ARGUMENT"}} 1\n' in page
    assert f'{count}{{model_name="",status="NOT_FOUND"}} 1\n' in page
    latency = ":tensorflow:serving:request_latency"
    rest = 'model_name="align",API="predict",entrypoint="REST"'
    assert f"# TYPE {latency} histogram" in page
    assert f"{latency}_count{{{rest}}} 2\n" in page
    assert f'{latency}_bucket{{{rest},le="+Inf"}} 2\n' in page
    assert re.search(re.escape(f'{latency}_bucket{{{rest},le="18"}}') + r" \d+\n", page)
    grpc_labels = 'model_name="align",API="Predict",entrypoint="GRPC"'
    assert f"{latency}_count{{{grpc_labels}}} 1\n" in page
    runtime = ":tensorflow:serving:runtime_latency_count"
    assert f'{runtime}{{model_name="align",API="Predict",runtime="TF1"}} 3\n' in page


def test_a_histogram_counts_up_to_each_limit():
    metrics = Metrics()
    for micros in (9, 10, 11, 1e12):
        metrics.observe("request_latency", micros / 1e6, 'a"b\\', "predict", "REST")
    lines = metrics.page().decode().splitlines()
    labels = r'{model_name="a\"b\\",API="predict",entrypoint="REST"'
    assert len(lines) == 1 + 34 + 2
    assert lines[1] == f':tensorflow:serving:request_latency_bucket{labels},le="10"}} 2'
    assert lines[2] == f':tensorflow:serving:request_latency_bucket{labels},le="18"}} 3'
    assert lines[33].endswith("} 3") and lines[34].endswith('le="+Inf"} 4')
    assert lines[36] == f":tensorflow:serving:request_latency_count{labels}}} 4"


def test_metrics_are_off_by_default(small):
    assert ask(small.rest_port, "GET", DEFAULT_PATH)[0] == 404


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", None),
        ("prometheus_config { enable: false path: '/m' }", None),
        ("prometheus_config { enable: true }", "/monitoring/prometheus/metrics"),
        ("prometheus_config { enable: true, path: '/m' }", "/m"),
    ],
)
def test_monitoring_config_file(tmp_path, text, path):
    (tmp_path / "monitoring").write_text(text)
    assert read_monitoring_config(tmp_path / "monitoring") == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prometheus { enable: true }", "not a monitoring config file"),
        ("prometheus_config { enable: true path: 'm' }", 'path is "m"'),
        ("prometheus_config { enable: true path: '/v1/models' }", 'path is "/v1/models"'),
    ],
)
def test_a_wrong_monitoring_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "monitoring"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_monitoring_config(path)
    assert str(path) in str(error.value)
