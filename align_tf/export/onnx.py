"""Export of the towers as ONNX files, for ONNX Runtime, OpenVINO and what else reads them."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from align_tf import addresses, files
from align_tf.export.matching import check_fit
from align_tf.export.onnx_graph import check_free, check_installed
from align_tf.export.onnx_towers import image_tower, text_tower
from align_tf.export.temporary import put, temporary_folder
from align_tf.export.tower_files import check_quantize, examples, least_cosine, tower_settings
from align_tf.extras import extra
from align_tf.models.align import AlignModel
from align_tf.models.fingerprint import fingerprint
from align_tf.models.plain_copy import plain_copy
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.preprocessing.tokenization import TOKEN_INPUTS
from align_tf.progress import track

# The names by which Hugging Face's optimum and transformers.js know a pair of towers.
IMAGE_TOWER, TEXT_TOWER = "vision_model.onnx", "text_model.onnx"
QUANTIZED_TEXT_TOWER = "text_model_quantized.onnx"
SETTINGS_NAME = "onnx.json"
OF_TOWERS = tuple(
    f"{file}{end}"
    for file in (IMAGE_TOWER, TEXT_TOWER, QUANTIZED_TEXT_TOWER)
    for end in ("", "_data")
)
# A protobuf message ends at 2 GiB; weights beyond it lie in a file beside.
LARGEST_MESSAGE = 2**31 - 2**20


def export_onnx(
    model: AlignModel,
    processor: AlignProcessor,
    directory: str | os.PathLike,
    *,
    quantize: str | None = None,
    progress: bool = False,
) -> addresses.Place:
    """Writes the towers as ONNX files, with what their runtimes need to feed them.

    They hold standard operations alone, of opset 17, and BatchNorm folded into the convolutions.
    Batch, image size and length are open; a row does not depend on another, nor on padding. Names,
    layout and dtypes are those of Hugging Face's exports, so that `pixel_values` have the channels
    first, as transformers' processor gives them, where `AlignProcessor` has them last:

        file               inputs                               output
        vision_model.onnx  pixel_values float32 (n, 3, h, w)    image_embeds (n, d)
        text_model.onnx    input_ids, attention_mask,
                           token_type_ids int64 (n, t)          text_embeds (n, d)

    The embeddings have unit length. Beside the towers are `config.json`, the processor's files,
    and `onnx.json` with what `export_litert` writes to `litert.json`, and a digest of the model.
    Weights of 2 GiB or more are in a file of their own, such as `text_model.onnx_data`.

    Args:
        model: the model; its towers are written in float32 whatever it was trained in, with LoRA
            merged and what Keras quantized as floating point: `quantize` is of its own.
        processor: its processor.
        directory: made if it is not there; files of the same names in it are replaced, once all
            of the new ones are written, and a tower that an export of another model has left
            there goes. Of the same model the text tower in float32 and in int8 may lie in one.
        quantize: `int8` writes the text tower as `text_model_quantized.onnx`: weights in int8,
            and the inputs of its products rounded while it runs, by one range for all rows of a
            batch, which ONNX Runtime is fast at. The image tower stays in float32, as rounding
            costs it too much.
        progress: show it on stderr.

    Returns:
        The directory.

    Raises:
        ModuleNotFoundError: onnx is not installed, or onnxruntime, which quantizes.
        FileExistsError: a file is in the place of the directory, or it is a checkpoint's.
        ValueError: quantize is neither, model and processor do not fit each other, the model
            cannot be copied, see `plain_copy`, or has an activation of the caller's own.
    """
    check_quantize(quantize)
    check_installed(quantize)
    check_fit(model, processor)
    directory = addresses.place(directory)
    with temporary_folder(directory, "onnx") as new:
        check_free(directory)
        copy = plain_copy(model, "float32")
        # file, what makes its tower
        towers = ((IMAGE_TOWER, image_tower), (TEXT_TOWER, text_tower))
        for file, tower in track(towers, "Converting", show=progress):
            _save(tower(copy), new / file)
        if quantize:
            _quantize(new / TEXT_TOWER, new / QUANTIZED_TEXT_TOWER)
        architectures = {"architectures": [type(model).__name__]}
        extra_keys = {**model.config.extra, **architectures, "dtype": "float32"}
        dataclasses.replace(model.config, extra=extra_keys).save_pretrained(new)
        processor.save_pretrained(new)
        settings = tower_settings(model, processor, quantize)
        settings["fingerprint"] = fingerprint(model, processor)
        (new / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n")
        for name in _of_another(directory, settings["fingerprint"]):
            (directory / name).unlink()
        # Weights before the graph that names them.
        for path in sorted(new.iterdir(), key=lambda path: path.suffix == ".onnx"):
            put(path, directory / path.name)
    return directory


def _of_another(directory: addresses.Place, digest: str) -> set[str]:
    """Finds the towers that an export of another model has left."""
    found = set(addresses.names(directory))
    if SETTINGS_NAME not in found:
        return set()
    with contextlib.suppress(ValueError):  # what cannot be read is of another
        if files.read_json(directory / SETTINGS_NAME).get("fingerprint") == digest:
            return set()
    return found & set(OF_TOWERS)


def _save(tower: Any, file: pathlib.Path) -> None:
    import onnx

    apart, size = {}, sum(len(weight.raw_data) for weight in tower.graph.initializer)
    if size > LARGEST_MESSAGE:
        apart = {"save_as_external_data": True, "location": f"{file.name}_data"}
    onnx.save_model(tower, file, **apart)


def _quantize(source: pathlib.Path, target: pathlib.Path) -> None:
    """Quantizes the weights of products and look-ups, in the place of the file that is read."""
    import onnx
    from onnxruntime import quantization

    apart = source.with_name(f"{source.name}_data")
    with _without_advice():
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            # By seven bits, so that the sums of processors without VNNI do not overflow.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=apart.exists(),
        )
    source.unlink()
    if apart.exists():
        apart.unlink()
        # The quantizer's name of the file beside is one that transformers.js does not look for.
        tower = onnx.load(target)
        target.with_name(f"{target.name}.data").unlink()
        _save(tower, target)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps the quantizer from advising a step that these graphs do not need."""

    def refuse(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    logging.root.addFilter(refuse)
    try:
        yield
    finally:
        logging.root.removeFilter(refuse)


def compare_onnx(
    directory: str | os.PathLike, model: AlignModel, processor: AlignProcessor
) -> dict[str, dict[str, float]]:
    """Compares the written towers, in ONNX Runtime, with the model they were written from.

    The inputs are align-tiny's example pictures and their names.

    Args:
        directory: what `export_onnx` wrote.
        model: the model.
        processor: its processor.

    Returns:
        For each file its size, `bytes`, and `cosine`, the least one between an embedding of the
        tower and the model's.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    with extra("onnx", "running ONNX files needs onnxruntime"):
        import onnxruntime

    inputs, expected = examples(model, processor)
    folder = addresses.fetched_folder(addresses.place(directory))
    pixels = {"pixel_values": inputs["pixel_values"].transpose(0, 3, 1, 2)}
    tokens = {name: inputs[name].astype("int64") for name in TOKEN_INPUTS}
    quantized = json.loads((folder / SETTINGS_NAME).read_text())["quantize"]
    figures = {}
    # file, inputs, output
    for file, values, output in (
        (IMAGE_TOWER, pixels, "image_embeds"),
        (QUANTIZED_TEXT_TOWER if quantized else TEXT_TOWER, tokens, "text_embeds"),
    ):
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        (embeds,) = session.run([output], values)
        size = sum(path.stat().st_size for path in folder.glob(f"{file}*"))
        figures[file] = {"bytes": size, "cosine": least_cosine(embeds, expected[output])}
    return figures
