"""The training step of a recipe, compiled for TPUs that are not here: memory, FLOPs, collectives.

Google's compiler, which libtpu brings, needs a description of the chips alone
(`jax.experimental.topologies`). What is compiled is the step that `fit` runs under
`keras.distribution.DataParallel`: `AlignModel.train_step`, its state donated, and where the
distribution puts it: replicated, or in parts; the batch spread over the chips.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

from align_tf.extras import extra
from align_tf.training.recipe import Recipe
from align_tf.training.tpu_program import (
    Collective,
    collectives_of,
    flops_of,
    foreign_parts,
)

GIB = 2**30

# generation: memory of a chip in GiB (cloud.google.com/tpu/docs/system-architecture-tpu-vm)
MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32}

# What a process has to know before JAX starts: no TPU is looked for, nor what would describe it.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Of the compiler's errors: what the program would take, and what there is.
OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"
    r"|\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
)


UNREADABLE = (
    "this JAX cannot read the program that this libtpu has compiled; "
    "pip install -U 'jax[tpu]' brings two that go together"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of a step.

    Args:
        topology: such as `v5e:2x4`.
        chips: how many the topology has.
        tokens: the length of the texts.
        state_bytes: on each chip, weights, optimizer and batch.
        temporary_bytes: on each chip, beside them while the step runs.
        chip_bytes: what a chip has.
        flops_per_pair: floating-point operations of the step's products and convolutions, a pair.
        collectives: what goes between the chips; None where JAX cannot read the program, as that
            of a libtpu newer than itself.
        seconds: that the compilation took.
        foreign: what has no place on a TPU, such as float64; empty, or None as above.
    """

    topology: str
    chips: int
    tokens: int
    state_bytes: int
    temporary_bytes: int
    chip_bytes: int
    flops_per_pair: float
    collectives: list[Collective] | None
    seconds: float
    foreign: list[str] | None

    @property
    def taken_bytes(self) -> int:
        """What it takes of a chip."""
        return self.state_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.taken_bytes <= self.chip_bytes


def too_large(recipe: Recipe, topology: str, taken: str, there: str) -> str:
    """Says that no chip holds a step, and what takes less.

    Args:
        recipe: the settings.
        topology: such as `v5e:2x4`.
        taken: what the step takes of a chip, such as `20.1 GiB`.
        there: what a chip has.
    """
    unused = [name for name in ("loop_blocks", "remat") if not getattr(recipe, name)]
    if not recipe.shard_state and not topology.endswith(":1x1"):
        unused.append("shard_state")
    if recipe.dtype == "float32":
        unused.append("dtype=mixed_bfloat16")
    *ways, last = ["a smaller batch_size", "accumulation in more parts", *unused]
    return (
        f"{topology}: the step takes {taken} of a chip's {there}; {', '.join(ways)} or {last} "
        "takes less"
    )


def check_topology(topology: str) -> None:
    """Checks the name of a topology, before anything is loaded.

    Raises:
        ValueError: it is none; the message says what is.
        ModuleNotFoundError: libtpu or JAX is not installed; the message names the pip command.
    """
    generation, _, shape = topology.partition(":")
    if generation not in MEMORY or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ValueError(
            f"topology {topology!r}: expected a generation of {', '.join(MEMORY)} and a shape, "
            "such as v5e:1x1 or v6e:2x4"
        )
    with extra("tpu", "compiling for a TPU needs libtpu and JAX"):
        import importlib.util

        for name in ("jax", "libtpu"):
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def compile_steps(
    recipe: Recipe, topology: str, program_path: str | None = None
) -> Iterator[Program]:
    """Compiles a recipe's training step, for each length that it pads texts to.

    Args:
        recipe: the settings; its data and output are not touched.
        topology: see `check_topology`.
        program_path: a file for the text of the last compiled program.

    Yields:
        What each program takes.

    Raises:
        ValueError: the batch cannot be spread over the chips, or is to be over some of them, the
            topology is not known to the compiler, or the program takes more memory than a chip
            has; the message says how much.
    """
    check_topology(topology)
    from align_tf.training.devices import check_shard_state, spread_over
    from align_tf.training.run import make_model, make_processor

    devices = _devices(topology)
    if recipe.devices not in (None, len(devices)):
        raise ValueError(
            f"devices={recipe.devices}: {topology} has {len(devices)} chips, which all share a "
            "batch; expected another topology"
        )
    if recipe.batch_size % len(devices):
        raise ValueError(
            f"batch_size={recipe.batch_size}: expected a multiple of {topology}'s "
            f"{len(devices)} chips"
        )
    if recipe.shard_state:
        check_shard_state(len(devices))
    recipe = recipe.counted(recipe.steps or (recipe.warmup_steps or 0) + 1)
    processor = make_processor(recipe)
    image_shape = processor.image_processor.output_shape
    if image_shape[0] is None:
        raise ValueError(
            f"{recipe.processor or recipe.model}: leaves images of any size, and a TPU runs "
            "programs of fixed shapes; expected one that crops, or image_size"
        )
    model = make_model(recipe, processor, len(devices), blank=recipe.preset is not None)
    # Not around the model, whose weights would be put on the chips.
    with spread_over(devices, recipe.shard_state).scope():
        for tokens in recipe.lengths(on_tpu=True):
            yield _compile(recipe, model, topology, image_shape, tokens, program_path)


def _compile(
    recipe: Recipe,
    model: Any,
    topology: str,
    image_shape: tuple,
    tokens: int,
    program_path: str | None,
) -> Program:
    import jax
    import keras

    chips = keras.distribution.distribution().device_mesh.devices.size
    state, batch, shardings = _arguments(model, recipe.batch_size, tokens, image_shape)
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, shardings))
    start = time.monotonic()
    with _plain_errors(recipe, topology):
        traced = step.trace(state, batch)
        compiled = traced.lower().compile()
    seconds = time.monotonic() - start
    text = _text(compiled)
    if program_path is not None and text is not None:
        from align_tf import files

        files.write_text(pathlib.Path(program_path), text)
    memory = compiled.memory_analysis()
    return Program(
        topology=topology,
        chips=chips,
        tokens=tokens,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        chip_bytes=MEMORY[topology.partition(":")[0]] * GIB,
        flops_per_pair=flops_of(traced.jaxpr.jaxpr) / recipe.batch_size,
        collectives=None if text is None else collectives_of(text),
        seconds=seconds,
        foreign=None if text is None else foreign_parts(text),
    )


def _text(compiled: Any) -> str | None:
    """Returns a program's text; None where the compiler has put into it what JAX does not know."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _devices(topology: str) -> list:
    import libtpu
    from jax.experimental import topologies

    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
    # A host of v5e and v6e has 2x2 chips, unless told that this is a single one.
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    try:
        described = topologies.get_topology_desc(topology, "tpu", **options)
        return list(described.devices)
    except Exception as error:  # of several kinds, from the compiler's own code
        raise ValueError(f"topology {topology}: {str(error).splitlines()[0]}") from error


def _arguments(
    model: Any, batch_size: int, tokens: int, image_shape: tuple
) -> tuple[tuple, dict, tuple]:
    """The shapes of a step's state and batch, and where the state lies."""
    import jax
    import keras

    distribution = keras.distribution.distribution()

    def shaped(shape: tuple, dtype: str, layout: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)

    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple(
        [shaped(v.shape, v.dtype, distribution.get_variable_layout(v)) for v in group]
        for group in variables
    )
    # As `make_dataset` gives them. name: (dtype, shape of a row)
    batch = {
        "pixel_values": ("float32", image_shape),
        "input_ids": ("int32", (tokens,)),
        "attention_mask": ("int32", (tokens,)),
        "token_type_ids": ("int32", (tokens,)),
        "image_ids": ("int32", ()),
        "text_ids": ("int32", ()),
        "sample_weight": ("float32", ()),
    }
    batch = {
        name: shaped(
            (batch_size, *shape), dtype, distribution.get_data_layout((batch_size, *shape))
        )
        for name, (dtype, shape) in batch.items()
    }
    return state, batch, jax.tree.map(lambda array: array.sharding, state)


@contextlib.contextmanager
def _plain_errors(recipe: Recipe, topology: str) -> Iterator[None]:
    """Has a program that does not fit a chip be one line."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        taken, there = [value for value in found.groups() if value]
        raise ValueError(too_large(recipe, topology, f"{taken}iB", f"{there}iB")) from error
