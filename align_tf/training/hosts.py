"""The processes of one training, on one host or many: joined, and which of them writes."""

import contextlib
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from align_tf.models.sharded_state import AFTER, GATHERED, is_apart, state_of
from align_tf.terminal import say

# What says that there are several processes: Keras's own, then what JAX finds out itself.
KERAS = ("KERAS_DISTRIBUTION_JOB_ADDRESSES", "KERAS_DISTRIBUTION_NUM_PROCESSES")
PROCESS_ID = "KERAS_DISTRIBUTION_PROCESS_ID"
NUMBERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
NAMES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
# Of these what the starter of each process sets, and not the allocation that it is started in.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
BY_HAND = f"{KERAS[0]} (the first process's host and port), _NUM_PROCESSES and _PROCESS_ID (from 0)"
# Of a Cloud TPU whose environment says nothing its metadata server does.
TPU_FILES, METADATA = ("/dev/accel0", "/dev/vfio/0"), "metadata.google.internal"
WORKERS = "http://{}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
ANSWER = 5  # seconds that it has


def join() -> None:
    """Joins the processes that the environment says there are, before anything is computed.

    Raises:
        ValueError: there are several, and Keras does not run on JAX, or they do not find each
            other.
    """
    by_keras = any(os.environ.get(name) for name in KERAS)
    if keras.backend.backend() != "jax":
        if by_keras or _above_one(STARTED):
            raise ValueError(
                f"{_said((*KERAS, *STARTED))}: several processes train by `align-tf train` on "
                "Keras's JAX backend alone; expected KERAS_BACKEND=jax, or 1 of each"
            )
        return
    import jax

    if jax.distributed.is_initialized() or not (by_keras or _several()):
        return
    if not jax.config.jax_cpu_collectives_implementation:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        (keras.distribution if by_keras else jax.distributed).initialize()
    except (ValueError, IndexError, RuntimeError) as error:  # of what a variable lacks
        said = _said((*KERAS, PROCESS_ID) if by_keras else (*NUMBERS, *NAMES))
        reason = " ".join(str(error).split()).rstrip(".")
        way = f"srun or mpirun to start each, or {BY_HAND}"
        if by_keras:
            way = "the first process's host and port, their number, and this one's place, from 0"
        raise ValueError(
            f"{said}: several processes, which do not find each other: {reason}; expected {way}"
        ) from error


def _said(names: Iterable[str]) -> str:
    """Says what variables of the environment say."""
    said = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return ", ".join(said) or "the metadata of this TPU"


def _above_one(names: Iterable[str]) -> bool:
    numbers = [os.environ.get(name, "") for name in names]
    return any(number.isdecimal() and int(number) > 1 for number in numbers)


def _several() -> bool:
    """Says whether the environment of a cluster tells of several processes."""
    if _above_one(NUMBERS):
        return True
    named = [os.environ[name] for name in NAMES if os.environ.get(name)]
    if named:
        return "," in named[0]
    if "TPU_SKIP_MDS_QUERY" in os.environ or not any(map(os.path.exists, TPU_FILES)):
        return False
    url = WORKERS.format(os.environ.get("GCE_METADATA_IP", METADATA))
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            return b"," in answer.read()
    except (OSError, urllib.error.URLError):
        return False


def place() -> tuple[int, int]:
    """Returns this process's index and the number of processes, as `make_dataset`'s `shard`."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Says whether this is the process that writes."""
    return place()[0] == 0


def say_first(message: str) -> None:
    """Says something on stderr, once for all processes."""
    if is_first():
        say(message)


def by_first(call: Callable[[], Any]) -> Any:
    """Calls a function in the first process, while the others wait for its end.

    Returns:
        What it returned; None in the others.

    Raises:
        ValueError: in the others, if it failed there; in the first its own error.
    """
    index, count = place()
    if count == 1:
        return call()
    from jax.experimental import multihost_utils

    result = error = None
    if index == 0:
        try:
            result = call()
        except Exception as caught:  # the others are told of whatever it is
            error = caught
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process has ended in an error, which it tells")
    return result


def in_all(call: Callable[[], Any]) -> Any:
    """Calls a function in each process; where it fails in one, none of the others waits for it.

    Returns:
        What it returned.

    Raises:
        ValueError: it failed in another process; here its own error.
    """
    if place()[1] == 1:
        return call()
    result = error = None
    try:
        result = call()
    except Exception as caught:  # the others are told of whatever it is
        error = caught
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ValueError("another process has ended in an error, which it tells")
    return result


def read(variable: keras.Variable) -> np.ndarray:
    """Reads a variable; one that lies in parts on several processes' devices, in all of them."""
    value = variable.value
    if not is_apart(value):  # of TensorFlow's replicas the value alone is no array
        return keras.ops.convert_to_numpy(variable)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


@contextlib.contextmanager
def readable(variables: Iterable[keras.Variable]) -> Iterator[None]:
    """Has the first process alone read variables that lie in parts on several processes' devices.

    They are whole in its memory meanwhile, gathered by all one after the other, and no process
    computes with them. What is gathered already stays so.
    """
    found = {id(variable): variable for variable in variables if is_apart(variable.value)}
    found = {key: variable for key, variable in found.items() if key not in GATHERED}
    held = {key: variable.value for key, variable in found.items()}
    there = dict(held)
    GATHERED.update(found)
    try:
        for key, variable in found.items():
            value = read(variable)
            if is_first():
                variable._value = there[key] = value
            del value
        yield
        for key, variable in found.items():
            if variable._value is not there[key]:
                raise ValueError(f"{variable.path}: assigned while gathered; expected it {AFTER}")
    finally:
        GATHERED.difference_update(found)
        for key, variable in found.items():
            variable._value = held[key]


@contextlib.contextmanager
def gathered(model: keras.Model) -> Iterator[None]:
    """Gathers the state of a model over several processes, for the first of them to save it.

    To be entered in all of them; within it the others have their parts alone, as before, and what
    computes with the model or assigns its weights, such as `fit` and `load_weights`, raises a
    ValueError in each. A model whose state no process shares is as it was.

    Args:
        model: an `AlignModel`; its optimizer's state is gathered with its weights.
    """
    with readable(state_of(model)):
        yield


def any_of(said: bool) -> bool:
    """Says whether any of the processes says so."""
    if place()[1] == 1:
        return said
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(said)).any())


def agree_on(settings: Mapping[str, Any]) -> None:
    """Checks that settings are the same in all processes.

    Raises:
        ValueError: one is not; the message names it.
    """
    if place()[1] == 1:
        return
    from jax.experimental import multihost_utils

    ours = np.array([zlib.crc32(repr(value).encode()) for value in settings.values()], np.uint32)
    gathered = multihost_utils.process_allgather(ours)
    for name, same in zip(settings, (gathered == gathered[0]).all(0), strict=True):
        if not same:
            raise ValueError(
                f"{name}={settings[name]!r}: not so in every process; expected one recipe in all"
            )


def agree(value: int, what: str) -> None:
    """Checks that a number is the same in all processes.

    Raises:
        ValueError: it is not; the message names what it is.
    """
    if place()[1] == 1:
        return
    from jax.experimental import multihost_utils

    values = np.unique(multihost_utils.process_allgather(np.array(value)))
    if len(values) > 1:
        raise ValueError(f"{what}: {', '.join(map(str, values))} in the processes; expected one")
