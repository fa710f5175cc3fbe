"""A collection of images as Parquet shards of embeddings: written resumably, read back."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from align_tf.data import dataset
from align_tf.data.readers import open_source
from align_tf.data.sources import Source
from align_tf.evaluation.embedder import BATCH_SIZE, Embedder
from align_tf.extras import extra
from align_tf.files import replacing
from align_tf.models.align import AlignModel
from align_tf.preprocessing import image_processing
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.progress import Rate
from align_tf.search.thumbnail import thumbnail, to_jpeg

SHARD_SIZE = 4096
BATCHES_AHEAD = 2
DTYPES = ("float16", "float32")
ENGINES = ("default", "ray")
NAMED = 10  # of the records that are left out
NAME = "shard-{:06}.parquet"
METADATA = b"align_tf"  # key of the JSON in a shard's metadata
COLUMNS = {"id": "string", "path": "string", "caption": "string", "thumbnail": "binary"}
THUMBNAIL = 160  # pixels

_graph = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shards of one collection have in common; it stands in the metadata of each.

    Attributes:
        source: where the records come from.
        records: how many there are.
        shard_size: records of a shard, whether or not their images can be embedded.
        dtype: of the embeddings.
        dim: their width.
        model: the name the model was loaded by; "" where it came as an object.
        fingerprint: of the model.
    """

    source: str
    records: int
    shard_size: int
    dtype: str
    dim: int
    model: str
    fingerprint: str

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_size)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard's metadata says of it.

    Attributes:
        number: its place in the collection.
        rows: images embedded.
        skipped: records left out.
        named: the first of them, id -> why.
    """

    number: int
    rows: int
    skipped: int
    named: dict[str, str]


def embed(
    source: dataset.PathOrPaths | tf.data.Dataset,
    output: str | os.PathLike,
    *,
    model: str | os.PathLike | AlignModel = "align-tiny",
    processor: AlignProcessor | None = None,
    dtype: str = "float16",
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD_SIZE,
    engine: str = "default",
    workers: int = 2,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> dict[str, Any]:
    """Embeds a collection of images into Parquet shards; called again, it goes on.

    A shard is written under another name and renamed when it is whole, so that after a kill the
    next call starts at the first record that is missing, and ends at the files of an unbroken
    run. Its columns are `id`, the record's key; `path`, the image file where there is one;
    `caption`, the first; `thumbnail`, a small JPEG where there is no file; `image_embeds` and, of
    the caption, `text_embeds`, of unit length.

    Args:
        source: as `data.make_dataset` takes it; captions may be missing.
        output: the folder of the shards.
        model: a checkpoint's name, as `AlignModel.from_pretrained` takes it, or the model.
        processor: the model's processor; None loads it by the model's name.
        dtype: of the embeddings, `float16` or `float32`.
        batch_size: images embedded at a time.
        shard_size: records of a shard, rounded up to whole batches.
        engine: `default` is this process; `ray` is Ray Data, on the cluster that the variable
            RAY_ADDRESS names or on this machine, and needs the model by name.
        workers: processes of Ray that embed.
        image_key: as `data.make_dataset` takes it.
        caption_key: as `data.make_dataset` takes it.

    Returns:
        `output`, the common `Settings` by name, `images`, the number embedded, `skipped`, that of
        the records left out, and `named`, the first of them: id -> why.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `data.make_dataset`.
        ValueError: an argument is out of range, the folder holds another collection, no image
            can be decoded, or an embedding is not finite.
    """
    if dtype not in DTYPES or engine not in ENGINES:
        raise ValueError(
            f"dtype={dtype!r}, engine={engine!r}: expected {' or '.join(DTYPES)}, and "
            f"{' or '.join(ENGINES)}"
        )
    if batch_size < 1 or shard_size < 1 or workers < 1:
        raise ValueError(
            f"batch_size={batch_size}, shard_size={shard_size}, workers={workers}: expected 1 or "
            "more"
        )
    if engine == "ray" and (isinstance(source, tf.data.Dataset) or isinstance(model, AlignModel)):
        raise ValueError("engine='ray': expected paths and the name of a model, to be read anew")
    require_pyarrow()
    source = _absolute(source)
    opened = open_source(source, image_key, caption_key, need_captions=False)
    name = ""
    if not isinstance(model, AlignModel):
        name = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    model, processor = load_model(model, processor)
    count = opened.count
    if count is None:
        count = int(opened.elements(None).reduce(np.int64(0), lambda n, _: n + 1))
    settings = Settings(
        source=os.pathsep.join(source) if isinstance(source, list) else opened.name,
        records=count,
        shard_size=-(-shard_size // batch_size) * batch_size,
        dtype=dtype,
        dim=model.config.projection_dim,
        model=name,
        fingerprint=fingerprint(model, processor),
    )
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    shards = {shard.number: shard for shard in _found(output, settings)}
    missing = [number for number in range(settings.shards) if number not in shards]
    with Rate("Embedding", settings.records, "images") as rate:
        rate.skip(sum(shard.rows + shard.skipped for shard in shards.values()))
        if engine == "ray":
            from align_tf.search import ray_engine

            reading = (source, image_key, caption_key)
            done = ray_engine.write_shards(
                reading, settings, output, batch_size, missing, workers, rate.advance
            )
        else:
            writer = ShardWriter(opened, settings, output, batch_size, Embedder(model), processor)
            done = itertools.chain.from_iterable(
                writer.write(run, rate.advance) for run in _runs(missing)
            )
        for shard in done:
            _tell(shard, sum(one.skipped for one in shards.values()))
            shards[shard.number] = shard
    for left in output.glob(".shard-*"):  # of processes that were killed
        left.unlink(missing_ok=True)
    return _summary(output, settings, shards)


def fingerprint(model: AlignModel, processor: AlignProcessor) -> str:
    """Returns a digest of what embeddings depend on: configuration, weights, image settings."""
    config = model.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        for key in ("architectures", "dtype", "torch_dtype", "transformers_version"):
            part.pop(key, None)  # of the file, not of the model
    images = processor.image_processor.to_dict()
    images.pop("max_image_pixels", None)
    digest = hashlib.sha256(json.dumps([config, images], sort_keys=True, default=str).encode())
    for weight in sorted(model.weights, key=lambda weight: weight.path):
        values = np.asarray(ops.convert_to_numpy(weight), np.float32)
        digest.update(f"{weight.path.removeprefix(model.path)} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]


def require_pyarrow() -> None:
    """Asks for the extra that a collection needs.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    with extra("data", "a collection needs pyarrow"):
        import pyarrow.parquet  # noqa: F401


def load_model(
    model: str | os.PathLike | AlignModel, processor: AlignProcessor | None
) -> tuple[AlignModel, AlignProcessor]:
    """Loads a model and its processor by the model's name, or passes on those that are given.

    Raises:
        FileNotFoundError, ValueError: as `AlignModel.from_pretrained`; or there is a model and no
            processor.
    """
    if isinstance(model, AlignModel):
        if processor is None:
            raise ValueError("processor=None: expected the processor of the model that is given")
        return model, processor
    return AlignModel.from_pretrained(model), processor or AlignProcessor.from_pretrained(model)


def _absolute(source: Any) -> Any:
    if isinstance(source, list | tuple):
        return [os.path.abspath(path) for path in source]
    return os.path.abspath(source) if isinstance(source, str | os.PathLike) else source


def _runs(numbers: list[int]) -> Iterator[range]:
    """Joins ascending numbers to ranges of those that follow one another."""
    for _, run in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        run = [number for _, number in run]
        yield range(run[0], run[-1] + 1)


def _tell(shard: Shard, before: int) -> None:
    for key, reason in list(shard.named.items())[: max(NAMED - before, 0)]:
        print(f"left out {key}: {reason}", file=sys.stderr, flush=True)


def _summary(output: pathlib.Path, settings: Settings, shards: dict[int, Shard]) -> dict[str, Any]:
    ordered = [shards[number] for number in sorted(shards)]
    named = dict(itertools.chain.from_iterable(shard.named.items() for shard in ordered))
    named = dict(itertools.islice(named.items(), NAMED))
    images = sum(shard.rows for shard in ordered)
    if not images:
        key, reason = next(iter(named.items()))
        raise ValueError(
            f"{settings.source}: none of {settings.records} images can be embedded, "
            f"such as {key}: {reason}"
        )
    return {
        "output": str(output),
        **dataclasses.asdict(settings),
        "images": images,
        "skipped": sum(shard.skipped for shard in ordered),
        "named": named,
    }


# --- writing -------------------------------------------------------------------------------


class ShardWriter:
    """Embeds and writes any of a collection's shards.

    Args:
        opened: the source.
        settings: of the collection.
        output: the folder.
        batch_size: images embedded at a time; the first batch of a shard starts with it.
        embedder: of the model.
        processor: of the model.
    """

    def __init__(
        self,
        opened: Source,
        settings: Settings,
        output: pathlib.Path,
        batch_size: int,
        embedder: Embedder,
        processor: AlignProcessor,
    ):
        self.opened, self.settings, self.output = opened, settings, output
        self.batch_size, self.embedder, self.processor = batch_size, embedder, processor

    def write(self, numbers: range, advance: Callable[[int], None] = lambda n: None) -> Iterator:
        """Writes shards that follow one another.

        Args:
            numbers: which.
            advance: is told how many records each batch has brought.

        Yields:
            The `Shard` of each that is written.
        """
        size = self.settings.shard_size
        first, stop = numbers.start * size, min(numbers.stop * size, self.settings.records)
        batches = self._batches(first, stop)
        for number in numbers:
            left = min(size, stop - number * size)
            parts, start = [], number * size
            while left > 0:
                part = self._embed(next(batches), start)
                parts.append(part)
                start, left = start + part["records"], left - part["records"]
                advance(part["records"])
            yield self._save(number, parts)

    def _batches(self, first: int, stop: int) -> Iterator[Any]:
        elements = self.opened.elements(None, first).take(stop - first)

        @_graph
        def load(_: tf.Tensor, elements: Any) -> dict[str, Any]:
            loaded = self.opened.load(elements)
            images = loaded["image_bytes"]
            pixels, problems, _ = self.processor.image_processor.try_pixel_values(images)
            problems = tf.where(images == "", dataset.NO_IMAGE, problems)
            return {**loaded, "pixel_values": pixels, "problem": problems}

        batches = elements.ragged_batch(self.batch_size).enumerate()
        batches = batches.map(load, num_parallel_calls=BATCHES_AHEAD, deterministic=True)
        try:
            yield from batches.prefetch(BATCHES_AHEAD)
        except tf.errors.OpError as error:
            raise ValueError(f"{self.opened.name}: cannot be read: {error.message}") from error
        raise ValueError(f"{self.opened.name}: fewer records than were counted; it has changed")

    def _embed(self, batch: dict[str, Any], first: int) -> dict[str, Any]:
        """Embeds a batch whose first record is the collection's `first`."""
        ids = [key.decode(errors="replace") for key in batch["key"].numpy()]
        captions = [
            next((text.decode(errors="replace") for text in texts if text.strip()), None)
            for texts in batch["captions"].to_list()
        ]
        problems = batch["problem"].numpy()
        fine = np.flatnonzero(problems == image_processing.FINE)
        embeds = self.embedder.images(batch["pixel_values"])[fine]
        wrong = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
        if wrong.size:
            raise ValueError(f"{ids[fine[wrong[0]]]}: its embedding is not finite")
        paths = self.opened.paths and self.opened.paths[first : first + len(ids)]
        captions = [captions[row] for row in fine]
        images = [None] * len(ids) if paths else batch["image_bytes"].numpy()
        return {
            "records": len(ids),
            "id": [ids[row] for row in fine],
            "path": [paths[row] if paths else None for row in fine],
            "caption": captions,
            "thumbnail": [_small(images[row]) for row in fine],
            "image_embeds": embeds,
            "text_embeds": self._embed_texts(captions),
            "skipped": {
                ids[row]: dataset.REASONS[problems[row]]
                for row in np.flatnonzero(problems != image_processing.FINE)
            },
        }

    def _embed_texts(self, captions: list[str | None]) -> np.ndarray:
        """Embeds captions, (n, d); rows of zeros where there is none."""
        embeds = np.zeros((len(captions), self.settings.dim), np.float32)
        said = [row for row, text in enumerate(captions) if text is not None]
        if said:
            texts = [captions[row] for row in said]
            embeds[said] = self.embedder.texts(self.processor.tokenizer(texts, padding="longest"))
        return embeds

    def _save(self, number: int, parts: list[dict[str, Any]]) -> Shard:
        columns = {
            name: list(itertools.chain.from_iterable(part[name] for part in parts))
            for name in COLUMNS
        }
        for name in ("image_embeds", "text_embeds"):
            columns[name] = np.concatenate([part[name] for part in parts])
        skipped = dict(itertools.chain.from_iterable(part["skipped"].items() for part in parts))
        named = dict(itertools.islice(skipped.items(), NAMED))
        rows = len(columns["id"])
        records = sum(part["records"] for part in parts)
        shard = Shard(number, rows, records - rows, named)
        write_shard(self.output, self.settings, shard, columns)
        return shard


def _small(image: bytes | None) -> bytes | None:
    picture = thumbnail(image, THUMBNAIL)
    return picture and to_jpeg(picture)


def write_shard(
    output: pathlib.Path, settings: Settings, shard: Shard, columns: dict[str, Any]
) -> None:
    """Writes one shard, at once or not at all.

    Args:
        output: the folder.
        settings: of the collection.
        shard: what its metadata will say.
        columns: those of `COLUMNS`, lists (n,), None where there is none, and `image_embeds` and
            `text_embeds` (n, d).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()}
    none = np.array([text is None for text in columns["caption"]], bool)
    for name, empty in (("image_embeds", np.zeros_like(none)), ("text_embeds", none)):
        values = pa.array(columns[name].astype(settings.dtype).ravel())
        mask = pa.array(empty)
        arrays[name] = pa.FixedSizeListArray.from_arrays(values, settings.dim, mask=mask)
    about = {**dataclasses.asdict(settings), "shard": dataclasses.asdict(shard)}
    table = pa.table(arrays).replace_schema_metadata({METADATA: json.dumps(about)})
    with replacing(output / NAME.format(shard.number)) as temporary:
        pq.write_table(table, temporary)


# --- reading -------------------------------------------------------------------------------


class Collection:
    """The shards of one collection, all of them there.

    Args:
        folder: what `embed` wrote.

    Attributes:
        settings: what the shards have in common.
        rows: images in all.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
        ValueError: a file is broken or of another collection, or the collection is not whole.
    """

    def __init__(self, folder: str | os.PathLike):
        require_pyarrow()
        self.folder = pathlib.Path(folder)
        files = _shard_files(self.folder)
        if not files:
            raise FileNotFoundError(
                f"{folder}: no embeddings; expected what `align-tf embed` wrote"
            )
        self.settings = _read_header(files[0])[0]
        shards = _found(self.folder, self.settings)
        if len(shards) < self.settings.shards:
            raise ValueError(
                f"{folder}: {len(shards)} of {self.settings.shards} shards are there; the same "
                "`align-tf embed` goes on"
            )
        self.rows = sum(shard.rows for shard in shards)

    def tables(self, columns: list[str]) -> Iterator[Any]:
        """Yields the columns of each shard, as a `pyarrow.Table`."""
        import pyarrow.parquet as pq

        for file in _shard_files(self.folder):
            yield pq.read_table(file, columns=columns)

    def image_embeds(self) -> Iterator[np.ndarray]:
        """Yields the image embeddings of each shard, (n, d) in the collection's dtype."""
        for table in self.tables(["image_embeds"]):
            yield _array(table["image_embeds"], self.settings.dim)

    def text_embeds(self) -> Iterator[np.ndarray]:
        """Yields the caption embeddings of each shard, (m, d); m is less where some have none."""
        for table in self.tables(["text_embeds"]):
            yield _array(table["text_embeds"].drop_null(), self.settings.dim)

    def labelled(self, limit: int, by: str | None = None) -> tuple[np.ndarray, list[str]]:
        """Reads images with a label each, for a plot.

        Args:
            limit: how many at most, spread evenly.
            by: `folder`, the name of the folder an image is in; `caption`; or None, which takes
                the folders if they differ.

        Returns:
            Image embeddings float32 (n, d), and labels (n), "" where there is none.
        """
        wanted = np.unique(np.linspace(0, self.rows - 1, min(limit, self.rows)).astype(int))
        parts, found, start = [], {"folder": [], "caption": []}, 0
        for table in self.tables(["path", "caption", "image_embeds"]):
            first, last = np.searchsorted(wanted, (start, start + len(table)))
            start, table = start + len(table), table.take(wanted[first:last] - start)
            parts.append(_array(table["image_embeds"], self.settings.dim))
            paths = table["path"].to_pylist()
            found["folder"] += [os.path.basename(os.path.dirname(path or "")) for path in paths]
            found["caption"] += [text or "" for text in table["caption"].to_pylist()]
        if by is None:
            by = "folder" if len(set(found["folder"])) > 1 else "caption"
        return np.concatenate(parts).astype(np.float32), found[by]


def _array(column: Any, dim: int) -> np.ndarray:
    values = column.combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("shard-*.parquet"))


def _found(folder: pathlib.Path, settings: Settings) -> list[Shard]:
    """Reads what the shards of a folder say, and checks that they are of one collection."""
    shards = []
    for file in _shard_files(folder):
        theirs, shard = _read_header(file)
        for name, value in dataclasses.asdict(settings).items():
            found = getattr(theirs, name)
            if name != "model" and found != value:
                raise ValueError(
                    f"{folder}: holds another collection, {name} {found!r}, not {value!r}; "
                    "expected the settings it was begun with, or another folder"
                )
        shards.append(shard)
    return shards


def _read_header(file: pathlib.Path) -> tuple[Settings, Shard]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = json.loads(pq.read_schema(file).metadata[METADATA])
        shard = Shard(**about.pop("shard"))
        return Settings(**about), shard
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a whole shard of `align-tf embed`") from error
