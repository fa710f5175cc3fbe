"""`align-tf tpu-check`: what a training would take on TPUs, by their compiler, without one."""

import argparse
import ctypes
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from align_tf import addresses
from align_tf.cli.common import EXIT_USER_ERROR, import_tensorflow, print_table, say
from align_tf.cli.settings import add_settings, read_settings
from align_tf.training.recipe import BATCH, MODEL, OPTIMIZER, TRAINS

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

# What a check does not touch, and a recipe has to state.
SILENT = {"data": "none", "output": "none", "steps": 1000}

PR_SET_PDEATHSIG = 1  # of Linux, on which alone there is a libtpu: the end of the parent is told


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
    from align_tf.training.tpu import ENVIRONMENT, UNREADABLE, check_topology, too_large

    check_topology(arguments.topology)
    os.environ.update(ENVIRONMENT)
    say(
        f"Compiling a step of {recipe.model or recipe.preset}, {recipe.batch_size:,} pairs, for "
        f"{arguments.topology}, minutes for a large model: loading Keras on JAX ..."
    )
    programs = []
    for program in _compiled_apart(recipe, arguments.topology, arguments.program):
        say(f"{program.tokens} tokens: compiled in {program.seconds:.0f} s")
        programs.append(program)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(p) | {"fits": p.fits} for p in programs], indent=2))
    else:
        for program in programs:
            _print(program)
    if any(program.collectives is None for program in programs):
        if arguments.program:
            raise ValueError(f"{arguments.program}: not written: {UNREADABLE}")
        say(f"Note: what goes between the chips is not told: {UNREADABLE}")
    foreign = sorted({name for program in programs for name in program.foreign or []})
    if foreign:
        say(f"align-tf: error: the program holds {', '.join(foreign)}, which a TPU has not")
        return EXIT_USER_ERROR
    for program in programs:
        if not program.fits:
            sizes = _size(program.taken_bytes), _size(program.chip_bytes)
            raise ValueError(too_large(recipe, program.topology, *sizes))
    return 0


def _compiled_apart(recipe: Any, topology: str, program_path: str | None) -> Iterator[Any]:
    """Compiles in a process of its own, since there are steps of which libtpu's compiler dies."""
    context = multiprocessing.get_context("fork")  # nothing large is loaded yet
    ours, theirs = context.Pipe(duplex=False)
    given = (theirs, recipe, topology, program_path)
    process = context.Process(target=_compile, args=given, daemon=True)
    process.start()
    theirs.close()
    try:
        while (found := _received(ours)) is not None:
            if isinstance(found, ValueError):
                raise found
            yield found
        process.join()
    finally:
        process.kill()
        process.join()
    if process.exitcode > 0:
        sys.exit(process.exitcode)  # of a fault that it has told
    if process.exitcode < 0:
        number = signal.Signals(-process.exitcode)
        why = "a fault of its own; another batch_size, loop_blocks or remat may compile"
        if number == signal.SIGKILL:
            why = "as where the memory of this machine runs out"
        raise ValueError(f"{topology}: libtpu's compiler has died of {number.name}, {why}")


def _received(pipe: Any) -> Any:
    """Returns what comes next through a pipe; None at its end."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _compile(pipe: Any, recipe: Any, topology: str, program_path: str | None) -> None:
    """Sends each program through a pipe, or as a ValueError the mistake that there is none for."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import_tensorflow()
        from align_tf.training.tpu import compile_steps

        for program in compile_steps(recipe, topology, program_path):
            pipe.send(program)
    except KeyboardInterrupt:
        return  # the parent's, which tells
    except (OSError, ValueError, ModuleNotFoundError) as error:
        pipe.send(ValueError(addresses.as_named(str(error))))


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
