"""Which rows are the same image, and which the same text: those that the model is given alike."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from align_tf.preprocessing.tokenization import TOKEN_INPUTS


def image_contents(pixel_values: Any) -> list[bytes]:
    """Returns what stands for the pixels of each image.

    A million images do not fit into memory, so it is a digest of all of their pixels: of 512 bits
    and cryptographic, so that no two images of one digest are known or can be made.

    Args:
        pixel_values: (n, h, w, 3).

    Returns:
        n digests.
    """
    images = np.ascontiguousarray(pixel_values, np.float32)
    return [hashlib.blake2b(image).digest() for image in images]


def text_contents(inputs: Mapping[str, Any]) -> list[bytes]:
    """Returns the tokens of each text, whole, without the padding after them.

    Args:
        inputs: `input_ids`, and `attention_mask` and `token_type_ids` where there are, (m, t).

    Returns:
        m strings of bytes.
    """
    ids = np.asarray(inputs["input_ids"])
    parts = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), **inputs}
    rows = np.stack([np.asarray(parts[name]) for name in TOKEN_INPUTS], axis=1).astype(np.int32)
    mask = np.asarray(parts["attention_mask"]) != 0
    ends = np.where(mask, np.arange(1, ids.shape[1] + 1), 0).max(axis=1, initial=0)
    return [row[:, :end].tobytes() for row, end in zip(rows, ends, strict=True)]


class Numbering:
    """Numbers contents in the order of their first rows, from 0: one number, one content."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def __call__(self, contents: Iterable[bytes]) -> np.ndarray:
        """Returns the numbers of some more rows, (n,)."""
        numbers = self._numbers
        return np.array([numbers.setdefault(one, len(numbers)) for one in contents], np.int64)


class RowIds:
    """The ids of a data set's rows: those that its batches give, or numbers of the contents.

    Args:
        name: `image_ids` or `text_ids`.
    """

    def __init__(self, name: str):
        self.name, self._number = name, Numbering()
        self._given: bool | None = None

    def __call__(
        self, given: np.ndarray | None, contents: Callable[[], list[bytes]], count: int
    ) -> np.ndarray:
        """Returns the ids of some more rows.

        Args:
            given: (n,), None where the batch has none; those below 0 are fingerprints, which two
                contents may share.
            contents: gives those of the rows.
            count: n.

        Raises:
            ValueError: some rows have an id of 0 or more, and some have not.
        """
        if not count:
            return np.zeros(0, np.int64)
        own = np.zeros(count, bool) if given is None else given >= 0
        if self._given is None:
            self._given = bool(own.flat[0])
        if (own != self._given).any():
            raise ValueError(f"{self.name}: expected ids of 0 or more for all rows, or for none")
        return given if self._given else self._number(contents())
