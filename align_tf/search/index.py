"""Search over a collection: its FAISS index, and text, image and text+image queries."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from align_tf import files
from align_tf.client import AlignClient, Classification
from align_tf.evaluation.embedder import Embedder
from align_tf.extras import extra
from align_tf.models.align import AlignModel
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.progress import track
from align_tf.search.collection import COLUMNS, Collection, embed, fingerprint, load_model

__all__ = ["Hit", "Index", "Searcher", "build_index", "embed"]

KINDS = ("flat", "ivf")
FLAT_ROWS = 100_000  # up to so many every vector is compared
LISTS_PER_ROOT = 4  # of an inverted file: the lists are so many times the root of the rows
TRAINING_ROWS = 64  # of each list
ITERATIONS = 10  # of k-means
# The fewest lists are searched that find this share of the true neighbors. It is measured on
# other queries than will come.
RECALL = 0.96
NEIGHBORS = 10
QUERIES = 256  # of each kind, for measuring recall
TIE = 1e-5  # a neighbor this much less near than the last true one is one too
SAME_IMAGE = 0.99  # the similarity that two embeddings of one picture have at least

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
    collection, output = Collection(embeddings), pathlib.Path(output)
    if output.exists() and not (output / ABOUT_NAME).is_file():
        raise ValueError(f"{output}: there already, and no index; expected another folder")
    if kind is None:
        kind = "flat" if collection.rows <= FLAT_ROWS else "ivf"
    index = _flat(collection) if kind == "flat" else _trained_ivf(collection, progress)
    shards = collection.image_embeds()
    for embeds in track(shards, "Indexing", collection.settings.shards, show=progress):
        index.add(_float32(embeds))
    recall = _tune(index, kind, collection, progress)
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
    sample = _sample(collection.image_embeds(), rows, lists * TRAINING_ROWS)
    if progress:
        message = f"Training {lists:,} lists on {len(sample):,} images ..."
        print(message, file=sys.stderr, flush=True)
    index.train(sample)
    return index


def _sample(shards: Iterator[np.ndarray], rows: int, count: int) -> np.ndarray:
    """Takes `count` rows of `rows`, evenly spread, as float32."""
    wanted = np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int))
    parts, start = [], 0
    for embeds in shards:
        first, last = np.searchsorted(wanted, (start, start + len(embeds)))
        parts.append(_float32(embeds[wanted[first:last] - start]))
        start += len(embeds)
    return np.concatenate(parts)


def _float32(embeds: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(embeds, np.float32)


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


# --- recall --------------------------------------------------------------------------------


def _tune(index: Any, kind: str, collection: Collection, progress: bool) -> dict[str, float]:
    """Sets how many lists are searched, and returns recall@10 by the kind of query."""
    own = np.unique(np.linspace(0, collection.rows - 1, QUERIES).astype(int))
    queries = {"image": _sample(collection.image_embeds(), collection.rows, QUERIES)}
    texts = _some_texts(collection)
    if len(texts):
        queries["text"] = texts
    # An image is not its own neighbor.
    left_out = {"image": own, "text": np.full(len(texts), -1)}
    true = {
        name: _least_scores(collection, embeds, left_out[name], progress)
        for name, embeds in queries.items()
    }
    nprobe = 1
    while True:
        if kind == "ivf":
            index.nprobe = nprobe
        recall = {
            name: _recall(index, embeds, left_out[name], true[name])
            for name, embeds in queries.items()
        }
        if kind == "flat" or min(recall.values()) >= RECALL or nprobe == index.nlist:
            return {name: round(value, 4) for name, value in recall.items()}
        nprobe = min(nprobe + max(1, nprobe // 4), index.nlist)


def _some_texts(collection: Collection) -> np.ndarray:
    each = -(-QUERIES // collection.settings.shards)
    texts = np.concatenate([_float32(embeds[:each]) for embeds in collection.text_embeds()])
    return texts[np.unique(np.linspace(0, len(texts) - 1, QUERIES).astype(int))[: len(texts)]]


def _least_scores(
    collection: Collection, queries: np.ndarray, left_out: np.ndarray, progress: bool
) -> np.ndarray:
    """Finds how near the last of the true neighbors of each query is, by exact search (q,)."""
    best, start = np.full((len(queries), NEIGHBORS), -np.inf, np.float32), 0
    shards = collection.image_embeds()
    for embeds in track(shards, "Comparing", collection.settings.shards, show=progress):
        scores = queries @ _float32(embeds).T  # (q, n)
        inside = np.flatnonzero((left_out >= start) & (left_out < start + len(embeds)))
        scores[inside, left_out[inside] - start] = -np.inf
        best = np.partition(np.concatenate([best, scores], axis=1), -NEIGHBORS, axis=1)
        best = best[:, -NEIGHBORS:]
        start += len(embeds)
    return np.where(np.isfinite(best), best, np.inf).min(axis=1)


def _recall(
    index: Any, queries: np.ndarray, left_out: np.ndarray, least_scores: np.ndarray
) -> float:
    """Returns the share of the true neighbors that the index finds."""
    scores, rows = index.search(queries, NEIGHBORS + 1)
    counted = (rows >= 0) & (rows != left_out[:, None])
    near = counted & (scores >= least_scores[:, None] - TIE)
    wanted = min(NEIGHBORS, index.ntotal - (left_out[0] >= 0))
    return float(np.minimum(near.sum(axis=1) / max(wanted, 1), 1).mean()) if wanted else 1.0


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

    def search(self, queries: np.ndarray, k: int = NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
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
        queries = _float32(queries)
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


# --- queries -------------------------------------------------------------------------------


class Encoder:
    """A model in this process, asked as `AlignClient` asks one on a server.

    Args:
        model: the model.
        processor: its processor.
    """

    def __init__(self, model: AlignModel, processor: AlignProcessor):
        self.model, self.processor = model, processor
        self.embedder = Embedder(model)

    def embed_images(self, images: Any) -> np.ndarray:
        """Returns (n, d), of unit length, of what `AlignProcessor` takes as images."""
        return self.embedder.images(self.processor(images=images)["pixel_values"])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n, d), of unit length."""
        return self.embedder.texts(self.processor(text=list(texts), padding="longest"))

    def classify(self, images: Any, labels: Sequence[str], template: str = "{}") -> Classification:
        """Classifies images, as `AlignClient.classify` does."""
        if "{}" not in template:
            raise ValueError(f"template={template!r}: expected a {{}} for the label")
        texts = self.embed_texts([template.replace("{}", label) for label in labels])
        logits = self.embed_images(images) @ texts.T / float(self.model.temperature)
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Classification(list(labels), logits, probs / probs.sum(axis=1, keepdims=True))


class Searcher:
    """Answers queries over an index.

    Args:
        index: the index, or its folder.
        model: the model that embedded the collection: a checkpoint's name, or the model; None
            takes the name that the index holds.
        processor: the model's; None loads it by the model's name.
        client: of a server that has the model, in the place of model and processor.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `Index` and `AlignModel.from_pretrained`.
        ValueError: the index holds the embeddings of another model.
    """

    def __init__(
        self,
        index: Index | str | os.PathLike,
        *,
        model: str | os.PathLike | AlignModel | None = None,
        processor: AlignProcessor | None = None,
        client: AlignClient | None = None,
    ):
        self.index = index if isinstance(index, Index) else Index(index)
        about = self.index.about
        if client is not None:
            self.encoder = client
            self._check_server()
            return
        model = model or about["model"]
        if not model:
            raise ValueError(f"{self.index.folder}: does not tell its model's name: expected model")
        name = "the model given" if isinstance(model, AlignModel) else os.fspath(model)
        model, processor = load_model(model, processor)
        found = fingerprint(model, processor)
        if found != about["fingerprint"]:
            raise ValueError(
                f"{self.index.folder}: holds embeddings of {about['model'] or 'another model'} "
                f"(fingerprint {about['fingerprint'][:8]}), not of {name} ({found[:8]}): expected "
                "that model, or the collection embedded and indexed again"
            )
        self.encoder = Encoder(model, processor)

    def embed_query(
        self,
        text: str | None = None,
        image: Any = None,
        add: str | Sequence[str] = (),
        subtract: str | Sequence[str] = (),
    ) -> np.ndarray:
        """Embeds a query: image + text + added texts - subtracted ones, of unit length.

        The parts are of unit length before they are summed (ALIGN, arXiv 2102.05918, section 7).

        Args:
            text: what the images show.
            image: a picture like them, as `AlignProcessor` takes it; of a server, as
                `AlignClient` does.
            add: texts that the result is moved towards.
            subtract: texts that it is moved away from.

        Returns:
            (d,).

        Raises:
            ValueError: there is neither text nor image, a text is blank, the image cannot be
                decoded, or the parts cancel out.
        """
        add = [add] if isinstance(add, str) else list(add)
        subtract = [subtract] if isinstance(subtract, str) else list(subtract)
        if text is None and image is None:
            raise ValueError("a query needs a text or an image")
        plus = [*([] if text is None else [text]), *add]
        if not all(part.strip() for part in (*plus, *subtract)):
            raise ValueError("a blank text in the query: expected words")
        parts = []
        if image is not None:
            parts.append(self.encoder.embed_images([image])[0])
        if plus or subtract:
            signs = np.array([1.0] * len(plus) + [-1.0] * len(subtract))
            parts.extend(signs[:, None] * self.encoder.embed_texts([*plus, *subtract]))
        total = np.sum(parts, axis=0)
        length = np.linalg.norm(total)
        if not length > 1e-6:
            raise ValueError("the parts of the query cancel out")
        return _float32(total / length)

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        add: str | Sequence[str] = (),
        subtract: str | Sequence[str] = (),
        k: int = NEIGHBORS,
    ) -> list[Hit]:
        """Finds the images nearest to a query, the nearest first.

        Args:
            text: as `embed_query`.
            image: as `embed_query`.
            add: as `embed_query`.
            subtract: as `embed_query`.
            k: how many.

        Returns:
            k images, fewer where the collection has not so many.

        Raises:
            ValueError: as `embed_query`, or k is less than 1.
        """
        query = self.embed_query(text, image, add, subtract)
        scores, rows = self.index.search(query[None], k)
        return self.index.hits(scores[0], rows[0])

    def _check_server(self) -> None:
        """Has the server embed a picture of the collection anew; it has to be found again."""
        rows = range(min(len(self.index), NEIGHBORS))
        hits = self.index.hits(np.zeros(len(rows)), np.array(rows))
        path = next((hit.path for hit in hits if hit.path and os.path.isfile(hit.path)), None)
        if path is None:  # its width is all that can be checked
            embeds = self.encoder.embed_texts(["a"])
            self.index.search(embeds, 1)
            return
        scores, _ = self.index.search(self.encoder.embed_images([path]), 1)
        if scores[0, 0] < SAME_IMAGE:
            raise ValueError(
                f"{self.index.folder}: the server's embedding of {path} is {scores[0, 0]:.2f} near "
                f"to the collection's, expected 1: it serves another model than "
                f"{self.index.about['model'] or 'the one of the index'}"
            )
