"""The initial values of weights: drawn, or none where a checkpoint is about to fill them."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import keras
from keras import ops

from align_tf.configuration.text import AlignTextConfig
from align_tf.configuration.vision import AlignVisionConfig

_blank: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("blank", default=None)


@contextlib.contextmanager
def no_init_weights() -> Iterator[None]:
    """Draws no weights for models built inside it, which spares time and memory.

    They start at zero, those of one shape in the same memory until they are assigned.
    """
    zeros = functools.cache(ops.zeros)
    token = _blank.set(zeros)
    try:
        yield
    finally:
        _blank.reset(token)
        zeros.cache_clear()


def kernel_initializer(config: AlignTextConfig | AlignVisionConfig) -> Callable:
    """Returns the tower's initializer: normal, with the deviation of its configuration."""
    return _blank.get() or keras.initializers.RandomNormal(stddev=config.initializer_range)
