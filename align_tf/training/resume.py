"""Checkpoints of a running training: written whole or not at all, read back to the same step."""

import contextlib
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from align_tf import addresses, files
from align_tf.training import hosts

STATE_NAME = "training_state.safetensors"
SUMMARY_NAME = "training_state.json"
FOLDER = "checkpoint-{}"  # as Hugging Face's Trainer names them


def save(
    output: addresses.Place,
    step: int,
    model: Any,
    processor: Any,
    keep: int,
    best: int | None = None,
) -> addresses.Place:
    """Writes `checkpoint-<step>`: model and processor for `from_pretrained`, and the state.

    Of several processes the first writes, and the others wait.

    The folder appears under its name when all of it is written; a remote one counts when its last
    file is there, the summary of the state. Of a model that LoRA adapts it holds the adapter alone.

    Args:
        output: the folder of the training, as `addresses.place` returns it.
        step: batches trained on, and so the position in the data; an optimizer that leaves out
            steps that are not finite has taken fewer.
        model: the model that trains. With a moving average of the weights, `model.safetensors`
            holds the average.
        processor: its AlignProcessor.
        keep: how many checkpoints stay; older ones go.
        best: the step of one that stays in any case.

    Returns:
        The folder.
    """
    folder = output / FOLDER.format(step)
    # What reads or writes weights of all processes is done in all of them.
    with hosts.readable([*_variables(model).values(), *model.weights]):
        place = hosts.by_first(lambda: _begun(folder, step, model))
    with averaged(model), hosts.readable(model.weights):
        hosts.by_first(lambda: _finish(place, folder, model, processor))
    hosts.by_first(lambda: _remove_old(output, keep, best))
    return folder


def _begun(
    folder: addresses.Place, step: int, model: Any
) -> pathlib.Path | tempfile.TemporaryDirectory:
    """Writes the state into a place from which a checkpoint goes to its own."""
    if addresses.is_local(folder):
        place = new = _hidden(folder)
        new.mkdir(parents=True)
    else:
        place = tempfile.TemporaryDirectory(prefix="align_tf-")
        new = pathlib.Path(place.name)
    state = {name: ops.convert_to_numpy(value) for name, value in _variables(model).items()}
    with files.replacing(new / STATE_NAME) as path:  # for its file mode
        safetensors.numpy.save_file(state, path)
    summary = {
        "step": step,
        "devices": _count_devices(model),
        "sha256": _sha256(new / STATE_NAME),
        **_base(model),
    }
    (new / SUMMARY_NAME).write_text(json.dumps(summary) + "\n", encoding="utf-8")
    return place


def _finish(
    place: pathlib.Path | tempfile.TemporaryDirectory,
    folder: addresses.Place,
    model: Any,
    processor: Any,
) -> None:
    new = place if addresses.is_local(folder) else pathlib.Path(place.name)
    write = model.save_pretrained if model.active_adapter is None else model.save_adapter
    write(new)
    processor.save_pretrained(new)
    if addresses.is_local(folder):
        if folder.exists():  # broken, so that an older one was resumed
            _remove(folder)
        new.rename(folder)
    else:
        _remove(folder)
        addresses.send_folder(new, folder, last=SUMMARY_NAME)
        place.cleanup()


def _remove_old(output: addresses.Place, keep: int, best: int | None) -> None:
    for old in list_checkpoints(output)[:-keep]:
        if old.name != FOLDER.format(best):
            _remove(old)


def list_checkpoints(output: addresses.Place) -> list[addresses.Place]:
    """Lists the checkpoints of a training, the latest last."""
    folders = _folders(output)
    if not addresses.is_local(output):
        folders = [folder for folder in folders if SUMMARY_NAME in addresses.names(folder)]
    return folders


def _folders(output: addresses.Place) -> list[addresses.Place]:
    steps = [re.fullmatch(r"checkpoint-(\d+)", name) for name in addresses.names(output)]
    return [output / FOLDER.format(n) for n in sorted(int(match[1]) for match in steps if match)]


def clear_unfinished(output: addresses.Place) -> None:
    """Removes what a killed process left half written or half removed."""
    if not addresses.is_local(output):
        whole = {folder.name for folder in list_checkpoints(output)}
        for folder in _folders(output):
            if folder.name not in whole:
                _remove(folder)
        return
    for folder in output.glob(".*checkpoint-*"):
        shutil.rmtree(folder)


def restore(folder: addresses.Place, model: Any) -> int:
    """Puts the state of a checkpoint into a compiled model: all of it, or nothing and an error.

    Args:
        folder: what `save` wrote.
        model: the model of the same recipe.

    Returns:
        The step that the state is of.

    Raises:
        CheckpointError: a file is missing, broken or of another model.
        ValueError: it is of another number of devices, which makes a difference here.
    """
    try:
        with (
            addresses.fetched(folder / SUMMARY_NAME) as summary,
            addresses.fetched(folder / STATE_NAME) as path,
        ):
            step = _checked_step(summary, path, model)
            _assign(path, _variables(model))
    except OSError as error:
        raise files.CheckpointError(str(error)) from error
    model.trained_batches = step
    return step


def _checked_step(summary: pathlib.Path, state: pathlib.Path, model: Any) -> int:
    """Reads the step of a state, and checks that this is as it was written, and of this model."""
    values = files.read_json(summary)
    if not isinstance(values.get("step"), int):
        raise files.CheckpointError(f"{summary}: expected a step")
    if _sha256(state) != values.get("sha256"):
        raise files.CheckpointError(f"{state}: not as it was written")
    if not _base(model).items() <= values.items():
        raise files.CheckpointError(
            f"{summary.parent}: an adapter of other weights than {model.name_or_path} holds"
        )
    count, before = _count_devices(model), values.get("devices")
    why = why_as_many_devices(model.vision_model.config.virtual_batch_size)
    if before not in (None, count) and why is not None:
        raise ValueError(
            f"{summary.parent}: of a training on {before} devices, and here it is {count}, {why}; "
            "expected as many devices, or another output"
        )
    return values["step"]


def why_as_many_devices(virtual_batch_size: int | None) -> str | None:
    """Says why a training goes on with as many devices alone; None where it need not."""
    if virtual_batch_size is not None:
        return "and virtual_batch_size takes its parts of each device's images"
    if keras.backend.backend() != "jax":
        return f"and on {keras.backend.backend()} each device draws masks of dropout of its own"
    return None


def _count_devices(model: Any) -> int:
    """How many devices share the batches of a model."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.num_replicas_in_sync
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.device_mesh.devices.size


def _assign(path: pathlib.Path, variables: dict[str, keras.Variable]) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = file.keys()
        found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        wanted = {name: tuple(variable.shape) for name, variable in variables.items()}
        if found != wanted:
            differing = sorted(set(found.items()) ^ set(wanted.items()))
            raise files.CheckpointError(f"{path}: of another model: {differing[0]} differs")
        for name, variable in variables.items():
            variable.assign(file.get_tensor(name))


def restore_last(output: addresses.Place, model: Any) -> int:
    """Restores the last whole checkpoint of a training, and says on stderr which.

    Args:
        output: the folder of the training.
        model: the model of the same recipe, compiled.

    Returns:
        The step that the state is of; 0 where there is no checkpoint.

    Raises:
        CheckpointError: there are some, and none is whole.
        ValueError: as `restore` raises it.
    """
    hosts.by_first(lambda: clear_unfinished(output))
    found = list_checkpoints(output)
    for folder in reversed(found):
        try:
            step = restore(folder, model)
        except files.CheckpointError as error:
            hosts.say_first(f"{folder.name} is broken, so the one before it is taken: {error}")
            continue
        hosts.say_first(f"Going on from step {step}, {folder}")
        return step
    if found:
        raise files.CheckpointError(
            f"{output}: none of its checkpoints is whole; another output starts anew"
        )
    return 0


def _variables(model: Any) -> dict[str, keras.Variable]:
    """All that a step depends on and changes, under names that every process gives alike.

    These are the weights, with BatchNorm's averages, or where LoRA is on its matrices; the states
    of dropout, which Keras's own `save_weights` leaves out; and those of the optimizer.
    """
    weights = model.weights if model.active_adapter is None else model._adapter_weights()
    # Keras counts the names of seeds and optimizers up within a process.
    seeds = [variable for variable in model.variables if variable.name == "seed_generator_state"]
    return {
        **{f"model/{weight.path}": weight for weight in weights},
        **{f"seed/{index}": seed for index, seed in enumerate(seeds)},
        **{
            f"optimizer/{index}/{variable.name}": variable
            for index, variable in enumerate(model.optimizer.variables)
        },
    }


def _base(model: Any) -> dict[str, str]:
    """What tells the weights that an adapter is of from others; nothing without an adapter."""
    if model.active_adapter is None:
        return {}
    sides, digest = {id(weight) for weight in model._adapter_weights()}, hashlib.sha256()
    for weight in model.weights:
        if id(weight) not in sides:
            digest.update(np.ascontiguousarray(hosts.read(weight)).data)
    return {"base_sha256": digest.hexdigest()}


class MeasuresAverages(keras.callbacks.Callback):
    """Has a validation within `fit` measure what `save` writes."""

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self._averaged = averaged(self.model)
        self._averaged.__enter__()

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        self._averaged.__exit__(None, None, None)


@contextlib.contextmanager
def averaged(model: Any) -> Iterator[None]:
    """Has the moving averages in the place of the weights, where the optimizer keeps some."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not optimizer.use_ema:
        yield
        return
    weights = model.trainable_variables
    raw = [_copy(weight) for weight in weights]
    optimizer.finalize_variable_values(weights)
    for weight in weights:  # on JAX now the average's own memory, which a compiled step takes
        weight.assign(_copy(weight))
    try:
        yield
    finally:
        for weight, value in zip(weights, raw, strict=True):
            weight.assign(value)


def _copy(variable: keras.Variable) -> Any:
    """Copies a variable's value, in parts where it lies in parts."""
    value = variable.value
    if getattr(value, "is_fully_replicated", True):
        return np.array(ops.convert_to_numpy(variable))
    return value.copy()


def _hidden(folder: pathlib.Path) -> pathlib.Path:
    """The path beside a checkpoint where it is built and taken apart."""
    hidden = folder.with_name(f".{folder.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    return hidden


def _remove(folder: addresses.Place) -> None:
    """Removes a checkpoint that a kill does not leave as half of one."""
    if not addresses.is_local(folder):
        addresses.remove(folder, first=SUMMARY_NAME)
        return
    shutil.rmtree(folder.rename(folder.with_name(f".old-{folder.name}")))


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
