"""Keras's files of weights, with an adapter beside the weights, where Keras merges it into them."""

import os
from typing import Any

import numpy as np

from align_tf.models import lora
from align_tf.models.adapters import Adapters
from align_tf.models.sharded_state import check_gathered, check_not_gathered, undistributed

# Of an adapted layer what a file has, after its name: the two matrices, and the factor of both.
PARTS = ("lora_a", "lora_b", "lora_scale")


class _State:
    """To Keras one thing, and none of its own."""

    def __init__(self) -> None:
        self.beside = False  # whether the file that is written has the adapter beside the weights
        self.read: dict[str, np.ndarray] = {}  # of the file that was read


class WeightFiles(Adapters):
    """`save_weights` and `load_weights` of a model that may be adapted.

    Keras's callbacks take them, such as `BackupAndRestore`. Merged, the weights would no longer be
    those that the adapter is of, and the adapter that goes on from them would be another one.
    """

    def save_weights(
        self, filepath: str | os.PathLike, overwrite: bool = True, max_shard_size: Any = None
    ) -> None:
        """As Keras's; the active adapter is beside the weights, for a model that has one like it.

        Args:
            filepath: as Keras takes it.
            overwrite: as Keras takes it.
            max_shard_size: as Keras takes it.

        Raises:
            ValueError: a weight lies in parts in several processes.
        """
        check_gathered(self.weights)
        adapted = list(self._adapted().values()) if self.active_adapter is not None else []
        self._park()
        self._file.beside = bool(adapted)
        try:
            for layer in adapted:
                layer.lora_enabled = False  # else Keras merges
            with undistributed():
                super().save_weights(filepath, overwrite=overwrite, max_shard_size=max_shard_size)
        finally:
            self._file.beside = False
            for layer in adapted:
                layer.lora_enabled = True

    def get_weights(self) -> list[np.ndarray]:
        check_gathered(self.weights)
        return super().get_weights()

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **options: Any) -> None:
        """As Keras's; where the file has no adapter, that of the model stays.

        Args:
            filepath: as Keras takes it.
            skip_mismatch: as Keras takes it.
            **options: as Keras takes them.

        Raises:
            ValueError: the file has an adapter, and the model none like it; or the model is
                gathered to be saved.
        """
        check_not_gathered(self)
        self._park()  # Keras empties it
        try:
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **options)
            self._check_like(filepath)
            self._take(self._file.read)
        finally:
            self._file.read = {}
            # Not by `set_adapter`: within `fit` what was traced for it goes on.
            for name, layer in self._adapted().items() if self.active_adapter is not None else ():
                for side, value in zip(lora.sides(layer), self._sides[name], strict=True):
                    side.assign(value)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self._file.beside:
            for name, value in self._parts().items():
                store[name] = value

    def load_own_variables(self, store: Any) -> None:
        read = {name: np.array(store[name]) for name in store.keys() if name.endswith(PARTS)}  # noqa: SIM118
        self._file.read = read
        super().load_own_variables({n: store[n] for n in store.keys() if n not in read})  # noqa: SIM118

    @property
    def _file(self) -> _State:
        if "_own_file" not in vars(self):
            self._own_file = _State()
        return self._own_file

    @property
    def _sides(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The matrices of the active adapter, as `_park` took note of them."""
        return {} if self.active_adapter is None else self._all.held[self.active_adapter].sides

    def _parts(self) -> dict[str, np.ndarray]:
        """Returns what a file has of the active adapter, by the names that it has there."""
        return {
            f"{name}.{part}": value
            for name, pair in self._sides.items()
            for part, value in zip(PARTS, (*pair, self._factor(name)), strict=True)
        }

    def _factor(self, name: str) -> np.ndarray:
        return np.array(self._all.held[self.active_adapter].config.scale(name))

    def _check_like(self, filepath: Any) -> None:
        found, expected = self._file.read, self._parts()
        for name in {**expected, **found} if found else {}:
            one, other = found.get(name), expected.get(name)
            like = one is not None and other is not None and np.shape(one) == np.shape(other)
            if not like or (name.endswith(PARTS[-1]) and not np.isclose(one, other)):
                raise ValueError(
                    f"{filepath}: has an adapter, and of {name} another one than the model: "
                    "expected enable_lora as it was where the file was written"
                )

    def _take(self, read: dict[str, np.ndarray]) -> None:
        for name in self._sides if read else ():
            self._sides[name] = tuple(read[f"{name}.{part}"] for part in PARTS[:2])
