"""The weight files of a checkpoint: which there are, and the tensors in them, read and written."""

import collections
import contextlib
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from align_tf.checkpoints import original
from align_tf.extras import extra
from align_tf.files import CheckpointError, replacing
from align_tf.hub import INDEX_NAME, TORCH_INDEX_NAME, TORCH_WEIGHTS_NAME, WEIGHTS_NAME, shard_names

# As a safetensors header, PyTorch and TensorFlow name them.
FLOAT_DTYPES = (
    *("F64", "F32", "F16", "BF16"),
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
    *("float64", "float32", "float16", "bfloat16"),
)

# What weights are written in.
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")

# What is read of a file before it is closed again: pages of a memory map count as the process's
# memory until then.
BYTES_PER_OPENING = 2**25


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the weight files of a checkpoint folder: safetensors, PyTorch's, or an `.index`.

    Args:
        folder: the folder, or the `.index` of one TensorFlow checkpoint in it.

    Raises:
        FileNotFoundError: it has none, or a shard is missing.
        CheckpointError: it has several TensorFlow checkpoints.
    """
    if folder.is_file():
        return [folder]
    for single, index in ((WEIGHTS_NAME, INDEX_NAME), (TORCH_WEIGHTS_NAME, TORCH_INDEX_NAME)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            files = [folder / name for name in shard_names(folder / index)]
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file}: the shard that {index} names is missing")
            return files
    indices = sorted(folder.glob("*.index"))
    if len(indices) > 1:
        names = ", ".join(index.stem for index in indices)
        raise CheckpointError(f"{folder}: several checkpoints: {names}; name one, as {indices[0]}")
    if indices:
        return indices
    raise FileNotFoundError(
        f"{folder}: no weights; expected {WEIGHTS_NAME}, {INDEX_NAME}, {TORCH_WEIGHTS_NAME} or "
        "the .index and .data files of a TensorFlow checkpoint"
    )


def is_original(file: pathlib.Path) -> bool:
    """Tells a checkpoint of the original training code from one in Hugging Face's names."""
    return file.suffix == ".index"


def read_header(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads the names, dtypes and shapes of the tensors in one weight file.

    Raises:
        CheckpointError: the file is truncated or is no weight file.
    """
    if is_original(file):
        return original.read_header(file)
    if file.suffix != ".safetensors":
        tensors = _torch_tensors(file)
        return {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    with _open_safetensors(file) as tensors:
        names = tensors.keys()
        slices = {name: tensors.get_slice(name) for name in names}
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def read_tensors(file: pathlib.Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors of one weight file, a few in memory at a time.

    Args:
        file: a `.safetensors` file, a `.bin` of PyTorch, or an `.index` of TensorFlow.
        names: which to read.

    Yields:
        Name and array; bfloat16 comes as ml_dtypes' bfloat16 or as float32.

    Raises:
        CheckpointError: the file is truncated or is no weight file.
    """
    waiting = collections.deque(names)
    while waiting:
        arrays = _read_batch(file, waiting)
        while arrays:
            yield arrays.popleft()  # no name holds it here, so it goes when the caller is done


def _read_batch(file: pathlib.Path, waiting: collections.deque) -> collections.deque:
    arrays, size = collections.deque(), 0
    with _open(file) as get:
        while waiting and size < BYTES_PER_OPENING:
            name = waiting.popleft()
            arrays.append((name, get(name)))
            size += arrays[-1][1].nbytes
    return arrays


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Callable[[str], np.ndarray]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as tensors:
            yield tensors.get_tensor
    elif is_original(file):
        with original.opened(file) as get:
            yield get
    else:
        tensors = _torch_tensors(file)
        yield lambda name: np.array(tensors[name].float().numpy())  # a copy, not the map


@contextlib.contextmanager
def _open_safetensors(file: pathlib.Path) -> Iterator[Any]:
    import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks for
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def _torch_tensors(file: pathlib.Path) -> dict[str, Any]:
    with extra("torch", f"{file.name} needs PyTorch to be read"):
        import torch
    try:
        # PyTorch's first format, which is no zip file, cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a broken or hostile file
        # PyTorch's own message advises to load the file unsafely.
        raise CheckpointError(
            f"{file}: not a whole PyTorch file of tensors alone; anything else in it could run "
            "code, so it is not opened"
        ) from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise CheckpointError(f"{file}: expected a dict of tensors")
    return tensors


def check_range(tensors: Mapping[str, Any], dtype: str | None) -> None:
    """Checks that a dtype can hold the finite numbers of tensors.

    Raises:
        ValueError: it is none that weights are written in, or a number would become infinite.
    """
    import ml_dtypes

    if dtype is None:
        return
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(WEIGHT_DTYPES)}")
    limit = float(ml_dtypes.finfo(dtype).max)
    for name, tensor in tensors.items():
        values = np.abs(np.asarray(tensor).astype("float64"))
        largest = np.max(values, where=np.isfinite(values), initial=0.0)
        if largest > limit:
            raise ValueError(
                f"{name} reaches {largest:.6g}, {dtype} only {limit:.6g}: choose another dtype"
            )


def write_tensors(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str | None = None
) -> None:
    """Writes `model.safetensors` as transformers reads it.

    Args:
        folder: made if it is not there.
        tensors: Hugging Face name -> array.
        dtype: `float32`, `float16` or `bfloat16`; None keeps each array's own.

    Raises:
        ValueError: there is no such dtype, or it cannot hold a number.
    """
    import ml_dtypes  # noqa: F401  gives numpy the bfloat16
    import safetensors.numpy

    check_range(tensors, dtype)
    arrays = {
        name: np.ascontiguousarray(array, dtype=dtype or array.dtype).reshape(array.shape)
        for name, array in tensors.items()
    }
    # PyTorch's BatchNorm counts its updates, and transformers misses a count that is not there.
    for name in list(arrays):
        if name.endswith(".running_mean"):
            count = name.replace("running_mean", "num_batches_tracked")
            arrays[count] = np.zeros((), np.int64)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt"})
