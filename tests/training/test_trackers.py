"""The figures of a training in Weights & Biases, MLflow and TensorBoard, each kept on this machine.

As the packages write them: without an account, and without a server.
"""

import json
import struct

import pytest
from small_training import settings_of

from align_tf.cli.main import main
from align_tf.training import Recipe, trackers, train

pytestmark = pytest.mark.slow  # a training, and a database that MLflow lays out

BLOCK = 2**15  # of LevelDB's log format, in which wandb keeps what it logs


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder in which both packages work, of which wandb takes the first for good."""
    for name in ("wandb", "mlflow", "tensorboard"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


def wandb_runs(folder, run):
    """Yields what each start of a run has written: its settings, figures, exit code."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # whose process may write after a run is over
    for file in sorted(folder.glob(f"wandb/offline-run-*/run-{run}.wandb")):
        content, place, whole = file.read_bytes(), 7, b""
        found = {"figures": {}, "exit": None}
        while place + 7 <= len(content):
            if BLOCK - place % BLOCK < 7:  # no room for a header
                place += BLOCK - place % BLOCK
                continue
            size, kind = struct.unpack_from("<HB", content, place + 4)
            whole += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind not in (1, 4):  # all of a record, or its end
                continue
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.HasField("run"):
                found["settings"] = {
                    u.key: json.loads(u.value_json) for u in record.run.config.update
                }
            elif record.HasField("history"):
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                found["figures"][int(items["_step"])] = {k: json.loads(v) for k, v in items.items()}
            elif record.HasField("exit"):
                found["exit"] = record.exit.exit_code
        yield found


def test_who_goes_on_goes_on_in_the_same_runs(place, here, tmp_path, when, traced_once):
    """Broken off behind the step 10, of which the last checkpoint knows nothing."""
    import mlflow

    output = tmp_path / "out"
    asked = {"wandb": True, "mlflow": True, "tensorboard": True}
    settings = {**settings_of(place, output), **asked}

    def break_off():
        raise RuntimeError("broken off")

    when["step 10/"] = break_off
    with pytest.raises(RuntimeError, match="broken off"):
        train(Recipe(**settings))
    runs = json.loads((output / "runs.json").read_text())
    assert list(runs) == ["wandb", "mlflow"]
    assert mlflow.get_run(runs["mlflow"]).info.status == "FAILED"
    when.clear()
    Recipe(**settings).save(tmp_path / "recipe.yaml")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert json.loads((output / "runs.json").read_text()) == runs

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        expected.setdefault(line["step"], {}).update(line)
    assert list(expected) == [5, 10, 15, 20]

    first, second = wandb_runs(here, runs["wandb"])
    assert (first["exit"], second["exit"]) == (1, 0)
    assert second["settings"]["learning_rate"] == 0.01
    assert list(first["figures"]) == [5]
    assert list(second["figures"]) == [10, 15, 20]
    for step, figures in (first["figures"] | second["figures"]).items():
        values = {key: value for key, value in expected[step].items() if key != "step"}
        assert values.items() <= figures.items()

    client, run = mlflow.MlflowClient(), mlflow.get_run(runs["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.data.params["data"] == str(place / "pairs")
    for key in ("loss", "temperature", "gradient_norm"):
        history = sorted((m.step, m.value) for m in client.get_metric_history(runs["mlflow"], key))
        assert history == [(line["step"], line[key]) for line in lines if key in line]
    assert len(list((output / "tensorboard").glob("events.*"))) == 2


def recipe(output, **asked):
    return Recipe(model="m", data="pairs", output=str(output), steps=2, **asked)


def test_a_run_of_who_calls_is_taken_and_left_to_him(here, tmp_path):
    import mlflow
    import wandb

    with wandb.init() as begun, mlflow.start_run() as run:
        with trackers.started(
            recipe(tmp_path, wandb=True, mlflow=True), tmp_path, tmp_path
        ) as write:
            write(3, {"loss": 0.5})
        assert wandb.run is not None and mlflow.active_run() is not None
    assert not (tmp_path / "runs.json").exists()
    (written,) = wandb_runs(here, begun.id)
    assert written["figures"][3]["loss"] == 0.5
    assert mlflow.get_run(run.info.run_id).data.metrics == {"loss": 0.5}


def test_what_does_not_start_is_a_line(here, tmp_path):
    (tmp_path / "runs.json").write_text(json.dumps({"mlflow": "0" * 32}))
    message = rf"^mlflow=true: the run {'0' * 32} of {tmp_path}: Run with id={'0' * 32} not found$"
    with (
        pytest.raises(ValueError, match=message),
        trackers.started(recipe(tmp_path, mlflow=True), tmp_path, tmp_path),
    ):
        pass


def test_a_run_that_takes_no_more_is_told_once(here, tmp_path, capsys):
    import mlflow

    with trackers.started(recipe(tmp_path, mlflow=True), tmp_path, tmp_path) as write:
        write(1, {"loss": 0.5})
        run = mlflow.active_run().info.run_id
        mlflow.MlflowClient().delete_run(run)
        for step in (2, 3):
            write(step, {"loss": 0.25})
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("MLflow ")]
    assert said[0].startswith(f"MLflow gets no figures from step 2 on: The run {run} must be in")
    assert len([line for line in said if "gets no figures" in line]) == 1
    assert mlflow.active_run() is None
