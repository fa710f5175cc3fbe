"""Finding and reading a checkpoint, and the name table between Hugging Face and Keras."""

import collections
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from align_tf.extras import extra

BUNDLED = {"align-tiny": pathlib.Path(__file__).parents[1] / "pretrained" / "align-tiny"}

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TORCH_WEIGHTS_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

# How one tensor's axes are permuted.
# transform: (Hugging Face -> Keras, Keras -> Hugging Face)
TRANSFORMS = {
    "same": (None, None),
    "dense": ((1, 0), (1, 0)),  # (out, in) <-> (in, out)
    "conv": ((2, 3, 1, 0), (3, 2, 0, 1)),  # (out, in, h, w) <-> (h, w, in, out)
    "depthwise": ((2, 3, 0, 1), (2, 3, 0, 1)),  # (channels, 1, h, w) <-> (h, w, channels, 1)
}

# Rows that stand for several tensors of one layer.
# Hugging Face suffix, Keras suffix, transform
_BATCH_NORM = (
    ("weight", "gamma", "same"),
    ("bias", "beta", "same"),
    ("running_mean", "moving_mean", "same"),
    ("running_var", "moving_variance", "same"),
)
_LAYER_NORM = (("weight", "gamma", "same"), ("bias", "beta", "same"))
_DENSE = (("weight", "kernel", "dense"), ("bias", "bias", "same"))
_CONV = (("weight", "kernel", "conv"),)
_CONV_BIAS = (*_CONV, ("bias", "bias", "same"))
_DEPTHWISE = (("weight", "kernel", "depthwise"),)
_EMBEDDING = (("weight", "embeddings", "same"),)

# {} is the index of a block or a layer.
# Hugging Face layer, Keras layer, tensors
VISION_TABLE = (
    ("embeddings.convolution", "stem_conv", _CONV),
    ("embeddings.batchnorm", "stem_bn", _BATCH_NORM),
    ("encoder.blocks.{}.expansion.expand_conv", "block_{}/expand_conv", _CONV),
    ("encoder.blocks.{}.expansion.expand_bn", "block_{}/expand_bn", _BATCH_NORM),
    ("encoder.blocks.{}.depthwise_conv.depthwise_conv", "block_{}/depthwise_conv", _DEPTHWISE),
    ("encoder.blocks.{}.depthwise_conv.depthwise_norm", "block_{}/depthwise_bn", _BATCH_NORM),
    ("encoder.blocks.{}.squeeze_excite.reduce", "block_{}/se_reduce", _CONV_BIAS),
    ("encoder.blocks.{}.squeeze_excite.expand", "block_{}/se_expand", _CONV_BIAS),
    ("encoder.blocks.{}.projection.project_conv", "block_{}/project_conv", _CONV),
    ("encoder.blocks.{}.projection.project_bn", "block_{}/project_bn", _BATCH_NORM),
)
TEXT_TABLE = (
    ("embeddings.word_embeddings", "embeddings/word_embeddings", _EMBEDDING),
    ("embeddings.position_embeddings", "embeddings/position_embeddings", _EMBEDDING),
    ("embeddings.token_type_embeddings", "embeddings/token_type_embeddings", _EMBEDDING),
    ("embeddings.LayerNorm", "embeddings/layer_norm", _LAYER_NORM),
    ("encoder.layer.{}.attention.self.query", "layer_{}/attention/query", _DENSE),
    ("encoder.layer.{}.attention.self.key", "layer_{}/attention/key", _DENSE),
    ("encoder.layer.{}.attention.self.value", "layer_{}/attention/value", _DENSE),
    (
        "encoder.layer.{}.attention.self.distance_embedding",
        "layer_{}/attention/distance_embedding",
        _EMBEDDING,
    ),
    ("encoder.layer.{}.attention.output.dense", "layer_{}/attention/output", _DENSE),
    ("encoder.layer.{}.attention.output.LayerNorm", "layer_{}/attention_norm", _LAYER_NORM),
    ("encoder.layer.{}.intermediate.dense", "layer_{}/intermediate", _DENSE),
    ("encoder.layer.{}.output.dense", "layer_{}/output", _DENSE),
    ("encoder.layer.{}.output.LayerNorm", "layer_{}/output_norm", _LAYER_NORM),
    ("pooler.dense", "pooler", _DENSE),
)
JOINT_TABLE = (
    *((f"text_model.{hf}", f"text_model/{keras}", rows) for hf, keras, rows in TEXT_TABLE),
    *((f"vision_model.{hf}", f"vision_model/{keras}", rows) for hf, keras, rows in VISION_TABLE),
    ("text_projection", "text_projection", _DENSE),
    ("image_projection", "image_projection", _DENSE),
    ("", "", (("temperature", "temperature", "same"), ("logit_bias", "logit_bias", "same"))),
)

# Tensors that a checkpoint may hold and the model has no use for.
UNUSED = (
    r"(^|\.)position_ids$",  # a buffer, 0 .. max_position_embeddings - 1
    r"(^|\.)embeddings\.token_type_ids$",  # a buffer of zeros
    r"\.num_batches_tracked$",  # PyTorch's count of BatchNorm updates
)
# The same for a tower taken out of a larger checkpoint.
_UNUSED_BY_TOWERS = (r"^(text|image)_projection\.", r"^(temperature|logit_bias)$")
UNUSED_BY_TEXT_TOWER = (r"^vision_model\.", *_UNUSED_BY_TOWERS)
UNUSED_BY_VISION_TOWER = (r"^text_model\.", *_UNUSED_BY_TOWERS)
UNUSED_OF_BERT = (r"^cls\.", r"^classifier\.", r"^qa_outputs\.")
UNUSED_OF_EFFICIENTNET = (r"^encoder\.top_(conv|bn)\.", r"^classifier\.")

# Names of the first BERT ports.
# old suffix, today's suffix
OLD_SUFFIXES = ((".gamma", ".weight"), (".beta", ".bias"))

# As a safetensors header, PyTorch and TensorFlow name them.
FLOAT_DTYPES = (
    *("F64", "F32", "F16", "BF16"),
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
    *("float64", "float32", "float16", "bfloat16"),
)

# What weights are written in.
DTYPES = ("float32", "float16", "bfloat16")

# What is read of a file before it is closed again: pages of a memory map count as the process's
# memory until then.
BYTES_PER_OPENING = 2**25


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


# --- files ---------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path beside `path`, renamed to it if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp gives the owner's rights alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file at once or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def resolve_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    weights: bool = False,
) -> pathlib.Path:
    """Turns the name of a checkpoint into a local folder.

    Args:
        name_or_path: a folder, the prefix of a TensorFlow checkpoint in it, `align-tiny`, or a
            Hugging Face id.
        revision: branch, tag or commit on the hub.
        token: access token of the hub.
        cache_dir: the hub's cache folder.
        local_files_only: never ask the hub, use its cache.
        weights: fetch the weights too, not only the configuration and vocabulary files.

    Returns:
        A folder that exists.

    Raises:
        FileNotFoundError: there is no such folder and no such id.
        CheckpointError: the hub's index of shards is broken.
    """
    folder = pathlib.Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if original_index(folder):
        return folder.parent
    name = os.fspath(name_or_path)
    if name in BUNDLED:
        return BUNDLED[name]
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r}: no such folder; expected a checkpoint folder, "
            f"{', '.join(BUNDLED)}, or a Hugging Face id such as kakaobrain/align-base"
        )
    import huggingface_hub

    options = {
        "repo_id": name,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    try:
        folder = huggingface_hub.snapshot_download(
            allow_patterns=["*.json", "*.txt", "*.index"], **options
        )
        if weights:
            _download_weights(pathlib.Path(folder), options)
    except CheckpointError:
        raise
    except Exception as error:  # the hub, its HTTP client and the system raise kinds of their own
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name!r}: no such folder, and the Hugging Face hub gave nothing: {reason}"
        ) from error
    return pathlib.Path(folder)


def is_available(name_or_path: str | os.PathLike, timeout: float = 5.0) -> bool:
    """Says at once whether a checkpoint can be had: it is here, or the hub has it and answers.

    Args:
        name_or_path: as `resolve_folder` takes it.
        timeout: seconds that the hub has for its answer.
    """
    try:
        resolve_folder(name_or_path, local_files_only=True, weights=True)
        return True
    except FileNotFoundError:
        if not HUB_ID.fullmatch(os.fspath(name_or_path)):
            return False
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    url = huggingface_hub.hf_hub_url(os.fspath(name_or_path), "config.json")
    headers = huggingface_hub.utils.build_hf_headers()  # with the token, where there is one
    request = urllib.request.Request(url, method="HEAD", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except (OSError, http.client.HTTPException):  # no network, or no such checkpoint
        return False


def _download_weights(folder: pathlib.Path, options: dict[str, Any]) -> None:
    import huggingface_hub

    for index in (INDEX_NAME, TORCH_INDEX_NAME):
        if (folder / index).is_file():  # fetched with the other JSON files
            for name in _shard_names(folder / index):
                huggingface_hub.hf_hub_download(filename=name, **options)
            return
    for name in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME):
        try:
            huggingface_hub.hf_hub_download(filename=name, **options)
            return
        except huggingface_hub.errors.EntryNotFoundError:
            if name == TORCH_WEIGHTS_NAME and not any(folder.glob("*.index")):
                raise
    huggingface_hub.snapshot_download(allow_patterns=["*.data-*"], **options)


def original_index(path: str | os.PathLike) -> pathlib.Path | None:
    """Finds the `.index` file of the TensorFlow checkpoint whose prefix, or index, a path is."""
    path = pathlib.Path(path).expanduser()
    beside = path.with_name(f"{path.name}.index") if path.name else path
    return next((p for p in (path, beside) if p.suffix == ".index" and p.is_file()), None)


def _shard_names(index: pathlib.Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map
    if not valid or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensors to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
    return names


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
            files = [folder / name for name in _shard_names(folder / index)]
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


# --- tensors -------------------------------------------------------------------------------


def read_header(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads the names, dtypes and shapes of the tensors in one weight file.

    Raises:
        CheckpointError: the file is truncated or is no weight file.
    """
    if is_original(file):
        from align_tf.checkpoints import original

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
    arrays = collections.deque()
    with _open(file) as get:
        while waiting and sum(array.nbytes for _, array in arrays) < BYTES_PER_OPENING:
            name = waiting.popleft()
            arrays.append((name, get(name)))
    return arrays


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Callable[[str], np.ndarray]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as tensors:
            yield tensors.get_tensor
    elif is_original(file):
        from align_tf.checkpoints import original

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


# --- the name table ------------------------------------------------------------------------


def _rows(table: tuple) -> Iterator[tuple[str, str, str]]:
    for hf_layer, keras_layer, tensors in table:
        for hf_suffix, keras_suffix, transform in tensors:
            hf = f"{hf_layer}.{hf_suffix}".lstrip(".")
            keras = f"{keras_layer}/{keras_suffix}".lstrip("/")
            yield hf, keras, transform


def _pattern(template: str) -> re.Pattern:
    return re.compile(r"(\d+)".join(re.escape(part) for part in template.split("{}")))


def to_hugging_face(paths: Iterable[str], table: tuple) -> dict[str, tuple[str, str]]:
    """Finds the Hugging Face name of each Keras weight.

    Args:
        paths: Keras paths, without the model's own name.
        table: `JOINT_TABLE`, `TEXT_TABLE` or `VISION_TABLE`.

    Returns:
        Keras path -> (Hugging Face name, transform).

    Raises:
        CheckpointError: a weight stands in no row of the table.
    """
    patterns = [(_pattern(keras), hf, transform) for hf, keras, transform in _rows(table)]
    names = {}
    for path in paths:
        for pattern, hf, transform in patterns:
            match = pattern.fullmatch(path)
            if match:
                names[path] = (hf.format(*match.groups()), transform)
                break
        else:
            raise CheckpointError(f"{path}: a weight that stands in no row of the name table")
    return names


def permute(array: np.ndarray, transform: str, *, to_keras: bool) -> np.ndarray:
    """Turns the axes of a tensor from one layout to the other."""
    axes = TRANSFORMS[transform][0 if to_keras else 1]
    return array if axes is None else np.transpose(array, axes)


def plan_import(
    shapes: dict[str, tuple[int, ...]],
    files: list[pathlib.Path],
    table: tuple,
    *,
    prefix: str = "",
    unused: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> tuple[dict[pathlib.Path, dict[str, tuple[str, str]]], list[str], list[str]]:
    """Pairs every Keras weight with a tensor of a checkpoint, or says what does not fit.

    Args:
        shapes: Keras path -> shape, the weights to fill.
        files: the weight files.
        table: the rows that name them.
        prefix: taken off the names of the checkpoint where they have it, such as `bert.`.
        unused: patterns of names that may be left over, beside `UNUSED`.
        optional: patterns of Keras paths that may stay as they are.

    Returns:
        For each file, name in the file -> (Keras path, transform); the parts of the checkpoint
        that `unused` left out, such as `encoder.top_conv`; the Keras paths left as they are.

    Raises:
        CheckpointError: a weight is missing, a tensor is left over, or a shape differs.
    """
    wanted = {
        hf: (path, transform) for path, (hf, transform) in to_hugging_face(shapes, table).items()
    }
    problems, left_out, plan = [], set(), {}
    for file in files:
        plan[file] = {}
        names, leftovers = _names_and_leftovers(file)
        for name, (dtype, shape) in read_header(file).items():
            hf = _todays_name(names.get(name, name).removeprefix(prefix))
            if hf not in wanted:
                matches = list(filter(None, (re.search(pattern, hf) for pattern in unused)))
                if matches:
                    left_out.add(matches[0].group().strip("."))
                elif not any(re.search(pattern, hf) for pattern in leftovers):
                    problems.append(f"unexpected tensor {name} {shape}")
                continue
            path, transform = wanted.pop(hf)
            transform = "same" if names else transform  # the original's arrays lie as Keras's do
            axes = TRANSFORMS[transform][0]
            turned = shape if axes is None else tuple(shape[a] for a in axes if a < len(shape))
            if turned != shapes[path]:
                problems.append(f"{name} {shape} does not fit {path} {shapes[path]}")
            if dtype not in FLOAT_DTYPES:
                problems.append(f"{name} is of {dtype}, expected floating-point numbers")
            plan[file][name] = (path, transform)
    kept = []
    for hf, (path, _) in wanted.items():
        if any(re.search(p, path) for p in optional):
            kept.append(path)
        else:
            problems.append(f"missing tensor {hf} for {path} {shapes[path]}")
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        where = files[0].parent if len(files) > 1 else files[0]
        raise CheckpointError(f"{where}: the checkpoint does not fit the model\n  {shown}{more}")
    return plan, sorted(left_out), kept


def _names_and_leftovers(file: pathlib.Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds what a file calls otherwise than Hugging Face does, and what it may hold beside."""
    if not is_original(file):
        return {}, UNUSED
    from align_tf.checkpoints import original

    return original.hugging_face_names(file), original.UNUSED


def unused_tensors(files: list[pathlib.Path]) -> collections.Counter:
    """Counts the tensors that an import leaves out, by what their names have in common."""
    counts = collections.Counter()
    for file in files:
        _, leftovers = _names_and_leftovers(file)
        for name in read_header(file):
            matches = filter(None, (re.search(pattern, name) for pattern in leftovers))
            counts.update(match.group().strip("./") for match in itertools.islice(matches, 1))
    return counts


def _todays_name(name: str) -> str:
    for old, new in OLD_SUFFIXES:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def write_tensors(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str | None = None
) -> None:
    """Writes `model.safetensors` as transformers reads it.

    Args:
        folder: made if it is not there.
        tensors: Hugging Face name -> array.
        dtype: `float32`, `float16` or `bfloat16`; None keeps each array's own.

    Raises:
        ValueError: there is no such dtype.
    """
    import ml_dtypes  # noqa: F401  gives numpy the bfloat16
    import safetensors.numpy

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
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
