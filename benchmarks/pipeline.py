"""From JPEG bytes and strings to embeddings, beside transformers' processor and model.

    python benchmarks/pipeline.py [--quick] [--rounds 3] [--json FILE]

A call embeds several batches of pairs, a photograph and its caption. Ours asks the SavedModel's
`embed_image` and `embed_text` in turn, or from two threads, so that the decoding of a batch runs
beside the model on another. transformers' processor pads texts to 64 tokens, its default.
"""

import concurrent.futures
import io
import pathlib
from typing import Any

import models
from images import photographs
from models import BATCH, CAPTIONS, without_gradient
from side_by_side import aim, compare, run, throughput

BATCHES = 4  # in a call

OURS, OURS_TWO = "align_tf, one thread", "align_tf, two threads"
OURS_BFLOAT16 = "align_tf, two threads, bfloat16"
LAST, COMPILED = "transformers, channels last", "transformers, torch.compile"
AUTOCAST = "transformers, bfloat16 autocast"


def embed_here(functions: Any, images: list[bytes], texts: list[str]) -> tuple[Any, Any]:
    """Embeds a batch by the SavedModel's signatures."""
    import tensorflow as tf

    image = functions["embed_image"](image_bytes=tf.constant(images))["image_embeds"]
    text = functions["embed_text"](texts=tf.constant(texts))["text_embeds"]
    return image.numpy(), text.numpy()


class Peer:
    """transformers' processor and model, as its documentation calls them."""

    def __init__(self, source: pathlib.Path, compiled: bool = False):
        import torch

        self.processor = models.peer_processor(source)
        self.model = models.peer(source, channels_last=True)
        vision = self.model.vision_model
        self.vision = torch.compile(vision) if compiled else vision

    def embed(self, images: list[bytes], texts: list[str]) -> tuple[Any, Any]:
        import PIL.Image
        import torch

        pictures = [PIL.Image.open(io.BytesIO(image)) for image in images]
        inputs = self.processor(images=pictures, text=texts, return_tensors="pt")
        pixels = inputs.pop("pixel_values").contiguous(memory_format=torch.channels_last)
        image = self.vision(pixels).pooler_output
        hidden = self.model.text_model(**inputs).last_hidden_state[:, 0]
        text = self.model.text_projection(hidden)
        normalize = torch.nn.functional.normalize
        return normalize(image.float()).numpy(), normalize(text.float()).numpy()


def measure(quick: bool, rounds: int | None, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Compares the two ways on the same files."""
    models.set_threads()
    source = models.checkpoint(folder, quick)
    functions = models.signatures(models.exported(folder, quick))
    bfloat16 = models.signatures(models.exported(folder, quick, "bfloat16"))
    last = Peer(source)
    files = photographs(BATCHES * BATCH)
    texts = [CAPTIONS[index % len(CAPTIONS)] for index in range(len(files))]
    starts = range(0, len(files), BATCH)
    batches = [(files[at : at + BATCH], texts[at : at + BATCH]) for at in starts]

    for ours, theirs in zip(
        embed_here(functions, *batches[0]),
        without_gradient(lambda: last.embed(*batches[0]))(),
        strict=True,
    ):
        models.check("pipeline", ours, theirs)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:

        def overlapped(functions: Any) -> Any:
            return list(pool.map(lambda batch: embed_here(functions, *batch), batches))

        def of(peer: Peer, autocast: bool = False) -> Any:
            return without_gradient(
                lambda: [peer.embed(*batch) for batch in batches], autocast=autocast
            )

        contenders = {
            OURS_TWO: lambda: overlapped(functions),
            OURS: lambda: [embed_here(functions, *batch) for batch in batches],
            OURS_BFLOAT16: lambda: overlapped(bfloat16),
            LAST: of(last),
            AUTOCAST: of(last, autocast=True),
        }
        if not quick:
            contenders[COMPILED] = of(Peer(source, compiled=True))
        result = compare(
            f"JPEG bytes and strings to embeddings, {BATCHES} batches of {BATCH} pairs",
            contenders,
            items=len(files),
            rounds=rounds or (1 if quick else 3),
        )
    peers = [name for name in (LAST, COMPILED) if name in contenders]
    result["aims"] = [
        aim(
            f"the better of one and two threads by the best of {'; '.join(peers)}",
            max(throughput(result, ours, peers) for ours in (OURS, OURS_TWO)),
            at_least=1.5,
        ),
        aim(
            f"bfloat16: throughput by {AUTOCAST}",
            throughput(result, OURS_BFLOAT16, [AUTOCAST]),
            at_least=1.5,
        ),
        aim(
            "cosine of bfloat16 to float32",
            min(
                models.least_cosine(a, b)
                for a, b in zip(
                    embed_here(bfloat16, *batches[0]),
                    embed_here(functions, *batches[0]),
                    strict=True,
                )
            ),
            at_least=0.9995,
        ),
    ]
    return [result]


if __name__ == "__main__":
    run(__doc__, measure)
