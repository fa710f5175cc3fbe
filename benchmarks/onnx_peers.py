"""ONNX Runtime and OpenVINO on the weights of the checkpoint: by torch's graph and by ours."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
# tower: its inputs, its output
TOWERS = {
    "image": (("pixel_values",), "image_embeds"),
    "text": (TOKENS, "text_embeds"),
}
CALIBRATION = 16  # inputs that the quantizer of OpenVINO sees

Feed = dict[str, np.ndarray]
Embed = Callable[[Feed], np.ndarray]


def our_graphs(
    folder: pathlib.Path, quick: bool, quantize: str | None = None
) -> dict[str, pathlib.Path]:
    """Writes our ONNX export, unless it is there; returns the file of each tower."""
    target = folder / f"onnx-ours-{quantize or 'float32'}"
    if not target.is_dir():
        from align_tf import AlignModel, AlignProcessor, export_onnx

        source = models.checkpoint(folder, quick)
        model = AlignModel.from_pretrained(source)
        export_onnx(model, AlignProcessor.from_pretrained(source), target, quantize=quantize)
    text = "text_model_quantized.onnx" if quantize else "text_model.onnx"
    return {"image": target / "vision_model.onnx", "text": target / text}


def torch_graphs(folder: pathlib.Path, quick: bool) -> dict[str, pathlib.Path]:
    """Writes what torch.onnx.export makes of transformers' towers, unless it is there."""
    target = folder / "onnx-torch"
    files = {tower: target / f"{tower}.onnx" for tower in TOWERS}
    if not all(file.is_file() for file in files.values()):
        target.mkdir(exist_ok=True)
        model = models.peer(models.checkpoint(folder, quick))
        side = model.config.vision_config.image_size
        _torch_export(files["image"], _image_module(model), "image", (2, 3, side, side))
        _torch_export(files["text"], _text_module(model), "text", (2, 16))
    return files


def _image_module(model: Any) -> Any:
    import torch

    class Image(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model = model.vision_model

        def forward(self, pixel_values: Any) -> Any:
            # The pooling as a mean: OpenVINO does not take transformers' layer.
            states = self.vision_model(pixel_values).last_hidden_state
            return torch.nn.functional.normalize(states.mean(dim=(2, 3)))

    return Image().eval()


def _text_module(model: Any) -> Any:
    import torch

    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model, self.text_projection = model.text_model, model.text_projection

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            states = self.text_model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
            return torch.nn.functional.normalize(self.text_projection(states[:, 0]))

    return Text().eval()


def _torch_export(file: pathlib.Path, module: Any, tower: str, shape: tuple[int, ...]) -> None:
    import torch

    inputs, output = TOWERS[tower]
    open_axes = {0: torch.export.Dim("batch")}
    if tower == "text":
        open_axes[1] = torch.export.Dim("length", max=models.MAX_TOKENS)
    # A tensor of its own for each input: one that two share becomes one input.
    kind = torch.float32 if tower == "image" else torch.int64
    torch.onnx.export(
        module,
        tuple(torch.ones(shape, dtype=kind) for _ in inputs),
        os.fspath(file),
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=dict.fromkeys(inputs, open_axes),
        opset_version=18,
        external_data=False,
        verbose=False,
    )


def in_onnx_runtime(file: pathlib.Path) -> Embed:
    """Opens a tower in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = models.THREADS
    # Its threads would spin on while the next contender computes.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)[0]


def onnx_runtime_int8(file: pathlib.Path) -> Embed:
    """Quantizes a tower by ONNX Runtime's dynamic quantizer, as it comes, and opens it."""
    from onnxruntime import quantization

    target = file.with_name(f"{file.stem}_int8.onnx")
    if not target.is_file():
        # It has no kernel for convolutions with signed weights.
        kind = "QUInt8" if file.stem == "image" else "QInt8"
        with quiet():
            quantization.quantize_dynamic(
                file, target, weight_type=getattr(quantization.QuantType, kind)
            )
    return in_onnx_runtime(target)


def in_openvino(file: pathlib.Path, like: Feed, precision: str = "f32") -> Embed:
    """Compiles a tower in OpenVINO for inputs of these shapes, which it is fastest for."""
    import openvino

    model = openvino.Core().read_model(file)
    model.reshape({name: list(value.shape) for name, value in like.items()})
    return _compiled(model, precision)


def openvino_has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_int8(file: pathlib.Path, like: Feed) -> Embed:
    """Quantizes a tower by NNCF on inputs of noise, and compiles it."""
    with quiet():
        import nncf
        import openvino

        target = file.with_name(f"{file.stem}_nncf.xml")
        if not target.is_file():
            text = "input_ids" in like
            model = nncf.quantize(
                openvino.Core().read_model(file),
                nncf.Dataset(list(_noise(like))),
                model_type=nncf.ModelType.TRANSFORMER if text else None,
                subset_size=CALIBRATION,
            )
            openvino.save_model(model, target, compress_to_fp16=False)
    return in_openvino(target, like)


def _noise(like: Feed) -> Iterator[Feed]:
    """Inputs as those, drawn anew."""
    rng = np.random.default_rng(1)
    for _ in range(CALIBRATION):
        if "pixel_values" in like:
            shape = like["pixel_values"][:1].shape
            yield {"pixel_values": rng.normal(size=shape).astype("float32")}
        else:
            most = int(like["input_ids"].max()) + 1
            ids = rng.integers(5, most, like["input_ids"][:1].shape)
            yield {**{name: value[:1] for name, value in like.items()}, "input_ids": ids}


def _compiled(model: Any, precision: str) -> Embed:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": models.THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda feed: request.infer(feed)[0].copy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizers' advice and bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)
