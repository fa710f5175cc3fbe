"""The two towers at align-base: throughput beside transformers' PyTorch, and the cores' limit.

    python benchmarks/towers.py [--quick] [--rounds 5] [--json FILE]

Both libraries run the same random weights, and their embeddings are held against each other
before anything is timed. The limit is the time that the tower's operations take at the rate of
the machine's own matrix products, measured in the same run.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np
from models import BATCH, CAPTIONS, MAX_TOKENS, without_gradient
from side_by_side import aim, compare, run, throughput

EAGER, LAST = "PyTorch, eager", "PyTorch, channels last"
COMPILED = "PyTorch, torch.compile"
AUTOCAST, PURE = "PyTorch, bfloat16 autocast", "PyTorch, bfloat16 weights"
COMPILED_AUTOCAST = "PyTorch, torch.compile, bfloat16 autocast"
OURS, OURS_BFLOAT16 = "align_tf, exported", "align_tf, exported, bfloat16"
IN_KERAS = "align_tf, AlignModel in tf.function"
DEFAULT = "PyTorch, processor's default (64 tokens)"

# peers of a precision
FLOAT32 = (EAGER, LAST, COMPILED)
BFLOAT16 = (AUTOCAST, PURE, COMPILED_AUTOCAST)


class Parts:
    """The models of both libraries, each loaded once."""

    def __init__(self, folder: pathlib.Path, quick: bool):
        import tensorflow as tf
        import torch

        from align_tf import AlignModel

        source = models.checkpoint(folder, quick)
        self.config = models.make_config(quick)
        self.keras = AlignModel.from_pretrained(source)
        self.exported = {
            OURS: models.signatures(models.exported(folder, quick)),
            OURS_BFLOAT16: models.signatures(models.exported(folder, quick, "bfloat16")),
        }
        self.eager = models.peer(source)
        self.last = models.peer(source, channels_last=True)
        self.pure = models.peer(source, channels_last=True).bfloat16()
        self.processor = models.peer_processor(source)
        self.in_keras_image = tf.function(self.keras.get_image_features)
        self.in_keras_text = tf.function(self.keras.get_text_features)
        # Compiling takes minutes at align-base, and seconds that prove nothing at `--quick`.
        self.compile = torch.compile if not quick else None


def image_contenders(parts: Parts, batch: int, side: int) -> dict[str, Callable[[], Any]]:
    """Returns what embeds a batch of prepared images, by each library and setting."""
    import tensorflow as tf
    import torch

    pixels = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype("float32")
    ours = tf.constant(pixels)
    theirs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    last = theirs.contiguous(memory_format=torch.channels_last)

    def of(model: Any, pixels: Any, autocast: bool = False) -> Callable[[], Any]:
        embed = getattr(model, "vision_model", model)
        return without_gradient(lambda: embed(pixels).pooler_output, autocast=autocast)

    contenders = {
        name: lambda f=functions["embed_pixels"]: f(pixel_values=ours)["image_embeds"].numpy()
        for name, functions in parts.exported.items()
    }
    contenders[IN_KERAS] = lambda: parts.in_keras_image(ours).numpy()
    contenders[EAGER] = of(parts.eager, theirs)
    contenders[LAST] = of(parts.last, last)
    contenders[AUTOCAST] = of(parts.last, last, autocast=True)
    contenders[PURE] = of(parts.pure, last.bfloat16())
    if parts.compile:
        compiled = parts.compile(parts.last.vision_model)
        contenders[COMPILED] = of(compiled, last)
        contenders[COMPILED_AUTOCAST] = of(compiled, last, autocast=True)
    return contenders


def text_contenders(parts: Parts, batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Returns what embeds a batch of texts of so many tokens."""
    import tensorflow as tf
    import torch

    vocab = parts.config.text_config.vocab_size
    ids = np.random.default_rng(0).integers(5, vocab, (batch, tokens)).astype("int32")
    ours = {name: tf.constant(ids) for name in ("input_ids", "attention_mask", "token_type_ids")}
    ours["attention_mask"], ours["token_type_ids"] = tf.ones_like(ids), tf.zeros_like(ids)
    theirs = {"input_ids": torch.from_numpy(ids).long()}
    theirs["attention_mask"] = torch.ones_like(theirs["input_ids"])
    theirs["token_type_ids"] = torch.zeros_like(theirs["input_ids"])
    embed = text_embedder(parts.eager)

    contenders = {
        name: lambda f=functions["embed_tokens"]: f(**ours)["text_embeds"].numpy()
        for name, functions in parts.exported.items()
    }
    contenders[IN_KERAS] = lambda: parts.in_keras_text(ours).numpy()
    contenders[EAGER] = without_gradient(lambda: embed(theirs))
    contenders[AUTOCAST] = without_gradient(lambda: embed(theirs), autocast=True)
    contenders[PURE] = without_gradient(lambda: text_embedder(parts.pure)(theirs))
    if parts.compile:
        compiled = parts.compile(embed)
        contenders[COMPILED] = without_gradient(lambda: compiled(theirs))
        contenders[COMPILED_AUTOCAST] = without_gradient(lambda: compiled(theirs), autocast=True)
    return contenders


def text_embedder(model: Any) -> Callable[[dict[str, Any]], Any]:
    """Returns PyTorch's text embedding: the first token, projected."""
    return lambda tokens: model.text_projection(model.text_model(**tokens).last_hidden_state[:, 0])


def caption_contenders(parts: Parts, batch: int) -> dict[str, Callable[[], Any]]:
    """Returns what embeds a batch of captions as strings."""
    import tensorflow as tf

    texts = list(CAPTIONS[:batch])
    strings = tf.constant(texts)
    embed = text_embedder(parts.eager)

    def theirs(**settings: Any) -> Any:
        return embed(parts.processor(text=texts, return_tensors="pt", **settings))

    contenders = {
        name: lambda f=functions["embed_text"]: f(texts=strings)["text_embeds"].numpy()
        for name, functions in parts.exported.items()
    }
    contenders[DEFAULT] = without_gradient(theirs)
    contenders["PyTorch, padded to the longest"] = without_gradient(
        lambda: theirs(padding="longest")
    )
    contenders[f"{DEFAULT}, bfloat16 autocast"] = without_gradient(theirs, autocast=True)
    return contenders


def check(title: str, contenders: dict[str, Callable[[], Any]], peer: str) -> dict[str, Any]:
    """Holds our embeddings against a peer's; returns the aim for bfloat16's cosine."""
    ours = contenders[OURS]()
    models.check(title, ours, contenders[peer]().numpy())
    cosine = models.least_cosine(contenders[OURS_BFLOAT16](), ours)
    return aim("cosine of bfloat16 to float32", cosine, at_least=0.9995)


def against(result: dict[str, Any], ours: str, theirs: tuple[str, ...], wanted: float) -> dict:
    """Aims at a multiple of the throughput of the best of these peers, those that ran."""
    there = [row["name"] for row in result["rows"] if row["name"] in theirs]
    reached = throughput(result, ours, there)
    return aim(f"{ours}: throughput by the best of {'; '.join(there)}", reached, at_least=wanted)


def by_limit(result: dict[str, Any], flops: int, peaks: dict[str, float]) -> dict[str, float]:
    """Adds to each row how many times the FLOP limit its time is; returns them by name."""
    multiples = {}
    for row in result["rows"]:
        dtype = "bfloat16" if "bfloat16" in row["name"] else "float32"
        row["times_limit"] = multiples[row["name"]] = row["seconds"] * peaks[dtype] / flops
    return multiples


def measure(quick: bool, rounds: int | None, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Measures captions, the text tower at full length, and the image tower."""
    models.set_threads()
    rounds = rounds or (1 if quick else 5)
    parts = Parts(folder, quick)
    peaks = models.peak_flops(256 if quick else 2048)
    rates = [
        {"": f"matrix product, {dtype}", "GFLOP/s": rate / 1e9} for dtype, rate in peaks.items()
    ]
    yield {"title": "the cores' own peak", "table": rates}
    yield measure_captions(parts, 2 * rounds)
    yield measure_text(parts, peaks, 2 * rounds)
    yield measure_image(parts, peaks, rounds)


def measure_captions(parts: Parts, rounds: int) -> dict[str, Any]:
    contenders = caption_contenders(parts, BATCH)
    cosine = check("captions", contenders, DEFAULT)
    title = f"captions of 8 to 20 words as strings, batch {BATCH}"
    result = compare(title, contenders, items=BATCH, rounds=rounds)
    result["aims"] = [
        against(result, OURS, (DEFAULT,), 4.0),
        against(result, OURS_BFLOAT16, (f"{DEFAULT}, bfloat16 autocast",), 4.0),
        cosine,
    ]
    return result


def measure_text(parts: Parts, peaks: dict[str, float], rounds: int) -> dict[str, Any]:
    contenders = text_contenders(parts, BATCH, MAX_TOKENS)
    cosine = check("text tower", contenders, EAGER)
    title = f"text tower, {MAX_TOKENS} tokens, batch {BATCH}"
    result = compare(title, contenders, items=BATCH, rounds=rounds)
    by_limit(result, models.text_flops(parts.config.text_config, MAX_TOKENS), peaks)
    result["aims"] = [
        against(result, OURS, FLOAT32, 1.2),
        against(result, OURS_BFLOAT16, BFLOAT16, 1.2),
        cosine,
    ]
    return result


def measure_image(parts: Parts, peaks: dict[str, float], rounds: int) -> dict[str, Any]:
    vision = parts.config.vision_config
    contenders = image_contenders(parts, BATCH, vision.image_size)
    cosine = check("image tower", contenders, EAGER)
    title = f"image tower, {vision.image_size} pixels, batch {BATCH}"
    result = compare(title, contenders, items=BATCH, rounds=rounds)
    multiples = by_limit(result, models.image_flops(vision, vision.image_size), peaks)
    peers = (COMPILED,) if COMPILED in contenders else FLOAT32
    result["aims"] = [
        against(result, OURS, peers, 1.75),
        aim("exported: seconds by those of the FLOP limit", multiples[OURS], at_most=1.2),
        against(result, OURS_BFLOAT16, BFLOAT16, 1.8),
        cosine,
    ]
    return result


if __name__ == "__main__":
    run(__doc__, measure)
