"""The activations of both towers, by the names that Hugging Face gives them."""

import functools
from collections.abc import Callable

from keras import activations

ACTIVATIONS = {
    "gelu": functools.partial(activations.gelu, approximate=False),
    "gelu_new": functools.partial(activations.gelu, approximate=True),
    "mish": activations.mish,
    "relu": activations.relu,
    "selu": activations.selu,
    "silu": activations.silu,
    "swish": activations.silu,
}


def get_activation(name: str | Callable) -> Callable:
    """Returns the function of that name, or the callable itself."""
    return name if callable(name) else ACTIVATIONS[name]
