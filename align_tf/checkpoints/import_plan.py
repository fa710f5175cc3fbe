"""The plan of an import: every weight of a model paired with a tensor of a checkpoint."""

import collections
import itertools
import pathlib
import re

from align_tf.checkpoints import original
from align_tf.checkpoints.name_table import OLD_SUFFIXES, TRANSFORMS, UNUSED, to_hugging_face
from align_tf.checkpoints.tensors import FLOAT_DTYPES, is_original, read_header
from align_tf.files import CheckpointError


def plan_import(
    shapes: dict[str, tuple[int, ...]],
    files: list[pathlib.Path],
    table: tuple,
    *,
    prefix: str = "",
    unused: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> tuple[dict[pathlib.Path, dict[str, tuple[str, str]]], list[str], list[str]]:
    """Pairs every Keras weight with a tensor of a checkpoint, or says what does not fit.

    Args:
        shapes: Keras path -> shape, the weights to fill.
        files: the weight files.
        table: the rows that name them.
        prefix: taken off the names of the checkpoint where they have it, such as `bert.`.
        unused: patterns of names that may be left over, beside `UNUSED`.
        optional: patterns of Keras paths that may stay as they are.

    Returns:
        For each file, name in the file -> (Keras path, transform); the parts of the checkpoint
        that `unused` left out, such as `encoder.top_conv`; the Keras paths left as they are.

    Raises:
        CheckpointError: a weight is missing, a tensor is left over, or a shape differs.
    """
    wanted = {
        hf: (path, transform) for path, (hf, transform) in to_hugging_face(shapes, table).items()
    }
    problems, left_out, plan = [], set(), {}
    for file in files:
        plan[file] = {}
        names, leftovers = _names_and_leftovers(file)
        for name, (dtype, shape) in read_header(file).items():
            hf = _todays_name(names.get(name, name).removeprefix(prefix))
            if hf not in wanted:
                matches = list(filter(None, (re.search(pattern, hf) for pattern in unused)))
                if matches:
                    left_out.add(matches[0].group().strip("."))
                elif not any(re.search(pattern, hf) for pattern in leftovers):
                    problems.append(f"unexpected tensor {name} {shape}")
                continue
            path, transform = wanted.pop(hf)
            transform = "same" if names else transform  # the original's arrays lie as Keras's do
            axes = TRANSFORMS[transform][0]
            turned = shape if axes is None else tuple(shape[a] for a in axes if a < len(shape))
            if turned != shapes[path]:
                problems.append(f"{name} {shape} does not fit {path} {shapes[path]}")
            if dtype not in FLOAT_DTYPES:
                problems.append(f"{name} is of {dtype}, expected floating-point numbers")
            plan[file][name] = (path, transform)
    kept = []
    for hf, (path, _) in wanted.items():
        if any(re.search(p, path) for p in optional):
            kept.append(path)
        else:
            problems.append(f"missing tensor {hf} for {path} {shapes[path]}")
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        where = files[0].parent if len(files) > 1 else files[0]
        raise CheckpointError(f"{where}: the checkpoint does not fit the model\n  {shown}{more}")
    return plan, sorted(left_out), kept


def _names_and_leftovers(file: pathlib.Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds what a file calls otherwise than Hugging Face does, and what it may hold beside."""
    if not is_original(file):
        return {}, UNUSED
    return original.hugging_face_names(file), original.UNUSED


def unused_tensors(files: list[pathlib.Path]) -> collections.Counter:
    """Counts the tensors that an import leaves out, by what their names have in common."""
    counts = collections.Counter()
    for file in files:
        _, leftovers = _names_and_leftovers(file)
        for name in read_header(file):
            matches = filter(None, (re.search(pattern, name) for pattern in leftovers))
            counts.update(match.group().strip("./") for match in itertools.islice(matches, 1))
    return counts


def _todays_name(name: str) -> str:
    for old, new in OLD_SUFFIXES:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
