"""Records that are no pairs: why they are left out, told on stderr, and where they are too many."""

import atexit
import collections
import numbers
import sys
import threading
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from align_tf.data.limit import share_of
from align_tf.data.sources import Source
from align_tf.preprocessing.decoding import reading
from align_tf.preprocessing.image_processing import BROKEN, FINE, TOO_LARGE

# Why a record is left out, beside what AlignImageProcessor.try_pixel_values tells.
NO_IMAGE, NO_CAPTION = TOO_LARGE + 1, TOO_LARGE + 2
REASONS = {
    BROKEN: f"not a decodable image ({reading.EXPECTED})",
    TOO_LARGE: "the image declares more pixels than max_image_pixels",
    NO_IMAGE: "no image, or its file cannot be read",
    NO_CAPTION: "no caption",
}
NAMED_ERRORS = 10  # told one by one
JUDGED_FROM = 1000  # records: of fewer a share says little, before they are all that there are


def tally(problems: Mapping[int, int], opened: Source | None) -> str:
    """Says how often each problem was met, and its usual cause in such a source, if it is one."""
    return ", ".join(
        f"{count} x {_because(problem, opened)}" for problem, count in problems.items()
    )


def _because(problem: int, opened: Source | None) -> str:
    cause = opened.image_cause if opened and problem == NO_IMAGE else ""
    return REASONS[problem] + (f" ({cause})" if cause else "")


class LeftOut:
    """Counts the records that are left out, each once, and tells of them on stderr.

    Args:
        opened: the source.
        limit: how many of them are too many, see `make_dataset`.
        pass_steps: the steps of one pass; None where they are not known.
    """

    def __init__(self, opened: Source, limit: int | str | None, pass_steps: range | None):
        self.opened, self.limit, self.pass_steps = opened, limit, pass_steps
        self.keys: set[bytes] = set()
        self.lock = threading.Lock()
        # What is judged: of the first pass each step once, whose steps come in any order and mixed
        # with those of the next; then all.
        self.steps, self.whole = set(), False
        self.read, self.problems = 0, collections.Counter()
        self.verdict = ""

    def report(self, step: tf.Tensor, keys: tf.Tensor, problems: tf.Tensor) -> tf.Operation:
        """Tells of the rows that are no pairs; ends the dataset where they are too many.

        Args:
            step: the number of the batch, int64.
            keys: of its records, (m,).
            problems: of its rows, (n,), n >= m: those that fill a last batch are no errors.
        """
        values = [step, keys, problems[: tf.size(keys)]]
        message = tf.numpy_function(self._count, values, tf.string)
        return tf.debugging.Assert(message == "", [message])

    def ended(self) -> tf.Tensor:
        """Judges what was read when there is no more of it; returns 0, int64."""
        message = tf.numpy_function(lambda: self._judge(True), [], tf.string)
        with tf.control_dependencies([tf.debugging.Assert(message == "", [message])]):
            return tf.cast(tf.strings.length(message), tf.int64)

    def summarise(self) -> None:
        self._say(f"records left out: {len(self.keys)}")

    def _count(self, step: np.ndarray, keys: np.ndarray, problems: np.ndarray) -> str:
        """Takes keys and problems (m,); returns a message where it is too much, or ""."""
        bad = problems != FINE
        with self.lock:
            for key, problem in zip(keys[bad], problems[bad].tolist(), strict=True):
                message = self._leave_out(key, problem)
                if message:
                    return message
            if self._is_judged(int(step)):
                self.read += len(keys)
                self.problems.update(problems[bad].tolist())
            return self._judge(self._is_whole())

    def _is_judged(self, step: int) -> bool:
        if self.whole or self.pass_steps is None:
            return True
        new = step in self.pass_steps and step not in self.steps
        self.steps.update([step] if new else [])
        return new

    def _is_whole(self) -> bool:
        """Whether a pass is over, or what was read of it is enough to judge by."""
        over = self.pass_steps is not None and len(self.steps) == len(self.pass_steps)
        enough = self.read >= JUDGED_FROM and self.problems.total() < self.read
        if not self.whole and (over or enough):
            self.whole = True
            self.steps.clear()
        return self.whole

    def _leave_out(self, key: bytes, problem: int) -> str:
        known = key in self.keys
        self.keys.add(key)
        count, name = len(self.keys), key.decode(errors="replace")
        if isinstance(self.limit, numbers.Integral) and count > self.limit:
            left_out = f", {count} records left out" if self.limit else ""
            because = _because(problem, self.opened)
            return f"{self.opened.name}: {name}: {because}{left_out}; max_errors={self.limit}"
        # Past the limit a known one ends the dataset too: `fit` on JAX throws away the first
        # iterator, with the error that it has met.
        if known:
            return ""
        if count == 1:
            atexit.register(self.summarise)
        # Each of the first ones, then each time they have doubled.
        if count <= NAMED_ERRORS or count & (count - 1) == 0:
            reason = _because(problem, self.opened) if count == 1 else REASONS[problem]
            self._say(f"left out {name}: {reason} ({count} so far)")
        return ""

    def _judge(self, whole: bool) -> str:
        """Returns a message where no record is a pair, or too large a share is none; or ""."""
        left_out, share = self.problems.total(), share_of(self.limit)
        if self.verdict or not left_out:
            return self.verdict
        found, of_all = "", tally(self.problems, self.opened)
        if whole and left_out == self.read:
            found = f"none of {self.read} records is a pair: {of_all}"
        elif share is not None and left_out > share * self.read:
            found = f"{left_out} of {self.read} records left out, {left_out / self.read:.1%}; "
            found += f"max_errors={self.limit}: {of_all}"
            found = found if whole or self.read >= JUDGED_FROM else ""
        self.verdict = f"{self.opened.name}: {found}" if found else ""
        return self.verdict

    def _say(self, message: str) -> None:
        print(f"{self.opened.name}: {message}", file=sys.stderr, flush=True)
