"""Embedding a collection of images, in this process or on Ray: called again, it goes on."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from align_tf import addresses
from align_tf.data.left_out import NO_IMAGE, REASONS
from align_tf.data.readers import PathOrPaths, list_files, open_source
from align_tf.data.sources import Source
from align_tf.data.streams import CHUNK
from align_tf.evaluation.embedder import BATCH_SIZE, Embedder
from align_tf.models.align import AlignModel
from align_tf.models.fingerprint import fingerprint, load_model
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.progress import Rate
from align_tf.search import own_pictures, source_files
from align_tf.search.collection import (
    EMBEDDING_DTYPES,
    SKIPPED_NAMED,
    Settings,
    Shard,
    read_shards,
)
from align_tf.search.required import require_pyarrow, require_ray
from align_tf.search.shard_writer import ShardWriter
from align_tf.terminal import say

SHARD_SIZE = 4096
ENGINES = ("default", "ray")


def embed(
    source: PathOrPaths | tf.data.Dataset,
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
    the caption, `text_embeds`, of unit length. `_listing.npz` beside them holds the names,
    sizes and times of the source's files: what was begun with others is not gone on with.
    `_pictures.json` tells, signed, the folder of the image files: an index shows those below it.

    Args:
        source: as `data.make_dataset` takes it; captions may be missing.
        output: the folder of the shards; also a remote one, such as `gs://bucket/embeds`.
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
        NotADirectoryError: the output is a file.
        ValueError: an argument is out of range, the folder holds another thing, the files of
            the source have changed since it was begun or while they were embedded, no image can be
            decoded, or an embedding is not finite.
    """
    _check_arguments(source, model, dtype, batch_size, shard_size, engine, workers)
    require_pyarrow()
    if engine == "ray":
        require_ray()
    addresses.check(output)
    source_files.check_own(addresses.place(output))
    source = _absolute(source)
    reading = (source, image_key, caption_key)
    # Before the source is opened, and again at the end: what was read lies between.
    listing = None if isinstance(source, tf.data.Dataset) else list_files(source, image_key)
    opened = open_source(*reading, need_captions=False)
    name = ""
    if not isinstance(model, AlignModel):
        name = os.path.abspath(model) if os.path.isdir(str(model)) else str(model)
    model, processor = load_model(model, processor)
    settings = Settings(
        source=os.pathsep.join(source) if isinstance(source, list) else opened.name,
        records=_count(opened),
        shard_size=-(-shard_size // batch_size) * batch_size,
        dtype=dtype,
        dim=model.config.projection_dim,
        model=name,
        fingerprint=fingerprint(model, processor),
        listing="" if listing is None else listing.digest(),
        image_key=image_key,
        caption_key=caption_key,
    )
    output = addresses.place(output)
    if addresses.is_local(output):
        output.mkdir(parents=True, exist_ok=True)
    source_files.claim(output, settings, listing)
    shards = {shard.number: shard for shard in read_shards(output, settings)}
    missing = [number for number in range(settings.shards) if number not in shards]
    with Rate("Embedding", settings.records, "images") as rate:
        rate.skip(sum(shard.rows + shard.skipped for shard in shards.values()))
        if engine == "ray":
            from align_tf.search import ray_engine

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
    for left in output.glob(".shard-*") if addresses.is_local(output) else ():
        left.unlink(missing_ok=True)  # of processes that were killed
    if listing is not None:
        source_files.check_unchanged(settings, listing, list_files(source, image_key))
    # None where it is not UTF-8
    if paths := [path for path in opened.paths or () if path and not addresses.is_remote(path)]:
        own_pictures.sign(output, paths)
    return _summary(output, settings, shards, opened)


def _check_arguments(
    source: Any,
    model: Any,
    dtype: str,
    batch_size: int,
    shard_size: int,
    engine: str,
    workers: int,
) -> None:
    if dtype not in EMBEDDING_DTYPES or engine not in ENGINES:
        raise ValueError(
            f"dtype={dtype!r}, engine={engine!r}: expected {' or '.join(EMBEDDING_DTYPES)}, and "
            f"{' or '.join(ENGINES)}"
        )
    counts = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: expected 1 or more")
    if engine == "ray" and (isinstance(source, tf.data.Dataset) or isinstance(model, AlignModel)):
        raise ValueError("engine='ray': expected paths and the name of a model, to be read anew")


def _count(opened: Source) -> int:
    """Returns how many records a source holds, reading it through where it does not say."""
    if opened.count is not None:
        return opened.count
    ones = opened.elements(None).map(lambda *_: 1).batch(CHUNK)
    with Rate(f"Counting {opened.name}", None, "records") as rate:
        for some in ones:
            rate.advance(len(some))
    return rate.done


def _absolute(source: Any) -> Any:
    if isinstance(source, list | tuple):
        return [_absolute(path) for path in source]
    if not addresses.is_path(source):
        return source
    return addresses.absolute(source)


def _runs(numbers: list[int]) -> Iterator[range]:
    """Joins ascending numbers to ranges of those that follow one another."""
    for _, run in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        run = [number for _, number in run]
        yield range(run[0], run[-1] + 1)


def _tell(shard: Shard, before: int) -> None:
    for key, reason in list(shard.named.items())[: max(SKIPPED_NAMED - before, 0)]:
        say(f"left out {key}: {reason}")


def _summary(
    output: addresses.Place, settings: Settings, shards: dict[int, Shard], opened: Source
) -> dict[str, Any]:
    ordered = [shards[number] for number in sorted(shards)]
    named = dict(itertools.chain.from_iterable(shard.named.items() for shard in ordered))
    named = dict(itertools.islice(named.items(), SKIPPED_NAMED))
    images = sum(shard.rows for shard in ordered)
    if not images:
        key, reason = next(iter(named.items()))
        if reason == REASONS[NO_IMAGE] and opened.image_cause:
            reason += f" ({opened.image_cause})"
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
