"""Image-text data to the batches that AlignModel trains and is evaluated on."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from align_tf.data.left_out import JUDGED_FROM, NO_CAPTION, NO_IMAGE, LeftOut
from align_tf.data.lengths import LENGTH_BUCKETS
from align_tf.data.limit import LIMIT, is_limit
from align_tf.data.mixing import Mixture
from align_tf.data.readers import PathOrPaths, open_source, open_sources
from align_tf.data.sources import Source
from align_tf.data.streams import CHUNK
from align_tf.files import readable
from align_tf.preprocessing.apart import functions_apart
from align_tf.preprocessing.image_processing import FINE
from align_tf.preprocessing.processor import AlignProcessor

MAX_ERRORS = 100
BATCHES_IN_FLIGHT = 2  # prepared at a time; within each, images are decoded in parallel
ID_RANGE = 2**31 - 1  # of the fingerprints

# All of it is TensorFlow operations, so that AutoGraph has nothing to convert.
_graph = tf.autograph.experimental.do_not_convert


def records(
    source: PathOrPaths | tf.data.Dataset,
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> tf.data.Dataset:
    """Reads image-text data in the order of its files, without decoding it.

    Args:
        source: as `make_dataset` takes it.
        image_key: as `make_dataset` takes it.
        caption_key: as `make_dataset` takes it.

    Returns:
        A dataset of `key` and `image_bytes`, scalar strings, and `captions`, string (k,). What
        cannot be read has no image, and k may be 0.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `make_dataset`.
    """
    return read_records(open_source(source, image_key, caption_key))


def read_records(opened: Source) -> tf.data.Dataset:
    """Reads the records of a source; see `records`."""
    batches = opened.elements(None).ragged_batch(CHUNK).enumerate()
    dataset = batches.map(_graph(lambda _, elements: _load(opened, elements))).unbatch()
    dataset = dataset.map(_graph(lambda record: record))  # ragged no more: captions are a tensor
    if opened.count is None:
        return dataset
    return dataset.apply(tf.data.experimental.assert_cardinality(opened.count))


def make_dataset(
    source: PathOrPaths | tf.data.Dataset,
    processor: AlignProcessor,
    *,
    batch_size: int,
    training: bool = False,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    epochs: int | None = None,
    start_step: int = 0,
    augment: bool = True,
    shard: tuple[int, int] = (0, 1),
    length_buckets: Sequence[int] = LENGTH_BUCKETS,
    max_errors: int | str | None = MAX_ERRORS,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> tf.data.Dataset:
    """Makes batches for `AlignModel.fit`, `evaluate` and `predict` of image-text data.

    In training the records are shuffled anew each epoch (those of a folder or a table among all,
    those of shards by shard and within a buffer), each image is cropped and flipped at random
    (ALIGN, arXiv 2102.05918, section 5), one of its captions is drawn, and the last records that
    fill no batch wait for another epoch. In evaluation they come in order, with the first
    caption, and the last batch is filled up with rows of weight 0. The batches depend on the
    arguments alone, not on the machine: those from `start_step` on are those of an unbroken run.

    Args:
        source: a folder of images, each beside a .txt (one caption) or a .json (a caption, a list
            of them, or an object with `caption`, `captions` or `text`); webdataset shards (.tar,
            .tar.gz); TFRecord files of img2dataset (.tfrecord, .tfrecord.gz); tables of image
            paths, relative to the table's folder, and captions (.csv, .tsv, .jsonl, .parquet;
            rows of one path are captions of one image); Parquet with the images in it; a folder
            of shards, a glob, or a list of files of one kind, on this machine or at an address
            such as `gs://bucket/pairs`; or a tf.data.Dataset of dicts, as TensorFlow Datasets
            gives them.
        processor: prepares images and texts.
        batch_size: pairs in a batch, of this worker.
        training: shuffles, draws among an image's captions, and augments.
        weights: of training on several sources, a list of such: a number above 0 for each, its
            share of the pairs of every batch being its weight of their sum, to within half a pair
            for each source over all batches up to any. Each is shuffled and repeated for itself.
        seed: of the order and all draws.
        epochs: passes over the data; None is endless in training and one in evaluation. With
            `weights` a pass is as many pairs as all sources hold together, whosever they are.
        start_step: the batches to leave out; they are not decoded.
        augment: crops and flips in training, where left and right mean the same; False takes the
            center of each image as evaluation does.
        shard: this worker's index and the number of workers. They read disjoint parts of each
            global batch and take the same number of steps.
        length_buckets: the lengths, in tokens, that texts are padded to: the shortest that holds
            the batch's longest text. The last one is the limit, longer texts are cut. One
            length gives all batches the same shape.
        max_errors: records without a caption or a decodable image that are left out before the
            dataset ends with an error; 0 allows none, None any number. They are rows of weight 0,
            which in training show another image of the batch, since BatchNorm sees them. Each
            counts once, and they are reported on stderr. `"5%"` allows that share of the records
            read, judged from the 1,000th on, or at the end of a pass over fewer. A whole pass
            without a pair is an error in any case. Of several sources each is judged by itself.
        image_key: name of the image's column, feature, key or suffix; None finds the usual ones.
        caption_key: name of the caption's.

    Returns:
        A dataset of dicts: `pixel_values` float32 (n, h, w, 3); `input_ids`, `attention_mask`,
        `token_type_ids` int32 (n, t); `image_ids`, `text_ids` int32 (n,), fingerprints of the
        encoded image and of the tokens, below 0: of a batch of n, two rows that differ share one
        by a chance of n^2 / 2^32, which evaluation does not take; `sample_weight` float32 (n,), 0
        for a row that is no pair, otherwise 1.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it is remote and cannot be reached, empty, of no known kind, has no captions,
            or has fewer records than a training batch, or than its part of one; or an argument
            is out of range, such as a batch_size of 1 in training, where a pair has no other to
            be told from.
        ModuleNotFoundError: Parquet without pyarrow; the message names the pip command.
        tf.errors.InvalidArgumentError: in iteration, more than max_errors records are left out,
            or no record of a pass is a pair.
    """
    index, workers = shard
    _check_arguments(batch_size, start_step, shard, length_buckets, training, max_errors)
    if weights is not None and not training:
        raise ValueError("weights: of training alone; in evaluation expected one source")
    opened = open_sources(source, weights, image_key, caption_key)
    if epochs is None:
        epochs = None if training else 1
    batches, steps = _batches(opened, batch_size * workers, training, seed, epochs, start_step)
    limits = [
        LeftOut(part, max_errors, of_pass)
        for part, of_pass in _first_passes(opened, batch_size, workers, training, start_step, steps)
    ]

    @_graph
    def prepare(step: tf.Tensor, elements: Any) -> dict[str, tf.Tensor]:
        rows = slice(index * batch_size, (index + 1) * batch_size)
        loaded = _load(opened, tf.nest.map_structure(lambda x: x[rows], elements))
        draws = tf.random.stateless_uniform([workers * batch_size, 4], [seed, step])[rows]
        with functions_apart():
            batch, problems = _prepare(
                loaded, draws, processor, training, training and augment, sorted(length_buckets)
            )
        with tf.control_dependencies(_reports(limits, step, loaded, problems)):
            return {name: tf.identity(value) for name, value in batch.items()}

    dataset = batches.map(prepare, num_parallel_calls=BATCHES_IN_FLIGHT, deterministic=True)
    options = tf.data.Options()
    options.deterministic = True
    if workers > 1:
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if steps is not None:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    elif epochs is not None and workers == 1:  # the end alone tells that a pass is over
        end = tf.data.Dataset.range(1).flat_map(_graph(lambda _: dataset.take(limits[0].ended())))
        dataset = dataset.concatenate(end)
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def batch_keys(
    source: PathOrPaths,
    batch_size: int,
    seed: int,
    step: int,
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Says which records are in a batch of a training.

    Args:
        source: as `make_dataset` takes it, with `batch_size` and `seed` of the same.
        batch_size: pairs in the batch of all workers.
        seed: of the order.
        step: the number of the batch, from 0.
        weights: of several sources.

    Returns:
        The keys of its records.
    """
    opened = open_sources(source, weights)
    batches, _ = _batches(opened, batch_size, True, seed, None, step)
    keys = _graph(lambda _, elements: _load(opened, elements)["key"])
    (found,) = batches.take(1).map(keys)
    return [readable(key.decode(errors="surrogateescape")) for key in found.numpy()]


def _check_arguments(
    batch_size: int,
    start_step: int,
    shard: tuple[int, int],
    length_buckets: Sequence[int],
    training: bool,
    max_errors: int | str | None,
) -> None:
    index, workers = shard
    if batch_size < 1 or start_step < 0 or not 0 <= index < workers:
        raise ValueError(
            f"batch_size={batch_size}, start_step={start_step}, shard={shard}: expected a positive "
            "batch_size, a step from 0 and a shard (index, count) with 0 <= index < count"
        )
    if not length_buckets or min(length_buckets) < 2:
        raise ValueError(f"length_buckets={length_buckets!r}: expected lengths of 2 tokens or more")
    if training and batch_size * workers == 1:
        raise ValueError(
            "batch_size=1 in training: expected 2 or more, so that a pair has others in its batch "
            "to be told from"
        )
    if max_errors is not None and not is_limit(max_errors):
        raise ValueError(f"max_errors={max_errors!r}: expected {LIMIT}; or None")


def _first_passes(
    opened: Source | Mixture,
    batch_size: int,
    workers: int,
    training: bool,
    start_step: int,
    steps: int | None,
) -> list[tuple[Source, range | None]]:
    """Returns each source with the steps of its first pass, or None as they are not known.

    `steps` are all that come. Of a source of unknown length the pass is the first records of a
    training. The last batch of an evaluation may leave one of several workers without rows, so
    that none can judge by its own.
    """
    size = batch_size * workers
    if isinstance(opened, Mixture):
        return [
            (source, source.count and opened.pass_steps(number, size, start_step))
            for number, source in enumerate(opened.sources)
        ]
    if not training and (workers > 1 or opened.count is None):
        return [(opened, None)]
    count = JUDGED_FROM if opened.count is None else opened.count
    of_pass = count // size if training and opened.count is not None else -(-count // size)
    if steps is not None and steps != tf.data.INFINITE_CARDINALITY:
        of_pass = min(of_pass, steps)
    return [(opened, range(start_step, start_step + of_pass))]


def _reports(
    limits: Sequence[LeftOut], step: tf.Tensor, loaded: dict[str, Any], problems: tf.Tensor
) -> list[tf.Operation]:
    """Tells each source's limit of the rows of a batch that are of it."""
    keys = loaded["key"]
    if "source" not in loaded:
        return [limits[0].report(step, keys, problems)]
    return [
        one.report(
            step, *(tf.boolean_mask(x, loaded["source"] == number) for x in (keys, problems))
        )
        for number, one in enumerate(limits)
    ]


def _batches(
    opened: Source | Mixture,
    size: int,
    training: bool,
    seed: int,
    epochs: int | None,
    start_step: int,
) -> tuple[tf.data.Dataset, int | None]:
    """Returns a dataset of (step, elements of a global batch) from a step on, and its length."""
    if isinstance(opened, Mixture):
        return _mixed_batches(opened, size, seed, epochs, start_step)
    first_epoch, first_step, length = 0, 0, None
    if training:
        opened.check(size)
    if opened.count is not None:
        steps = opened.count // size if training else -(-opened.count // size)
        first_epoch, first_step = divmod(start_step, steps)
        length = tf.data.INFINITE_CARDINALITY
        if epochs is not None:
            length = max(steps * epochs - start_step, 0)

    @_graph
    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_fold_in([seed, 0], number) if training else None
        elements = opened.elements(order)
        skipped = tf.where(number == first_epoch, first_step * size, 0)
        return elements.skip(tf.cast(skipped, tf.int64)).ragged_batch(size, training)

    last_epoch = tf.int64.max if epochs is None else epochs
    batches = tf.data.Dataset.range(first_epoch, last_epoch).flat_map(epoch)
    if opened.count is None:
        batches = batches.skip(start_step)
    return batches.enumerate(start_step), length


def _mixed_batches(
    opened: Mixture, size: int, seed: int, epochs: int | None, start_step: int
) -> tuple[tf.data.Dataset, int]:
    """Does the same of several sources, in training."""
    opened.check(size)
    batches = opened.batches(size, seed, start_step).enumerate(start_step)
    if epochs is None:
        return batches, tf.data.INFINITE_CARDINALITY
    if opened.count is None:
        raise ValueError(f"epochs={epochs}: {opened.name} do not say how many pairs they hold")
    length = max(opened.count // size * epochs - start_step, 0)
    return batches.take(length), length


def _load(opened: Source | Mixture, elements: Any) -> dict[str, Any]:
    """Takes a batch of elements to records, without the captions that say nothing."""
    loaded = opened.load(elements)
    captions = loaded["captions"]
    said = captions.with_values(tf.strings.strip(captions.values) != "")
    return {**loaded, "captions": tf.ragged.boolean_mask(captions, said)}


def _prepare(
    loaded: dict[str, Any],
    draws: tf.Tensor,
    processor: AlignProcessor,
    training: bool,
    augment: bool,
    buckets: Sequence[int],
) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
    """Decodes, augments and tokenises a batch.

    Args:
        loaded: records (m,), m <= n.
        draws: float32 (n, 4) in 0..1, the random numbers of each row: where its crop lies, whether
            it is flipped, which caption it takes.
        processor: prepares images and texts.
        training: draws one of the captions.
        augment: crops and flips.
        buckets: lengths that texts are padded to.

    Returns:
        the batch, n rows, and the problem of each, int32 (n,): a key of REASONS or FINE.
    """
    size = draws.shape[0]
    filling = [[0, size - tf.size(loaded["key"])]]
    image_bytes = tf.ensure_shape(tf.pad(loaded["image_bytes"], filling, constant_values=""), size)
    captions, draw = loaded["captions"], draws[:, 3] if training else tf.zeros([size])
    texts = tf.pad(_drawn(captions, draw[: captions.nrows()]), filling, constant_values="")
    texts = tf.ensure_shape(texts, size)

    crop_at = draws[:, :2] if augment else None
    pixels, problems, _ = processor.image_processor.try_pixel_values(image_bytes, crop_at)
    if augment:
        flipped = draws[:, 2] < 0.5
        pixels = tf.where(flipped[:, None, None, None], tf.reverse(pixels, [2]), pixels)
    tokens = processor.tokenizer.encode(texts, max_length=buckets[-1], padding="longest")
    tokens = _pad_to_bucket(tokens, processor.tokenizer.pad_token_id, buckets)
    tokens = {name: tf.ensure_shape(value, [size, None]) for name, value in tokens.items()}

    problems = tf.where(image_bytes == "", NO_IMAGE, problems)
    if training:  # BatchNorm sees each row: black ones would move it
        there = problems == FINE
        first = tf.argmax(tf.cast(there, tf.int32), output_type=tf.int32)
        pixels = tf.gather(pixels, tf.where(there, tf.range(size), first))
    problems = tf.where((problems == FINE) & (texts == ""), NO_CAPTION, problems)
    batch = {
        "pixel_values": tf.ensure_shape(pixels, [size, *pixels.shape[1:]]),
        **tokens,
        "image_ids": _fingerprint(image_bytes),
        "text_ids": _fingerprint(_spelled(tokens)),
        "sample_weight": tf.cast(problems == FINE, tf.float32),
    }
    return batch, problems


def _drawn(captions: tf.RaggedTensor, draw: tf.Tensor) -> tf.Tensor:
    """Takes one caption of each row, string (m,); "" where there is none."""
    lengths = captions.row_lengths()
    place = tf.cast(draw * tf.cast(lengths, tf.float32), tf.int64)
    values = tf.concat([captions.values, [""]], 0)  # so that the start of the last row is in it
    return tf.where(lengths > 0, tf.gather(values, captions.row_starts() + place), "")


def _pad_to_bucket(
    tokens: dict[str, tf.Tensor], pad_token_id: int, buckets: Sequence[int]
) -> dict[str, tf.Tensor]:
    length = tf.shape(tokens["input_ids"])[1]
    bucket = tf.reduce_min(tf.where(tf.constant(buckets) >= length, buckets, buckets[-1]))
    filling = [[0, 0], [0, bucket - length]]
    width = buckets[0] if len(buckets) == 1 else None
    fills = {"input_ids": pad_token_id}  # of the others, 0
    return {
        name: tf.ensure_shape(
            tf.pad(value, filling, constant_values=fills.get(name, 0)), [None, width]
        )
        for name, value in tokens.items()
    }


def _fingerprint(strings: tf.Tensor) -> tf.Tensor:
    # Of the row alone, so that workers agree who see each their part of a batch; in 32 bits, which
    # is what JAX takes; below 0, where nobody's own ids are.
    return -1 - tf.cast(tf.strings.to_hash_bucket_fast(strings, ID_RANGE), tf.int32)


def _spelled(tokens: dict[str, tf.Tensor]) -> tf.Tensor:
    """Writes out the ids of each text, alike however far it is padded."""
    ids = tf.strings.as_string(tokens["input_ids"])
    ids = tf.where(tokens["attention_mask"] == 1, ids, "")
    return tf.strings.strip(tf.strings.reduce_join(ids, axis=1, separator=" "))
