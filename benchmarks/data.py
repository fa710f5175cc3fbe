"""Shows where the time of the input pipeline goes, beside a training step of align-tiny.

    python benchmarks/data.py [--source FOLDER_OR_SHARDS] [--batch-size 64] [--json]

Each row does one part of the work on the same images. The step is fed where, fed by the pipeline,
it is as fast as alone; the two share the processor. The rows are timed one after another, not in
turn, since the pipeline works ahead while others run. Without a source it writes photographs of
noise.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from side_by_side import compare, show, to_rows

from align_tf import AlignModel, AlignProcessor
from align_tf.data import make_dataset, records

HEIGHT, WIDTH = 480, 640
BATCHES = 2  # in a call


def write_photographs(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes JPEG files that compress about as photographs do, each with a caption."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8))
        coarse.resize((WIDTH, HEIGHT)).save(folder / f"{i:04d}.jpg", quality=90)
        words = " ".join(f"word{n}" for n in rng.integers(0, 99, 8))
        (folder / f"{i:04d}.txt").write_text(f"a picture of {words}")
    return folder


def contenders(source: Any, batch_size: int) -> dict[str, Any]:
    model = AlignModel.from_pretrained("align-tiny")
    processor = AlignProcessor.from_pretrained("align-tiny")
    model.compile(optimizer=keras.optimizers.SGD(1e-6))
    few = records(source).ragged_batch(batch_size, drop_remainder=True).take(BATCHES)
    raw = [batch["image_bytes"] for batch in few]
    texts = [tf.constant([row[0] for row in batch["captions"].to_list()]) for batch in few]
    tokenize = tf.function(processor.tokenizer.encode)
    decode = tf.function(processor.image_processor.try_pixel_values)
    at = tf.random.stateless_uniform([batch_size, 2], [0, 0])
    pipeline = iter(make_dataset(source, processor, batch_size=batch_size, training=True))
    prepared = [next(pipeline) for _ in range(BATCHES)]
    return {
        "pipeline (all below, but the steps)": lambda: [next(pipeline) for _ in range(BATCHES)],
        "read": lambda: list(few),
        "decode, resize and crop": lambda: [decode(images, at) for images in raw],
        "tokenise": lambda: [tokenize(text) for text in texts],
        "batch and copy": lambda: [tf.stack(tf.unstack(b["pixel_values"])) for b in prepared],
        "training step of align-tiny": lambda: [model.train_on_batch(b) for b in prepared],
        "training step, fed by the pipeline": lambda: [
            model.train_on_batch(next(pipeline)) for _ in range(BATCHES)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=pathlib.Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = BATCHES * arguments.batch_size
        source = arguments.source or write_photographs(pathlib.Path(folder), count)
        times = {}
        for name, call in contenders(source, arguments.batch_size).items():
            alone = compare(name, {name: call}, items=count, rounds=arguments.rounds)
            times[name] = alone["rows"][0]["times"]
    title = f"images/s of the input pipeline, batches of {arguments.batch_size}"
    show([{"title": title, "rows": to_rows(times)}], arguments.json)


if __name__ == "__main__":
    main()
