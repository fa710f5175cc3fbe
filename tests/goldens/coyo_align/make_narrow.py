"""Cuts the two narrow checkpoints of the original training code down to what the tests need.

    python tests/goldens/coyo_align/make_narrow.py FOLDER

FOLDER holds `b3-narrow` and `b7-narrow`, each with a checkpoint `model-weights`, `expected.npz`
and `architecture.json`, as README.md says. `b3-narrow` is copied whole but for two of its three
images; `b7-narrow` loses the optimizer's slots, its other variables and its object graph are
written as they are.
"""

import pathlib
import shutil
import sys

import numpy as np
import tensorflow as tf

HERE = pathlib.Path(__file__).parent
PREFIX = "model-weights"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def cut_images(source: pathlib.Path, target: pathlib.Path, count: int) -> None:
    arrays = dict(np.load(source / "expected.npz"))
    for name in ("image", "image_features"):
        arrays[name] = arrays[name][:count]
    np.savez(target / "expected.npz", **arrays)


def strip_slots(source: pathlib.Path, target: pathlib.Path) -> None:
    reader = tf.train.load_checkpoint(str(source / PREFIX))
    names = [n for n in sorted(reader.get_variable_to_shape_map()) if "optimizer/_var" not in n]
    tensors = [tf.constant(reader.get_tensor(name)) for name in names]
    tf.raw_ops.SaveV2(
        prefix=str(target / f"{PREFIX}.part"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=tensors,
    )
    # Renames the one shard as a training run does.
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(target / f"{PREFIX}.part")],
        destination_prefix=str(target / PREFIX),
    )


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    for name, images in (("b3-narrow", 1), ("b7-narrow", 3)):
        source, target = folder / name, HERE / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        shutil.copyfile(source / "architecture.json", target / "architecture.json")
        cut_images(source, target, images)
    for file in (folder / "b3-narrow").glob(f"{PREFIX}.*"):
        shutil.copyfile(file, HERE / "b3-narrow" / file.name)
    strip_slots(folder / "b7-narrow", HERE / "b7-narrow")


if __name__ == "__main__":
    main()
