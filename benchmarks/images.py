"""Throughput from JPEG bytes to pixel_values, beside Pillow and Hugging Face's processor.

    python benchmarks/images.py [--json] [--rounds 7]

Ours runs as in an exported SavedModel; theirs in one thread, and in a pool of two. A tf.data map
reads ahead while the others run, so that it has no place here. Needs the extra `parity`.
"""

import argparse
import concurrent.futures
import io
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import PIL.Image
import tensorflow as tf
import transformers
from side_by_side import compare, show

from align_tf import AlignImageProcessor
from align_tf.preprocessing.image_processing import FILE_DEFAULTS

HEIGHT, WIDTH = 480, 640
BATCHES = (1, 8, 32)
CALLS = {1: 32, 8: 4, 32: 1}  # of a round


def photographs(count: int) -> list[bytes]:
    """Draws clouds of all colors, about as hard to decode as photographs."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        levels = np.zeros((HEIGHT, WIDTH, 3))
        for step in (1, 2, 4, 8, 16, 32, 64):  # as in photographs, the coarser the stronger
            part = rng.normal(0, step, (-(-HEIGHT // step), -(-WIDTH // step), 3))
            levels += part.repeat(step, 0).repeat(step, 1)[:HEIGHT, :WIDTH]
        image = PIL.Image.fromarray((levels * 0.7 + 128).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    arguments = parser.parse_args()

    ours = AlignImageProcessor()
    in_graph = tf.function(ours.pixel_values, input_signature=[tf.TensorSpec([None], tf.string)])
    module = transformers.models.efficientnet.image_processing_pil_efficientnet
    theirs = module.EfficientNetImageProcessorPil(
        **{name: getattr(ours, name) for name in FILE_DEFAULTS}
    )

    def prepare(files: list[bytes]) -> np.ndarray:
        images = [PIL.Image.open(io.BytesIO(file)) for file in files]
        return np.stack(theirs(images, return_tensors="np")["pixel_values"])

    results = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for batch in BATCHES:
            files = photographs(batch)
            np.testing.assert_array_equal(
                in_graph(files), prepare(files).transpose(0, 2, 3, 1), "the pixels differ"
            )
            alone = [[file] for file in files]
            contenders = {
                "align_tf, in the graph": lambda f=files: in_graph(tf.constant(f)),
                "transformers, one thread": lambda f=files: prepare(f),
            }
            if batch > 1:
                contenders["transformers, two threads"] = lambda a=alone: [*pool.map(prepare, a)]
            calls = CALLS[batch]
            repeated = {
                name: lambda call=call, n=calls: [call() for _ in range(n)]
                for name, call in contenders.items()
            }
            title = f"JPEG {WIDTH}x{HEIGHT} to pixel_values, batches of {batch}"
            results.append(compare(title, repeated, items=batch * calls, rounds=arguments.rounds))
    show(results, arguments.json)


if __name__ == "__main__":
    main()
