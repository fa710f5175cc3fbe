"""`align-tf evaluate`: a model and a folder in, figures out."""

import collections
import dataclasses
import importlib.resources
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from align_tf.data import dataset, left_out, sources
from align_tf.data.folders import class_pictures
from align_tf.data.label_files import is_file_of_labels, read_labels
from align_tf.data.readers import open_source
from align_tf.evaluation import (
    confusion,
    examples,
    linear_probe,
    nearest_neighbors,
    retrieval,
    zero_shot,
)
from align_tf.evaluation.embedder import BATCH_SIZE, Embedder, batched, in_batches
from align_tf.evaluation.identity import Numbering, image_contents, text_contents
from align_tf.files import check_local, read_lines, readable
from align_tf.graph_errors import plain
from align_tf.preprocessing import image_processing
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.progress import track

TEST_SHARE = 0.2  # of each class, where no training folder is given

# key, bytes of the image file, captions with their columns or the name of the class
Record = tuple[str, bytes, list[Any]]


@dataclasses.dataclass
class Embedded:
    """The images of records, those that could be decoded."""

    image_embeds: np.ndarray  # (n, d)
    contents: list[bytes]  # (n)
    texts: list[list[Any]]  # of each record
    skipped: dict[str, str]  # key of an image that is left out -> why


def read(options: Any) -> dict[str, Any]:
    """Opens what a task measures, before there is a model.

    Args:
        options: as in `evaluate`.

    Returns:
        What `evaluate` takes as `opened`.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: what no model could make right.
    """
    if options.task == "retrieval":
        columns = options.caption_key or [None]
        return {
            column: open_source(options.data, options.image_key, column)
            for column in dict.fromkeys(columns)
        }
    if options.task == "zero-shot":
        templates = read_templates(options.templates)
        folders = class_folders(options.data)
        labels = class_labels(options.labels, list(folders))
        return {"folders": folders, "labels": labels, "templates": templates}
    examples.require_sklearn()
    opened = {"folders": class_folders(options.data)}
    if options.train_data:
        opened["train_folders"] = class_folders(options.train_data)
    return opened


def evaluate(
    model: Any,
    processor: AlignProcessor,
    options: Any,
    opened: dict[str, Any] | None = None,
    embedder: Embedder | None = None,
) -> dict[str, Any]:
    """Runs one task.

    Args:
        model: the model.
        processor: its processor.
        options: what the command line holds: task, data, image_key, caption_key, train_data,
            labels, templates.
        opened: what `read` returned; None has it read here.
        embedder: of the model, where several tasks share one; None compiles it here.

    Returns:
        `images`, the number measured on, what else was counted, `skipped`, key -> why, and
        `metrics`, by the names that `align_tf.evaluation` gives them; of several columns of
        captions `by_caption`, the same of each; of the other tasks `per_class`, see
        `class_figures`.

    Raises:
        ValueError: the data does not suit the task.
        FileNotFoundError: there is no such folder or file.
    """
    embedder = Embedder(model) if embedder is None else embedder
    opened = read(options) if opened is None else opened
    if options.task == "retrieval":
        return _retrieval(embedder, processor, opened)
    if options.task == "zero-shot":
        return _zero_shot(embedder, processor, **opened)
    return _from_examples(embedder, processor, options.task, **opened)


# --- the tasks -----------------------------------------------------------------------------


def _retrieval(
    embedder: Embedder, processor: AlignProcessor, opened: dict[str | None, sources.Source]
) -> dict[str, Any]:
    streams = {column: dataset.read_records(source) for column, source in opened.items()}
    count = int(next(iter(streams.values())).cardinality())
    first = next(iter(opened.values()))
    images = _embed_images(embedder, processor, captioned_images(streams), count, first)
    captions = sorted({caption for texts in images.texts for _, caption in texts})
    texts, contents = _embed_texts(embedder, processor, captions, progress=True)
    # A row for each caption of each record: of an image, and of a text.
    rows = {caption: row for row, caption in enumerate(captions)}
    of_image = np.repeat(np.arange(len(images.texts)), [len(texts) for texts in images.texts])
    of_text = np.array([rows[caption] for texts in images.texts for _, caption in texts])
    of_column = np.array([column for texts in images.texts for column, _ in texts], object)
    image_ids, text_ids = Numbering()(images.contents), Numbering()(contents)

    def figures(chosen: Any) -> dict[str, Any]:
        own_images, own_texts = of_image[chosen], of_text[chosen]
        image_rows, text_rows, pairs = retrieval.distinct_pairs(
            image_ids[own_images], text_ids[own_texts]
        )
        embeds = images.image_embeds[own_images[image_rows]], texts[own_texts[text_rows]]
        metrics = retrieval.retrieval_metrics(*embeds, pairs, progress=True)
        return {"images": len(image_rows), "texts": len(text_rows), "metrics": metrics}

    report = {**figures(slice(None)), "skipped": images.skipped}
    if len(opened) > 1:
        report["by_caption"] = {}
        for column in opened:
            if not (of_column == column).any():
                raise ValueError(
                    f"no captions: none of {len(images.texts)} images has one in {column!r}"
                )
            report["by_caption"][column] = figures(of_column == column)
    return report


def _zero_shot(
    embedder: Embedder,
    processor: AlignProcessor,
    folders: dict[str, list[pathlib.Path]],
    labels: dict[str, str],
    templates: list[str],
) -> dict[str, Any]:
    names = list(labels.values())
    zero_shot.check_labels(names, text_contents(processor.tokenizer(names, padding="longest")))
    embeds, classes, skipped = _embed_classes(embedder, processor, folders)
    class_embeds = zero_shot.class_embeddings(
        names,
        templates,
        lambda texts: _embed_texts(embedder, processor, texts)[0],
        progress=True,
    )
    rows = {name: row for row, name in enumerate(labels)}
    sets = (embeds, class_embeds, [rows[name] for name in classes])
    return {
        "images": len(classes),
        "classes": len(labels),
        "templates": len(templates),
        "skipped": skipped,
        "metrics": zero_shot.zero_shot_metrics(*sets),
        "per_class": confusion.class_figures(
            sets[2], zero_shot.zero_shot_predictions(*sets), names
        ),
    }


def _from_examples(
    embedder: Embedder,
    processor: AlignProcessor,
    task: str,
    folders: dict[str, list[pathlib.Path]],
    train_folders: dict[str, list[pathlib.Path]] | None = None,
) -> dict[str, Any]:
    """kNN and the linear probe: classes learned from training images."""
    embeds, labels, skipped = _embed_classes(embedder, processor, folders)
    if train_folders:
        train_embeds, train_labels, left_out = _embed_classes(embedder, processor, train_folders)
        skipped = {**left_out, **skipped}
    else:
        test = examples.holdout(labels, TEST_SHARE)
        train_embeds, train_labels = embeds[~test], labels[~test]
        embeds, labels = embeds[test], labels[test]
    sets = (train_embeds, train_labels, embeds, labels)
    report = {
        "images": len(labels),
        "train_images": len(train_labels),
        "classes": len(np.unique(train_labels)),
        "skipped": skipped,
    }
    if task == "linear-probe":
        metrics, predicted = linear_probe.linear_probe_with_predictions(*sets, progress=True)
    else:
        report["neighbors"] = k = min(nearest_neighbors.NUM_NEIGHBORS, len(train_labels))
        metrics, predicted = nearest_neighbors.knn_with_predictions(*sets, k=k, progress=True)
    names = np.unique(train_labels)
    rows = (np.searchsorted(names, of) for of in (labels, predicted))
    per_class = confusion.class_figures(*rows, [readable(name) for name in names.tolist()])
    return {**report, "metrics": metrics, "per_class": per_class}


# --- reading -------------------------------------------------------------------------------


def captioned_images(streams: dict[str | None, tf.data.Dataset]) -> Iterator[Record]:
    """Reads images with their captions.

    Args:
        streams: column of captions -> what `align_tf.data.records` gives of it; the images are
            the same, in the same order.

    Yields:
        Each image once, its texts pairs of a column and a caption.
    """
    iterators = [stream.as_numpy_iterator() for stream in streams.values()]
    try:
        for records in zip(*iterators, strict=True):
            texts = [
                (column, caption.decode(errors="replace"))
                for column, record in zip(streams, records, strict=True)
                for caption in record["captions"]
            ]
            yield records[0]["key"].decode(errors="replace"), records[0]["image_bytes"], texts
    except tf.errors.OpError as error:
        raise ValueError(f"the data cannot be read: {plain(error.message)}") from error


def class_folders(source: str) -> dict[str, list[pathlib.Path]]:
    """Lists a folder that has one sub-folder a class: name of the sub-folder -> image files."""
    folder = _folder(source)
    files = class_pictures(folder)
    if not files:
        raise ValueError(f"{source}: no sub-folders; expected one for each class, with its images")
    for name, found in files.items():
        if not found:
            raise ValueError(f"{folder / name}: no images; expected {', '.join(sources.IMAGE)}")
    return files


def class_labels(labels: Sequence[str] | None, folders: list[str]) -> dict[str, str]:
    """Says which classes there are and what they are called.

    Args:
        labels: the labels, `folder<TAB>label` where they differ; or a file alone, as
            `label_files.read_labels` takes it; None takes the names of the sub-folders, `_` read
            as a space.
        folders: the names of the sub-folders.

    Returns:
        Class -> label; a class need not have a folder.

    Raises:
        ValueError: a folder is of no class, a class comes twice, or a label is blank.
    """
    if labels is None:
        return {name: readable(name).replace("_", " ") for name in folders}
    pairs = (line.rpartition("\t")[::2] for line in labels)
    classes = {}
    for name, label in read_labels(labels[0]) if is_file_of_labels(labels) else pairs:
        name = name or (label if label in folders else label.replace(" ", "_"))
        if name in classes:
            raise ValueError(f"--labels: class {name!r} comes twice")
        if not label.strip():
            raise ValueError(f"--labels: class {name!r} has a blank label")
        classes[name] = label
    unknown = [name for name in folders if name not in classes]
    if unknown:
        raise ValueError(
            f"unknown class {unknown[0]!r}: {len(unknown)} of {len(folders)} folders are not among "
            "the labels"
        )
    return classes


def read_templates(name: str | None) -> list[str]:
    """Reads the templates of a file, one a line; `imagenet` are CLIP's 80, None is the label."""
    if name is None:
        return ["{}"]
    if name == "imagenet":
        file = importlib.resources.files("align_tf.evaluation") / "imagenet_templates.txt"
        return [line for line in read_lines(file) if not line.startswith("#")]
    templates = [line for line in read_lines(name) if not line.startswith("#")]
    for template in templates:
        if "{}" not in template:
            said = template if len(template) <= 60 else template[:59] + "…"
            raise ValueError(f"{name}: template {said!r}: expected a {{}} for the label")
    return templates


def _folder(source: str) -> pathlib.Path:
    check_local(source)
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{source}: a file; expected a folder")
        raise FileNotFoundError(f"{source}: no such folder")
    return folder


# --- embedding -----------------------------------------------------------------------------


def _embed_classes(
    embedder: Embedder, processor: AlignProcessor, folders: dict[str, list[pathlib.Path]]
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Embeds the images of class folders: (n, d), their classes (n,), and what is skipped."""
    files = [(name, file) for name, found in folders.items() for file in found]
    records = ((str(file), file.read_bytes(), [name]) for name, file in files)
    images = _embed_images(embedder, processor, records, len(files))
    classes = np.concatenate(images.texts)
    for name, found in folders.items():
        if name not in classes:
            raise ValueError(
                f"class {name!r}: none of its {len(found)} images can be decoded, such as "
                f"{found[0]}; expected one or more"
            )
    return images.image_embeds, classes, images.skipped


def _embed_images(
    embedder: Embedder,
    processor: AlignProcessor,
    records: Iterable[Record],
    total: int,
    opened: sources.Source | None = None,
) -> Embedded:
    """Embeds the images of records.

    Args:
        embedder: of the model.
        processor: of the model.
        records: what to read.
        total: how many there are, for the progress; negative where that is not known.
        opened: where they are from, for what is said of absent images.
    """
    keys, kept, skipped = [], [], {}

    def files() -> Iterator[bytes]:
        for key, content, texts in records:
            if texts:
                keys.append(key)
                kept.append(list(texts))
                yield content
            else:
                skipped[key] = left_out.REASONS[left_out.NO_CAPTION]

    def decode(batch: list[bytes]) -> tuple[tf.Tensor, list[bytes], np.ndarray]:
        pixel_values, problems, _ = processor.image_processor.try_pixel_values_of(batch)
        absent = np.array([not content for content in batch])
        contents = image_contents(pixel_values)
        return pixel_values, contents, np.where(absent, left_out.NO_IMAGE, problems)

    embeds, contents, problems = [], [], []
    batches = None if total < 0 else -(-total // BATCH_SIZE)
    decoded = _ahead(decode, batched(files()))
    for pixel_values, content, problem in track(decoded, "Embedding images", batches):
        embeds.append(embedder.images(pixel_values))
        contents.extend(content)
        problems.append(problem)
    if not keys:
        raise ValueError(f"no captions: none of {len(skipped)} images has one")
    problems = np.concatenate(problems)
    fine = problems == image_processing.FINE
    skipped.update((keys[row], left_out.REASONS[problems[row]]) for row in np.flatnonzero(~fine))
    if not fine.any():
        why = left_out.tally(collections.Counter(problems.tolist()), opened)
        raise ValueError(f"none of {len(keys)} images can be decoded, such as {keys[0]}: {why}")
    contents, kept = ([of[row] for row in np.flatnonzero(fine)] for of in (contents, kept))
    return Embedded(np.concatenate(embeds)[fine], contents, kept, skipped)


def _embed_texts(
    embedder: Embedder, processor: AlignProcessor, texts: list[str], progress: bool = False
) -> tuple[np.ndarray, list[bytes]]:
    """Embeds texts (m, d), and returns what tells which of them are the same."""
    order = np.argsort([len(text) for text in texts])  # texts of a batch need little padding
    embeds, contents = [], []
    for rows in track(in_batches(order), "Embedding texts", show=progress):
        tokens = processor.tokenizer([texts[i] for i in rows], padding="longest")
        embeds.append(embedder.texts(tokens))
        contents.extend(text_contents(tokens))
    places = np.argsort(order)
    return np.concatenate(embeds)[places], [contents[place] for place in places]


def _ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) of each item, the next one being worked on meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
