"""`align-tf tpu-check`: what a training would take on TPUs, by their compiler, without one."""

import argparse
import dataclasses
import json
import os
from typing import Any

from align_tf.cli.common import EXIT_USER_ERROR, import_tensorflow, print_table, say
from align_tf.cli.settings import add_settings, read_settings
from align_tf.training.recipe import BATCH, MODEL, OPTIMIZER, TRAINS

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

# What a check does not touch, and a recipe has to state.
SILENT = {"data": "none", "output": "none", "steps": 1000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_settings(parser, (MODEL, BATCH, OPTIMIZER, TRAINS))
    parser.add_argument(
        "--topology",
        default="v5e:1x1",
        metavar="CHIPS",
        help="generation and shape, such as v5e:1x1 and v6e:1x1 (Colab's) or v5e:16x16 (v5e:1x1)",
    )
    parser.add_argument(
        "--program", metavar="FILE", help="write the text of the last compiled program"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: Any) -> int:
    recipe = read_settings(arguments, SILENT)
    from align_tf.training.tpu import ENVIRONMENT, check_topology, compile_steps, too_large

    check_topology(arguments.topology)
    os.environ.update(ENVIRONMENT)
    say(
        f"Compiling a step of {recipe.model or recipe.preset}, {recipe.batch_size:,} pairs, for "
        f"{arguments.topology}, minutes for a large model: loading Keras on JAX ..."
    )
    import_tensorflow()
    programs = []
    for program in compile_steps(recipe, arguments.topology, arguments.program):
        say(f"{program.tokens} tokens: compiled in {program.seconds:.0f} s")
        programs.append(program)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(p) | {"fits": p.fits} for p in programs], indent=2))
    else:
        for program in programs:
            _print(program)
    foreign = sorted({name for program in programs for name in program.foreign})
    if foreign:
        say(f"align-tf: error: the program holds {', '.join(foreign)}, which a TPU has not")
        return EXIT_USER_ERROR
    for program in programs:
        if not program.fits:
            sizes = _size(program.taken_bytes), _size(program.chip_bytes)
            raise ValueError(too_large(program.topology, *sizes))
    return 0


def _print(program: Any) -> None:
    figures = [
        ["weights, optimizer, batch", f"{_size(program.state_bytes)} a chip"],
        ["beside them", f"{_size(program.temporary_bytes)} a chip"],
        ["a chip has", _size(program.chip_bytes) + ("" if program.fits else ", too little")],
        ["computed", f"{program.flops_per_pair / 1e9:,.1f} GFLOP a pair"],
        ["compiled in", f"{program.seconds:,.0f} s"],
    ]
    chips = f"{program.chips} chip{'s' * (program.chips > 1)}"
    title = f"{program.topology}, {chips}, texts of {program.tokens} tokens"
    print_table(title, ["", "figure"], figures)
    if program.collectives:
        rows = [
            [
                row.kind,
                row.dtype,
                str(row.count),
                _size(row.num_bytes),
                "x".join(map(str, row.largest)),
            ]
            for row in program.collectives
        ]
        columns = ["between chips", "dtype", "count", "bytes a chip", "largest"]
        print_table("Collectives", columns, rows)


def _size(num_bytes: int) -> str:
    for unit, size in UNITS:
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
