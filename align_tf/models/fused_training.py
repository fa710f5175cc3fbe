"""Training on CPUs by TensorFlow in fewer passes: an MBConv block's branch, and BERT's gelu.

Plain operations read and write a block's wide activations some sixty times in a step, and keep
five of them for the gradient. Here two are kept, what the first two convolutions give: what
becomes of them (normalised, swish, gated) is computed again for the gradient, in loops that XLA
compiles. Of gelu its input is kept, not five arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import activations, layers, ops

from align_tf.models.activation import get_activation
from align_tf.models.ghost_batch_norm import GhostBatchNormalization

COLUMNS = 3  # of a depthwise filter, that oneDNN has a fast gradient for


def can_fuse(activation: Callable, norm: layers.BatchNormalization, x: Any) -> bool:
    """Says whether this file computes what `norm` and `activation` do in training.

    Args:
        activation: what follows `norm`.
        norm: a BatchNorm.
        x: what it normalises, or what that is made from.
    """
    if not _on_cpu() or activation is not get_activation("swish"):
        return False
    # Statistics over all replicas or of parts, and those of float64, the fused kernel lacks.
    special = norm.synchronized or isinstance(norm, GhostBatchNormalization)
    return x.dtype != "float64" and not (special and norm.trainable)


def branch(block: layers.Layer, x: Any) -> Any:
    """Runs an `MBConvBlock` without drop-connect and residual.

    Args:
        block: the block.
        x: (n, h, w, in_channels).

    Returns:
        (n, h', w', out_channels).
    """

    def convolve(x: Any) -> Any:
        x = block.depthwise_pad(x) if block.spec.stride == 2 else x
        return depthwise(block.depthwise_conv, x)

    def gate(squeezed: Any) -> Any:
        return block.se_expand(block.se_reduce(squeezed))

    if block.spec.expand_ratio == 1:
        x = convolve(x)
    else:
        owners = [block.depthwise_conv]
        x = pointwise(block.expand_conv, x)
        x = normalize_swish(block.expand_bn, x, convolve, owners=owners)
    project = functools.partial(pointwise, block.project_conv)
    owners = [block.se_reduce, block.se_expand, block.project_conv]
    x = normalize_swish(block.depthwise_bn, x, project, gate, owners=owners)
    return normalize(block.project_bn, x)


def normalize(norm: layers.BatchNormalization, x: Any) -> Any:
    """As norm(x, training=True), by TensorFlow's kernel: a third of the time of Keras's moments."""
    if not norm.trainable:
        return norm(x)
    gamma, beta = _scale_and_offset(norm)
    y, *moments, _ = _batch_norm(norm, x, gamma, beta)
    _move_averages(norm, *moments)
    return y


def normalize_swish(
    norm: layers.BatchNormalization,
    x: Any,
    then: Callable = activations.linear,
    gate: Callable | None = None,
    *,
    owners: Sequence[layers.Layer] = (),
) -> Any:
    """Computes then(y * gate(mean of y over its area)), y = swish(norm(x)).

    Args:
        norm: a BatchNorm. If it trains, by the statistics of x, and its averages move; if not, by
            its averages.
        x: (n, h, w, c); nothing else of that size is kept for the gradient.
        then: the convolution that follows.
        gate: from (n, 1, 1, c) to (n, 1, 1, c); None for no factor.
        owners: the layers whose weights `then` and `gate` read.

    Returns:
        What `then` returns.
    """
    import tensorflow as tf

    averages = [ops.cast(value, "float32") for value in (norm.moving_mean, norm.moving_variance)]
    weights = [weight for owner in owners for weight in owner.weights]

    call = functools.partial(_call_with, weights)
    gradients = functools.partial(_gradients_with, weights)

    # Weights go in as values: only an argument gets a gradient.
    @tf.custom_gradient
    def with_gradient(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *values: tf.Tensor) -> tuple:
        mean, variance = averages
        if norm.trainable:
            y, mean, variance, reserved = _batch_norm(norm, x, gamma, beta)
        deviation = tf.math.rsqrt(variance + norm.epsilon)
        scale, offset = gamma * deviation, beta - mean * gamma * deviation
        y = y * tf.sigmoid(y) if norm.trainable else _swish(x, scale, offset)
        squeezed = factor = None
        if gate:
            squeezed = area_mean(y)
            factor = call(gate, squeezed, values)
            y *= factor
        outputs = call(then, y, values)

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> list:
            with tf.control_dependencies([upstream]):  # else y is made at once, and kept
                y = _swish(x, scale, offset, factor)
            of_y, *of_values = gradients(then, y, values, upstream)
            of_squeezed = None
            if gate:
                of_factor = tf.cast(area_sum(_swish(x, scale, offset, of_y)), x.dtype)
                of_squeezed, *of_gate = gradients(gate, squeezed, values, of_factor)
                of_squeezed = tf.cast(of_squeezed, scale.dtype) / area(x)
                of_values = [a if b is None else b for a, b in zip(of_values, of_gate, strict=True)]
            arguments = (x, of_y, scale, offset, factor, of_squeezed)
            of_norm = _swish_gradient(*arguments)
            if norm.trainable:
                return [*_batch_norm_gradient(norm, x, gamma, of_norm, reserved), *of_values]
            of_x = _swish_gradient(*arguments, slope=scale)
            return [of_x, *_scale_gradients(x, mean, deviation, of_norm), *of_values]

        return (outputs, mean, variance) if norm.trainable else outputs, gradient

    values = [tf.convert_to_tensor(weight.value) for weight in weights]
    results = with_gradient(x, *_scale_and_offset(norm), *values)
    if not norm.trainable:
        return results
    outputs, *moments = results
    _move_averages(norm, *moments)
    return outputs


def _call_with(weights: Sequence, function: Callable, x: Any, values: Sequence) -> Any:
    """Calls function(x) with values in the place of weights."""
    with keras.StatelessScope(list(zip(weights, values, strict=True))):
        return function(x)


def _gradients_with(
    weights: Sequence, function: Callable, x: Any, values: Sequence, upstream: Any
) -> list:
    """Returns the gradients at x and at each of the values."""
    import tensorflow as tf

    # The graph drops what nobody reads, as the convolution's output.
    with tf.GradientTape() as tape:
        tape.watch([x, *values])
        y = _call_with(weights, function, x, values)
    return tape.gradient(y, [x, *values], upstream)


def area(x: Any) -> Any:
    """The pixels of each image of (n, h, w, c), float32."""
    height, width = x.shape[1:3] if None not in x.shape[1:3] else ops.shape(x)[1:3]
    return ops.cast(height * width, "float32")


def area_mean(x: Any) -> Any:
    """The mean over each image's area, (n, h, w, c) to (n, 1, 1, c), as x."""
    return ops.cast(area_sum(x) / area(x), x.dtype)


def area_sum(x: Any) -> Any:
    """The sum over each image's area, (n, h, w, c) to (n, 1, 1, c) float32.

    It is a product of matrices: TensorFlow's sums take up to twice the time, four in bfloat16.
    """
    n, h, w, c = ops.shape(x)
    # A power of two is exact; a small one keeps the sums within float16.
    weights = ops.full((n, 1, h * w), 2**-10, x.dtype)
    sums = ops.matmul(weights, ops.reshape(x, (n, h * w, c)))
    return ops.cast(sums[:, None], "float32") * 2**10


def _scale_and_offset(norm: layers.BatchNormalization) -> tuple[Any, Any]:
    return ops.cast(norm.gamma, "float32"), ops.cast(norm.beta, "float32")


def _move_averages(norm: layers.BatchNormalization, mean: Any, variance: Any) -> None:
    for moving, value in ((norm.moving_mean, mean), (norm.moving_variance, variance)):
        before = ops.cast(moving, "float32")  # the model may be of another dtype than its moments
        moved = before * norm.momentum + value * (1.0 - norm.momentum)
        moving.assign(ops.cast(moved, moving.dtype))


def _batch_norm(norm: layers.BatchNormalization, x: Any, gamma: Any, beta: Any) -> tuple:
    """Returns what is normalised, its mean and variance, and what the gradient reads beside."""
    import tensorflow as tf

    with tf.name_scope(norm.name):
        y, mean, variance, *reserved = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=[],
            variance=[],
            epsilon=norm.epsilon,
            is_training=True,
        )
    count = ops.cast(ops.shape(x)[0], "float32") * area(x)
    variance *= (count - 1.0) / count  # the kernel's is the unbiased one, Keras's is not
    return y, mean, variance, reserved


def _batch_norm_gradient(
    norm: layers.BatchNormalization, x: Any, gamma: Any, upstream: Any, reserved: list
) -> Sequence:
    """Returns the gradients of `_batch_norm` at x, gamma and beta."""
    import tensorflow as tf

    spaces = {f"reserve_space_{index}": space for index, space in enumerate(reserved, start=1)}
    with tf.name_scope(f"gradient_tape/{norm.name}"):
        return tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=upstream,
            x=x,
            scale=gamma,
            epsilon=norm.epsilon,
            is_training=True,
            **spaces,
        )[:3]


def _scale_gradients(x: Any, mean: Any, deviation: Any, upstream: Any) -> tuple[Any, Any]:
    """Returns the gradients at gamma and beta where mean and deviation are constants."""
    upstream, x = ops.cast(upstream, mean.dtype), ops.cast(x, mean.dtype)
    of_gamma = ops.sum(upstream * (x - mean), axis=(0, 1, 2)) * deviation
    return of_gamma, ops.sum(upstream, axis=(0, 1, 2))


def pointwise(layer: layers.Conv2D, x: Any) -> Any:
    """As layer(x), a convolution of 1x1 without bias, as a product of matrices.

    The gradient at the filter then takes a third to nine tenths of the time.
    """
    import tensorflow as tf

    kernel = ops.cast(layer.kernel, x.dtype)[0, 0]
    *places, channels = ops.shape(x)
    with tf.name_scope(layer.name):
        y = tf.matmul(tf.reshape(x, [-1, channels]), kernel)
    return tf.reshape(y, [*places, layer.filters])


def depthwise(layer: layers.DepthwiseConv2D, x: Any) -> Any:
    """As layer(x); the gradient at a wide filter is computed by three columns at a time.

    Of wider ones oneDNN takes the kernel of grouped convolutions, in three to twenty times the
    time.
    """
    import tensorflow as tf

    height, width = layer.kernel_size
    if width <= COLUMNS:
        return layer(x)
    same = layer.padding == "same"
    (top, bottom), (left, right) = (
        ((size - 1) // 2, size // 2) if same else (0, 0) for size in (height, width)
    )
    options = {"strides": [1, *layer.strides, 1]}

    def columns(x: tf.Tensor, first: int) -> tf.Tensor:
        """What filter columns first to first + 3 meet, and no more."""
        before, after = left - first, right - (width - COLUMNS - first)
        x = x[:, :, max(0, -before) : ops.shape(x)[2] - max(0, -after)]
        return tf.pad(x, [[0, 0], [top, bottom], [max(0, before), max(0, after)], [0, 0]])

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.name_scope(f"gradient_tape/{layer.name}"):
                of_kernel = []
                for column in range(0, width, COLUMNS):
                    first = min(column, width - COLUMNS)
                    part = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                        input=columns(x, first),
                        filter_sizes=[height, COLUMNS, x.shape[-1], 1],
                        out_backprop=upstream,
                        padding="VALID",
                        **options,
                    )
                    of_kernel.append(part[:, column - first :])
                of_x = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                    input_sizes=tf.shape(x),
                    filter=kernel,
                    out_backprop=upstream,
                    padding=layer.padding.upper(),
                    **options,
                )
            return of_x, tf.concat(of_kernel, axis=1)

        with tf.name_scope(layer.name):
            y = tf.nn.depthwise_conv2d(x, kernel, padding=layer.padding.upper(), **options)
        return y, gradient

    return with_gradient(x, ops.cast(layer.kernel, x.dtype))


def _on_cpu() -> bool:
    """Whether TensorFlow computes, and on a CPU: a GPU's or a TPU's own compiler fuses better."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not any(map(tf.config.list_logical_devices, ("GPU", "TPU")))


def _swish(x: Any, scale: Any, offset: Any, factor: Any = None) -> Any:
    """Returns swish(x * scale + offset) * factor, as x."""
    return _in_one_loop(_swish_formula)(x, scale, offset, factor)


def _swish_formula(x: Any, scale: Any, offset: Any, factor: Any) -> Any:
    y = x * scale + offset
    y *= ops.sigmoid(y)
    return y if factor is None else y * factor


def _swish_gradient(
    x: Any, of_y: Any, scale: Any, offset: Any, factor: Any, of_mean: Any, slope: Any = None
) -> Any:
    """Returns the gradient at x * scale + offset, as x.

    Args:
        x: (n, h, w, c).
        of_y: the gradient at swish * factor, as x.
        scale: (c,).
        offset: (c,).
        factor: (n, 1, 1, c) or None.
        of_mean: what to add to the gradient at swish, (n, 1, 1, c) or None.
        slope: what to multiply the result by, (c,) or None.
    """
    return _in_one_loop(_gradient_formula)(x, of_y, scale, offset, factor, of_mean, slope)


def _gradient_formula(
    x: Any, of_y: Any, scale: Any, offset: Any, factor: Any, of_mean: Any, slope: Any
) -> Any:
    y = x * scale + offset
    s = ops.sigmoid(y)
    upstream = of_y if factor is None else of_y * factor + of_mean
    result = upstream * (s + y * s * (1 - s))
    return result if slope is None else result * slope


def gelu_for(activation: Callable, x: Any) -> Callable:
    """Returns the function to train with in place of `activation`: for gelu, `gelu`.

    Args:
        activation: of BERT's feed-forward layer.
        x: what that layer takes.
    """
    if not _on_cpu() or x.dtype == "float64":
        return activation
    return gelu if activation is get_activation("gelu") else activation


def gelu(x: Any) -> Any:
    """As `activations.gelu(x, approximate=False)`; keeps nothing but x for the gradient."""
    import tensorflow as tf

    @tf.custom_gradient
    def with_gradient(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return _in_one_loop(_gelu_formula)(x), functools.partial(_in_one_loop(_gelu_gradient), x)

    return with_gradient(x)


def _gelu_formula(x: Any) -> Any:
    return x * _normal_cdf(x)


def _gelu_gradient(x: Any, upstream: Any) -> Any:
    density = ops.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return upstream * (_normal_cdf(x) + x * density)


def _normal_cdf(x: Any) -> Any:
    return 0.5 + 0.5 * ops.erf(x * 2**-0.5)


@functools.cache
def _in_one_loop(formula: Callable) -> Callable:
    """Returns an elementwise formula, in float32, as XLA compiles it, once for each shape."""
    import tensorflow as tf

    @tf.function(jit_compile=True, reduce_retracing=True)
    def compiled(*values: tf.Tensor | None) -> tf.Tensor:
        wide = [value if value is None else tf.cast(value, "float32") for value in values]
        return tf.cast(formula(*wide), values[0].dtype)

    return lambda x, *others: tf.ensure_shape(compiled(x, *others), x.shape)
