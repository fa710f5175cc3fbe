"""Where the time of our training step goes, by part of the model and by operation.

    python benchmarks/step_profile.py [--quick] [--batch-size 8] [--dtype mixed_bfloat16]

The sums are of the operations' own times, as TensorFlow's profiler has them.
"""

import argparse
import collections
import pathlib
import tempfile
from collections.abc import Iterator

import models
from side_by_side import show
from training import make_batch, tensorflow_step

WARM = 2
PARTS = (  # first match: what an operation's name holds, the part it is of
    ("lamb", "optimizer"),
    ("_bn", "image tower: BatchNorm"),
    ("depthwise_conv", "image tower: depthwise convolutions"),
    ("expand_conv", "image tower: convolutions of 1x1"),
    ("project_conv", "image tower: convolutions of 1x1"),
    ("stem_conv", "image tower: stem"),
    ("/se_", "image tower: squeeze-and-excite"),
    ("vision_model", "image tower: activations and the rest"),
    ("text_", "text tower"),
)
UNNAMED = "not named by the graph optimiser"


def operations(folder: str) -> Iterator[tuple[str, str, float]]:
    """Yields each operation that ran: its name, its type and its seconds."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(file.read_bytes())
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                place, colon, kind = name.rpartition(":")
                # What has no place is the executor, which holds the operations.
                if colon and "/" in place and not kind.startswith("__"):
                    yield place, kind.partition("#")[0], event.duration_ps / 1e12


def part_of(place: str, kind: str) -> str:
    for word, part in PARTS:
        if word in place:
            backward = "gradient_tape" in place or "Backprop" in kind
            if part == "optimizer":
                return part
            return f"{part}, {'backward' if backward else 'forward'}"
    return UNNAMED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: proves that it runs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    import tensorflow as tf

    models.set_tensorflow_threads()
    with tempfile.TemporaryDirectory() as folder:
        source = models.checkpoint(pathlib.Path(folder), arguments.quick)
        batch = make_batch(models.make_config(arguments.quick), arguments.batch_size)
        step = tensorflow_step(source, batch, arguments.dtype)
        for _ in range(WARM):
            step()
        tf.profiler.experimental.start(folder)
        step()
        tf.profiler.experimental.stop()
        ran = list(operations(folder))
    results = []
    for title, key in (("by part", part_of), ("by operation", lambda place, kind: kind)):
        seconds = collections.Counter()
        for place, kind, time in ran:
            seconds[key(place, kind)] += time
        total = seconds.total()
        table = [
            {"": name, "seconds": time, "share": time / total}
            for name, time in seconds.most_common(20)
        ]
        results.append({"title": f"a training step, {title}", "table": table})
    show(results, arguments.json)


if __name__ == "__main__":
    main()
