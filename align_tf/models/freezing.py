"""Freezing: a tower by block, and parts that stay frozen when Keras's `trainable` is set."""

from collections.abc import Iterable

from keras import layers

from align_tf.models.lora import freeze_base


class KeepsFrozen:
    """A layer some parts of which do not train even where it does.

    Keras hands a layer's `trainable` down to all that it holds: without this,
    `model.trainable = False; model.trainable = True` would have frozen BatchNorms train.
    """

    kept_frozen: tuple[str, ...] = ()  # the attributes that hold those parts
    base_frozen = False  # whether LoRA alone trains

    @property
    def trainable(self) -> bool:
        """Whether the layer trains; setting it sets that of all parts that are not kept frozen."""
        return layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        layers.Layer.trainable.fset(self, value)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for name in self.kept_frozen:
            getattr(self, name).trainable = False
        if self.base_frozen:
            freeze_base(self)


class Tower(KeepsFrozen):
    """Freezing by block, shared by the two towers."""

    def freeze(self, blocks: Iterable[int] | None = None) -> None:
        """Stops the tower from training.

        Args:
            blocks: indices of the blocks to freeze; None freezes the whole tower.

        Raises:
            ValueError: there is no block of that index.
        """
        self._set_trainable(blocks, False)

    def unfreeze(self, blocks: Iterable[int] | None = None) -> None:
        """Lets the tower train; takes what `freeze` takes."""
        self._set_trainable(blocks, True)
        self._trainable = True  # Keras's `tower.trainable = False` undone, of it and no block

    def _set_trainable(self, blocks: Iterable[int] | None, value: bool) -> None:
        # The tower itself stays trainable: Keras asks the parent before the child.
        chosen = self.layers if blocks is None else [self._block(index) for index in blocks]
        for layer in chosen:
            layer.trainable = value
        self._keep_frozen()

    def _block(self, index: int) -> layers.Layer:
        count = len(self.blocks)
        if not -count <= index < count:
            raise ValueError(f"block {index}: {self.name} has blocks 0 to {count - 1}")
        return self.blocks[index]
