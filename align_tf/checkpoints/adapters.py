"""LoRA adapters in the format of Hugging Face's PEFT: what their files hold, read and written."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from align_tf import addresses, files
from align_tf.checkpoints.name_table import permute
from align_tf.checkpoints.tensors import FLOAT_DTYPES, read_header, read_tensors
from align_tf.configuration.checks import is_finite
from align_tf.files import CheckpointError
from align_tf.hub import ADAPTER_CONFIG_NAME, ADAPTER_TORCH_NAME, ADAPTER_WEIGHTS_NAME

PREFIX = "base_model.model."  # what PEFT puts before the names of a model's layers

# Those of PEFT's settings that change what an adapter computes or holds, and the values of each
# that are supported; a setting that is absent or null is as the first.
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ((), []),
    "trainable_token_indices": ((), [], {}),
    "target_parameters": ((), []),
    "layer_replication": ((), []),
    "alora_invocation_tokens": ((), []),
    "velora_config": ({},),
    "use_bdlora": ((),),
    "kasa_config": ((),),
    "monteclora_config": ((),),
    "arrow_config": ((),),
    # Others change the weights of the model too, by what they find in it.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

# For each tensor of a layer by its kind, PEFT's names of the two; how the axes of the first are
# permuted; the axes of the second.
# transform of the layer's weight: (names, transform of A, axes of B)
KINDS = {
    "dense": (("lora_A.weight", "lora_B.weight"), "dense", 2),
    "conv": (("lora_A.weight", "lora_B.weight"), "conv", 4),
    "same": (("lora_embedding_A", "lora_embedding_B"), "dense", 2),
}

# A layer -> its two matrices as Keras has them, (..., in, rank) and (rank, out).
Sides = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(kw_only=True)
class AdapterConfig:
    """The settings of an adapter, named as in `adapter_config.json`.

    Args:
        r: the rank.
        lora_alpha: the product of the two matrices counts `lora_alpha / r` times.
        target_modules: what the names of the adapted layers end in; or an expression that they
            match.
        base_model_name_or_path: the model that was adapted.
        revision: of that model on the hub.
        use_rslora: it counts `lora_alpha / sqrt(r)` times (arXiv 2312.03732).
        rank_pattern, alpha_pattern: other ranks and alphas, by an expression for a name's end.
        exclude_modules: layers that `target_modules` does not mean.
        layers_to_transform, layers_pattern: the indices of the layers that it means.
    """

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def targets(self, name: str) -> bool:
        """Says whether a layer, by Hugging Face's name of it, is adapted."""
        return _ends(name, self.target_modules) and not _ends(name, self.exclude_modules or [])

    @property
    def names_all(self) -> bool:
        """Whether `target_modules` says of each layer if it is adapted."""
        return self.target_modules != "all-linear" and self.layers_to_transform is None

    def scale(self, name: str) -> float:
        """What the product of the matrices of a layer is multiplied by."""
        rank = _of_pattern(self.rank_pattern, name, self.r)
        alpha = _of_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, name: str) -> int:
        """The rank of the matrices of a layer."""
        return _of_pattern(self.rank_pattern, name, self.r)


def _ends(name: str, patterns: list[str] | str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _of_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


# --- reading -------------------------------------------------------------------------------


def read_config(folder: pathlib.Path) -> AdapterConfig:
    """Reads `adapter_config.json`.

    Raises:
        FileNotFoundError: the folder has none.
        CheckpointError: it is no valid one, or of an adapter that is not supported.
    """
    path = folder / ADAPTER_CONFIG_NAME
    values = files.read_json(path)
    for key, supported in SUPPORTED.items():
        value = values.get(key)
        if value is not None and value not in supported:
            wanted = "none" if supported[0] in ((), {}) else repr(supported[0])
            raise CheckpointError(f"{path}: {key}={value!r} is not supported: expected {wanted}")
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    given = {key: value for key, value in values.items() if key in known and value is not None}
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in given:
            raise CheckpointError(f"{path}: {key} is missing")
    try:
        config = AdapterConfig(**given)
        _check_config(config)
    except (TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _check_config(config: AdapterConfig) -> None:
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(getattr(config, key), str | None):
            raise ValueError(f"{key}={getattr(config, key)!r}: expected a text")
    if not isinstance(config.use_rslora, bool):
        raise ValueError(f"use_rslora={config.use_rslora!r}: expected true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, key), dict):
            raise ValueError(
                f"{key}={getattr(config, key)!r}: expected numbers by the ends of names"
            )
    for key, rank in {"r": config.r, **config.rank_pattern}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"{key}={rank!r}: expected a positive integer")
    for key, alpha in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
        if not is_finite(alpha):
            raise ValueError(f"{key}={alpha!r}: expected a number")
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key) or []
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise ValueError(f"{key}={value!r}: expected names, or an expression")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        re.compile(pattern)
    for value in (config.target_modules, config.exclude_modules):
        if isinstance(value, str):
            re.compile(value)


def read_sides(
    folder: pathlib.Path, config: AdapterConfig, layers: dict[str, tuple[str, tuple[int, ...]]]
) -> Sides:
    """Reads the matrices of an adapter: all that the layers take, or an error.

    Args:
        folder: with `adapter_model.safetensors`, or PyTorch's `adapter_model.bin`.
        config: the adapter's.
        layers: of each layer that can be adapted, by Hugging Face's name, the transform of its
            weight and, as Keras has it, its shape.

    Returns:
        The matrices by the layers' names.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a tensor is of no layer, missing, or of another shape.
    """
    path = _weights_file(folder)
    expected = {}
    for name, (kind, shape) in layers.items():
        rank = config.rank(name)
        for side, key in enumerate(KINDS[kind][0]):
            expected[f"{PREFIX}{name}.{key}"] = (name, side, _peft_shape(kind, shape, rank)[side])
    header = read_header(path)
    for key, (dtype, shape) in header.items():
        if key not in expected:
            raise CheckpointError(f"{path}: {key}: the model has no such layer to adapt")
        name, _, wanted = expected[key]
        if shape != wanted:
            raise CheckpointError(f"{path}: {key} is {shape}, expected {wanted}")
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: {key} is of {dtype}, expected floating-point numbers")
    found = {expected[key][0] for key in header}
    if config.names_all:
        found |= {name for name in layers if config.targets(name)}
    missing = [key for key, (name, *_) in expected.items() if name in found and key not in header]
    if missing or not header:
        raise CheckpointError(f"{path}: missing {missing[0] if missing else 'all tensors'}")
    read: dict[str, list] = {name: [None, None] for name in layers if name in found}
    for key, array in read_tensors(path, header):
        name, side, _ = expected[key]
        read[name][side] = _to_keras(array.astype("float32"), layers[name][0], side)
    return {name: (a, b) for name, (a, b) in read.items()}


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    for name in (ADAPTER_WEIGHTS_NAME, ADAPTER_TORCH_NAME):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder / ADAPTER_WEIGHTS_NAME}: no such file")


def _peft_shape(kind: str, shape: tuple[int, ...], rank: int) -> tuple[tuple, tuple]:
    """The shapes of PEFT's two tensors, of a weight that has this shape in Keras."""
    *size, inputs, outputs = shape
    ends = (1,) * len(size)
    return (rank, inputs, *size), (outputs, rank, *ends)


def _to_keras(array: np.ndarray, kind: str, side: int) -> np.ndarray:
    if side == 0:
        return permute(array, KINDS[kind][1], to_keras=True)
    return array.reshape(array.shape[:2]).T


def _to_peft(array: np.ndarray, kind: str, side: int) -> np.ndarray:
    _, transform, rank = KINDS[kind]
    if side == 0:
        return permute(array, transform, to_keras=False)
    return array.T.reshape(*array.shape[::-1], *(1,) * (rank - 2))


# --- writing -------------------------------------------------------------------------------


def write_adapter(
    folder: addresses.Place, config: AdapterConfig, sides: Sides, kinds: dict[str, str]
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT reads them.

    Args:
        folder: made if it is not there; also a remote one.
        config: the adapter's.
        sides: the matrices by the layers' names in Hugging Face's model.
        kinds: the transform of each layer's weight.
    """
    import safetensors.numpy

    tensors = {
        f"{PREFIX}{name}.{key}": np.ascontiguousarray(_to_peft(pair[side], kinds[name], side))
        for name, pair in sides.items()
        for side, key in enumerate(KINDS[kinds[name]][0])
    }
    with files.replacing(folder / ADAPTER_WEIGHTS_NAME) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": None,
        # What PEFT's AutoPeftModel loads the base by.
        "auto_mapping": {
            "base_model_class": "AlignModel",
            "parent_library": "transformers.models.align.modeling_align",
        },
        **dataclasses.asdict(config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
    }
    text = json.dumps(dict(sorted(values.items())), indent=2)
    files.write_text(folder / ADAPTER_CONFIG_NAME, f"{text}\n")
