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


def check_plain(*changed: layers.Layer) -> None:
    """Checks that layers hold a kernel or a table alone, of which rows and columns can be taken.

    Raises:
        ValueError: LoRA or a quantization is on one of them.
    """
    for layer in changed:
        lora = "has LoRA" if getattr(layer, "lora_enabled", False) else None
        found = f"is quantized to {layer.quantization_mode}" if layer.quantization_mode else lora
        if found:
            raise ValueError(
                f"{layer.path} {found}: resize and prune before it, or in what from_pretrained "
                "loads of what save_pretrained wrote"
            )


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
