"""The files that a source is made of, with sizes and times: they tell later whether it changed."""

import array
import hashlib
import os
import zipfile
import zlib

import numpy as np

from align_tf import addresses
from align_tf.files import replacing

NAMED = 3  # of the files that have changed

# What numpy raises of a file that is gone, cut off or changed.
BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


class Listing:
    """Files with their sizes and times, in the order in which they are read.

    Attributes:
        paths: of the files.
        sizes: in bytes; -1 of a file that is not there.
        times: of their last change, in nanoseconds, or of a remote one what tells its content; 0
            where the time does not count.
        records: how many the files hold; None where nobody has counted them.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes, self.times = array.array("q"), array.array("q")
        self.records: int | None = None

    def add(self, path: str | os.PathLike, timed: bool = True) -> None:
        """Looks at one more file; without `timed` its time does not count."""
        self.paths.append(os.fspath(path))
        size, time = addresses.state(os.fspath(path)) or (-1, 0)
        self.sizes.append(size)
        self.times.append(time if timed else 0)

    def extend(self, other: "Listing") -> None:
        """Adds the files of another listing."""
        self.paths += other.paths
        self.sizes += other.sizes
        self.times += other.times

    def save(self, path: addresses.Place) -> None:
        """Writes the listing as a file that `read` takes."""
        paths = np.frombuffer(b"\0".join(map(os.fsencode, self.paths)), np.uint8)
        columns = {"paths": paths, "sizes": self.sizes, "times": self.times}
        if self.records is not None:
            columns["records"] = self.records
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **columns)

    @classmethod
    def read(cls, path: addresses.Place) -> "Listing | None":
        """Reads what `save` wrote; None where it is gone or broken.

        Raises:
            AddressError: it is remote, and cannot be reached.
        """
        listing = cls()
        try:
            with addresses.fetched(path) as file, np.load(file) as columns:
                listing.paths = [os.fsdecode(p) for p in columns["paths"].tobytes().split(b"\0")]
                listing.sizes.extend(columns["sizes"])
                listing.times.extend(columns["times"])
                listing.records = int(columns["records"]) if "records" in columns else None
        except addresses.AddressError:  # it may well be there
            raise
        except BROKEN:
            return None
        return listing

    def digest(self) -> str:
        """Returns what tells this listing from another, 32 hexadecimal digits."""
        digest = hashlib.sha256(self.sizes.tobytes() + self.times.tobytes())
        for path in self.paths:
            digest.update(os.fsencode(path) + b"\0")
        return digest.hexdigest()[:32]

    def changes(self, now: "Listing", root: str = "") -> str:
        """Says what has changed since, such as `a.png replaced, b.png gone, c.png new, and 3 more`.

        Args:
            now: the listing of today.
            root: a folder that names are told relative to.

        Returns:
            The changes, or "" where there is none.
        """
        old, new = (
            dict(zip(one.paths, zip(one.sizes, one.times, strict=True), strict=True))
            for one in (self, now)
        )
        changed = [
            path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)
        ]
        told = [
            f"{path.removeprefix(os.path.join(root, ''))} {_change(old.get(path), new.get(path))}"
            for path in changed[:NAMED]
        ]
        more = len(changed) - len(told)
        return ", ".join(told) + (f", and {more} more" if more else "")


def _change(old: tuple[int, int] | None, new: tuple[int, int] | None) -> str:
    """Says what became of a file of a size and a time."""
    was, there = (one is not None and one[0] >= 0 for one in (old, new))
    if was and there:
        return "replaced"
    return "new" if there else "gone"
