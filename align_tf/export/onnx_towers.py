"""The two towers as ONNX graphs: the layers of a model, and their weights."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from align_tf.export.onnx_graph import Graph
from align_tf.models.activation import ACTIVATIONS
from align_tf.models.align import AlignModel
from align_tf.models.bert import MASKED_SCORE, EncoderLayer, SelfAttention
from align_tf.models.efficientnet import MBConvBlock
from align_tf.models.folding import fold
from align_tf.models.text import AlignTextModel
from align_tf.preprocessing.tokenization import TOKEN_INPUTS

# --- activations ----------------------------------------------------------------------------


def _swish(graph: Graph, path: str, x: str) -> str:
    return graph.add("Mul", path, x, graph.add("Sigmoid", path, x))


def _gelu(graph: Graph, path: str, x: str) -> str:
    # In this order of operations, by which the runtimes know it and put one in their place.
    scaled = graph.add("Div", f"{path}/scaled", x, graph.number("sqrt_2", math.sqrt(2)))
    share = graph.add("Add", path, graph.add("Erf", path, scaled), graph.number("one", 1))
    return graph.add("Mul", path, graph.add("Mul", f"{path}/twice", x, share), _half(graph))


def _gelu_new(graph: Graph, path: str, x: str) -> str:
    cube = graph.add("Pow", f"{path}/cube", x, graph.number("three", 3))
    small = graph.add("Mul", f"{path}/small", cube, graph.number("gelu_cubic", 0.044715))
    inner = graph.add("Add", f"{path}/inner", x, small)
    factor = graph.number("sqrt_2_by_pi", math.sqrt(2 / math.pi))
    tanh = graph.add("Tanh", path, graph.add("Mul", f"{path}/inner", inner, factor))
    share = graph.add("Add", path, tanh, graph.number("one", 1))
    return graph.add("Mul", path, graph.add("Mul", f"{path}/half", x, _half(graph)), share)


def _mish(graph: Graph, path: str, x: str) -> str:
    return graph.add("Mul", path, x, graph.add("Tanh", path, graph.add("Softplus", path, x)))


def _half(graph: Graph) -> str:
    return graph.number("half", 0.5)


def _one_operation(operation: str) -> Callable[[Graph, str, str], str]:
    return lambda graph, path, x: graph.add(operation, path, x)


# What adds an activation to a graph, by the function that computes it in Keras.
ONNX_ACTIVATIONS = {
    ACTIVATIONS["gelu"]: _gelu,
    ACTIVATIONS["gelu_new"]: _gelu_new,
    ACTIVATIONS["mish"]: _mish,
    ACTIVATIONS["relu"]: _one_operation("Relu"),
    ACTIVATIONS["selu"]: _one_operation("Selu"),
    ACTIVATIONS["silu"]: _swish,
    keras.activations.sigmoid: _one_operation("Sigmoid"),
    keras.activations.tanh: _one_operation("Tanh"),
    keras.activations.linear: lambda graph, path, x: x,
}


def _activate(graph: Graph, path: str, x: str, activation: Callable) -> str:
    if activation not in ONNX_ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: activation {activation!r}: ONNX export takes {names}")
    return ONNX_ACTIVATIONS[activation](graph, path, x)


# --- layers ---------------------------------------------------------------------------------


def _weight(graph: Graph, layer: layers.Layer, name: str) -> str:
    """The weight of a layer that the attribute `name` holds."""
    value = ops.convert_to_numpy(getattr(layer, name))
    return graph.weight(f"{layer.path}/{name}", value)


def _dense(graph: Graph, layer: layers.Dense, x: str) -> str:
    product = graph.add("MatMul", layer.path, x, _weight(graph, layer, "kernel"))
    y = graph.add("Add", layer.path, product, _weight(graph, layer, "bias"))
    return _activate(graph, f"{layer.path}/activation", y, layer.activation)


def _layer_norm(graph: Graph, layer: layers.LayerNormalization, x: str) -> str:
    scale, offset = _weight(graph, layer, "gamma"), _weight(graph, layer, "beta")
    return graph.add(
        "LayerNormalization", layer.path, x, scale, offset, axis=-1, epsilon=float(layer.epsilon)
    )


def _convolve(graph: Graph, path: str, x: str, kernel: Any, bias: Any, **attributes: Any) -> str:
    """Adds a convolution: kernel as ONNX has it, (out, in by group, h, w)."""
    weights = graph.weight(f"{path}/kernel", kernel), graph.weight(f"{path}/bias", bias)
    return graph.add("Conv", path, x, *weights, kernel_shape=kernel.shape[2:], **attributes)


def _conv(graph: Graph, layer: layers.Conv2D, x: str) -> str:
    kernel, bias = (ops.convert_to_numpy(weight) for weight in (layer.kernel, layer.bias))
    y = _convolve(graph, layer.path, x, kernel.transpose(3, 2, 0, 1), bias)
    return _activate(graph, f"{layer.path}/activation", y, layer.activation)


def _conv_norm(graph: Graph, owner: layers.Layer, name: str, x: str, padding: tuple) -> str:
    """Adds a convolution with its BatchNorm; `padding` before and after, of both sides."""
    convolution, norm = getattr(owner, f"{name}_conv"), getattr(owner, f"{name}_bn")
    statistics = [norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance]
    kernel, offset = fold(convolution, convolution.kernel, norm, statistics)
    group = 1
    if isinstance(convolution, layers.DepthwiseConv2D):
        kernel, group = kernel.transpose(2, 3, 0, 1), kernel.shape[2]
    else:
        kernel = kernel.transpose(3, 2, 0, 1)
    before, after = padding
    return _convolve(
        graph,
        convolution.path,
        x,
        kernel.astype("float32"),
        offset.astype("float32"),
        strides=convolution.strides,
        pads=[before, before, after, after],
        group=group,
    )


def _unit(graph: Graph, name: str, x: str) -> str:
    length = graph.add("ReduceL2", f"{name}/length", x, axes=[-1], keepdims=1)
    length = graph.add("Max", f"{name}/length", length, graph.number("least_length", 1e-12))
    return graph.add("Div", f"{name}/unit", x, length)


# --- the image tower ------------------------------------------------------------------------

POOLINGS = {"mean": "GlobalAveragePool", "max": "GlobalMaxPool"}


def image_tower(model: AlignModel) -> Any:
    """Writes the image tower of a model in float32 as an ONNX model.

    Args:
        model: a `plain_copy`.

    Returns:
        The `onnx.ModelProto`: `pixel_values` float32 (n, channels, h, w) to `image_embeds`.

    Raises:
        ValueError: an activation is none that ONNX export knows.
    """
    graph, tower = Graph("image tower"), model.vision_model
    x = _conv_norm(graph, tower, "stem", "pixel_values", (0, 1))
    x = _activate(graph, f"{tower.stem_bn.path}/activation", x, tower.activation)
    for block in tower.blocks:
        x = _block(graph, block, x)
    x = graph.add(POOLINGS[tower.config.pooling_type], "pooler", x)
    x = graph.add("Flatten", "pooler", x, axis=1)
    if model.config.image_projection:
        x = _dense(graph, model.image_projection, x)
    shape = ["batch_size", tower.config.num_channels, "height", "width"]
    return graph.finish(
        {"pixel_values": (np.float32, shape)},
        ("image_embeds", _unit(graph, "image_embeds", x), model.config.projection_dim),
    )


def _block(graph: Graph, block: MBConvBlock, inputs: str) -> str:
    x, spec = inputs, block.spec
    if spec.expand_ratio != 1:
        x = _conv_norm(graph, block, "expand", x, (0, 0))
        x = _activate(graph, f"{block.expand_bn.path}/activation", x, block.activation)
    before, after = (spec.kernel_size - 1) // 2, spec.kernel_size // 2
    if spec.stride == 2:
        (before, after), _ = block.depthwise_pad.padding
    x = _conv_norm(graph, block, "depthwise", x, (before, after))
    x = _activate(graph, f"{block.depthwise_bn.path}/activation", x, block.activation)
    squeezed = graph.add("GlobalAveragePool", f"{block.path}/se_squeeze", x)
    excited = _conv(graph, block.se_expand, _conv(graph, block.se_reduce, squeezed))
    x = graph.add("Mul", f"{block.path}/excite", x, excited)
    x = _conv_norm(graph, block, "project", x, (0, 0))
    return graph.add("Add", f"{block.path}/residual", x, inputs) if spec.residual else x


# --- the text tower -------------------------------------------------------------------------


def text_tower(model: AlignModel) -> Any:
    """Writes the text tower of a model in float32 as an ONNX model.

    Args:
        model: a `plain_copy`.

    Returns:
        The `onnx.ModelProto`: `input_ids`, `attention_mask` and `token_type_ids` int64 (n, t) to
        `text_embeds`.

    Raises:
        ValueError: an activation is none that ONNX export knows.
    """
    graph, tower = Graph("text tower"), model.text_model
    attended = graph.add("Cast", "attention_mask/attended", "attention_mask", to=9)  # bool
    scores = (graph.number("zero", 0), graph.number("masked_score", MASKED_SCORE))
    mask = graph.add("Where", "attention_mask/scores", attended, *scores)
    mask = graph.add("Unsqueeze", "attention_mask/scores", mask, graph.integers("axes", 1, 2))
    x = _embeddings(graph, tower)
    for block in tower.blocks:
        x = _encoder_layer(graph, block, x, mask, first_token_only=block is tower.blocks[-1])
    x = graph.add("Squeeze", "first_token", x, graph.integers("axis_1", 1))
    x = _dense(graph, model.text_projection, x)
    tokens = (np.int64, ["batch_size", "sequence_length"])
    return graph.finish(
        dict.fromkeys(TOKEN_INPUTS, tokens),
        ("text_embeds", _unit(graph, "text_embeds", x), model.config.projection_dim),
    )


def _embeddings(graph: Graph, tower: AlignTextModel) -> str:
    """The states before the first layer, (n, t, width)."""
    embeddings = tower.embeddings
    x = _look_up(graph, embeddings.word_embeddings, "input_ids")
    types = _look_up(graph, embeddings.token_type_embeddings, "token_type_ids")
    x = graph.add("Add", f"{embeddings.path}/types", x, types)
    if tower.config.position_embedding_type == "absolute":
        table = _weight(graph, embeddings.position_embeddings, "embeddings")
        start, axis = graph.integers("start", 0), graph.integers("axis_0", 0)
        path = embeddings.position_embeddings.path
        length = _length(graph, path)
        positions = graph.add("Slice", path, table, start, length, axis)
        x = graph.add("Add", f"{embeddings.path}/positions", x, positions)
    return _layer_norm(graph, embeddings.layer_norm, x)


def _look_up(graph: Graph, layer: layers.Embedding, ids: str) -> str:
    return graph.add("Gather", layer.path, _weight(graph, layer, "embeddings"), ids)


def _length(graph: Graph, path: str) -> str:
    """The number of tokens of a text, int64 (1,)."""
    return graph.add("Shape", f"{path}/length", "input_ids", start=1, end=2)


def _encoder_layer(
    graph: Graph, block: EncoderLayer, inputs: str, mask: str, first_token_only: bool
) -> str:
    asking = _first(graph, f"{block.path}/asking", inputs, 1) if first_token_only else inputs
    attended = _attention(graph, block.attention, asking, inputs, mask, first_token_only)
    x = graph.add("Add", f"{block.path}/attended", attended, asking)
    x = _layer_norm(graph, block.attention_norm, x)
    forwarded = _dense(graph, block.intermediate, x)
    path = f"{block.intermediate.path}/activation"
    forwarded = _dense(
        graph, block.output_dense, _activate(graph, path, forwarded, block.activation)
    )
    x = graph.add("Add", f"{block.path}/forwarded", forwarded, x)
    return _layer_norm(graph, block.output_norm, x)


def _first(graph: Graph, path: str, x: str, axis: int) -> str:
    """What has the index 0 of an axis, the axis kept."""
    start, end = graph.integers("start", 0), graph.integers("end", 1)
    return graph.add("Slice", path, x, start, end, graph.integers(f"axis_{axis}", axis))


def _attention(
    graph: Graph,
    attention: SelfAttention,
    asking: str,
    inputs: str,
    mask: str,
    first_token_only: bool,
) -> str:
    config, path, size = attention.config, attention.path, attention.config.head_size
    heads = graph.integers(f"{path}/heads", 0, 0, attention.num_heads, size)  # 0: as it is

    def in_heads(layer: layers.Dense, x: str, axes: list[int]) -> str:
        x = graph.add("Reshape", layer.path, _dense(graph, layer, x), heads)
        return graph.add("Transpose", layer.path, x, perm=axes)

    query = in_heads(attention.query, asking, [0, 2, 1, 3])
    key = in_heads(attention.key, inputs, [0, 2, 3, 1])
    value = in_heads(attention.value, inputs, [0, 2, 1, 3])
    scores = graph.add("MatMul", f"{path}/scores", query, key)
    if config.position_embedding_type != "absolute":
        scores = _add_relative(graph, attention, scores, query, key, first_token_only)
    scale = graph.number("head_scale", math.sqrt(size))
    scores = graph.add("Div", f"{path}/scores", scores, scale)
    scores = graph.add("Add", f"{path}/masked", scores, mask)
    probs = graph.add("Softmax", f"{path}/probs", scores, axis=-1)
    x = graph.add("MatMul", f"{path}/attended", probs, value)
    x = graph.add("Transpose", f"{path}/attended", x, perm=[0, 2, 1, 3])
    width = graph.integers(f"{path}/width", 0, 0, attention.num_heads * size)
    x = graph.add("Reshape", f"{path}/attended", x, width)
    return _dense(graph, attention.output_dense, x)


def _add_relative(
    graph: Graph, attention: SelfAttention, scores: str, query: str, key: str, first: bool
) -> str:
    """Adds to the scores of keys, (n, h, d, r), those of how far they are from the queries."""
    path, table = attention.path, attention.distance_embedding
    length = graph.add("Squeeze", f"{path}/length", _length(graph, path))
    zero, one = graph.integer("integer_0", 0), graph.integer("integer_1", 1)
    asked = graph.add("Range", f"{path}/asked", zero, length, one)
    asking = _first(graph, f"{path}/asking", asked, 0) if first else asked
    asking = graph.add("Unsqueeze", f"{path}/asking", asking, graph.integers("axis_1", 1))
    distance = graph.add("Sub", f"{path}/distance", asking, asked)
    most = graph.integer("most", attention.config.max_position_embeddings - 1)
    distance = graph.add("Add", f"{path}/distance", distance, most)
    embeds = _look_up(graph, table, distance)
    by_query = graph.add("Einsum", f"{path}/by_query", query, embeds, equation="nhld,lrd->nhlr")
    scores = graph.add("Add", f"{path}/by_query", scores, by_query)
    if attention.config.position_embedding_type == "relative_key_query":
        by_key = graph.add("Einsum", f"{path}/by_key", key, embeds, equation="nhdr,lrd->nhlr")
        scores = graph.add("Add", f"{path}/by_key", scores, by_key)
    return scores
