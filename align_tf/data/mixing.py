"""Several sources drawn by weights: how much of each batch is whose, and their records in one."""

import dataclasses
import fractions
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf.data.sources import Source

HALF = fractions.Fraction(1, 2)
ORDER = -1  # beside the numbers of sources, in the seeds of what is drawn

_graph = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources that are drawn by weights, each shuffled and repeated for itself.

    How many pairs of a training are of each source follows from their number alone, so that what
    comes after a checkpoint needs none of what was drawn before.

    Attributes:
        sources: of which each has a number, its place.
        shares: of the pairs, one for each source; their sum is 1.
    """

    sources: Sequence[Source]
    shares: Sequence[fractions.Fraction]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def count(self) -> int | None:
        """The records of all sources; None where one does not say."""
        counts = [source.count for source in self.sources]
        return None if None in counts else sum(counts)

    def drawn(self, pairs: int) -> list[int]:
        """Says how many of the first pairs of a training are of each source.

        That is its share of them, to within half a pair for each source that there is; it grows
        with them, so that each batch has the difference between its end and its beginning.
        """
        left, rest, found = pairs, fractions.Fraction(1), []
        for share in self.shares:
            found.append(math.floor(left * share / rest + HALF))  # all, of the last one
            left, rest = left - found[-1], rest - share
        return found

    def pass_steps(self, number: int, size: int, start_step: int) -> range:
        """Returns the steps from `start_step` on in which a source of a known length is read once.

        Args:
            number: of the source.
            size: pairs in a batch.
            start_step: the first of them.
        """
        end = self.drawn(start_step * size)[number] + self.sources[number].count
        low, high = start_step, start_step + 1
        while self.drawn(high * size)[number] < end:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.drawn(middle * size)[number] < end else (low, middle)
        return range(start_step, min(high, sys.maxsize))

    def check(self, size: int) -> None:
        """Checks that no source is smaller than its part of a batch.

        Raises:
            ValueError: one is; the message names it.
        """
        for source, share in zip(self.sources, self.shares, strict=True):
            part = f"its part of a batch of {size}"
            source.check(math.ceil(share * size), part, "weight or ")

    def batches(self, size: int, seed: int, start_step: int) -> tf.data.Dataset:
        """Returns the elements of each global batch from a step on, without an end."""
        firsts = self.drawn(start_step * size)
        streams = [self._numbered(number, firsts[number], seed) for number in range(len(firsts))]

        def parts(step: np.ndarray) -> np.ndarray:
            ends = (self.drawn((int(step) + more) * size) for more in (0, 1))
            return np.diff(list(ends), axis=0)[0]

        @_graph
        def order(step: tf.Tensor) -> tf.data.Dataset:
            counts = tf.ensure_shape(tf.numpy_function(parts, [step], tf.int64), len(self.sources))
            numbers = tf.repeat(tf.range(len(self.sources), dtype=tf.int64), counts)
            shuffled = tf.random.experimental.stateless_shuffle(
                numbers, tf.random.experimental.stateless_fold_in([seed, ORDER], step)
            )
            return tf.data.Dataset.from_tensor_slices(shuffled)

        choices = tf.data.Dataset.range(start_step, tf.int64.max).flat_map(order)
        mixed = tf.data.Dataset.choose_from_datasets(streams, choices)
        return mixed.ragged_batch(size, drop_remainder=True)

    def _numbered(self, number: int, first: int, seed: int) -> tf.data.Dataset:
        """Returns a source from a record on, without an end, in elements that all sources share.

        They are zipped, and not made by a function, which would be called for each.
        """
        passes = _endless(self.sources[number], first, [seed, number])
        elements, is_record = {"source": _always(number)}, self.sources[number].paths is None
        if any(source.paths is not None for source in self.sources):
            elements["row"] = _always(0) if is_record else passes
        if any(source.paths is None for source in self.sources):
            nothing = tuple(map(_always, ("", "", tf.constant([], tf.string))))
            elements["record"] = passes if is_record else nothing
        return tf.data.Dataset.zip(elements)

    def load(self, elements: dict[str, Any]) -> dict[str, Any]:
        """Takes a batch of elements to what `Source.load` returns, and `source`, their numbers."""
        numbers, places, parts = elements["source"], [], []
        for number, source in enumerate(self.sources):
            mine = numbers == number
            of_all = elements["record" if source.paths is None else "row"]
            picked = tf.nest.map_structure(lambda x: tf.ragged.boolean_mask(x, mine), of_all)  # noqa: B023
            parts.append(source.load(picked))
            places.append(tf.where(mine)[:, 0])
        back = tf.argsort(tf.concat(places, 0))
        loaded = {
            name: tf.gather(tf.concat([part[name] for part in parts], 0), back) for name in parts[0]
        }
        return {**loaded, "source": numbers}


def _always(value: Any) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors(value).repeat()


def _endless(source: Source, first: int, seed: Sequence[int]) -> tf.data.Dataset:
    """Returns pass after pass of a source, each in an order of its own, from a record on."""
    first_pass, skipped = divmod(first, source.count) if source.count else (0, 0)

    @_graph
    def one_pass(which: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_fold_in(seed, which)
        left_out = tf.where(which == first_pass, skipped, 0)
        return source.elements(order).skip(tf.cast(left_out, tf.int64))

    passes = tf.data.Dataset.range(first_pass, tf.int64.max).flat_map(one_pass)
    passes = passes if source.count else passes.skip(first)
    ragged = any(
        not isinstance(spec, tf.TensorSpec) for spec in tf.nest.flatten(passes.element_spec)
    )
    return passes.map(_graph(lambda *record: record)) if ragged else passes  # captions: a tensor
