import concurrent.futures
import contextlib
import gzip
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

from align_tf.server import Limits, ModelServer, rapidjson, rest_json, servable, servables
from align_tf.server.model_config import ModelConfig, read_model_config_file
from align_tf.server.model_server import _bind
from align_tf.server.status_codes import RequestError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "tf_serving"
PROBE = GOLDENS / "probe"
EXCHANGES = json.loads((GOLDENS / "exchanges.json").read_text())

FLOAT = r"-?\d+\.\d+(?:e[+-]?\d+)?"

# Errors that quote a protobuf's debug string, which protobuf keeps unstable on purpose: these are
# equal up to that quotation alone.
QUOTES_INTERNALS = ["No classification inputs found in SignatureDef: "]


@pytest.fixture(scope="module")
def server():
    with ModelServer(None, model_config_file=GOLDENS / "models.config") as running:
        yield running


@pytest.fixture(scope="module")
def stubs(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield (
            prediction_service_pb2_grpc.PredictionServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
        )


@pytest.fixture(scope="module")
def small_server():
    """One that takes 1000 bytes, in a second, and has room for two predictions."""
    limits = Limits(1000, max_concurrent_requests=1, max_queued_requests=1, client_timeout=1)
    config = GOLDENS / "models.config"
    with ModelServer(None, model_config_file=config, limits=limits) as running:
        yield running


def ask(server, method, path, body=None, headers=None):
    """Returns status, content type and body of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=300)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers["content-type"], response.read()


def predict(server, body, path="/v1/models/probe:predict", headers=None):
    """Returns status and JSON value of a prediction."""
    body = body if isinstance(body, bytes) else body.encode()
    status, _, answer = ask(server, "POST", path, body, headers)
    return status, json_value(answer.decode("utf-8", "surrogateescape"))


def json_value(text):
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def recorded_value(text):
    return json_value(re.sub(r"\\x(..)", lambda byte: chr(0xDC00 + int(byte[1], 16)), text))


def assert_same_value(got, expected):
    """Values are equal, floats but for the last bit of a float32, in which processors differ."""
    if isinstance(expected, float) and isinstance(got, float):
        np.testing.assert_allclose(got, expected, rtol=2**-23, atol=0)  # NaN equals NaN here
    elif isinstance(expected, list) and isinstance(got, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same_value(one, other)
    elif isinstance(expected, dict) and isinstance(got, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_value(got[key], value)
    else:
        assert type(got) is type(expected) and got == expected


def take_numbers_out(text):
    """Returns the text with "#" for each number with a point, and these numbers."""
    return re.sub(FLOAT, "#", text), [float(number) for number in re.findall(FLOAT, text)]


# --- the recorded exchanges ----------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(EXCHANGES)))
def test_answers_as_recorded(server, number):
    recorded = EXCHANGES[number]
    body = None if recorded["body"] is None else recorded["body"].encode()
    status, content_type, answer = ask(server, recorded["method"], recorded["path"], body)
    assert (status, content_type) == (recorded["status"], recorded["content_type"])
    got = json_value(answer.decode("utf-8", "surrogateescape"))
    expected = recorded_value(recorded["response"])
    for clause in QUOTES_INTERNALS:
        if isinstance(expected, dict) and expected.get("error", "").startswith(clause):
            got["error"], expected["error"] = got["error"][: len(clause)], clause
    assert_same_value(got, expected)


def test_all_81_exchanges_are_there():
    assert len(EXCHANGES) == 81


def test_layout_is_that_of_the_recording(server):
    recorded = [e for e in EXCHANGES if '"predictions": [[' in e["response"]]
    assert len(recorded) == 13
    for exchange in recorded:
        answer = ask(server, "POST", exchange["path"], exchange["body"].encode())[2]
        (ours, numbers), (theirs, expected) = map(
            take_numbers_out, (answer.decode(), exchange["response"])
        )
        assert ours == theirs
        assert_same_value(numbers, expected)


# --- JSON ----------------------------------------------------------------------------------

# body: rapidjson's message and offset
PARSE_ERRORS = {
    b" ": "The document is empty. at offset: 1",
    b"{": "Missing a name for object member. at offset: 1",
    b'{"a"': "Missing a colon after a name of object member. at offset: 4",
    b'{"a":}': "Invalid value. at offset: 5",
    b'{"a":1': "Missing a comma or '}' after an object member. at offset: 6",
    b'{"a":1,}': "Missing a name for object member. at offset: 7",
    b'{"a":[1 2]}': "Missing a comma or ']' after an array element. at offset: 8",
    b'{"a":[1,]}': "Invalid value. at offset: 8",
    b'{"a":"b': "Missing a closing quotation mark in string. at offset: 7",
    b'{"a":"\\x"}': "Invalid escape character in string. at offset: 6",
    b'{"a":"\\u12g4"}': "Incorrect hex digit after \\u escape in string. at offset: 6",
    b'{"a":"\\ud800"}': "The surrogate pair in string is invalid. at offset: 6",
    b'{"a":"\\udc00"}': "The surrogate pair in string is invalid. at offset: 6",
    b'{"a":"\n"}': "Invalid encoding in string. at offset: 6",
    b'{"a":tru}': "Invalid value. at offset: 8",
    b'{"a":-}': "Invalid value. at offset: 6",
    b'{"a":01}': "Missing a comma or '}' after an object member. at offset: 6",
    b'{"a":1.}': "Miss fraction part in number. at offset: 7",
    b'{"a":1e+}': "Miss exponent in number. at offset: 8",
    b'{"a":1e999}': "Number too big to be stored in double. at offset: 5",
    b'{"a":' + b"9" * 400 + b"}": "Number too big to be stored in double. at offset: 5",
}


@pytest.mark.parametrize("body", PARSE_ERRORS)
def test_parse_errors_are_rapidjsons(body):
    with pytest.raises(RequestError) as error:
        rapidjson.read(body)
    assert error.value.message == f"JSON Parse error: {PARSE_ERRORS[body]}"


# body: value of "a"
READ_VALUES = {
    b'{"a": 1} trailing }': 1,
    b'\xef\xbb\xbf {"a": 1}': 1,
    b'{"a": 1, "a": 2}': 1,
    b'{"a": -Infinity}': -np.inf,
    b'{"a": -Inf}': -np.inf,
    b'{"a": 1e+100}': 1e100,
    b'{"a": 123456789012345678901234567890}': 123456789012345678901234567890,
    b'{"a": "\\ud83d\\ude00 \\u00e9 \\\\ud800"}': "\U0001f600 é \\ud800",
    b'{"a": "\xff"}': "\udcff",
}


@pytest.mark.parametrize("body", READ_VALUES)
def test_reads_what_rapidjson_reads(body):
    assert rapidjson.read(body)["a"] == READ_VALUES[body]


@pytest.mark.parametrize("escape", [b"", b"\\n", b'\\"', b"\\\\"])
def test_a_number_out_of_range_is_seen_between_strings(escape):
    body = b'{"a": "%s", "b": 1e999, "c": "%s"}' % (escape, escape)
    with pytest.raises(RequestError, match="Number too big"):
        rapidjson.read(body)


def test_a_string_without_an_end_is_refused_at_once():
    body = b'{"a": "' + b'\\"' * 500_000
    for end in (b"", b"\\"):
        with pytest.raises(RequestError, match="JSON Parse error"):
            rapidjson.read(body + end)


def test_both_readers_agree():
    rng = random.Random(0)
    leaves = [None, True, False, 0, -7, 2**63, 0.1, -1e-7, 1e22, "", 'q"\\/\b\n', "é 中 😀"]

    def value(depth):
        kind = rng.randrange(4) if depth < 4 else 0
        if kind == 1:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 2:
            return {rng.choice("abcdé"): value(depth + 1) for _ in range(rng.randrange(4))}
        return rng.choice(leaves)

    for _ in range(300):
        document = {"a": value(0)}
        for text in (
            json.dumps(document),
            json.dumps(document, ensure_ascii=False, indent=2),
        ):
            assert rapidjson._ExactReader(text.encode()).document() == document
            assert rapidjson.read(text.encode()) == document


X_ROWS = ["[1, 2.5]", "[1e400]", "[true]", "1", "[]", "[[1], [2]]", '"a"', '{"b64": "YQ=="}', "{}"]


def test_lists_are_converted_at_once_as_item_by_item(monkeypatch):
    pairs = [f"[{one}, {other}]" for one in X_ROWS for other in X_ROWS]
    forms = ['{"inputs": %s}', '{"instances": %s}', '{"instances": [{"x": %s}, {"x": [1, 2.5]}]}']
    dtypes = [{"x": dtype} for dtype in (tf.float32, tf.int32, tf.bool, tf.string)]
    cases = [(json.loads(form % pair), d) for form in forms for pair in pairs for d in dtypes]

    def outcome(document, dtypes):
        try:
            arrays, row_form = rest_json.predict_inputs(document, dtypes)
        except RequestError as error:
            return str(error)
        return row_form, *((k, v.dtype, v.shape, v.tolist()) for k, v in arrays.items())

    at_once = [outcome(*case) for case in cases]
    monkeypatch.setattr(rest_json, "_leaves", lambda *_: None)
    monkeypatch.setattr(rest_json, "_rows_at_once", lambda *_: None)
    assert at_once == [outcome(*case) for case in cases]
    assert sum(isinstance(found, tuple) for found in at_once) > 20


def test_a_mistake_in_a_large_body_is_told_without_reading_it_anew(monkeypatch):
    monkeypatch.setattr(rapidjson, "_ExactReader", None)  # not to be come to
    body = '{"ö": [' + "1," * rapidjson.EXACT_UP_TO + "]}"
    with pytest.raises(RequestError) as error:
        rapidjson.read(body.encode())
    at = len(body.encode()) - 2
    told = f"INVALID_ARGUMENT: JSON Parse error: Expecting value. at offset: {at}"
    assert str(error.value) == told


PAIRS = rb"\ud83d\ude00 \\ud83d \\\\ \\\ud83d\ude00"


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'["%s"]' % PAIRS, ["\U0001f600 \\ud83d \\\\ \\\U0001f600"]),
        (b"[1e100, 18446744073709551616, -3]", [1e100, 18446744073709551616.0, -3]),
        (b'["%s\\ud83d", "a"]' % PAIRS, "The surrogate pair in string is invalid. at offset: {}"),
        (b"[1e999]", "Number too big to be stored in double."),
        (b"[-%s]" % (b"9" * 5000), "Number too big to be stored in double."),
    ],
    ids=["pairs", "large numbers", "half a pair", "too large", "digits"],
)
@pytest.mark.parametrize("large", [False, True])
def test_what_python_takes_otherwise_is_read_at_its_speed(monkeypatch, body, answer, large):
    body = b'{"a": %s}' % body
    if large:
        body += b" " * rapidjson.EXACT_UP_TO
        monkeypatch.setattr(rapidjson, "_ExactReader", None)  # not to be come to
    if isinstance(answer, list):
        assert rapidjson.read(body) == {"a": answer}
        return
    with pytest.raises(RequestError) as error:
        rapidjson.read(body)
    assert answer.format(8 + len(PAIRS)) in str(error.value)


def test_deep_nesting_is_refused(server):
    status, answer = predict(server, '{"instances": ' + "[" * 100_000)
    assert (status, "nested too deeply" in answer["error"]) == (400, True)
    for depth in (66, 200, 400, 900):
        assert predict(server, '{"instances": ' + "[" * depth + "]" * depth + "}")[0] == 400


# number, token: six digits where they read back as the same float32, else nine
FLOAT_TOKENS = [
    (0.0, "0.0"),
    (-0.0, "-0.0"),
    (20, "20.0"),
    (0.5, "0.5"),
    (0.1, "0.1"),
    (120 / 7, "17.1428566"),
    (1e6, "1e+06"),
    (1e-5, "1e-05"),
    (16777216, "16777216.0"),
    (3.4028234663852886e38, "3.40282347e+38"),
    (np.nan, "NaN"),
    (-np.inf, "-Infinity"),
]


def test_float_tokens():
    numbers, tokens = zip(*FLOAT_TOKENS, strict=True)
    assert rapidjson.decimals(np.array(numbers, np.float32)) == list(tokens)
    rng = np.random.default_rng(0)
    short = np.array([f"{number:.6g}" for number in rng.standard_normal(3000)], np.float32)
    some = [short, short[:500] * np.float32(1e30), rng.standard_normal(3000).astype(np.float32)]
    some.append(rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32))  # any bits
    for number, token in zip(found := np.concatenate(some), rapidjson.decimals(found), strict=True):
        if np.isfinite(number):
            six, nine = f"{number:.6g}", f"{number:.9g}"
            with np.errstate(over="ignore"):
                expected = six if np.float32(six) == number else nine
            assert token in (expected, f"{expected}.0") and float(token) == float(expected)
    doubles = rapidjson.decimals(np.array([1 / 3, 0.1, 1e300]))
    assert doubles == ["0.33333333333333331", "0.1", "1e+300"]


# --- REST requests -------------------------------------------------------------------------

ELEMENT = "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: "
# body: error
REFUSED_BODIES = {
    "[1]": "JSON Value: [1] Is not object",
    '{"instances": 1}': "JSON Value: {\n    \"instances\": 1\n} Expecting 'instances' to be an "
    "list/array",
    '{"signature_name": "two", "inputs": [1]}': "inputs is a plain value/list, but expecting an "
    "object as multiple input tensors required as per tensorinfo_map",
    '{"instances": [[1, [2]]]}': f"{ELEMENT}Encountered list at unexpected level: 1 expected < 1",
    '{"instances": [[[1], 2]]}': f"{ELEMENT}JSON Value: 2 found at incorrect level: 2 in the JSON "
    "DOM. Expected at level: 2",
    '{"inputs": [[1, 2], [3]]}': "Encountered list at unexpected size: 1 at level: 1 expected "
    "size: 2, in input: x",
    '{"instances": [[1, 2], [[1, 2]]]}': "Failed to process element: 1 of 'instances' list. "
    "Error: INVALID_ARGUMENT: Expecting shape [2] but got: [1,2]",
    '{"instances": [{"x": [1]}, [1]]}': "Expecting object but got list at item 1 of input list",
    '{"instances": [[1], {"x": [1]}]}': "Expecting value/list but got object at item 1 of input "
    "list",
    '{"signature_name": "text", "instances": [{"b64": "a"}]}': f"{ELEMENT}Unable to base64 decode",
    '{"signature_name": "text", "instances": [{"b64": "$$$$"}]}': f"{ELEMENT}Unable to base64 "
    "decode",
    '{"signature_name": "text", "instances": [{"b64": "YQ="}]}': f"{ELEMENT}Unable to base64 "
    "decode",
    '{"signature_name": "text", "instances": ["a", null]}': "Failed to process element: 1 of "
    "'instances' list. Error: INVALID_ARGUMENT: JSON Value: null Type: Null is not of expected "
    "type: string",
    '{"signature_name": "__saved_model_init_op", "instances": [1]}': "Failed to get input map for "
    "signature: __saved_model_init_op",
    '{"inputs": ' + "[" * 65 + "1" + "]" * 65 + "}": "tensor parsing error: x",
}


@pytest.mark.parametrize("body", REFUSED_BODIES)
def test_refuses_a_body_that_does_not_fit(server, body):
    status, answer = predict(server, body)
    assert (status, answer["error"]) == (400, REFUSED_BODIES[body])


# numbers: answer. As recorded from the server, whose floats take any number.
ANSWERED_NUMBERS = {
    "0.5, 33554433, 1.0, 2.0": [28760950.0, 38347932.0, 47934916.0],
    "1, 0.1, 33554433, 2": [57521888.0, 67108872.0, 76695856.0],
    "1, 2, 3, 16777217": [43141420.0, 47934912.0, 52728404.0],
    "1.0, 2.0, 3.0, 16777217": [43141420.0, 47934912.0, 52728404.0],
    "2147483648, 1, 2, 3": [12.0, 613566784.0, 1.22713357e09],
    "2147483648, 1.0, 2, 3": [12.0, 613566784.0, 1.22713357e09],
    "0.1, 18446744073709551616, 2, 3": [1.58114951e19, 2.10819942e19, 2.63524922e19],
    "1e39, 1, 2, 3": [np.nan, np.inf, np.inf],
    "1e39, 1.0, 2.0, 3.0": [np.nan, np.inf, np.inf],
    "-0, 0, -0.0, 1e-46": [0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("numbers", ANSWERED_NUMBERS)
def test_a_float_takes_any_number_in_any_list(server, numbers):
    expected = ANSWERED_NUMBERS[numbers]
    status, answer = predict(server, f'{{"instances": [[{numbers}]]}}')
    assert status == 200
    np.testing.assert_allclose(answer["predictions"][0], expected, rtol=2**-23, atol=0)
    assert_same_value(predict(server, f'{{"inputs": [[{numbers}]]}}')[1]["outputs"][0], expected)
    # One number at a time goes another way than a list of them.
    values = [
        rest_json.predict_inputs({"inputs": number}, {"x": tf.float32})[0]["x"].item()
        for number in json.loads(f"[{numbers}]")
    ]
    row = rest_json.predict_inputs({"inputs": json.loads(f"[{numbers}]")}, {"x": tf.float32})
    assert row[0]["x"].tolist() == values


# body: answer
ANSWERED_BODIES = {
    '{"signature_name": "text", "inputs": {"texts": ["a"], "more": 1}}': {
        "outputs": {"length": [1], "echo": ["a"], "echo_bytes": [{"b64": "YQ=="}]}
    },
    '{"signature_name": "text", "instances": [{"b64": " YWI\\n"}, {"b64": "YWI="}]}': {
        "predictions": [{"length": 2, "echo": "ab", "echo_bytes": {"b64": "YWI="}}] * 2
    },
    '{"signature_name": "two", "instances": [{"a": 1, "flag": true, "d": [0.5, 1]}]}': {
        "predictions": [{"sum": 3.5, "big": 10000000000}]
    },
    '{"inputs": {"x": [[123456789012345678901234567890, 0, 0, 0]]}}': {
        "outputs": [[0.0, 3.52733693e28, 7.05467387e28]]
    },
    '{"signature_name": "text", "inputs": []}': {
        "outputs": {"length": [], "echo": [], "echo_bytes": []}
    },
}


@pytest.mark.parametrize("body", ANSWERED_BODIES)
def test_answers(server, body):
    assert predict(server, body) == (200, ANSWERED_BODIES[body])


# (method, path): status, error
ROUTES = {
    ("POST", "/v1/models/probe/versions/2"): (400, "Malformed request: POST {path}"),
    ("GET", "/v1/models/"): (400, "Malformed request: GET {path}"),
    ("GET", "/v1/models/probe/"): (400, "Malformed request: GET {path}"),
    ("GET", "/v1/models/probe/versions/x"): (400, "Malformed request: GET {path}"),
    ("PATCH", "/v1/x%20y"): (400, "Malformed request: PATCH {path}"),
    ("GET", "/v1/models/probe?x=1"): (404, "Could not find any versions of model probe?x=1"),
    ("GET", "/v1/models/a%2Fb"): (404, "Could not find any versions of model a/b"),
    ("GET", "/v1/models/none/metadata"): (404, "Servable not found for request: Latest(none)"),
    ("GET", "/v1/models/probe/labels/zz/metadata"): (
        400,
        "Unrecognized servable version label: zz",
    ),
}


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_routes(server, route):
    status, content_type, body = ask(server, *route)
    expected_status, error = ROUTES[route]
    assert (status, content_type) == (expected_status, "application/json")
    assert json.loads(body) == {"error": error.format(path=route[1])}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_version_beyond_int64_is_answered_without_a_body(server, method):
    for version in (str(2**63), "9" * 5000, "0" * 5000 + "9" * 20):
        path = f"/v1/models/probe/versions/{version}" + (":predict" if method == "POST" else "")
        assert ask(server, method, path, b"{}") == (400, "application/json", b"")


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_signatures_are_none_over_examples(server, method):
    def error(signature):
        body = f'{{"signature_name": "{signature}", "examples": [{{"x": 1}}]}}'
        status, answer = predict(server, body, f"/v1/models/probe:{method}")
        assert status == 400
        return answer["error"]

    assert error("two") == "Expected one input Tensor."
    kind = {"classify": "classification", "regress": "regression"}[method]
    assert error("text").startswith(f"No {kind} inputs found in SignatureDef: ")


def test_routes_outside_v1_are_not_found(server):
    for path in ("/v1", "/metrics", "/v11/models/probe"):
        assert ask(server, "GET", path)[:2] == (404, "text/html")


def test_routes_know_no_case(server):
    body = '{"instances": [[1, 2, 3, 4]]}'
    answer = predict(server, body, "/V1/Models/probe/VERSIONS/1:predict")
    assert answer == (200, {"predictions": [[8.5714283, 10.0, 11.4285717]]})
    assert answer == predict(server, body, "/v1/models/pr%6Fbe/labels/stable:predict")
    path = "/v1/models/probe:Predict"  # but for the verb
    assert predict(server, body, path) == (400, {"error": f"Malformed request: POST {path}"})


def test_gzip_body(server):
    headers = {"Content-Encoding": "gzip"}
    plain = b'{"instances": [[1, 2, 3, 4]]}'
    assert predict(server, gzip.compress(plain), headers=headers) == predict(server, plain)
    for broken in (plain, gzip.compress(plain)[:-9]):
        status, answer = predict(server, broken, headers=headers)
        assert status == 400
        assert answer["error"].startswith("JSON Parse error: The document is empty. Failed to dec")


def test_a_body_over_the_limit_is_refused(small_server):
    server = small_server
    text = b'{"signature_name": "text", "inputs": "%s"}' % (b"x" * 2000)
    expected = {"error": "Request body is larger than 1000 bytes"}
    assert predict(server, text) == (413, expected)
    compressed = gzip.compress(text)
    assert len(compressed) < 1000
    assert predict(server, compressed, headers={"Content-Encoding": "gzip"}) == (429, expected)
    assert predict(server, '{"instances": [[1, 2, 3, 4]]}')[0] == 200


def test_a_body_of_64_mb(server):
    image = b"A" * (64 * 2**20)
    row = b'{"image_bytes": {"b64": "%s"}, "labels": ["a", "bc"]}' % image
    body = b'{"signature_name": "classify", "instances": [%s]}' % row
    status, answer = predict(server, body)
    logits = [1 / (48 * 2**20), 2 / (48 * 2**20)]
    assert status == 200
    np.testing.assert_allclose(answer["predictions"][0]["logits"], logits, rtol=1e-6)


# --- gRPC ----------------------------------------------------------------------------------


def request(inputs, signature="", **spec):
    made = predict_pb2.PredictRequest()
    made.model_spec.name = spec.pop("name", "probe")
    made.model_spec.signature_name = signature
    if "version" in spec:
        made.model_spec.version.value = spec["version"]
    if "label" in spec:
        made.model_spec.version_label = spec["label"]
    for name, value in inputs.items():
        made.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return made


X = {"x": np.float32([[1, 2, 3, 4]])}


def test_grpc_predict(stubs):
    response = stubs[0].Predict(request(X))
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("probe", 2, "serving_default")
    assert list(response.outputs) == ["y"]
    assert list(response.outputs["y"].float_val) == [17.142856597900391, 20.0, 22.857143402099609]
    assert [dim.size for dim in response.outputs["y"].tensor_shape.dim] == [1, 3]


@pytest.mark.parametrize(
    ("spec", "version"), [({"version": 1}, 1), ({"label": "stable"}, 1), ({"label": "canary"}, 2)]
)
def test_grpc_versions_and_labels(stubs, spec, version):
    assert stubs[0].Predict(request(X, **spec)).model_spec.version.value == version


def test_grpc_dtypes(stubs):
    two = {"a": np.int32([1, 2]), "flag": np.array([True, False]), "d": np.ones((2, 2))}
    outputs = stubs[0].Predict(request(two, "two")).outputs
    assert list(outputs["sum"].float_val) == [4.0, 4.0]
    assert list(outputs["big"].int64_val) == [10000000000, 20000000000]
    outputs = (
        stubs[0]
        .Predict(request({"texts": np.array([b"\xff\0", "é".encode()], object)}, "text"))
        .outputs
    )
    assert list(outputs["echo"].string_val) == [b"\xff\0", "é".encode()]
    assert list(outputs["length"].int_val) == [2, 2]


def test_grpc_output_filter(stubs):
    made = request({"texts": ["a"]}, "text")
    made.output_filter.append("length")
    assert list(stubs[0].Predict(made).outputs) == ["length"]


def filtered(*names):
    made = request({"texts": ["a"]}, "text")
    made.output_filter.extend(names)
    return made


def in_another_field():
    made = request({"texts": [b"a"]}, "text")
    made.inputs["texts"].string_val[:] = []
    made.inputs["texts"].float_val.append(1)
    return made


def malformed():
    made = request(X)
    made.inputs["x"].tensor_shape.dim[0].size = 3
    return made


# request: code, message
REFUSED_REQUESTS = {
    "no model_spec": (predict_pb2.PredictRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    "no name": (request(X, name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    "unknown model": (
        request(X, name="none"),
        "NOT_FOUND",
        "Servable not found for request: Latest(none)",
    ),
    "unknown version": (
        request(X, version=7),
        "NOT_FOUND",
        "Servable not found for request: Specific(probe, 7)",
    ),
    "unknown label": (
        request(X, label="zz"),
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: zz",
    ),
    "unknown signature": (
        request(X, "zz"),
        "FAILED_PRECONDITION",
        'Serving signature key "zz" not found.',
    ),
    "missing input": (
        request({"a": np.int32([1])}, "two"),
        "INVALID_ARGUMENT",
        "input size does not match signature: 1!=3 len({a}) != len({a,d,flag}). Sent extra: {}. "
        "Missing but required: {d,flag}.",
    ),
    "wrong name": (
        request({"z": np.float32([[1]])}),
        "INVALID_ARGUMENT",
        "Signature input alias: x(feed name: serving_default_x:0) not found in request and no "
        "default value provided. Inputs expected to be in the request {z}, or default input alias "
        "set: ",
    ),
    "wrong dtype": (
        request({"x": np.int64([[1, 2, 3, 4]])}),
        "INVALID_ARGUMENT",
        "x: expected float, but int64 is provided",
    ),
    "wrong shape": (
        request({"x": np.float32([[1, 2, 3]])}),
        "INVALID_ARGUMENT",
        "Matrix size-incompatible: In[0]: [1,3], In[1]: [4,3]\n\t "
        "[[{{node StatefulPartitionedCall/StatefulPartitionedCall/MatMul}}]]",
    ),
    "malformed tensor": (malformed(), "INVALID_ARGUMENT", "tensor parsing error: x"),
    "values in another dtype's field": (
        in_another_field(),
        "INVALID_ARGUMENT",
        "tensor parsing error: texts: 1 elements declared, 0 held",
    ),
    "unknown output": (
        filtered("zz"),
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: zz Outputs expected to be in the set "
        "{echo,echo_bytes,length}.",
    ),
    "output twice": (
        filtered("echo", "echo"),
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: echo",
    ),
}


@pytest.mark.parametrize("case", REFUSED_REQUESTS)
def test_grpc_refusals(stubs, case):
    made, code, message = REFUSED_REQUESTS[case]
    with pytest.raises(grpc.RpcError) as error:
        stubs[0].Predict(made)
    assert (error.value.code().name, error.value.details()) == (code, message)


def test_grpc_errors_are_kept_short(stubs):
    with pytest.raises(grpc.RpcError) as error:
        stubs[0].Predict(request(X, "z" * 100_000))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert len(error.value.details()) == 1024 + len("...TRUNCATED")


def test_grpc_message_over_4_mb(stubs):
    response = stubs[0].Predict(filtered("length"))
    made = request({"texts": [b"x" * (64 * 2**20)]}, "text")
    made.output_filter.append("length")
    assert list(stubs[0].Predict(made).outputs["length"].int_val) == [64 * 2**20]
    assert list(response.outputs["length"].int_val) == [1]


def test_grpc_metadata_is_that_of_rest(server, stubs):
    made = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    made.model_spec.name = "probe"
    response = stubs[0].GetModelMetadata(made)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    rest = json.loads(ask(server, "GET", "/v1/models/probe/metadata")[2])
    assert response.model_spec.version.value == 2
    assert rest["metadata"]["signature_def"] == json_format.MessageToDict(
        signatures, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    made.metadata_field[:] = []
    with pytest.raises(grpc.RpcError, match="must specify at least one metadata_field"):
        stubs[0].GetModelMetadata(made)


def test_grpc_status(stubs):
    made = get_model_status_pb2.GetModelStatusRequest()
    made.model_spec.name = "probe"
    statuses = stubs[1].GetModelStatus(made).model_version_status
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert [(s.version, s.state, s.status.error_code) for s in statuses] == [
        (2, available, 0),
        (1, available, 0),
    ]
    made.model_spec.version.value = 9
    with pytest.raises(grpc.RpcError, match="Could not find version 9 of model probe"):
        stubs[1].GetModelStatus(made)


# --- many at once --------------------------------------------------------------------------


def test_bad_requests_do_not_harm_others(server, stubs):
    def one(number):
        x = np.float32([[number, 0, 0, 7]])
        expected = (x @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 7) * 2)[0]
        if number % 4 == 0:
            return predict(server, '{"instances": [[1]]}')[0] == 400
        if number % 4 == 1:
            with pytest.raises(grpc.RpcError):
                stubs[0].Predict(request({"x": np.float32([[1]])}))
            return True
        if number % 4 == 2:
            got = predict(server, json.dumps({"instances": x.tolist()}))[1]["predictions"][0]
        else:
            got = tf.make_ndarray(stubs[0].Predict(request({"x": x})).outputs["y"])[0]
        return np.allclose(got, expected)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(400)))


def test_half_open_connections_do_not_block(server):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", server.rest_port)))
            held.sendall(b"POST /v1/models/probe:predict HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert predict(server, '{"instances": [[1, 2, 3, 4]]}')[0] == 200


# --- folders, versions, starting and stopping ----------------------------------------------


def make_versions(folder, *versions):
    for version in versions:
        shutil.copytree(PROBE / "1", folder / str(version))
    return folder


@pytest.mark.parametrize(
    ("config", "versions"),
    [
        ({}, [12]),
        ({"latest": 2}, [12, 3]),
        ({"policy": "all"}, [12, 3, 1]),
        ({"policy": "specific", "specific": (1, 3, 9)}, [3, 1]),
    ],
)
def test_version_policies(tmp_path, config, versions):
    for name in ("1", "3", "12", "temporary", ".13.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "14").write_text("not a folder")
    assert list(ModelConfig("m", tmp_path, **config).folders()) == versions


def test_model_config_file(tmp_path):
    path = tmp_path / "models.config"
    path.write_text("""
        model_config_list {
          config { name: "a" base_path: "/models/a" model_platform: "tensorflow" }
          config {
            name: "b" base_path: "b"
            model_version_policy { specific { versions: 4 versions: 5 } }
            version_labels { key: "stable" value: 4 }
          }
          config { name: "c" base_path: "c" model_version_policy { latest { num_versions: 2 } } }
        }
    """)
    assert read_model_config_file(path) == [
        ModelConfig("a", pathlib.Path("/models/a")),
        ModelConfig("b", tmp_path / "b", "specific", 1, (4, 5), {"stable": 4}),
        ModelConfig("c", tmp_path / "c", "latest", 2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense {", "not a model config file"),
        ("", "expected models"),
        ('model_config_list { config { name: "a" } config { name: "a" } }', "name of their own"),
        ('model_config_list { config { name: "a" model_platform: "x" } }', 'expected "tensorflow"'),
        ('model_config_list { config { name: "a" } }', "model a: expected a base_path"),
    ],
)
def test_a_wrong_model_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "models.config"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ModelServer(None, model_config_file=path)
    assert str(path) in str(error.value)


def test_a_single_version_folder_is_served():
    with ModelServer(PROBE / "2", model_name="one") as server:
        status, answer = predict(
            server, '{"instances": [[1, 2, 3, 4]]}', "/v1/models/one/versions/2:predict"
        )
    assert (status, answer) == (200, {"predictions": [[17.1428566, 20.0, 22.8571434]]})


def test_what_cannot_be_served_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="/none: no such folder"):
        ModelServer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such model config file"):
        ModelServer(None, model_config_file=tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="a folder; expected a model config file"):
        ModelServer(None, model_config_file=tmp_path)
    with pytest.raises(ValueError, match="one of them"):
        ModelServer(None)
    with pytest.raises(FileNotFoundError, match="numbered version folders"):
        ModelServer(tmp_path).start()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_text("broken")
    with pytest.raises(ValueError, match="version 1 does not load"):
        ModelServer(tmp_path).start()
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "p" base_path: "{PROBE}" '
        "model_version_policy { specific { versions: 9 } } } }"
    )
    with pytest.raises(FileNotFoundError, match=r"no version of \[9\] .* there are \[1, 2\]"):
        ModelServer(None, model_config_file=config).start()


def test_a_model_config_comes_through_a_pipe():
    read, write = os.pipe()
    with open(read, "rb"):
        with open(write, "w") as file:
            file.write('model_config_list { config { name: "a" base_path: "/models/a" } }')
        assert [config.name for config in read_model_config_file(f"/dev/fd/{read}")] == ["a"]


def test_a_label_without_its_version_is_refused(tmp_path):
    path = tmp_path / "models.config"
    path.write_text(
        f'model_config_list {{ config {{ name: "p" base_path: "{PROBE}" '
        'version_labels { key: "old" value: 1 } } }'
    )
    with pytest.raises(ValueError, match="label old points at version 1, which is not served"):
        ModelServer(None, model_config_file=path).start()


@pytest.mark.parametrize("port", ["grpc_port", "rest_port"])
def test_a_port_in_use_is_named(port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{number}: cannot listen: .*in use"):
            ModelServer(PROBE, **{port: number}).start()


def test_a_port_that_another_takes_meanwhile_is_named(monkeypatch):
    with _bind("127.0.0.1", 0) as taken:  # as by another server that starts at the same time
        number = taken.getsockname()[1]
        server, start_grpc = ModelServer(PROBE, rest_port=number), ModelServer._start_grpc

        def first_the_other(*arguments):
            taken.listen()
            return start_grpc(*arguments)

        monkeypatch.setattr(ModelServer, "_start_grpc", first_the_other)
        with pytest.raises(OSError, match=f"127.0.0.1:{number}: cannot listen: .*in use"):
            server.start()


def test_warmup_requests_are_run_and_must_fit(tmp_path):
    folder = make_versions(tmp_path, 1)
    records = folder / "1" / servable.WARMUP_REQUESTS
    records.parent.mkdir()

    def write(made):
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(made)
        with tf.io.TFRecordWriter(os.fspath(records)) as writer:
            writer.write(log.SerializeToString())

    write(request(X))
    with ModelServer(folder):
        pass
    write(request({"x": np.float32([[1]])}))
    with pytest.raises(ValueError, match="Matrix size-incompatible"):
        ModelServer(folder).start()


def test_a_new_version_is_taken_up_without_a_failed_request(tmp_path, monkeypatch):
    monkeypatch.setattr(servables, "POLL_SECONDS", 0.02)
    update, polls = servables.Servables._update, []

    def counted(*arguments):
        polls.append(update(*arguments))

    def wait_for_two_polls():  # the first may have begun before
        enough = len(polls) + 2
        while len(polls) < enough:
            time.sleep(0.01)

    monkeypatch.setattr(servables.Servables, "_update", counted)
    folder = make_versions(tmp_path, 1)
    body = '{"instances": [[1, 2, 3, 4]]}'
    one, two = [[8.5714283, 10.0, 11.4285717]], [[17.1428566, 20.0, 22.8571434]]
    with ModelServer(folder) as server:
        path = "/v1/models/align:predict"
        assert predict(server, body, path) == (200, {"predictions": one})
        (folder / "2").mkdir()  # as a copy that is under way
        shutil.copy(PROBE / "2" / "saved_model.pb", folder / "2")
        wait_for_two_polls()
        assert predict(server, body, path) == (200, {"predictions": one})
        (folder / "2" / "variables").mkdir()
        for file in (PROBE / "2" / "variables").iterdir():
            shutil.copy(file, folder / "2" / "variables")
        deadline = time.monotonic() + 300
        while (answer := predict(server, body, path)) == (200, {"predictions": one}):
            assert time.monotonic() < deadline
        assert answer == (200, {"predictions": two})
        while True:
            listed = json.loads(ask(server, "GET", "/v1/models/align")[2])["model_version_status"]
            states = [(status["version"], status["state"]) for status in listed]
            if states == [("2", "AVAILABLE"), ("1", "END")]:
                break
            assert time.monotonic() < deadline, states
        old = predict(server, body, "/v1/models/align/versions/1:predict")
        assert old == (404, {"error": "Servable not found for request: Specific(align, 1)"})
        shutil.rmtree(folder / "1")
        (folder / "2").rename(folder / "two")  # nothing takes its place
        while predict(server, body, path)[0] != 404:
            assert time.monotonic() < deadline
        (folder / "two").rename(folder / "2")
        while (answer := predict(server, body, path))[0] == 404:
            assert time.monotonic() < deadline
        assert answer == (200, {"predictions": two})


@pytest.mark.slow
def test_serve_says_where_and_stops_on_ctrl_c():
    command = [sys.executable, "-m", "align_tf.cli", "serve", os.fspath(PROBE)]
    command += ["--grpc-port", "0", "--rest-port", "0"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("Serving "))
            assert re.fullmatch(
                r"Serving align \(version 2\): gRPC at 127.0.0.1:\d+, "
                r"REST at http://127.0.0.1:\d+/v1/models/align\n",
                line,
            )
            process.send_signal(signal.SIGINT)
            assert "Traceback" not in process.stderr.read()
            assert process.wait(300) == 0
        finally:
            process.kill()
