"""Dynamic batching: requests of different callers run as one, as TensorFlow Serving does it."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent import futures

import numpy as np

from align_tf.server import protos
from align_tf.server.prometheus import Metrics
from align_tf.server.status_codes import RequestError, invalid_argument

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """TensorFlow Serving's batching parameters, with its defaults.

    Attributes:
        max_batch_size: rows of a batch; a request of more is refused.
        batch_timeout_micros: how long a batch that is not full waits for more rows.
        max_enqueued_batches: that wait for a thread, per signature of a version; a request that
            needs one more is refused.
        num_batch_threads: batches that run at once, of all models together.
        thread_pool_name: their name in the metrics.
        allowed_batch_sizes: a batch is filled up to one of them with copies of a row; the last is
            max_execution_batch_size.
        pad_variable_length_inputs: merge inputs that differ in dimensions which the signature
            leaves open, filled up at their ends with zeros or empty strings. (TensorFlow Serving
            fills with the request's first element, which a model cannot tell from a value.) An
            answer is as wide as the batch was. Without it only requests of equal shapes are merged.
        enable_large_batch_splitting: a request may have more rows than a batch, up to
            max_batch_size, and is run in parts.
        max_execution_batch_size: rows of a batch when requests are split; None is max_batch_size.
    """

    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    num_batch_threads: int = os.cpu_count() or 1
    thread_pool_name: str = "model_server_batch_threads"
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    max_execution_batch_size: int | None = None

    def __post_init__(self):
        for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.batch_timeout_micros < 0:
            raise ValueError(f"batch_timeout_micros is {self.batch_timeout_micros}, expected >= 0")
        if not 1 <= self.batch_rows <= self.max_batch_size:
            raise ValueError(
                f"max_execution_batch_size is {self.batch_rows}, expected 1 to max_batch_size, "
                f"{self.max_batch_size}"
            )
        sizes = self.allowed_batch_sizes
        if sizes and (list(sizes) != sorted({*sizes}) or sizes[0] < 1):
            raise ValueError(f"allowed_batch_sizes is {list(sizes)}, expected increasing sizes")
        if sizes and sizes[-1] != self.batch_rows:
            raise ValueError(
                f"allowed_batch_sizes ends in {sizes[-1]}, expected the largest batch, "
                f"{self.batch_rows}"
            )

    @property
    def batch_rows(self) -> int:
        """The most rows that run at once."""
        if self.enable_large_batch_splitting and self.max_execution_batch_size is not None:
            return self.max_execution_batch_size
        return self.max_batch_size

    def padded(self, rows: int) -> int:
        """Returns how many rows a batch of so many is filled up to."""
        return next((size for size in self.allowed_batch_sizes if size >= rows), rows)


def read_batching_parameters(path: str | os.PathLike) -> BatchingParameters:
    """Reads TensorFlow Serving's batching parameters file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not parse, or a value is out of range.
    """
    kind = "batching parameters"
    proto = protos.read_text_proto(path, protos.BatchingParameters(), kind)
    given = {}
    for field, value in proto.ListFields():
        if field.message_type:
            given[field.name] = value.value
        else:
            given[field.name] = tuple(value) if field.name == "allowed_batch_sizes" else value
    try:
        return BatchingParameters(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(eq=False)
class _Task:
    """A request, or a part of one."""

    inputs: Arrays
    rows: int
    result: futures.Future = dataclasses.field(default_factory=futures.Future)
    queued: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(eq=False)
class _Batch:
    """Tasks that will run together, at the time `due` if it does not fill up before."""

    queue: Hashable
    kind: Hashable  # what the inputs of its tasks have in common
    run: Callable[[Arrays], dict[str, np.ndarray]]
    due: float
    tasks: list[_Task] = dataclasses.field(default_factory=list)
    rows: int = 0


class Batcher:
    """Merges requests that wait in the same queue, and runs them in threads of its own."""

    def __init__(self, parameters: BatchingParameters, metrics: Metrics):
        """Makes a batcher whose threads do not run yet.

        Args:
            parameters: sizes and limits.
            metrics: is told of runs and of the time in the queue.
        """
        self.parameters, self.metrics = parameters, metrics
        self._waiting: list[_Batch] = []  # oldest first
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True)
            for number in range(parameters.num_batch_threads)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """Runs what is queued and ends the threads, which are waited for, so long at most."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(end and max(0, end - time.monotonic()))

    def run(
        self,
        queue: Hashable,
        run: Callable[[Arrays], dict[str, np.ndarray]],
        inputs: Arrays,
        open_dims: Mapping[str, Collection[int]],
    ) -> dict[str, np.ndarray]:
        """Runs a request as part of a batch; blocks until it has run.

        Args:
            queue: requests are merged with others of the same queue.
            run: what runs a batch of this queue; each output has the batch as its first dimension.
            inputs: arrays by name, each with the batch as its first dimension.
            open_dims: of each input, the dimensions that may be padded.

        Returns:
            This request's rows of the outputs.

        Raises:
            RequestError: the request has too many rows or no common first dimension
                (INVALID_ARGUMENT), the queue is full (UNAVAILABLE), an output is not by row
                (FAILED_PRECONDITION), or what `run` raises for these rows alone.
        """
        rows = _row_count(inputs)
        if rows == 0:
            return run(inputs)
        if rows > self.parameters.max_batch_size:
            raise invalid_argument(
                f"Task size {rows} is larger than maximum input batch size "
                f"{self.parameters.max_batch_size}"
            )
        step = self.parameters.batch_rows
        tasks = [
            _Task({name: array[start : start + step] for name, array in inputs.items()}, size)
            for start in range(0, rows, step)
            for size in [min(step, rows - start)]
        ]
        with self._changed:
            if self._stopped:
                raise RequestError("UNAVAILABLE", "The server is stopping")
            for task in tasks:
                self._enqueue(queue, run, task, self._kind(inputs, open_dims))
        parts = [task.result.result() for task in tasks]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _enqueue(self, queue: Hashable, run: Callable, task: _Task, kind: Hashable) -> None:
        batches = [batch for batch in self._waiting if batch.queue == queue]
        batch = next((batch for batch in reversed(batches) if batch.kind == kind), None)
        if batch is None or batch.rows + task.rows > self.parameters.batch_rows:
            if len(batches) >= self.parameters.max_enqueued_batches:
                raise RequestError(
                    "UNAVAILABLE",
                    "The batch scheduling queue to which this task was submitted is full",
                )
            if batch is not None:
                batch.due = task.queued  # it takes no more
            due = task.queued + self.parameters.batch_timeout_micros / 1e6
            batch = _Batch(queue, kind, run, due)
            self._waiting.append(batch)
        batch.tasks.append(task)
        batch.rows += task.rows
        if batch.rows == self.parameters.batch_rows:
            batch.due = task.queued
        self._changed.notify()

    def _kind(self, inputs: Arrays, open_dims: Mapping[str, Collection[int]]) -> Hashable:
        """Returns what inputs that are concatenated must share."""
        if not self.parameters.pad_variable_length_inputs:
            open_dims = dict.fromkeys(inputs, ())
        return tuple(
            (
                name,
                array.dtype,
                *[None if n in open_dims[name] else array.shape[n] for n in range(1, array.ndim)],
            )
            for name, array in sorted(inputs.items())
        )

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._observe(batch)
            self._run(batch.run, batch.tasks)
            del batch  # or its arrays would stay until the next one

    def _observe(self, batch: _Batch) -> None:
        now, pool = time.monotonic(), self.parameters.thread_pool_name
        for task in batch.tasks:
            self.metrics.observe("batching_session:queuing_latency", now - task.queued, pool)

    def _next(self) -> _Batch | None:
        """Waits for a batch that is due; None when there is no more to come."""
        with self._changed:
            while self._waiting or not self._stopped:
                batch = min(self._waiting, key=lambda batch: batch.due, default=None)
                seconds = batch and batch.due - time.monotonic()
                if batch is not None and (self._stopped or seconds <= 0):
                    self._waiting.remove(batch)
                    if self._waiting:
                        self._changed.notify()  # another thread looks after the rest
                    return batch
                self._changed.wait(seconds)
        return None

    def _run(self, run: Callable, tasks: Sequence[_Task]) -> None:
        try:
            outputs = self._run_merged(run, tasks)
        except BaseException as error:  # else the thread would end, and its callers wait for ever
            if len(tasks) == 1:
                tasks[0].result.set_exception(error)
                return
            for task in tasks:  # so that it reaches no one but its own caller
                self._run(run, [task])
            return
        for task, part in zip(tasks, outputs, strict=True):
            task.result.set_result(part)

    def _run_merged(self, run: Callable, tasks: Sequence[_Task]) -> list[dict[str, np.ndarray]]:
        rows = sum(task.rows for task in tasks)
        padded = self.parameters.padded(rows)
        merged = {name: _merge([t.inputs[name] for t in tasks], padded) for name in tasks[0].inputs}
        self.metrics.count("batching_session:wrapped_run_count")
        outputs = run(merged)
        for array in outputs.values():
            if array.ndim == 0:
                raise RequestError("FAILED_PRECONDITION", "Batched output tensor has 0 dimensions")
            if len(array) != padded:
                raise RequestError(
                    "FAILED_PRECONDITION",
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th "
                    "dimension sizes of the input tensors",
                )
        ends = np.cumsum([task.rows for task in tasks]).tolist()
        return [
            {name: array[end - task.rows : end] for name, array in outputs.items()}
            for task, end in zip(tasks, ends, strict=True)
        ]


def _row_count(inputs: Arrays) -> int:
    scalars = [name for name, array in inputs.items() if not array.ndim]
    if scalars:
        raise invalid_argument(
            f"Batching Run() input tensors must have at least one dimension: {', '.join(scalars)}"
        )
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        raise invalid_argument(
            f"Batching Run() input tensors must have equal 0th-dimension size: {listed}"
        )
    return next(iter(counts.values()), 0)


def _merge(arrays: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Concatenates, filled up to a common shape and with copies of a row to so many rows."""
    if len(arrays) == 1 and len(arrays[0]) == rows:
        return arrays[0]
    shapes = np.array([array.shape[1:] for array in arrays])
    shape = tuple(shapes.max(axis=0).astype(int).tolist())
    dtype = arrays[0].dtype
    merged = np.full((rows, *shape), b"" if dtype.hasobject else 0, dtype)
    end = 0
    for array in arrays:
        within = tuple(slice(size) for size in array.shape[1:])
        start, end = end, end + len(array)
        merged[(slice(start, end), *within)] = array
    merged[end:] = merged[start]  # a row of the last, which is known to be one
    return merged
