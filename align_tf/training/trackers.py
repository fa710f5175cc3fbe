"""Where else the figures of a training go: TensorBoard, Weights & Biases, MLflow.

The packages' own Keras callbacks count batches and epochs from the beginning of a `fit`; here a
figure has the step of the training, as in `metrics.jsonl`, and who goes on goes on in the same run.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping

from align_tf import addresses, files
from align_tf.terminal import say
from align_tf.training.recipe import TRACKERS, Recipe

RUNS_NAME = "runs.json"  # tracker: its run
FOLDER = "tensorboard"
# By which a figure is looked up to find the last step that a run has: each line has it.
ALWAYS = "loss"

Write = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def started(recipe: Recipe, output: addresses.Place, folder: addresses.Place) -> Iterator[Write]:
    """Starts the trackers that a recipe asks for, or goes on with their runs; ends them at the end.

    Args:
        recipe: the settings; `check_extras` has passed.
        output: the folder of the training, which remembers the runs.
        folder: that of logs, on this machine.

    Yields:
        A function that takes a step and figures to each of them; one that fails is left out from
        then on, and told.

    Raises:
        ValueError: one does not start: there is no login, no server, or no such run.
    """
    asked = [name for name in STARTS if getattr(recipe, name)]
    runs, kept = _runs(output), {}
    with contextlib.ExitStack() as stack:
        writes = {}
        for name in asked:
            try:
                start = STARTS[name](recipe, folder, runs.get(name))
                kept[name], write = stack.enter_context(start)
            except Exception as error:  # each package raises kinds of its own
                of_run = f" the run {runs[name]} of {output}:" if runs.get(name) else ""
                raise ValueError(f"{name}=true:{of_run} {_reason(error)}") from error
            writes[name] = write
        found = {name: run for name, run in kept.items() if run is not None}
        if runs | found != runs:
            files.write_text(output / RUNS_NAME, json.dumps(runs | found) + "\n")
        yield lambda step, values: _write_all(writes, step, values)


def _write_all(writes: dict[str, Write], step: int, values: Mapping[str, float]) -> None:
    for name, write in list(writes.items()):
        try:
            write(step, values)
        except Exception as error:  # as above; no server's absence ends a training
            del writes[name]
            say(f"{TRACKERS[name]} gets no figures from step {step:,} on: {_reason(error)}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _runs(output: addresses.Place) -> dict[str, str]:
    """Reads the runs that a training has begun; none of a file that is broken."""
    content = addresses.content(output / RUNS_NAME)
    with contextlib.suppress(ValueError):
        runs = json.loads(content or b"{}")
        return runs if isinstance(runs, dict) else {}
    return {}


@contextlib.contextmanager
def _tensorboard(
    recipe: Recipe, folder: addresses.Place, run: str | None
) -> Iterator[tuple[None, Write]]:
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(folder / FOLDER))

    def write(step: int, values: Mapping[str, float]) -> None:
        with writer.as_default(step):
            for key, value in values.items():
                tf.summary.scalar(key, value)
        writer.flush()

    with contextlib.closing(writer):
        yield None, write


@contextlib.contextmanager
def _wandb(
    recipe: Recipe, folder: addresses.Place, run: str | None
) -> Iterator[tuple[str | None, Write]]:
    """Project, entity and all else are what its own variables say, such as WANDB_PROJECT."""
    import wandb

    if wandb.run is not None:  # of who calls `train`
        yield None, lambda step, values: wandb.run.log(dict(values), step=step)
        return
    begun = wandb.init(
        id=run or secrets.token_hex(4),
        resume="allow",
        config=recipe.to_dict(),
        allow_val_change=True,
        settings=wandb.Settings(silent=True, console="off"),
    )
    with _ended("wandb", lambda failed: begun.finish(exit_code=int(failed))):
        yield begun.id, lambda step, values: begun.log(dict(values), step=step)


@contextlib.contextmanager
def _mlflow(
    recipe: Recipe, folder: addresses.Place, run: str | None
) -> Iterator[tuple[str | None, Write]]:
    """Server and experiment are what its own variables say, such as MLFLOW_TRACKING_URI."""
    import mlflow

    if mlflow.active_run() is not None:  # of who calls `train`
        yield None, lambda step, values: mlflow.log_metrics(dict(values), step=step)
        return
    begun = mlflow.start_run(run_id=run)
    last = -1
    if run is None:
        mlflow.log_params(recipe.to_dict())
    else:  # which has more than the last checkpoint, where a training was killed after it
        history = mlflow.MlflowClient().get_metric_history(run, ALWAYS)
        last = max((one.step for one in history), default=-1)

    def write(step: int, values: Mapping[str, float]) -> None:
        if step > last or ALWAYS not in values:  # a validation is of a checkpoint, so made once
            mlflow.log_metrics(dict(values), step=step)

    with _ended("mlflow", lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED")):
        yield begun.info.run_id, write


@contextlib.contextmanager
def _ended(name: str, end: Callable[[bool], None]) -> Iterator[None]:
    """Ends a run, told whether the block was left by an error, as Ctrl-C is."""
    failed = True
    try:
        yield
        failed = False
    finally:
        try:
            end(failed)
        except Exception as error:  # as above
            say(f"{TRACKERS[name]} has not been told the end: {_reason(error)}")


STARTS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
