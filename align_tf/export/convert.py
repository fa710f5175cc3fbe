"""Conversion of a checkpoint into another format: checked whole first, then written at once."""

import collections
import dataclasses
import json
import math
import os
import pathlib
import zipfile
from typing import Any

import keras

from align_tf import addresses, hub
from align_tf.checkpoints import import_plan, tensors
from align_tf.configuration.blocks import block_table
from align_tf.export.matching import check_fit
from align_tf.export.saved_model import export_saved_model
from align_tf.export.temporary import put, temporary_folder
from align_tf.files import CheckpointError, check_folder
from align_tf.models.align import AlignModel
from align_tf.models.effective_weights import effective_weights
from align_tf.models.plain_copy import plain_copy
from align_tf.preprocessing.image_processing import AlignImageProcessor
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import AlignTokenizer

LARGEST_CONFIG = 1 << 24  # bytes of a .keras file's config.json


def convert(
    source: str | os.PathLike,
    to: str,
    output: str | os.PathLike,
    *,
    config: Any = None,
    processor: str | os.PathLike | None = None,
    image_mode: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint.

    Args:
        source: what `AlignModel.from_pretrained` takes, or a `.keras` file.
        to: `hf`, a folder as transformers reads it; `keras`, a `.keras` file; `savedmodel`, a
            folder for TensorFlow Serving, which gets the next free version number.
        output: the folder or the file.
        config: as `AlignModel.from_pretrained` takes it.
        processor: folder or id of the tokenizer's files and, if it has them, of the image
            settings, in place of the source's own. Image settings that neither has are
            align-base's. A `.keras` file holds none.
        image_mode: `hf` or `original`, as AlignImageProcessor takes it; None keeps the one of
            the image settings, which is `hf` where nothing else is said.
        dtype: `float32`, `float16` or `bfloat16`; None keeps the one the weights are loaded in.
        overwrite: replaces a `.keras` file, or the files of a checkpoint in a folder that is
            not empty; what else the folder holds stays.
        dry_run: reads and checks everything, and writes nothing.

    Returns:
        `source`, `source_format`, `to`, `output`, `tensors`, `parameters`, `dtype`, `unused`
        (parts of the source that were left out, and the tensors in each), `dry_run`, and
        `notes` for the user.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a file of it is missing.
        FileExistsError: the output is there already.
        CheckpointError: the source is broken or is no ALIGN.
        ValueError: the model cannot be had in that format or dtype, the processor does not fit
            it, or a setting is wrong.
    """
    output, notes = _local_home(output), []
    _check_output(output, to, overwrite)
    model, found = _read(source, config)
    if to == "hf":
        _check_transformers_has(model, source)
    prepared = None
    if to != "keras":
        prepared = _read_processor(found["folder"], processor, image_mode, model, notes)
    if prepared is None and to == "savedmodel":
        raise ValueError(
            f"{source}: no tokenizer with it; a SavedModel takes raw strings: name a --processor"
        )
    if prepared is None and to == "hf":
        notes.append(
            f"{source}: no tokenizer with it, so the folder gets the weights and "
            "config.json alone; name a --processor for the rest"
        )
    weights = effective_weights(model)
    if dtype is not None:
        tensors.check_range(weights, dtype)
        model = model if to == "hf" else plain_copy(model, dtype)
    if not dry_run:
        output = _WRITERS[to](model, prepared, output, dtype)
    return {
        "source": str(source),
        "source_format": found["format"],
        "to": to,
        "output": str(output),
        "tensors": len(weights),
        "parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "dtype": dtype or model.variable_dtype,
        "unused": dict(found["unused"]),
        "dry_run": dry_run,
        "notes": notes,
    }


def describe(summary: dict[str, Any]) -> str:
    """Words the summary of a conversion in lines of a name and a value."""
    unused = [f"{part} ({count:,})" for part, count in summary["unused"].items()]
    lines = {
        "from": f"{summary['source']} ({summary['source_format']})",
        "to": f"{summary['output']} ({summary['to']})",
        "tensors": f"{summary['tensors']:,}",
        "parameters": f"{summary['parameters']:,}",
        "dtype": summary["dtype"],
        "unused": ", ".join(unused) or "none",
    }
    if summary["dry_run"]:
        lines["dry run"] = "nothing was written"
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


# --- reading -------------------------------------------------------------------------------


def _read(source: str | os.PathLike, config: Any) -> tuple[AlignModel, dict[str, Any]]:
    """Reads a model, and says of what format it was, where from, and what was left out."""
    path = _local_home(source)
    if path.suffix == ".keras":
        if config is not None:
            raise ValueError(f"{path}: a .keras file holds its configuration: give no config")
        found = {"format": "keras", "folder": None, "unused": collections.Counter()}
        with addresses.fetched(path) as file:
            return _read_keras(file), found
    index = hub.original_index(source)
    path = index or hub.resolve_folder(source, weights=True)
    # Of an adapter, those of the model that it is of.
    files = tensors.weight_files(hub.resolve_settings(path, hub.WHOLE, weights=True))
    model = AlignModel.from_pretrained(path, config=config)
    return model, {
        "format": "original" if tensors.is_original(files[0]) else "hf",
        "folder": path if hub.is_adapter(path) else files[0].parent,
        "unused": import_plan.unused_tensors(files),
    }


def _local_home(path: str | os.PathLike) -> addresses.Place:
    """Takes a path or an address to its place; `~` of a path is this user's home."""
    there = addresses.place(path)
    return there.expanduser() if addresses.is_local(there) else there


def _read_keras(path: pathlib.Path) -> AlignModel:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        name, kind = _keras_class(path)
        if kind is not None:
            return keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras, zipfile and h5py raise kinds of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a whole .keras file: {reason}") from error
    raise CheckpointError(f"{path}: expected an AlignModel, found {name}")


def _keras_class(path: pathlib.Path) -> tuple[str, type[AlignModel] | None]:
    """Reads the name of a .keras file's class, and which class of ours it is, before Keras does.

    Keras makes whatever the file names, with what it says.
    """
    with zipfile.ZipFile(path) as archive:
        about = archive.getinfo("config.json")
        if about.file_size > LARGEST_CONFIG:
            raise ValueError(f"config.json of {about.file_size:,} bytes")
        config = json.loads(archive.read(about))
    kind = keras.saving.get_registered_object(config["registered_name"])
    is_ours = isinstance(kind, type) and issubclass(kind, AlignModel)
    return str(config["class_name"]), kind if is_ours else None


def _read_processor(
    folder: pathlib.Path | None,
    given: str | os.PathLike | None,
    image_mode: str | None,
    model: AlignModel,
    notes: list[str],
) -> AlignProcessor | None:
    """Reads each half from what was given or else from the source; None without a tokenizer."""
    folders = [path for path in (given, folder) if path is not None]
    tokenizer = AlignTokenizer.from_pretrained(given) if given else _first(AlignTokenizer, folders)
    if tokenizer is None:
        return None
    images = _first(AlignImageProcessor, folders)
    if images is None:
        images = AlignImageProcessor()
        notes.append("no image settings in the source: those of align-base")
    if image_mode is not None:
        images = AlignImageProcessor.from_dict({**images.to_dict(), "mode": image_mode})
    processor = AlignProcessor(images, tokenizer)
    try:
        check_fit(model, processor)
    except ValueError as error:
        raise ValueError(f"{folders[0]}: {error}") from error
    return processor


def _first(half: type, folders: list) -> Any:
    """Reads one half of a processor from the first folder that has its files."""
    for folder in folders:
        try:
            return half.from_pretrained(folder)
        except FileNotFoundError:
            continue
    return None


# --- what cannot be had --------------------------------------------------------------------


def _check_output(output: addresses.Place, to: str, overwrite: bool) -> None:
    if to not in _WRITERS:
        raise ValueError(f"to={to!r}: expected one of {', '.join(_WRITERS)}")
    if to == "keras":
        if output.suffix != ".keras":
            raise ValueError(f"{output}: expected the name of a file that ends in .keras")
        if output.is_dir() or (output.exists() and not overwrite):
            raise FileExistsError(f"{output}: it is there already; --overwrite replaces a file")
        return
    check_folder(output)
    if to == "hf" and output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{output}: the folder is not empty; --overwrite replaces the checkpoint in it"
        )


def _check_transformers_has(model: AlignModel, source: str | os.PathLike) -> None:
    vision, missing = model.config.vision_config, None
    plain = dataclasses.replace(vision, first_block_residual=False)
    if model.config.image_projection:
        missing = "no image projection"
    elif block_table(plain) != block_table(vision):
        missing = "no residual in the first block of a stage (first_block_residual)"
    if missing:
        raise ValueError(
            f"{source}: transformers has {missing}, so this model cannot be had as hf; "
            "keras and savedmodel keep it"
        )


# --- writing -------------------------------------------------------------------------------


def _write_hf(
    model: AlignModel, processor: AlignProcessor | None, output: addresses.Place, dtype: str | None
) -> addresses.Place:
    with temporary_folder(output.parent, output.name) as temporary:
        folder = temporary / output.name
        model.save_pretrained(folder, dtype=dtype)
        if processor is not None:
            processor.save_pretrained(folder)
        if not addresses.is_local(output):
            put(folder, output, last=hub.WEIGHTS_NAME)
            return output
        if not output.exists():
            folder.rename(output)
            return output
        # The weights come last: where they are new, the rest is.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == hub.WEIGHTS_NAME):
            file.replace(output / file.name)
    return output


def _write_keras(
    model: AlignModel, processor: AlignProcessor | None, output: addresses.Place, dtype: str | None
) -> addresses.Place:
    with temporary_folder(output.parent, output.name) as temporary:
        file = temporary / output.name
        model.save(file)
        put(file, output)
    return output


def _write_saved_model(
    model: AlignModel, processor: AlignProcessor | None, output: addresses.Place, dtype: str | None
) -> addresses.Place:
    return export_saved_model(model, processor, output)


# format: writer
_WRITERS = {"hf": _write_hf, "keras": _write_keras, "savedmodel": _write_saved_model}
