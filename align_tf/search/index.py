"""The index over a collection: built with FAISS, and read from its folder."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from align_tf import files
from align_tf.addresses import (
    Place,
    absolute,
    fetched_folder,
    is_local,
    is_remote,
    names,
    naming,
    place,
    send_folder,
)
from align_tf.progress import track
from align_tf.search import own_pictures
from align_tf.search.collection import COLUMNS, Collection
from align_tf.search.recall import tune
from align_tf.search.required import require_faiss
from align_tf.search.vectors import as_float32, evenly_spread
from align_tf.terminal import say

KINDS = ("flat", "ivf")
FLAT_ROWS = 100_000  # up to so many every vector is compared
LISTS_PER_ROOT = 4  # of an inverted file: the lists are so many times the root of the rows
TRAINING_ROWS = 64  # of each list
ITERATIONS = 10  # of k-means
TOP_K = 10

SUMMED = 256 * 2**20  # bytes: of a larger file the size alone is looked at when it is opened
BLOCK = 2**20
HEADER = 32  # bytes that FAISS writes before the vectors, at least

INDEX_NAME, RECORDS_NAME, ABOUT_NAME = "index.faiss", "records.arrow", "index.json"


@dataclasses.dataclass(frozen=True)
class Hit:
    """One image found.

    Attributes:
        score: cosine of the query and the image, -1..1.
        id: the record's key.
        path: the image file or its address; None where the image is in a shard.
        caption: None where it has none.
        thumbnail: a small JPEG of an image that is in a shard or remote.
        outside: whether the image file is not below the folder whose pictures are shown.
    """

    score: float
    id: str
    path: str | None
    caption: str | None
    thumbnail: bytes | None = dataclasses.field(default=None, repr=False)
    outside: bool = False

    @property
    def picture(self) -> str | bytes | None:
        """What shows the image: its file, or the thumbnail; None where it is not to be shown."""
        return self.thumbnail or (None if self.outside else self.path)


# --- the index -----------------------------------------------------------------------------


def build_index(
    embeddings: str | os.PathLike,
    output: str | os.PathLike,
    *,
    kind: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Builds a FAISS index over the image embeddings of a collection.

    `flat` compares a query with every vector. `ivf`, an inverted file (Sivic and Zisserman,
    2003), compares it with those of the lists whose centers are nearest: as many lists as recall
    needs, measured with images of the collection, each without itself, and with its captions.
    Vectors keep the dtype of the collection, so float16 takes half the memory.

    Args:
        embeddings: the folder that `embed` wrote.
        output: the folder of the index; an index that is there is replaced.
        kind: `flat` or `ivf`; None takes flat up to 100,000 images.
        progress: show it on stderr.

    Returns:
        What `index.json` in the folder holds: `kind`, `rows`, `dim`, `dtype`, `nlist` and
        `nprobe` of an ivf, `recall_at_10` against exact search by the kind of query, `model`,
        `fingerprint`, `embeddings`, and `pictures`, the folder that was embedded, signed, and
        `files`, sizes and checksums.

    Raises:
        FileNotFoundError, ValueError: as `Collection`; or the output is no index, or kind is
            unknown.
        ModuleNotFoundError: FAISS is not installed.
    """
    require_faiss()
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r}: expected {' or '.join(KINDS)}")
    collection, output = Collection(embeddings), place(output)
    if _is_taken(output):
        raise ValueError(f"{output}: there already, and no index; expected another folder")
    if kind is None:
        kind = "flat" if collection.rows <= FLAT_ROWS else "ivf"
    index = _flat(collection) if kind == "flat" else _trained_ivf(collection, progress)
    shards = collection.image_embeds()
    for embeds in track(shards, "Indexing", collection.settings.shards, show=progress):
        index.add(as_float32(embeds))
    recall = tune(index, kind, collection, progress)
    about = {
        "kind": kind,
        "rows": collection.rows,
        "dim": collection.settings.dim,
        "dtype": collection.settings.dtype,
        **({"nlist": index.nlist, "nprobe": index.nprobe} if kind == "ivf" else {}),
        "recall_at_10": recall,
        "model": collection.settings.model,
        "fingerprint": collection.settings.fingerprint,
        "embeddings": absolute(embeddings),
        "pictures": own_pictures.signed(collection.folder),
    }
    with _replacing_folder(output) as folder:
        _write(folder, index, collection, about)
    return about


def _is_taken(output: Place) -> bool:
    """Whether there is something that is no index."""
    if is_local(output) and output.exists() and not output.is_dir():
        return True
    there = names(output)
    return bool(there) and ABOUT_NAME not in there


def _flat(collection: Collection) -> Any:
    import faiss

    dim = collection.settings.dim
    if collection.settings.dtype == "float32":
        return faiss.IndexFlatIP(dim)
    half = faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT)


def _trained_ivf(collection: Collection, progress: bool) -> Any:
    import faiss

    dim, rows = collection.settings.dim, collection.rows
    lists = min(max(1, round(LISTS_PER_ROOT * rows**0.5)), rows)
    centers = faiss.IndexFlatIP(dim)
    if collection.settings.dtype == "float32":
        index = faiss.IndexIVFFlat(centers, dim, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFScalarQuantizer(centers, dim, lists, half, metric, False)
    index.cp.niter, index.cp.spherical = ITERATIONS, True
    index.cp.min_points_per_centroid = 1  # so that FAISS does not warn of a small collection
    sample = evenly_spread(collection.image_embeds(), rows, lists * TRAINING_ROWS)
    if progress:
        say(f"Training {lists:,} lists on {len(sample):,} images ...")
    index.train(sample)
    return index


@contextlib.contextmanager
def _replacing_folder(folder: Place) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, which takes the place of `folder` if the block ends well."""
    if not is_local(folder):
        with tempfile.TemporaryDirectory(prefix="align_tf-") as temporary:
            yield pathlib.Path(temporary)
            send_folder(pathlib.Path(temporary), folder, last=ABOUT_NAME)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = pathlib.Path(temporary, "new"), pathlib.Path(temporary, "old")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def _write(folder: pathlib.Path, index: Any, collection: Collection, about: dict) -> None:
    import faiss
    import pyarrow as pa

    faiss.write_index(index, str(folder / INDEX_NAME))
    schema = pa.schema(COLUMNS)
    with pa.ipc.new_file(folder / RECORDS_NAME, schema) as file:
        for table in collection.tables(schema.names):
            file.write_table(table.cast(schema))
    about["files"] = {name: _sum(folder / name) for name in (INDEX_NAME, RECORDS_NAME)}
    files.write_text(folder / ABOUT_NAME, json.dumps(about, indent=2) + "\n")


# --- loading -------------------------------------------------------------------------------


class Index:
    """An index on disk, its files mapped into memory, not read.

    Args:
        folder: what `build_index` wrote; a remote one is copied to this machine.
        pictures: the folder whose pictures may be shown; None takes the one that was embedded, of
            an index of this user's. One that came from someone else may name any file.

    Attributes:
        about: what `build_index` returned.
        pictures: the folder whose pictures may be shown; None shows those of no file.

    Raises:
        FileNotFoundError: there is no index, or no such folder of pictures.
        ValueError: it is broken.
        ModuleNotFoundError: FAISS is not installed.
    """

    @naming()
    def __init__(self, folder: str | os.PathLike, pictures: str | os.PathLike | None = None):
        require_faiss()
        import faiss
        import pyarrow as pa

        self.folder = fetched_folder(place(folder))
        if not (self.folder / ABOUT_NAME).is_file():
            raise FileNotFoundError(f"{folder}: no index; expected what `align-tf index` wrote")
        with self._unbroken():
            self.about = files.read_json(self.folder / ABOUT_NAME)
            _check_about(self.folder, self.about)
            ivf = self.about["kind"] == "ivf"
            flags = faiss.IO_FLAG_MMAP if ivf else faiss.IO_FLAG_MMAP_IFC
            self._index = faiss.read_index(str(self.folder / INDEX_NAME), flags)
            _check_index(self._index, self.about)
            records = pa.memory_map(str(self.folder / RECORDS_NAME))
            self._records = pa.ipc.open_file(records).read_all()
            if self._records.schema != pa.schema(COLUMNS) or len(self._records) != len(self):
                raise ValueError("records of another kind or number")
        self.pictures = own_pictures.own_folder(self.about.get("pictures"))
        if pictures is not None:
            if not os.path.isdir(pictures):
                raise FileNotFoundError(f"{pictures}: no such folder of pictures")
            self.pictures = os.path.abspath(pictures)
        if ivf:
            # Threads that read every list once before it is searched pay on a cold disk alone.
            faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0

    def __len__(self) -> int:
        return self._index.ntotal

    def search(self, queries: np.ndarray, k: int = TOP_K) -> tuple[np.ndarray, np.ndarray]:
        """Finds the nearest images.

        Args:
            queries: (q, d), of unit length.
            k: how many.

        Returns:
            Cosines (q, k), falling, and rows (q, k), -1 where fewer are found; k is at most the
            number of images.

        Raises:
            ValueError: k or the width of the queries does not fit.
        """
        queries = as_float32(queries)
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise ValueError(f"queries of shape {queries.shape}: expected (q, {self._index.d})")
        if k < 1:
            raise ValueError(f"k={k}: expected 1 or more")
        with self._unbroken():
            return self._index.search(queries, min(k, len(self)))

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        """Takes the scores (k,) and rows (k,) of one query to what is known of the images."""
        hits = []
        for score, row in zip(scores, rows, strict=True):
            if row >= 0:
                with self._unbroken():
                    part = self._records.slice(int(row), 1)
                    part.validate(full=True)  # before it is read: what is broken leads anywhere
                    (record,) = part.to_pylist()
                path = record["path"]
                own = path is None or is_remote(path)  # shown by its thumbnail, if at all
                outside = not own and not own_pictures.is_below(path, self.pictures)
                hits.append(Hit(float(score), **record, outside=outside))
        return hits

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Makes one line of whatever FAISS, Arrow and JSON say of a broken file."""
        try:
            yield
        except (RuntimeError, MemoryError, OSError, ValueError) as error:
            raise ValueError(
                f"{self.folder}: a broken index; `align-tf index` builds it anew"
            ) from error


def _check_about(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Checks what an index says of itself, and its files where it says how they were."""
    kinds = {"kind": str, "rows": int, "dim": int, "model": str, "fingerprint": str}
    for name, kind in kinds.items():
        if type(about.get(name)) is not kind:
            raise ValueError(f"{name} {about.get(name)!r}")
    if about["kind"] not in KINDS or min(about["rows"], about["dim"]) < 1:
        raise ValueError(f"kind {about['kind']!r}, {about['rows']} rows of {about['dim']}")
    # FAISS reads beyond the end of a mapped file that is cut within its header.
    if (folder / INDEX_NAME).stat().st_size < HEADER + 2 * about["rows"] * about["dim"]:
        raise ValueError(f"{INDEX_NAME} is cut")
    said = about.get("files", {})
    for name in (INDEX_NAME, RECORDS_NAME) if said else ():
        if said != {**said, name: _sum(folder / name)}:
            raise ValueError(f"{name} has changed")


def _check_index(index: Any, about: dict[str, Any]) -> None:
    """Checks that an index of FAISS is one that `build_index` makes, and holds what it should."""
    import faiss

    flat = (faiss.IndexFlat, faiss.IndexScalarQuantizer)
    ivf = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
    if not isinstance(index, ivf if about["kind"] == "ivf" else flat):
        raise ValueError(f"a {type(index).__name__}")
    found = (index.ntotal, index.d, index.metric_type, index.is_trained)
    if found != (about["rows"], about["dim"], faiss.METRIC_INNER_PRODUCT, True):
        raise ValueError(f"rows, dimensions and metric {found}")
    half = isinstance(index, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer)
    if half and index.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
        raise ValueError(f"a quantizer of kind {index.sq.qtype}")
    width = about["dim"] * (2 if half else 4)  # bytes of a vector
    if index.code_size != width or (half and index.sq.code_size != width):
        raise ValueError(f"vectors of {index.code_size} bytes")
    if about["kind"] == "flat":
        held = index.codes.size()
    else:
        lists = faiss.downcast_InvertedLists(index.invlists)
        centers = faiss.downcast_index(index.quantizer)
        if (lists.nlist, centers.ntotal, centers.d) != (index.nlist, index.nlist, index.d):
            raise ValueError(f"{lists.nlist} lists")
        held = sum(lists.list_size(number) for number in range(lists.nlist)) * lists.code_size
    if held != index.ntotal * width:
        raise ValueError(f"{held} bytes of vectors")


def _sum(file: pathlib.Path) -> list[int]:
    """Returns a file's size and, unless it is large, its CRC-32."""
    size, crc = file.stat().st_size, 0
    with open(file, "rb") as data:
        while size <= SUMMED and (part := data.read(BLOCK)):
            crc = zlib.crc32(part, crc)
    return [size, crc]
