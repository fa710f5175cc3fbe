"""Import, load and first answer, each in a fresh process; peak memory of load and of export.

    python benchmarks/start.py [--quick] [--rounds 3] [--json FILE]

The checkpoint is a local folder that the system has read before; the answer is one picture held
against two labels. A process is timed from its start to its end.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import models
from images import photographs
from side_by_side import aim, compare, run

# What a fresh process runs, with the checkpoint, a picture, a SavedModel and a folder to write to;
# its last line is the most memory that it held, in GiB (Linux).
HEAD = """
import sys
checkpoint, picture, exported, written = sys.argv[1:]
"""
OURS = """
from align_tf import AlignModel, AlignProcessor
model = AlignModel.from_pretrained(checkpoint)
processor = AlignProcessor.from_pretrained(checkpoint)
outputs = model(processor(images=picture, text={labels}))
print(float(outputs.logits_per_image[0, 0]))
"""
THEIRS = """
import torch
from PIL import Image
from transformers import AlignModel, AlignProcessor
model = AlignModel.from_pretrained(checkpoint)
processor = AlignProcessor.from_pretrained(checkpoint)
inputs = processor(images=Image.open(picture), text={labels}, return_tensors="pt")
with torch.inference_mode():
    print(model(**inputs).logits_per_image[0, 0].item())
"""
SAVED_MODEL = """
import tensorflow as tf
import tensorflow_text
classify = tf.saved_model.load(exported).signatures["serving_default"]
picture = tf.constant([open(picture, "rb").read()])
print(float(classify(image_bytes=picture, labels=tf.constant([{labels}]))["logits"][0, 0]))
"""
TAIL = """
print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 2**20)
"""
OUR_LOAD = "from align_tf import AlignModel\nAlignModel.from_pretrained(checkpoint)\n"
THEIR_LOAD = "from transformers import AlignModel\nAlignModel.from_pretrained(checkpoint)\n"
EXPORT = """
from align_tf import AlignModel, AlignProcessor, export_saved_model
model = AlignModel.from_pretrained(checkpoint)
export_saved_model(model, AlignProcessor.from_pretrained(checkpoint), written)
"""

# name: program
FIRST_ANSWER = {
    "align_tf": OURS,
    "transformers": THEIRS,
    "align_tf, its SavedModel": SAVED_MODEL,
}
MEMORY = {
    "load, align_tf": OUR_LOAD,
    "load, transformers": THEIR_LOAD,
    "export, align_tf": EXPORT,
}


class Process:
    """A program in a fresh Python: what it prints, and the most memory that a run of it held."""

    def __init__(self, program: str, arguments: list[str]):
        program = (HEAD + program + TAIL).replace("{labels}", repr(models.LABELS))
        self.command = [sys.executable, "-c", program, *arguments]
        self.peak_gib, self.answer = 0.0, ""

    def __call__(self) -> None:
        # The round that does not count leaves Python's bytecode, as an installation by pip does.
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": ""}
        done = subprocess.run(
            self.command, capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise SystemExit(f"a fresh process failed:\n{done.stderr[-2000:]}")
        *answer, peak = done.stdout.splitlines()
        self.answer = answer[-1] if answer else ""
        self.peak_gib = max(self.peak_gib, float(peak))


def help_seconds(times: int) -> float:
    """Returns the median time of `align-tf --help`."""
    command = [sys.executable, "-m", "align_tf.cli", "--help"]
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(quick: bool, rounds: int | None, folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Times fresh processes, and takes their peak memory."""
    rounds = rounds or (1 if quick else 3)
    picture = folder / "picture.jpg"
    picture.write_bytes(photographs(1)[0])
    source, version = models.checkpoint(folder, quick), models.exported(folder, quick)
    arguments = [os.fspath(path) for path in (source, picture, version, folder / "written")]
    answers = {name: Process(program, arguments) for name, program in FIRST_ANSWER.items()}
    result = compare("a fresh process to its first classification", answers, items=1, rounds=rounds)
    logits = [float(process.answer) for process in answers.values()]
    if max(logits) - min(logits) > 1e-2 * max(1, abs(logits[0])):
        raise SystemExit(f"the first answers differ: {logits}")
    for row in result["rows"]:
        row["peak_GiB"] = answers[row["name"]].peak_gib
    theirs = next(row for row in result["rows"] if row["name"] == "transformers")
    result["aims"] = [
        aim("align_tf: time by transformers'", theirs["ratio"], at_most=0.8),
        aim("align-tf --help, seconds", help_seconds(5), at_most=0.3),
    ]
    yield result
    memory = {name: Process(program, arguments) for name, program in MEMORY.items()}
    for name, process in memory.items():
        print(f"memory: {name}", file=sys.stderr)
        process()
    table = [{"": name, "peak GiB": process.peak_gib} for name, process in memory.items()]
    yield {"title": "peak memory of a process", "table": table}


if __name__ == "__main__":
    run(__doc__, measure)
