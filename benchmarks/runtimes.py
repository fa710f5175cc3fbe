"""The towers, and bytes and strings to embeddings, beside PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/runtimes.py [--quick] [--rounds 5] [--json FILE]

One request at a time, eight and thirty-two. All contenders compute the same random weights, and
each one's embeddings are held against ours before anything is timed: what differs ends the program
in float32, and is left out where it was rounded. The ONNX files are torch's, which
`torch.onnx.export` writes of transformers' towers, and ours, of `align-tf export --format onnx`.
Bytes and strings go through transformers' processor; `pipeline.py` has them in PyTorch.
Needs `pip install "align-tf[benchmarks]"`.
"""

import functools
import io
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np
import onnx_peers
from images import photographs
from models import CAPTIONS, MAX_TOKENS, without_gradient
from onnx_peers import TOKENS
from side_by_side import compare, run
from towers import AUTOCAST, COMPILED, LAST, OURS, OURS_BFLOAT16, against, text_embedder

BATCHES = (1, 8, 32)
# Texts of so many tokens: a query, one at full length.
LENGTHS = (16, MAX_TOKENS)
COMPILE_SECONDS = 600

ORT, ORT_OURS = "ONNX Runtime, torch's graph", "ONNX Runtime, our graph"
ORT_INT8 = "ONNX Runtime, torch's graph, int8"
ORT_OURS_INT8 = "ONNX Runtime, our graph, int8"
OV, OV_OURS = "OpenVINO, torch's graph", "OpenVINO, our graph"
OV_BFLOAT16 = "OpenVINO, torch's graph, bfloat16"
OV_OURS_BFLOAT16 = "OpenVINO, our graph, bfloat16"
OV_INT8 = "OpenVINO, torch's graph, int8"

# peers of a precision; torch.compile is not among those of one that did not compile
FLOAT32 = (LAST, COMPILED, ORT, OV)
BFLOAT16 = (AUTOCAST, OV_BFLOAT16)
# How far a contender's embeddings may be from ours.
LEAST_COSINE = {"int8": 0.995, "bfloat16": 0.999, "float32": 0.9999}

Contenders = dict[str, Callable[[], Any]]


class Files:
    """Where the weights are, in each library's format; each written once."""

    def __init__(self, folder: pathlib.Path, quick: bool):
        self.compiles = not quick  # a minute of compiling that proves nothing
        self.source = models.checkpoint(folder, quick)
        self.config = models.make_config(quick)
        self.exported = {
            OURS: models.exported(folder, quick),
            OURS_BFLOAT16: models.exported(folder, quick, "bfloat16"),
        }
        self.ours = onnx_peers.our_graphs(folder, quick)
        self.int8 = onnx_peers.our_graphs(folder, quick, "int8")
        self.torch = onnx_peers.torch_graphs(folder, quick)

    @functools.cached_property
    def peer(self) -> Any:
        """transformers' model in PyTorch."""
        return models.peer(self.source, channels_last=True)


class TimeIsUp(BaseException):
    """Of a kind that no library takes for an error of its own."""


def within(seconds: int, call: Callable[[], Any]) -> Any:
    """Calls, and breaks the call off when the time is up.

    Raises:
        TimeIsUp: it was broken off.
    """

    def break_off(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, break_off)
    signal.alarm(seconds)
    try:
        return call()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def leave_out(name: str, why: Any) -> None:
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    print(f"{name}: left out: {reason}", file=sys.stderr)


def made(makers: dict[str, Callable[[], Callable[[], Any]]]) -> Contenders:
    """Makes the contenders; what cannot be made here is said and left out."""
    contenders = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except Exception as error:  # a runtime's own, of any kind
            leave_out(name, error)
    return contenders


def admitted(files: Files, title: str, contenders: Contenders) -> Contenders:
    """Holds each contender's embeddings against those of the first, which are ours."""
    ours = contenders[OURS]()
    fine = {}
    for name, call in contenders.items():
        precision = next((kind for kind in LEAST_COSINE if kind in name), "float32")
        try:
            embeds = within(COMPILE_SECONDS, call) if name == COMPILED else call()
        except TimeIsUp:
            leave_out(name, f"not compiled after {COMPILE_SECONDS} s; nor is it tried again")
            files.compiles = False
            continue
        except Exception as error:  # a kernel that a runtime lacks shows when it runs
            leave_out(name, error)
            continue
        least = LEAST_COSINE[precision]
        if precision == "float32":
            models.check(f"{title}: {name}", ours, embeds, least)
        elif not models.least_cosine(ours, embeds) >= least:
            cosine = models.least_cosine(ours, embeds)
            leave_out(name, f"cosine {cosine:.4f} to float32, below {least}")
            continue
        fine[name] = call
    return fine


def runtime_makers(files: Files, tower: str, like: onnx_peers.Feed) -> dict[str, Callable]:
    """Returns what opens a tower in each runtime: name -> a function without arguments.

    Args:
        files: the files.
        tower: `image` or `text`.
        like: inputs as those that are timed.
    """
    torch, ours = files.torch[tower], files.ours[tower]
    makers = {
        ORT: lambda: onnx_peers.in_onnx_runtime(torch),
        ORT_OURS: lambda: onnx_peers.in_onnx_runtime(ours),
        ORT_INT8: lambda: onnx_peers.onnx_runtime_int8(torch),
        ORT_OURS_INT8: lambda: onnx_peers.in_onnx_runtime(files.int8[tower]),
        OV: lambda: onnx_peers.in_openvino(torch, like),
        OV_OURS: lambda: onnx_peers.in_openvino(ours, like),
        OV_INT8: lambda: onnx_peers.openvino_int8(torch, like),
    }
    if onnx_peers.openvino_has_bfloat16():
        makers[OV_BFLOAT16] = lambda: onnx_peers.in_openvino(torch, like, "bf16")
        makers[OV_OURS_BFLOAT16] = lambda: onnx_peers.in_openvino(ours, like, "bf16")
    return makers


def fed(make: Callable[[], onnx_peers.Embed], feed: onnx_peers.Feed) -> Callable:
    """Returns what makes a contender of a runtime that is fed so."""

    def contender() -> Callable[[], Any]:
        embed = make()
        return lambda: embed(feed)

    return contender


def image_makers(files: Files, batch: int) -> dict[str, Callable]:
    """Returns what makes the contenders for a batch of prepared images."""
    import tensorflow as tf
    import torch

    side = files.config.vision_config.image_size
    pixels = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype("float32")
    ours, first = tf.constant(pixels), np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    last = torch.from_numpy(first).contiguous(memory_format=torch.channels_last)

    def here(name: str) -> Callable[[], Any]:
        embed = models.signatures(files.exported[name])["embed_pixels"]
        return lambda: embed(pixel_values=ours)["image_embeds"].numpy()

    def there(compiled: bool = False, autocast: bool = False) -> Callable[[], Any]:
        tower = files.peer.vision_model
        tower = torch.compile(tower) if compiled else tower
        return without_gradient(
            lambda: tower(last).pooler_output.float().numpy(), autocast=autocast
        )

    return assemble(files, "image", here, there, {"pixel_values": first})


def text_makers(files: Files, batch: int, length: int) -> dict[str, Callable]:
    """Returns what makes the contenders for a batch of texts of so many tokens."""
    import tensorflow as tf
    import torch

    vocab = files.config.text_config.vocab_size
    ids = np.random.default_rng(0).integers(5, vocab, (batch, length))
    feed = dict(zip(TOKENS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    ours = {name: tf.constant(value.astype("int32")) for name, value in feed.items()}
    theirs = {name: torch.from_numpy(value) for name, value in feed.items()}

    def here(name: str) -> Callable[[], Any]:
        embed = models.signatures(files.exported[name])["embed_tokens"]
        return lambda: embed(**ours)["text_embeds"].numpy()

    def there(compiled: bool = False, autocast: bool = False) -> Callable[[], Any]:
        embed = text_embedder(files.peer)
        embed = torch.compile(embed) if compiled else embed
        return without_gradient(lambda: embed(theirs).float().numpy(), autocast=autocast)

    return assemble(files, "text", here, there, feed)


def assemble(
    files: Files, tower: str, here: Callable, there: Callable, feed: onnx_peers.Feed
) -> dict[str, Callable]:
    """Puts the makers of our SavedModels, of PyTorch and of the runtimes in one table."""
    makers = {name: functools.partial(here, name) for name in files.exported}
    makers[LAST] = there
    makers[AUTOCAST] = lambda: there(autocast=True)
    if files.compiles:
        makers[COMPILED] = lambda: there(compiled=True)
    runtimes = runtime_makers(files, tower, feed)
    if tower == "image":  # which our int8 leaves as it is
        del runtimes[ORT_OURS_INT8]
    return {**makers, **{name: fed(make, feed) for name, make in runtimes.items()}}


class Pairs:
    """Bytes and captions, through transformers' processor and a runtime's two towers."""

    def __init__(self, files: Files, batch: int):
        self.files, self.processor = files, models.peer_processor(files.source)
        self.images = photographs(batch)
        self.texts = [CAPTIONS[index % len(CAPTIONS)] for index in range(batch)]

    def prepare(self) -> onnx_peers.Feed:
        import PIL.Image

        pictures = [PIL.Image.open(io.BytesIO(image)) for image in self.images]
        return dict(
            self.processor(images=pictures, text=self.texts, padding="longest", return_tensors="np")
        )

    def makers(self) -> dict[str, Callable]:
        """Returns what makes the contenders."""
        feed = self.prepare()
        likes = {
            "image": {"pixel_values": feed["pixel_values"]},
            "text": {name: feed[name].astype("int64") for name in TOKENS},
        }
        towers = {name: runtime_makers(self.files, name, like) for name, like in likes.items()}
        both = {
            name: functools.partial(self._there, *(makers[name] for makers in towers.values()))
            for name in towers["image"]
        }
        here = {name: functools.partial(self._here, name) for name in self.files.exported}
        return {**here, **both}

    def _here(self, name: str) -> Callable[[], Any]:
        import tensorflow as tf

        functions = models.signatures(self.files.exported[name])

        def call() -> Any:
            image = functions["embed_image"](image_bytes=tf.constant(self.images))
            text = functions["embed_text"](texts=tf.constant(self.texts))
            return np.concatenate([image["image_embeds"].numpy(), text["text_embeds"].numpy()])

        return call

    def _there(self, make_image: Callable, make_text: Callable) -> Callable[[], Any]:
        image, text = make_image(), make_text()

        def call() -> Any:
            feed = self.prepare()
            tokens = {name: feed[name].astype("int64", copy=False) for name in TOKENS}
            return np.concatenate([image({"pixel_values": feed["pixel_values"]}), text(tokens)])

        return call


def measured(
    files: Files, title: str, makers: dict[str, Callable], batch: int, rounds: int
) -> dict[str, Any]:
    """Times the contenders that can be made here and that compute what ours do."""
    contenders = admitted(files, title, made(makers))
    result = compare(title, contenders, items=batch, rounds=rounds, settle=True)
    there = [row["name"] for row in result["rows"]]
    # ours, peers, wanted
    for ours, peers, wanted in ((OURS, FLOAT32, 1.1), (OURS_BFLOAT16, BFLOAT16, 1.0)):
        if ours in there and set(peers) & set(there):
            result.setdefault("aims", []).append(against(result, ours, peers, wanted))
    return result


def measure(quick: bool, rounds: int | None, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Measures both towers and all of the way, at each batch size."""
    models.set_threads()
    files = Files(folder, quick)
    for batch in BATCHES:
        count = rounds or (1 if quick else max(3, 20 // batch))
        title = f"image tower, batch {batch}"
        yield measured(files, title, image_makers(files, batch), batch, count)
        for length in LENGTHS:
            title = f"text tower, {length} tokens, batch {batch}"
            yield measured(files, title, text_makers(files, batch, length), batch, count)
        title = f"JPEG bytes and strings to embeddings, batch {batch}"
        yield measured(files, title, Pairs(files, batch).makers(), batch, count)


if __name__ == "__main__":
    run(__doc__, measure)
