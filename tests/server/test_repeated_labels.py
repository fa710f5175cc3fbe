"""Zero-shot classification of repeated labels: one answer, whoever is asked and however."""

import concurrent.futures
import json

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

pytest.importorskip("tensorflow_serving")

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.client import AlignClient
from align_tf.hub import BUNDLED
from align_tf.search.encoder import Encoder
from align_tf.server import ModelServer
from align_tf.server.batching import BatchingParameters

pytestmark = pytest.mark.slow

PICTURE = BUNDLED["align-tiny"] / "examples" / "panda.png"
NO_LABEL = float(np.finfo(np.float32).min)
LISTS = {
    "none": ["panda", "rose", "star"],
    "start": ["panda", "panda", "rose", "star"],
    "middle": ["rose", "panda", "panda", "dog"],
    "tail": ["panda", "rose", "panda"],
    "all": ["star", "star"],
    "empty": ["", "rose", "", "rose", "dog"],
}


@pytest.fixture(scope="module")
def parts():
    return AlignModel.from_pretrained("align-tiny"), AlignProcessor.from_pretrained("align-tiny")


@pytest.fixture(scope="module")
def expected(parts):
    """Each list's logits and probabilities, by the model's own logits of the distinct labels."""
    model, processor = parts
    names = sorted({label for labels in LISTS.values() for label in labels} - {""})
    inputs = processor(images=[PICTURE], text=names, padding="longest")
    own = dict(zip(names, np.asarray(model(inputs).logits_per_image)[0].tolist(), strict=True))
    answers = {}
    for case, labels in LISTS.items():
        odds = {label: np.exp(own[label]) for label in labels if label}
        probs = [odds.get(label, 0) / sum(odds.values()) for label in labels]
        answers[case] = [own.get(label, NO_LABEL) for label in labels], probs
    return answers


def assert_answer(logits, probs, expected):
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probs, expected[1], atol=1e-5)


@pytest.fixture(scope="module", params=["keras", "rest", "grpc"])
def asked(request, parts, tiny_server):
    """What classifies: a model in this process, or a client of either protocol."""
    if request.param == "keras":
        yield Encoder(*parts)
        return
    port = getattr(tiny_server, f"{request.param}_port")
    with AlignClient(f"127.0.0.1:{port}", protocol=request.param) as client:
        yield client


@pytest.mark.parametrize("case", LISTS)
def test_a_repeated_label_counts_once(asked, expected, case):
    answer = asked.classify([PICTURE], LISTS[case])
    assert answer.labels == LISTS[case]
    assert answer.logits.dtype == answer.probs.dtype == np.float32
    assert_answer(answer.logits[0], answer.probs[0], expected[case])


def test_rows_of_different_lists_in_one_request(parts, tiny_server, expected):
    longest = max(map(len, LISTS.values()))
    lists = [labels + [""] * (longest - len(labels)) for labels in LISTS.values()]
    with AlignClient(f"127.0.0.1:{tiny_server.rest_port}") as client:
        images = [PICTURE.read_bytes()] * len(lists)
        outputs = client.predict({"image_bytes": images, "labels": lists})
    for row, (case, labels) in enumerate(LISTS.items()):
        logits, probs = (outputs[name][row] for name in ("logits", "probs"))
        assert_answer(logits[: len(labels)], probs[: len(labels)], expected[case])
        assert set(probs[len(labels) :]) <= {0} and set(logits[len(labels) :]) <= {NO_LABEL}


def test_requests_that_the_server_merges(tiny_export, expected):
    # The batch runs when it is full: all of them are in it.
    settings = {"batch_timeout_micros": 600_000_000, "pad_variable_length_inputs": True}
    parameters = BatchingParameters(len(LISTS), **settings)
    with (
        ModelServer(tiny_export, batching=parameters) as server,
        AlignClient(f"127.0.0.1:{server.grpc_port}", protocol="grpc", timeout=300) as client,
        concurrent.futures.ThreadPoolExecutor(len(LISTS)) as callers,
    ):
        answers = callers.map(lambda labels: client.classify([PICTURE], labels), LISTS.values())
        for case, answer in zip(LISTS, answers, strict=True):
            assert_answer(answer.logits[0], answer.probs[0], expected[case])


@pytest.mark.parametrize("case", ["middle", "tail"])
def test_the_command(capsys, expected, case):
    labels = LISTS[case]
    command = ["classify", str(PICTURE), "--labels", *labels]
    assert main([*command, "--json"]) == 0
    ((_, probs),) = [result.values() for result in json.loads(capsys.readouterr().out)]
    assert list(probs) == list(dict.fromkeys(labels))
    assert [probs[label] for label in labels] == pytest.approx(expected[case][1], abs=1e-5)
    assert sum(probs.values()) == pytest.approx(1, abs=1e-5)
    assert main(command) == 0
    table = capsys.readouterr().out
    for label, prob in zip(labels, expected[case][1], strict=True):
        assert table.count(f"{prob:6.1%}  {label}") == 1
