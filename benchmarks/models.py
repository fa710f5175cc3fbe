"""What the benchmarks share: align-base with random weights, here and in transformers, and inputs.

No checkpoint is fetched: the weights are random, and the statistics of each BatchNorm are those
of one batch of noise, so that activations keep the size they have in a trained model.
"""

import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as `align-tf` does

import numpy as np
from text import read_vocab

THREADS = 2
BATCH = 8
MAX_TOKENS = 64
LABELS = ["a dog on a beach", "a plate of food"]

CAPTIONS = (  # 8 to 20 words each, as people write them
    "a brown dog runs along the beach with a stick in its mouth",
    "two children in yellow raincoats jump into a puddle on a grey autumn day",
    "an old wooden fishing boat lies on the shore at low tide",
    "a plate of spaghetti with tomato sauce and fresh basil on a checked tablecloth",
    "the skyline of a large city at night seen from the other side of the river",
    "a man repairs the wheel of a red bicycle",
    "close-up of a bee that collects pollen from a purple lavender flower in full bloom",
    "a snow-covered mountain behind a small village with a white church",
    "a woman in a green dress plays the violin on the stage of a crowded concert hall",
    "several sheep graze on a hill beside the sea",
    "a black and white cat sleeps on a pile of old books next to the window",
    "a steam train crosses a stone bridge over a deep valley full of autumn trees and morning fog",
    "a young man with a skateboard sits on the steps",
    "fresh vegetables and fruit for sale at an outdoor market in the south of france",
    "an empty road leads straight through the desert towards distant red rocks under a blue sky",
    "a child's drawing of a house with smoke and a big yellow sun",
)


def tiny_config() -> dict[str, Any]:
    """Returns the configuration of `--quick`: a few narrow blocks, align-tiny's vocabulary."""
    text = {"vocab_size": 6000, "hidden_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "intermediate_size": 64}
    vision = {
        "image_size": 33,
        "width_coefficient": 0.5,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 5],
        "in_channels": [32, 16],
        "out_channels": [16, 32],
        "strides": [1, 2],
        "num_block_repeats": [1, 2],
        "expand_ratios": [1, 6],
        "hidden_dim": 16,
    }
    return {"text_config": text, "vision_config": vision, "projection_dim": 16}


def make_config(quick: bool) -> Any:
    from align_tf import AlignConfig

    return AlignConfig(**tiny_config()) if quick else AlignConfig.from_preset("align-base")


def checkpoint(folder: pathlib.Path, quick: bool) -> pathlib.Path:
    """Writes the checkpoint, unless it is there; both libraries load it."""
    target = folder / "checkpoint"
    if target.is_dir():
        return target
    import keras

    from align_tf import AlignImageProcessor, AlignModel, AlignProcessor, AlignTokenizer

    keras.utils.set_random_seed(0)
    config = make_config(quick)
    side = config.vision_config.image_size
    model = AlignModel(config)
    vision = model.vision_model
    for _, layer in vision._batch_norms():
        layer.momentum = 0.0
    vision(np.random.default_rng(0).normal(size=(2, side, side, 3)).astype("f"), training=True)
    model.temperature.assign(0.05)
    model.freeze_batch_norm()
    tokenizer = AlignTokenizer.from_pretrained("align-tiny") if quick else None
    tokenizer = tokenizer or AlignTokenizer(read_vocab(), model_max_length=MAX_TOKENS)
    images = AlignImageProcessor()
    if quick:
        images = AlignImageProcessor(
            size={"height": 40, "width": 40}, crop_size={"height": side, "width": side}
        )
    model.save_pretrained(target)
    AlignProcessor(images, tokenizer).save_pretrained(target)
    return target


def exported(folder: pathlib.Path, quick: bool, dtype: str = "float32") -> pathlib.Path:
    """Writes the SavedModel in a dtype, unless it is there; returns its version's folder."""
    target = folder / f"exported-{dtype}"
    if not (target / "1").is_dir():
        from align_tf import AlignModel, AlignProcessor, export_saved_model

        source = checkpoint(folder, quick)
        model = AlignModel.from_pretrained(source)
        processor = AlignProcessor.from_pretrained(source)
        export_saved_model(model, processor, target, version=1, dtype=dtype)
    return target / "1"


def set_threads(threads: int = THREADS) -> None:
    """Gives TensorFlow and PyTorch as many threads; called before either has run anything.

    Sets what `serving/` sets, too.
    """
    os.environ["TF_ONEDNN_ASSUME_FROZEN_WEIGHTS"] = "1"
    import torch

    set_tensorflow_threads(threads)
    torch.set_num_threads(threads)


def set_tensorflow_threads(threads: int = THREADS) -> None:
    """Gives an operation so many threads, and the graph, which is a chain, one."""
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(threads)


@functools.cache
def signatures(version: pathlib.Path) -> Any:
    """Loads a SavedModel; returns its signatures, which live as long as it does."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  (its operations are in the graph)

    loaded = tf.saved_model.load(os.fspath(version))
    functions = dict(loaded.signatures)
    functions["keep"] = loaded
    return functions


def peer(source: pathlib.Path, *, channels_last: bool = False) -> Any:
    """Loads transformers' PyTorch AlignModel for inference."""
    import torch
    import transformers

    model = transformers.AlignModel.from_pretrained(source).eval()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def peer_processor(source: pathlib.Path) -> Any:
    """Loads transformers' processor, over Pillow."""
    import transformers

    return transformers.AlignProcessor.from_pretrained(source)


def without_gradient(call: Callable[[], Any], *, autocast: bool = False) -> Callable[[], Any]:
    """Wraps a call of PyTorch's for inference, in bfloat16 if asked to."""
    import torch

    def run() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call()

    return run


def unit(array: Any) -> np.ndarray:
    """Scales the rows to unit length, in float64."""
    array = np.asarray(array, "float64")
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def least_cosine(ours: Any, theirs: Any) -> float:
    """Returns the least cosine of a row with its twin."""
    return float((unit(ours) * unit(theirs)).sum(axis=-1).min())


def check(name: str, ours: Any, theirs: Any, least: float = 0.9999) -> None:
    """Ends the program where embeddings that ought to be equal are not."""
    cosine = least_cosine(ours, theirs)
    if not cosine >= least:
        raise SystemExit(f"{name}: the embeddings differ, cosine {cosine:.6f} below {least}")


def peak_gib() -> float:
    """Returns the most memory that this process has held (Linux).

    `getrusage` would count what its parent held when it forked.
    """
    return status_gib("VmHWM")


def status_gib(key: str) -> float:
    """Reads one of the sizes that Linux tells of this process, as `VmRSS`, what it holds now."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / 2**20


def peak_flops(size: int = 2048) -> dict[str, float]:
    """Measures the cores' own peak: the best of large matrix products by both libraries.

    Returns:
        dtype -> floating point operations a second, for `float32` and `bfloat16`.
    """
    import tensorflow as tf
    import torch

    peaks = {}
    for name in ("float32", "bfloat16"):
        a, b = tf.cast(tf.random.normal([size, size]), name), torch.randn(size, size)
        b = b.to(getattr(torch, name))
        calls = (functools.partial(_tensorflow_product, a), functools.partial(torch.mm, b, b))
        best = min(_seconds(call) for _ in range(6) for call in calls)
        peaks[name] = 2 * size**3 / best
    return peaks


def _tensorflow_product(a: Any) -> Any:
    import tensorflow as tf

    return tf.reduce_max(tf.matmul(a, a)).numpy()  # waits for it, and copies nothing large


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def image_flops(config: Any, side: int) -> int:
    """Counts the image tower's operations for one image: two for each multiply-add.

    Args:
        config: an AlignVisionConfig.
        side: of the image, in pixels.
    """
    from align_tf.configuration.blocks import block_table

    side = (side + 1 - 3) // 2 + 1
    total = 2 * side**2 * 9 * config.num_channels * config.stem_channels
    for spec in block_table(config):
        wide = spec.in_channels * spec.expand_ratio
        if spec.expand_ratio != 1:
            total += 2 * side**2 * spec.in_channels * wide
        if spec.stride == 2:
            padding = spec.kernel_size - (1 if spec.square_padding else 2)
            side = (side + padding - spec.kernel_size) // 2 + 1
        total += 2 * side**2 * spec.kernel_size**2 * wide
        squeezed = max(1, int(spec.in_channels * config.squeeze_expansion_ratio))
        total += 4 * wide * squeezed
        total += 2 * side**2 * wide * spec.out_channels
    return total


def text_flops(config: Any, tokens: int) -> int:
    """Counts the text tower's operations for one text of so many tokens; see `image_flops`."""
    width, inner = config.hidden_size, config.intermediate_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return config.num_hidden_layers * layer
