"""Changes to a built model: opened for new weights, a layer put in another's place."""

import contextlib
from collections.abc import Iterator

import keras
from keras import layers


def replace_layer(parent: layers.Layer, attribute: str, new: layers.Layer, values: list) -> None:
    """Puts a layer of another size in the place of a built one, under the same weight paths."""
    old = getattr(parent, attribute)
    with open_for_change(parent):
        new.build((None, None, values[0].shape[0]))
        new.set_weights(values)
        new.trainable = old.trainable
        parent._tracker.untrack(old)
        setattr(parent, attribute, new)


@contextlib.contextmanager
def open_for_change(layer: layers.Layer) -> Iterator[None]:
    """Lets a built layer take new weights and sublayers, under its own path."""
    # Keras closes a built layer to them; its own LoRA and quantization open it so.
    layer._tracker.unlock()
    try:
        with contextlib.ExitStack() as scopes:
            for part in layer.path.split("/"):
                scopes.enter_context(keras.name_scope(part))
            yield
    finally:
        layer._tracker.lock()
