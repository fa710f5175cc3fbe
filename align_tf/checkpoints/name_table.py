"""The name table: what Hugging Face and Keras call each weight, both ways, and how its axes lie."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from align_tf.files import CheckpointError

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
