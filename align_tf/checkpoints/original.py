"""The checkpoints of the original training code (kakaobrain/coyo-align): names, tensors, sizes.

They are TensorFlow 2 object-graph checkpoints that Keras 2 wrote: `PREFIX.index` beside
`PREFIX.data-*`. A key numbers the layers of the image tower, so these are found by the names that
the object graph holds. Arrays lie as Keras lays them out; a BatchNorm has four axes of length 1
before its channels, from the virtual batches it was trained with.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from align_tf.configuration.blocks import block_table
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.files import CheckpointError

# {} is a block's stage and letter, such as 2a, or a layer's index.
_IMAGE = "image_encoder/layer_with_weights-0"
_TEXT = "text_encoder/layer_with_weights-0/bert"
# original layer, Hugging Face layer
TABLE = (
    (f"{_IMAGE}/stem_conv", "vision_model.embeddings.convolution"),
    (f"{_IMAGE}/stem_bn", "vision_model.embeddings.batchnorm"),
    (f"{_IMAGE}/block{{}}_expand_conv", "vision_model.encoder.blocks.{}.expansion.expand_conv"),
    (f"{_IMAGE}/block{{}}_expand_bn", "vision_model.encoder.blocks.{}.expansion.expand_bn"),
    (f"{_IMAGE}/block{{}}_dwconv", "vision_model.encoder.blocks.{}.depthwise_conv.depthwise_conv"),
    (f"{_IMAGE}/block{{}}_bn", "vision_model.encoder.blocks.{}.depthwise_conv.depthwise_norm"),
    (f"{_IMAGE}/block{{}}_se_reduce", "vision_model.encoder.blocks.{}.squeeze_excite.reduce"),
    (f"{_IMAGE}/block{{}}_se_expand", "vision_model.encoder.blocks.{}.squeeze_excite.expand"),
    (f"{_IMAGE}/block{{}}_project_conv", "vision_model.encoder.blocks.{}.projection.project_conv"),
    (f"{_IMAGE}/block{{}}_project_bn", "vision_model.encoder.blocks.{}.projection.project_bn"),
    ("image_encoder/layer_with_weights-1", "image_projection"),
    (f"{_TEXT}/embeddings", "text_model.embeddings"),
    (f"{_TEXT}/embeddings/LayerNorm", "text_model.embeddings.LayerNorm"),
    *(
        (f"{_TEXT}/encoder/layer/{{}}/{original}", f"text_model.encoder.layer.{{}}.{hugging_face}")
        for original, hugging_face in (
            ("attention/self_attention/query", "attention.self.query"),
            ("attention/self_attention/key", "attention.self.key"),
            ("attention/self_attention/value", "attention.self.value"),
            ("attention/dense_output/dense", "attention.output.dense"),
            ("attention/dense_output/LayerNorm", "attention.output.LayerNorm"),
            ("intermediate/dense", "intermediate.dense"),
            ("bert_output/dense", "output.dense"),
            ("bert_output/LayerNorm", "output.LayerNorm"),
        )
    ),
    (f"{_TEXT}/pooler/dense", "text_model.pooler.dense"),
    ("text_encoder/layer_with_weights-1", "text_projection"),
    ("", ""),
)
# original variable: Hugging Face tensor
VARIABLES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "weight": "word_embeddings.weight",
    "embeddings": "position_embeddings.weight",
    "token_type_embeddings": "token_type_embeddings.weight",
    "temperature": "temperature",
}

# What a training run leaves in the file beside the weights.
UNUSED = (
    r"^optimizer/",
    r"\.OPTIMIZER_SLOT/",
    r"^save_counter/",
    r"^loss(_i2t|_t2i)?_tracker/",
)

# Compound scaling: EfficientNet-B0 to B7 (arXiv 1905.11946, as released), L2 (arXiv 1911.04252).
# width coefficient, depth coefficient
SCALINGS = (
    (1.0, 1.0),
    (1.0, 1.1),
    (1.1, 1.2),
    (1.2, 1.4),
    (1.4, 1.8),
    (1.6, 2.2),
    (1.8, 2.6),
    (2.0, 3.1),
    (4.3, 5.3),
)
# Coefficients that are looked for where none of these fits, the shortest first.
DECIMALS = (*(n / 10 for n in range(1, 100)), *(n / 100 for n in range(1, 1000)))
IMAGE_SIZE = 289  # the original trained on crops of it
HEAD_SIZE = 64  # of every published BERT

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


# --- tensors -------------------------------------------------------------------------------


def read_header(index: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads the dtypes and shapes of a checkpoint's variables, BatchNorm's squeezed.

    Args:
        index: the `.index` file.

    Returns:
        Key -> dtype and shape.

    Raises:
        CheckpointError: a file of it is missing, truncated or of another kind.
    """
    with _reader(index) as reader:
        dtypes = reader.get_variable_to_dtype_map()
        shapes = reader.get_variable_to_shape_map()
    variables = {key: dtype for key, dtype in dtypes.items() if key != _GRAPH}
    size = sum(dtype.size * math.prod(shapes[key]) for key, dtype in variables.items())
    found = sum(file.stat().st_size for file in _data_files(index))
    if found < size:
        raise CheckpointError(
            f"{index}: truncated: its variables take {size} bytes, its .data files hold {found}"
        )
    return {key: (variables[key].name, _squeezed(shapes[key])) for key in sorted(variables)}


@contextlib.contextmanager
def opened(index: pathlib.Path) -> Iterator[Callable[[str], np.ndarray]]:
    """Opens a checkpoint, and gives what reads the variable of a key."""
    with _reader(index) as reader:

        def get(key: str) -> np.ndarray:
            array = reader.get_tensor(key)
            return array.reshape(_squeezed(array.shape))

        yield get


def _squeezed(shape: Any) -> tuple[int, ...]:
    shape = tuple(shape)
    return shape[4:] if shape[:4] == (1, 1, 1, 1) and len(shape) == 5 else shape


def _data_files(index: pathlib.Path) -> list[pathlib.Path]:
    prefix = index.name.removesuffix(".index")
    pattern = re.compile(re.escape(prefix) + r"\.data-\d{5}-of-(\d{5})")
    found = {path: pattern.fullmatch(path.name) for path in sorted(index.parent.iterdir())}
    counts = {path: int(match.group(1)) for path, match in found.items() if match}
    if not counts or set(counts.values()) != {len(counts)}:
        raise CheckpointError(
            f"{index}: expected all of its {prefix}.data-00000-of-... beside it, found "
            f"{', '.join(path.name for path in counts) or 'none'}"
        )
    return list(counts)


@contextlib.contextmanager
def _reader(index: pathlib.Path) -> Iterator[Any]:
    _data_files(index)
    import tensorflow as tf

    try:
        yield tf.train.load_checkpoint(os.fspath(index).removesuffix(".index"))
    except CheckpointError:
        raise
    except Exception as error:  # TensorFlow raises many kinds for a broken file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{index}: not a whole TensorFlow checkpoint: {reason}") from error


# --- names ---------------------------------------------------------------------------------


def hugging_face_names(index: pathlib.Path) -> dict[str, str]:
    """Finds the Hugging Face name of each variable that stands in the table.

    Args:
        index: the `.index` file.

    Returns:
        Key -> Hugging Face name, in a joint model.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is none of the original model.
    """
    layers = [
        (re.compile(re.escape(original).replace(r"\{\}", r"(\d+)")), hugging_face)
        for original, hugging_face in TABLE
    ]
    found = {}
    for key, name in _table_names(_full_names(index)).items():
        layer, _, variable = name.rpartition("/")
        for pattern, hugging_face in layers:
            match = pattern.fullmatch(layer)
            if match and variable in VARIABLES:
                hugging_face = hugging_face.format(*match.groups())
                found[key] = f"{hugging_face}.{VARIABLES[variable]}".lstrip(".")
    return found


def _full_names(index: pathlib.Path) -> dict[str, str]:
    """Reads from the object graph how Keras called the variable of each key."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    with _reader(index) as reader:
        if not reader.has_tensor(_GRAPH):
            raise CheckpointError(f"{index}: no object graph in it: expected a TensorFlow 2 format")
        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
            reader.get_tensor(_GRAPH)
        )
    variables = [variable for node in graph.nodes for variable in node.attributes]
    return {variable.checkpoint_key: variable.full_name for variable in variables}


def _table_names(full_names: dict[str, str]) -> dict[str, str]:
    """Turns keys into the names of the table, with a block's index for its stage and letter."""
    names = {}
    for key, full_name in full_names.items():
        if re.match(rf"{_IMAGE}/layer_with_weights-\d+/", key):
            layer, variable = full_name.split("/")[-2:]
            names[key] = f"{_IMAGE}/{layer}/{variable}"
        else:
            names[key] = key.removesuffix(_VALUE)
    pattern = re.compile(rf"(?<=^{_IMAGE}/block)(\d+)([a-z])(?=_)")
    matches = filter(None, map(pattern.search, names.values()))
    blocks = sorted({(int(match[1]), match[2]) for match in matches})
    return {
        key: pattern.sub(lambda match: str(blocks.index((int(match[1]), match[2]))), name)
        for key, name in names.items()
    }


# --- sizes ---------------------------------------------------------------------------------


def read_config(index: pathlib.Path, given: dict[str, Any]) -> dict[str, Any]:
    """Infers the keys of config.json from a checkpoint; see `infer_config`."""
    header, names = read_header(index), hugging_face_names(index)
    shapes = {names[key]: shape for key, (_, shape) in header.items() if key in names}
    try:
        return infer_config(shapes, given)
    except CheckpointError as error:
        raise CheckpointError(f"{index}: {error}") from error


def infer_config(shapes: dict[str, tuple[int, ...]], given: dict[str, Any]) -> dict[str, Any]:
    """Infers the keys of config.json from the shapes of the weights.

    What shapes cannot say is that of the original: EfficientNet's stages and strides, heads of
    width 64, images of 289 pixels, and else the defaults of the configurations.

    Args:
        shapes: Hugging Face name -> shape, as Keras lays it out.
        given: keys of config.json that are known; a size among them is checked.

    Returns:
        The keys of a joint config.json.

    Raises:
        CheckpointError: a size that is given is not that of the weights, a weight is missing, or
            the shapes leave a size open.
    """
    weights = _Shapes(shapes)
    given_text = given.get("text_config") or {}
    text = {
        "vocab_size": weights["text_model.embeddings.word_embeddings.weight"][0],
        "hidden_size": weights["text_model.embeddings.word_embeddings.weight"][1],
        "max_position_embeddings": weights["text_model.embeddings.position_embeddings.weight"][0],
        "type_vocab_size": weights["text_model.embeddings.token_type_embeddings.weight"][0],
        "num_hidden_layers": _count(r"text_model\.encoder\.layer\.(\d+)\.", shapes),
        "intermediate_size": weights["text_model.encoder.layer.0.intermediate.dense.weight"][1],
    }
    joint = {
        "projection_dim": weights["text_projection.weight"][1],
        "image_projection": "image_projection.weight" in shapes,
    }
    for where, known, found in (("text_config.", given_text, text), ("", given, joint)):
        for key, value in found.items():
            if known.get(key, value) != value:
                raise CheckpointError(f"{where}{key}={known[key]!r}: the weights have {value!r}")
    if "num_attention_heads" not in given_text:
        text["num_attention_heads"] = _heads(text["hidden_size"])
    return {
        **given,
        **joint,
        "text_config": {**given_text, **text},
        "vision_config": _vision_config(weights, given.get("vision_config") or {}),
    }


class _Shapes(dict):
    """Shapes by name; one that is missing is told."""

    def __missing__(self, name: str) -> None:
        raise CheckpointError(f"no checkpoint of the original ALIGN code: it has no {name}")


def _count(pattern: str, names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _heads(hidden_size: int) -> int:
    if hidden_size % HEAD_SIZE:
        raise CheckpointError(
            f"hidden_size={hidden_size} is no multiple of BERT's head size {HEAD_SIZE}, so the "
            "weights leave the number of heads open: give a config with "
            '{"text_config": {"num_attention_heads": ...}}'
        )
    return hidden_size // HEAD_SIZE


def _vision_config(weights: _Shapes, given: dict[str, Any]) -> dict[str, Any]:
    """Finds the width and the depth that an EfficientNet was scaled by."""
    blocks = []  # expanded channels, channels after the block, kernel size
    for index in range(_count(r"vision_model\.encoder\.blocks\.(\d+)\.", weights)):
        block = f"vision_model.encoder.blocks.{index}"
        kernel_size = weights[f"{block}.depthwise_conv.depthwise_conv.weight"][0]
        blocks.append((*weights[f"{block}.projection.project_conv.weight"][2:], kernel_size))
    stem = weights["vision_model.embeddings.convolution.weight"][3]

    def scaled(width: float, depth: float) -> AlignVisionConfig:
        scaling = {"width_coefficient": width, "depth_coefficient": depth}
        return AlignVisionConfig.from_dict({**scaling, **given})

    def fits(width: float, depth: float) -> bool:
        config = scaled(width, depth)
        return config.stem_channels == stem and blocks == [
            (spec.in_channels * spec.expand_ratio, spec.out_channels, spec.kernel_size)
            for spec in block_table(config)
        ]

    # A depth gives a number of blocks whatever the width, so each is looked for alone.
    depths = [d for d in DECIMALS if scaled(1.0, d).num_hidden_layers == len(blocks)][:1]
    scalings = (*SCALINGS, *itertools.product(DECIMALS, depths))
    for width, depth in scalings:
        if fits(width, depth):
            return {
                "width_coefficient": width,
                "depth_coefficient": depth,
                "hidden_dim": blocks[-1][1],
                "image_size": IMAGE_SIZE,
                "first_block_residual": _has_first_block_residual(scaled(width, depth)),
                **given,
            }
    raise CheckpointError(
        f"the {len(blocks)} blocks of the image tower, a stem of {stem} channels before them and "
        f"{blocks[-1][1] if blocks else 0} after them, are no EfficientNet of any width and depth "
        f"with {given or 'the standard stages'}: give a config with the vision_config"
    )


def _has_first_block_residual(config: AlignVisionConfig) -> bool:
    """Tells whether the original's rule of residuals makes a difference to a tower."""
    original = dataclasses.replace(config, first_block_residual=True)
    return block_table(original) != block_table(config)
