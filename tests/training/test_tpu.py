"""The training step compiled for TPUs: the text of its program, and the step of align-tiny."""

import dataclasses
import faulthandler
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from align_tf.cli.main import main
from align_tf.training import tpu
from align_tf.training.tpu import GIB
from align_tf.training.tpu_program import Collective, collectives_of, flops_of, foreign_parts

ROOT = pathlib.Path(__file__).parents[2]

# As libtpu writes them, shortened: a gather in two pieces, a start with its done, two reductions.
TEXT = """
  %fusion.1 = bf16[2,192]{1,0} fusion(%p.1), kind=kLoop, calls=%f.1
  %all-gather.1 = bf16[8,1,192]{2,1,0:T(2,128)} all-gather(%fusion.1), channel_id=88, dimensions={0}
  %all-gather.2 = bf16[8,2,192]{2,1,0:T(2,128)} all-gather(%fusion.1), channel_id=88, dimensions={0}
  %all-reduce.3 = (f32[64]{0}, f32[64]{0:T(128)}) all-reduce(%a, %b), channel_id=6, to_apply=%add
  %all-reduce-start.4 = f32[512,640]{1,0} all-reduce-start(%c), channel_id=7, to_apply=%add
  %all-reduce-done.4 = f32[512,640]{1,0} all-reduce-done(%all-reduce-start.4)
  %all-reduce.5 = (bf16[10]{0}, f32[]{:T(128)}) all-reduce(%d, %e), channel_id=8, to_apply=%add
"""


def test_collectives_count_once_by_channel():
    assert collectives_of(TEXT) == [
        Collective("all-reduce", "f32", 3, 512 * 640 * 4 + 2 * 64 * 4 + 4, (512, 640)),
        Collective("all-gather", "bf16", 1, 8 * 2 * 192 * 2, (8, 2, 192)),
        Collective("all-reduce", "bf16", 1, 20, (10,)),
    ]


# A loop of three turns, whose body gathers a weight and sums its gradient into parts; a start.
LOOP = """
%cond.1 (p.1: (s32[], f32[8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(3)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %limit.1), direction=LT
}

%all-reduce-scatter.2 (in.1: bf16[768,192]) -> bf16[96,192] {
  %all-reduce.5 = bf16[768,192]{1,0} all-reduce(%in.1), channel_id=5, to_apply=%add.9
  ROOT %slice.1 = bf16[96,192]{1,0} dynamic-slice(%all-reduce.5, %at.1, %at.2)
}

%body.1.spmd (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.6 = bf16[64,32]{1,0} all-gather(%w.1), channel_id=6, dimensions={0}
  %fusion.3 = bf16[96,192]{1,0} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.2
}

ENTRY %main.1_spmd (p.3: f32[8]) -> (f32[8], s32[]) {
  %while.1 = (s32[], f32[8]) while(%tuple.1), condition=%cond.1, body=%body.1.spmd
  %start.1 = (f32[2,4], f32[16,4]) all-gather-start(%w.2), channel_id=7, dimensions={0}
  %done.1 = f32[16,4]{1,0} all-gather-done(%start.1)
}
"""


def test_collectives_count_by_the_turns_of_their_loop():
    assert collectives_of(LOOP) == [
        Collective("reduce-scatter", "bf16", 3, 3 * 96 * 192 * 2, (96, 192)),
        Collective("all-gather", "bf16", 3, 3 * 64 * 32 * 2, (64, 32)),
        Collective("all-gather", "f32", 1, 16 * 4 * 4, (16, 4)),
    ]


def test_operations_of_products_and_convolutions_count_in_each_round():
    jax = pytest.importorskip("jax")
    import numpy as np

    def rounds(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    traced = jax.jit(rounds).trace(np.ones((2, 3), "float32"), np.ones((3, 3), "float32"))
    assert flops_of(traced.jaxpr.jaxpr) == 5 * 2 * (2 * 3 * 3)

    def convolved(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers).sum()

    step = jax.jit(jax.value_and_grad(jax.checkpoint(convolved), (0, 1)))
    traced = step.trace(np.ones((1, 8, 8, 3), "float32"), np.ones((3, 3, 3, 5), "float32"))
    # 4 x 4 places of 5 channels, once forward and once to each gradient.
    assert flops_of(traced.jaxpr.jaxpr) == 3 * 2 * (4 * 4 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%a = f64[8]{0} add(%b, %c)", ["float64"]),
        ('%a = f32[8]{0} custom-call(%b), target="xla_ffi_python_cpu"', ["a callback to the host"]),
        ("%a = token[] outfeed(%b, %c)", ["a transfer to the host"]),
        ("%a = (f32[8]{0}, token[]) infeed(%b)", ["a transfer to the host"]),
        (TEXT, []),
    ],
)
def test_what_has_no_place_on_a_tpu_is_named(line, found):
    assert foreign_parts(line) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e"], "topology 'v5e': expected a generation of v5e, v5p, v6e and a"),
        (["--topology", "v9:2x2"], "topology 'v9:2x2': expected a generation"),
        (
            ["--length-buckets", "[1, 8]"],
            "--length-buckets [1, 8]: expected whole numbers of 2 or more",
        ),
        (["--batch-size", "1"], "--batch-size 1: expected"),
        (["--preset", "align-base"], "expected model, a checkpoint to fine-tune, or preset"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(flags, message, capsys):
    assert main(["tpu-check", "--model", "align-tiny", *flags]) == 2
    assert message in capsys.readouterr().err


def program(chip_bytes, **figures):
    made = tpu.Program(
        topology="v5e:1x1",
        chips=1,
        tokens=8,
        state_bytes=5 * GIB,
        temporary_bytes=12 * GIB,
        chip_bytes=chip_bytes,
        flops_per_pair=1e9,
        collectives=[],
        seconds=1.0,
        foreign=[],
    )
    return dataclasses.replace(made, **figures)


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs `align-tf tpu-check` with another compiler; returns code, table and last line."""
    monkeypatch.setattr(tpu, "check_topology", lambda topology: None)
    monkeypatch.setattr(tpu, "ENVIRONMENT", {})

    def run(compile_steps, *flags):
        monkeypatch.setattr(tpu, "compile_steps", compile_steps)
        code = main(["tpu-check", "--model", "align-tiny", *flags])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1]

    return run


def test_a_program_that_no_chip_holds_is_told_as_one_that_the_compiler_refuses(told):
    code, out, last = told(lambda *_: iter([program(16 * GIB)]))
    assert code == 2
    assert "16.00 GiB, too little" in out
    assert last == (
        "align-tf: error: v5e:1x1: the step takes 17.00 GiB of a chip's 16.00 GiB; a smaller "
        "batch_size, accumulation in more parts, loop_blocks, remat or dtype=mixed_bfloat16 takes "
        "less"
    )
    flags = ["--loop-blocks", "true", "--remat", "true", "--dtype", "mixed_bfloat16"]
    _, _, last = told(lambda *_: iter([program(16 * GIB)]), *flags)
    assert last.endswith("; a smaller batch_size or accumulation in more parts takes less")
    code, out, _ = told(lambda *_: iter([program(16 * GIB)]), "--json")
    assert (code, json.loads(out)[0]["fits"]) == (2, False)
    code, out, last = told(lambda *_: iter([program(17 * GIB)]))
    assert (code, last) == (0, "8 tokens: compiled in 1 s")
    assert "too little" not in out


def test_a_program_that_jax_cannot_read_has_its_figures_all_the_same(told):
    unread = program(17 * GIB, collectives=None, foreign=None)
    code, out, last = told(lambda *_: iter([unread]))
    assert (code, "12.00 GiB a chip" in out) == (0, True)
    assert last == (
        "Note: what goes between the chips is not told: this JAX cannot read the program that this "
        "libtpu has compiled; pip install -U 'jax[tpu]' brings two that go together"
    )
    _, out, _ = told(lambda *_: iter([unread]), "--json")
    assert json.loads(out)[0]["collectives"] is None
    code, out, last = told(lambda *_: iter([unread]), "--program", "program.txt")
    assert (code, "12.00 GiB a chip" in out) == (2, True)
    assert last.startswith("align-tf: error: program.txt: not written: this JAX cannot read ")


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGSEGV, "a fault of its own; another batch_size, loop_blocks or remat may "),
        (signal.SIGKILL, "as where the memory of this machine runs out"),
    ],
)
def test_a_compiler_that_dies_is_told(told, number, why):
    def dies(*_):
        faulthandler.disable()  # which pytest has on
        yield program(17 * GIB)
        os.kill(os.getpid(), number)

    code, out, last = told(dies)
    died = f"align-tf: error: v5e:1x1: libtpu's compiler has died of {number.name}, {why}"
    assert (code, out) == (2, "")
    assert last.startswith(died)


def test_a_mistake_that_the_compiler_tells_is_one_line(told):
    def fails(*_):
        raise FileNotFoundError("align-tiny: no such folder")
        yield

    code, out, last = told(fails)
    assert (code, out, last) == (2, "", "align-tf: error: align-tiny: no such folder")


@pytest.fixture(scope="module")
def check():
    """Runs `align-tf tpu-check` for align-tiny; returns what it prints and its stderr."""
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    pytest.importorskip("jax")

    def run(*flags):
        command = [sys.executable, "-m", "align_tf", "tpu-check", "--model", "align-tiny", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command += ["--dtype", "mixed_bfloat16", "--optimizer", "lamb", "--batch-norm", "trained"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def compiled(check):
    """Runs it for texts of 8 tokens; returns what it tells of the one program."""

    def run(topology, batch_size, *flags):
        size = ("--batch-size", str(batch_size), "--length-buckets", "8")
        code, out, err = check("--topology", topology, *size, *flags)
        assert code == 0, err
        [program] = json.loads(out)
        return program

    return run


@pytest.mark.slow
def test_step_compiles_for_one_chip(compiled):
    program = compiled("v5e:1x1", 16)
    assert program["collectives"] == []
    assert program["foreign"] == []
    assert program["fits"]
    # Weights and LAMB's two moments in float32, 3.3 million of each, and the batch.
    assert 30e6 < program["state_bytes"] < 60e6
    assert program["flops_per_pair"] > 1e8


@pytest.mark.slow
def test_step_of_two_hosts_moves_embeddings_and_gradients_alone(compiled, tmp_path):
    text = tmp_path / "program.txt"
    program = compiled("v6e:2x4", 32, "--program", str(text))
    assert program["chips"] == 8
    assert program["foreign"] == []
    assert "f64[" not in text.read_text()
    kinds = {row["kind"] for row in program["collectives"]}
    assert kinds == {"all-gather", "all-reduce"}
    [gathered] = [row for row in program["collectives"] if row["kind"] == "all-gather"]
    # The embeddings of both towers, 32 of 192 in bfloat16, and nothing wider.
    assert gathered["dtype"] == "bf16"
    assert gathered["num_bytes"] == gathered["count"] * 32 * 192 * 2


@pytest.mark.slow
def test_a_step_in_parts_gathers_the_embeddings_once(compiled):
    program = compiled("v6e:2x4", 64, "--accumulation", "2")
    kinds = {row["kind"] for row in program["collectives"]}
    assert kinds == {"all-gather", "all-reduce", "reduce-scatter"}  # no row of the logits moves
    [gathered] = [row for row in program["collectives"] if row["kind"] == "all-gather"]
    assert (gathered["dtype"], gathered["num_bytes"]) == ("bf16", 2 * 64 * 192 * 2)


@pytest.mark.slow
def test_step_with_sharded_state_gathers_weights_and_keeps_parts(compiled):
    program = compiled("v6e:2x4", 32, "--shard-state", "true")
    # 39 MiB a chip whole; of these 13 are variables too small to be cut.
    assert 13e6 < program["state_bytes"] < 20e6
    gathered = [row for row in program["collectives"] if row["kind"] == "all-gather"]
    assert [750, 192] in [row["largest"][-2:] for row in gathered]  # 8 parts of word embeddings
    assert "reduce-scatter" in {row["kind"] for row in program["collectives"]}
    assert not {"all-to-all", "collective-permute"} & {r["kind"] for r in program["collectives"]}


@pytest.mark.slow
def test_a_step_that_no_chip_holds_is_one_line(check):
    code, _, err = check("--topology", "v5e:1x1", "--batch-size", "262144", "--length-buckets", "8")
    assert code == 2
    assert "v5e:1x1: the step takes" in err.splitlines()[-1]


@pytest.mark.slow
def test_what_a_topology_does_not_have_is_told_before_the_model(check):
    code, _, err = check("--topology", "v6e:2x4", "--batch-size", "32", "--devices", "4")
    assert code == 2
    assert err.splitlines()[-1] == (
        "align-tf: error: --devices 4: v6e:2x4 has 8 chips, which all share a batch; expected "
        "another topology"
    )
