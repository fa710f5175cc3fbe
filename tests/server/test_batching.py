"""Merged requests: sizes, waiting, padding, splitting; a failure stays with its caller."""

import concurrent.futures
import contextlib
import threading
import time

import numpy as np
import pytest

from align_tf.server.batching import Batcher, BatchingParameters, read_batching_parameters
from align_tf.server.prometheus import Metrics
from align_tf.server.status_codes import RequestError

LONG = 300_000_000  # microseconds: a batch that is not full does not run


class Model:
    """Doubles x and echoes s; remembers what it was called with, and can be held."""

    def __init__(self):
        self.calls = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, inputs):
        self.calls.append(inputs)
        assert self.open.wait(60)
        if any(b"bad" in row for row in inputs.get("s", np.empty((0, 1)))):
            raise RequestError("INVALID_ARGUMENT", "bad row")
        outputs = {"y": inputs["x"] * 2}
        if "s" in inputs:
            outputs["echo"] = inputs["s"]
        return outputs


@contextlib.contextmanager
def batching(**parameters):
    parameters = {"num_batch_threads": 1, **parameters}
    batcher = Batcher(BatchingParameters(**parameters), Metrics())
    enqueue, arrived = batcher._enqueue, []

    def noted(*arguments):
        arrived.append(arguments)
        enqueue(*arguments)

    batcher._enqueue = noted
    batcher.start()
    with concurrent.futures.ThreadPoolExecutor(16) as callers:

        def send(run, x, s=None, queue="q"):
            inputs = {"x": np.asarray(x)}
            if s is not None:
                inputs["s"] = np.array(s, object)
            before = len(arrived)
            future = callers.submit(batcher.run, queue, run, inputs, {"x": {1}, "s": {1}})
            while len(arrived) == before and not future.done():  # so that they arrive in order
                time.sleep(0.001)
            return future

        try:
            yield send
        finally:
            batcher.stop()


def test_requests_are_merged_and_each_gets_its_rows():
    model = Model()
    with batching(max_batch_size=6, batch_timeout_micros=LONG) as send:
        sent = [send(model, [[1.0], [2.0]]), send(model, [[3.0]]), send(model, [[4.0]] * 3)]
        got = [future.result(60)["y"].tolist() for future in sent]
    assert got == [[[2.0], [4.0]], [[6.0]], [[8.0]] * 3]
    assert [call["x"].tolist() for call in model.calls] == [[[1.0], [2.0], [3.0]] + [[4.0]] * 3]


def test_a_batch_that_is_not_full_runs_after_its_timeout():
    model = Model()
    with batching(max_batch_size=100, batch_timeout_micros=100_000) as send:
        started = time.monotonic()
        assert send(model, [[1.0]]).result(60)["y"].item() == 2.0
        assert time.monotonic() - started >= 0.1


def test_a_request_that_does_not_fit_closes_the_batch_before_it():
    model = Model()
    with batching(max_batch_size=3, batch_timeout_micros=LONG) as send:
        first = send(model, [[1.0], [2.0]])
        second = send(model, [[3.0], [4.0]])
        assert first.result(60)["y"].tolist() == [[2.0], [4.0]]
        assert not second.done()
        send(model, [[5.0]])
        assert second.result(60)["y"].tolist() == [[6.0], [8.0]]


def test_queues_and_kinds_do_not_mix():
    model = Model()
    with batching(max_batch_size=2, batch_timeout_micros=LONG, max_enqueued_batches=9) as send:
        sent = []
        for _ in range(2):
            sent.append(send(model, np.float32([[1.0]])))
            sent.append(send(model, np.float32([[1.0]]), queue="other"))
            sent.append(send(model, np.float32([[1.0, 2.0]])))
            sent.append(send(model, np.float64([[1.0]])))
        for future in sent:
            future.result(60)
    assert [(call["x"].shape, call["x"].dtype.name) for call in model.calls] == [
        ((2, 1), "float32"),
        ((2, 1), "float32"),
        ((2, 2), "float32"),
        ((2, 1), "float64"),
    ]


def test_inputs_of_different_lengths_are_padded_if_asked():
    model = Model()
    parameters = {"max_batch_size": 3, "batch_timeout_micros": LONG}
    with batching(**parameters, pad_variable_length_inputs=True) as send:
        one = send(model, np.int32([[1], [2]]), [[b"a", b"b"], [b"c", b"d"]])
        two = send(model, np.int32([[3, 4, 5]]), [[b"e"]])
        one, two = one.result(60), two.result(60)
    assert one["y"].tolist() == [[2, 0, 0], [4, 0, 0]]
    assert one["echo"].tolist() == [[b"a", b"b"], [b"c", b"d"]]
    assert two["y"].tolist() == [[6, 8, 10]]
    assert two["echo"].tolist() == [[b"e", b""]]
    assert len(model.calls) == 1 and model.calls[0]["x"].dtype == np.int32


def test_a_dimension_that_is_not_open_is_not_padded():
    model = Model()
    parameters = {"max_batch_size": 3, "batch_timeout_micros": LONG}
    with batching(**parameters, pad_variable_length_inputs=True) as send:
        send(model, np.ones((1, 3, 2)))
        send(model, np.ones((1, 3, 4)))
        send(model, np.ones((1, 1, 4)))
    assert [call["x"].shape for call in model.calls] == [(1, 3, 2), (2, 3, 4)]


def test_a_batch_is_filled_up_to_an_allowed_size_with_copies_of_a_row():
    model = Model()
    with batching(max_batch_size=8, allowed_batch_sizes=(1, 4, 8)) as send:
        assert send(model, [[1.0], [2.0]]).result(60)["y"].tolist() == [[2.0], [4.0]]
        assert send(model, [[3.0]]).result(60)["y"].tolist() == [[6.0]]
    assert [call["x"].tolist() for call in model.calls] == [[[1.0], [2.0], [1.0], [1.0]], [[3.0]]]


def test_a_bad_row_fails_its_own_caller_alone():
    model = Model()
    with batching(max_batch_size=4, batch_timeout_micros=LONG) as send:
        sent = [send(model, [[float(n)]], [[s]]) for n, s in enumerate([b"a", b"bad", b"c", b"d"])]
        with pytest.raises(RequestError, match="bad row"):
            sent[1].result(60)
        got = [sent[number].result(60) for number in (0, 2, 3)]
    assert [part["echo"].item() for part in got] == [b"a", b"c", b"d"]
    assert [len(call["x"]) for call in model.calls] == [4, 1, 1, 1, 1]


def test_a_thread_outlives_whatever_a_run_raises():
    model = Model()

    def end(inputs):
        raise SystemExit("ended")

    with batching() as send:
        with pytest.raises(SystemExit, match="ended"):
            send(end, [[1.0]]).result(60)
        assert send(model, [[2.0]]).result(60)["y"].item() == 4.0


def test_a_full_queue_refuses():
    model = Model()
    model.open.clear()
    with batching(max_batch_size=1, max_enqueued_batches=2) as send:
        running = send(model, [[0.0]])
        while not model.calls:
            time.sleep(0.001)
        queued = [send(model, [[float(n)]]) for n in (1, 2)]
        with pytest.raises(
            RequestError, match="queue to which this task was submitted is full"
        ) as e:
            send(model, [[3.0]]).result(60)
        assert e.value.code == "UNAVAILABLE"
        other = send(model, [[4.0]], queue="other")  # has a queue of its own
        model.open.set()
        got = [future.result(60)["y"].item() for future in [running, *queued, other]]
    assert got == [0.0, 2.0, 4.0, 8.0]


def test_a_request_of_too_many_rows_is_refused_or_split():
    model = Model()
    with (
        batching(max_batch_size=2) as send,
        pytest.raises(RequestError, match="Task size 3 is larger than maximum input batch size 2"),
    ):
        send(model, [[1.0]] * 3).result(60)
    parameters = {"max_batch_size": 5, "max_execution_batch_size": 2}
    with batching(**parameters, enable_large_batch_splitting=True) as send:
        got = send(model, np.arange(5.0)).result(60)
        with pytest.raises(RequestError, match="Task size 6 is larger"):
            send(model, np.arange(6.0)).result(60)
    assert got["y"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [len(call["x"]) for call in model.calls] == [2, 2, 1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.float32(1)}, "must have at least one dimension: x"),
        ({"x": np.ones(2), "z": np.ones(3)}, "must have equal 0th-dimension size: x 2, z 3"),
    ],
)
def test_inputs_without_a_common_first_dimension_are_refused(inputs, message):
    with pytest.raises(RequestError, match=message):
        Batcher(BatchingParameters(), Metrics()).run("q", Model(), inputs, {})


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda inputs: {"y": np.float32(1)}, "has 0 dimensions"),
        (lambda inputs: {"y": np.ones(9)}, "does not equal the sum"),
    ],
)
def test_outputs_that_are_not_by_row_are_refused(run, message):
    with batching() as send, pytest.raises(RequestError, match=message) as error:
        send(run, [1.0, 2.0]).result(60)
    assert error.value.code == "FAILED_PRECONDITION"


def test_no_rows_run_by_themselves():
    model = Model()
    with batching(allowed_batch_sizes=(4,), max_batch_size=4) as send:
        assert send(model, np.empty((0, 2))).result(60)["y"].shape == (0, 2)


def test_stopping_runs_what_is_queued():
    model = Model()
    with batching(max_batch_size=9, batch_timeout_micros=LONG) as send:
        future = send(model, [1.0])
    assert future.result(0)["y"].tolist() == [2.0]


FILE = """
    max_batch_size { value: 32 }
    batch_timeout_micros { value: 5000 }
    max_enqueued_batches { value: 100 }
    num_batch_threads { value: 2 }
    thread_pool_name { value: "pool" }
    allowed_batch_sizes: 1
    allowed_batch_sizes: 32
    pad_variable_length_inputs: true
"""


def test_parameters_file(tmp_path):
    path = tmp_path / "batching"
    path.write_text(FILE)
    expected = BatchingParameters(32, 5000, 100, 2, "pool", (1, 32), True)
    assert read_batching_parameters(path) == expected
    path.write_text("")
    assert read_batching_parameters(path) == BatchingParameters()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: 32", "not a batching parameters file"),
        ("batch_size { value: 1 }", "no field named"),
        ("num_batch_threads { value: 0 }", "num_batch_threads is 0, expected at least 1"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros is -1"),
        ("allowed_batch_sizes: 4 allowed_batch_sizes: 2", "expected increasing sizes"),
        ("allowed_batch_sizes: 4", "ends in 4, expected the largest batch, 1000"),
        (
            "max_batch_size { value: 4 } enable_large_batch_splitting { value: true } "
            "max_execution_batch_size { value: 8 }",
            "max_execution_batch_size is 8",
        ),
    ],
)
def test_a_wrong_parameters_file_is_named(tmp_path, text, message):
    path = tmp_path / "batching"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_batching_parameters(path)
    assert str(path) in str(error.value)


def test_a_parser_that_repeats_what_it_met_is_told_in_short(tmp_path):
    path = tmp_path / "batching.txt"
    path.write_text("{" * 100_000)
    with pytest.raises(ValueError, match="not a batching parameters file") as told:
        read_batching_parameters(path)
    assert len(str(told.value)) < 1000
