"""The index over a collection: built with FAISS, and read from its folder."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from align_tf import files
from align_tf.extras import extra
from align_tf.progress import track
from align_tf.search.collection import COLUMNS, Collection
from align_tf.search.recall import tune
from align_tf.search.vectors import as_float32, evenly_spread

KINDS = ("flat", "ivf")
FLAT_ROWS = 100_000  # up to so many every vector is compared
LISTS_PER_ROOT = 4  # of an inverted file: the lists are so many times the root of the rows
TRAINING_ROWS = 64  # of each list
ITERATIONS = 10  # of k-means
TOP_K = 10

INDEX_NAME, RECORDS_NAME, ABOUT_NAME = "index.faiss", "records.arrow", "index.json"


@dataclasses.dataclass(frozen=True)
class Hit:
    """One image found.

    Attributes:
        score: cosine of the query and the image, -1..1.
        id: the record's key.
        path: the image file; None where the image is in a shard.
        caption: None where it has none.
        thumbnail: a small JPEG of an image that is in a shard.
    """

    score: float
    id: str
    path: str | None
    caption: str | None
    thumbnail: bytes | None = dataclasses.field(default=None, repr=False)

    @property
    def picture(self) -> str | bytes | None:
        """What shows the image: its file, or the thumbnail."""
        return self.path or self.thumbnail


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
        `fingerprint`, `embeddings`.

    Raises:
        FileNotFoundError, ValueError: as `Collection`; or the output is no index, or kind is
            unknown.
        ModuleNotFoundError: FAISS is not installed.
    """
    require_faiss()
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r}: expected {' or '.join(KINDS)}")
    files.check_local(output)
    collection, output = Collection(embeddings), pathlib.Path(output)
    if output.exists() and not (output / ABOUT_NAME).is_file():
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
        "embeddings": str(collection.folder.absolute()),
    }
    with _replacing_folder(output) as folder:
        _write(folder, index, collection, about)
    return about


def require_faiss() -> None:
    """Asks for the extra that an index needs.

    Raises:
        ModuleNotFoundError: FAISS is not installed.
    """
    with extra("search", "an index needs FAISS"):
        import faiss  # noqa: F401


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
        message = f"Training {lists:,} lists on {len(sample):,} images ..."
        print(message, file=sys.stderr, flush=True)
    index.train(sample)
    return index


@contextlib.contextmanager
def _replacing_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder, which takes the place of `folder` if the block ends well."""
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
    files.write_text(folder / ABOUT_NAME, json.dumps(about, indent=2) + "\n")


# --- loading -------------------------------------------------------------------------------


class Index:
    """An index on disk, its files mapped into memory, not read.

    Args:
        folder: what `build_index` wrote.

    Attributes:
        about: what `build_index` returned.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is broken.
        ModuleNotFoundError: FAISS is not installed.
    """

    def __init__(self, folder: str | os.PathLike):
        require_faiss()
        import faiss
        import pyarrow as pa

        self.folder = pathlib.Path(folder)
        if not (self.folder / ABOUT_NAME).is_file():
            raise FileNotFoundError(f"{folder}: no index; expected what `align-tf index` wrote")
        self.about = files.read_json(self.folder / ABOUT_NAME)
        flags = faiss.IO_FLAG_MMAP if self.about["kind"] == "ivf" else faiss.IO_FLAG_MMAP_IFC
        try:
            self._index = faiss.read_index(str(self.folder / INDEX_NAME), flags)
            records = pa.memory_map(str(self.folder / RECORDS_NAME))
            self._records = pa.ipc.open_file(records).read_all()
        except (RuntimeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{folder}: a broken index; `align-tf index` builds it anew"
            ) from error
        if self.about["kind"] == "ivf":
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
        return self._index.search(queries, min(k, len(self)))

    def hits(self, scores: np.ndarray, rows: np.ndarray) -> list[Hit]:
        """Takes the scores (k,) and rows (k,) of one query to what is known of the images."""
        return [
            Hit(float(score), **self._records.slice(int(row), 1).to_pylist()[0])
            for score, row in zip(scores, rows, strict=True)
            if row >= 0
        ]
