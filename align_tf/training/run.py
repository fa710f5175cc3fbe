"""Training by a recipe: the model, its data, the steps, and going on where it was stopped."""

import contextlib
import ctypes
import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from align_tf import addresses, files
from align_tf.configuration.align import AlignConfig
from align_tf.data.dataset import batch_keys, make_dataset
from align_tf.data.listing import Listing
from align_tf.data.mixing import Mixture
from align_tf.data.readers import list_files, open_source, open_sources
from align_tf.data.sources import Source
from align_tf.graph_errors import plain
from align_tf.hub import RECIPE_NAME
from align_tf.models.align import AlignModel
from align_tf.preprocessing.processor import AlignProcessor
from align_tf.progress import Bar
from align_tf.terminal import say
from align_tf.training import devices, hosts, resume
from align_tf.training.log import METRICS_NAME, Log, say_header
from align_tf.training.optimization import make_optimizer
from align_tf.training.recipe import Recipe, check_extras
from align_tf.training.recipe_file import read_recipe
from align_tf.training.validation import Best, count_steps, make_validation

LISTING_NAME, COUNTS_NAME = "data_listing.npz", "data_counts.json"
BATCH_NAME = "not_finite.txt"  # the keys of a batch whose loss was not
KEYS_SAID = 4  # of it in the error
ADAPTER_FOLDER = "adapter"  # beside the model that it is merged into
M_ARENA_MAX = -8  # of glibc's malloc.h

# Settings that may change when a training goes on: no weight depends on them,
FREE_SETTINGS = (
    *("output", "validation_data", "max_errors", "save_every", "keep", "log_every"),
    *("tensorboard", "wandb", "mlflow", "keep_best", "early_stop"),
)
# or by rounding alone, since they say how the same step is computed.
ROUNDING_SETTINGS = ("remat", "loop_blocks", "shard_state")
# Settings that name places, which may be called otherwise on another host.
OF_A_HOST = ("output", "data", "validation_data", "model", "processor")


def train(recipe: Recipe) -> addresses.Place:
    """Trains, or goes on with the training that its output folder holds.

    The folder gets `checkpoint-<step>` folders, which `from_pretrained` loads, `metrics.jsonl`,
    and at the end the trained model itself. A process that is killed at any moment is taken up
    from its last checkpoint, and reaches the weights that it would have reached unbroken: the
    checkpoint holds the optimizer and the states of dropout, and the data follow from seed and
    step. On one CPU they are equal bit for bit; on a GPU as far as its kernels are deterministic,
    see `tf.config.experimental.enable_op_determinism`. It may go on with another `remat`,
    `loop_blocks` or `shard_state`, and on JAX on other `devices`, as where memory ran out: to
    weights that differ by rounding. SIGINT and SIGTERM write a checkpoint first.
    With `lora_rank` the checkpoints hold the adapter alone; the trained model has it merged, and
    beside it in `adapter`.

    Args:
        recipe: the settings.

    Returns:
        The output folder.

    Raises:
        ValueError: a setting does not fit, the output folder belongs to another recipe, or the
            loss is no longer finite.
        FileNotFoundError: model or data are not there.
        ModuleNotFoundError: the recipe asks for what is not installed.
        KeyboardInterrupt: a signal stopped the training, after its checkpoint.
    """
    check_extras(recipe)
    hosts.join()
    hosts.agree_on({key: v for key, v in vars(recipe).items() if key not in OF_A_HOST})
    output = hosts.by_first(lambda: _claim(recipe)) or addresses.place(recipe.output)
    hosts.in_all(lambda: _check_seen(output))
    limit_arenas()
    keras.utils.set_random_seed(recipe.seed)
    count = devices.count_devices() if recipe.devices is None else recipe.devices
    devices.check_all(count)
    if recipe.shard_state:
        devices.check_shard_state(count)
    if recipe.batch_size % count:
        raise ValueError(f"batch_size={recipe.batch_size}: expected a multiple of devices={count}")
    at_a_time = recipe.batch_size // count // recipe.accumulation
    if recipe.virtual_batch_size and at_a_time % recipe.virtual_batch_size:
        raise ValueError(
            f"virtual_batch_size={recipe.virtual_batch_size}: expected a divisor of the images "
            f"that a device computes at a time, {at_a_time}"
        )
    processor = hosts.in_all(lambda: make_processor(recipe))
    recipe, opened = _opened(recipe, output)
    several = count > 1 or hosts.place()[1] > 1
    spread = devices.data_parallel(count, recipe.shard_state) if several else None
    with contextlib.nullcontext() if spread is None else spread.scope():
        model = make_model(recipe, processor, count)
        if hosts.is_first():
            say_header(recipe, model, opened, count)
        step = resume.restore_last(output, model)
        hosts.agree(step, f"{output}: the last checkpoint's step")
        best = Best(recipe, output / METRICS_NAME, step)
        if step < recipe.steps and not best.over:
            _fit(model, processor, recipe, output, step, opened.count, best)
        else:
            end = f"It ended at step {step:,}." if best.over else "All of its {:,} steps are done."
            hosts.say_first(end.format(recipe.steps))
        if recipe.keep_best is not None:
            _take_best(output, model, best)
        model.optimizer.finalize_variable_values(model.trainable_variables)  # averages, if any
        with hosts.readable(model.weights):
            hosts.by_first(lambda: _save(model, processor, recipe, output))
    return output


def _save(
    model: AlignModel, processor: AlignProcessor, recipe: Recipe, output: addresses.Place
) -> None:
    model.save_pretrained(output)
    if recipe.lora_rank is not None:
        model.save_adapter(output / ADAPTER_FOLDER)
    processor.save_pretrained(output)


def _take_best(output: addresses.Place, model: AlignModel, best: Best) -> None:
    """Puts the checkpoint of the best validation into the model."""
    there = output / resume.FOLDER.format(best.step)
    if there.name not in [folder.name for folder in resume.list_checkpoints(output)]:
        which = "no validation has found it" if best.step is None else f"{there} is gone"
        raise ValueError(
            f"keep_best={best.key!r}: {which}; expected keep_best from the beginning of a "
            "training, in another output"
        )
    step = resume.restore(there, model)
    hosts.say_first(f"The best {best.key}, {best.values[step]:.4f}, was that of step {step}.")


def limit_arenas() -> None:
    """Has glibc keep one heap for all threads, where it is the C library.

    With one for each thread, each holds on to what was freed in it: a training of align-base in
    batches of 8 took a tenth more memory.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def _claim(recipe: Recipe) -> addresses.Place:
    """Takes the output folder, or refuses one that belongs to something else."""
    output = addresses.place(recipe.output)
    path = output / RECIPE_NAME
    begun = addresses.content(path) is not None
    if begun and resume.list_checkpoints(output):
        _check_same(read_recipe(path), recipe, output)
    elif not begun and addresses.names(output):
        raise ValueError(f"{output}: not empty and not of a training; expected another output")
    recipe.save(path)
    _check_data(recipe, output)
    return output


def _check_same(before: Recipe, recipe: Recipe, output: addresses.Place) -> None:
    """Checks that a training can go on, and tells all that differs: one setting may set others."""
    theirs, ours = [], []
    for field in dataclasses.fields(Recipe):
        old, new = getattr(before, field.name), getattr(recipe, field.name)
        if old != new and (why := _why_kept(field.name, recipe)) is not None:
            theirs.append(f"{field.name}={old!r}")
            ours.append(f"{new!r}{why}")
    if theirs:
        raise ValueError(
            f"{output}: belongs to a training with {' and '.join(theirs)}, this recipe has "
            f"{' and '.join(ours)}; expected the same recipe to go on with it, or another output"
        )


def _why_kept(setting: str, recipe: Recipe) -> str | None:
    """Says why a training cannot go on with another value of a setting; None where it can."""
    if setting in (*FREE_SETTINGS, *ROUNDING_SETTINGS):
        return None
    if setting == "accumulation":
        return ", whose parts draw masks of dropout of their own (remat may change)"
    if setting != "devices":
        return ""
    why = resume.why_as_many_devices(recipe.virtual_batch_size)
    return None if why is None else f", {why}"


def _check_seen(output: addresses.Place) -> None:
    """Checks that a process sees what the first has written: it goes on from its checkpoints."""
    if hosts.place()[1] > 1 and addresses.content(output / RECIPE_NAME) is None:
        raise ValueError(
            f"{output}: not where the first process writes; expected a place that all of them see"
        )


def _check_data(recipe: Recipe, output: addresses.Place) -> None:
    """Keeps the listing of the data, or refuses to go on over others: a step is a place in them."""
    (sources, _), listing = recipe.drawn(), Listing()
    for source in sources:
        listing.extend(list_files(source))
    path = output / LISTING_NAME
    before = Listing.read(path) if resume.list_checkpoints(output) else None
    if before is None:
        listing.save(path)
    elif before.digest() != listing.digest():
        root = recipe.data if isinstance(recipe.data, str) else ""
        raise ValueError(
            f"{', '.join(recipe.said_data())}: changed since {output} was begun: "
            f"{before.changes(listing, root)}; expected the same files, or another output"
        )


def _opened(recipe: Recipe, output: addresses.Place) -> tuple[Recipe, Source | Mixture]:
    """Counts in each process what the first has counted, and checks that all find as much."""
    hosts.by_first(lambda: _counted(recipe, output))  # for the others, what it has counted
    found, opened = hosts.in_all(lambda: _counted(recipe, output))
    hosts.agree(opened.count or 0, "data: pairs")
    hosts.by_first(lambda: _check_count(recipe, output, opened.count))
    return found, opened


def _check_count(recipe: Recipe, output: addresses.Place, count: int) -> None:
    """Keeps how many pairs there are: a shard of the same size may hold others."""
    path = output / LISTING_NAME
    listing = Listing.read(path)
    if listing is None or listing.records == count:
        return
    if listing.records is not None and resume.list_checkpoints(output):
        raise ValueError(
            f"{', '.join(recipe.said_data())}: {listing.records:,} pairs when {output} was begun, "
            f"now {count:,}; expected the same files, or another output"
        )
    listing.records = count
    listing.save(path)


def make_processor(recipe: Recipe) -> AlignProcessor:
    """Makes the processor of a recipe, for its images' size."""
    processor = AlignProcessor.from_pretrained(recipe.processor or recipe.model)
    if recipe.image_size is not None:
        before = processor.image_processor
        # What is resized keeps its margin around what is cropped, as 346 around 289.
        share = recipe.image_size / before.crop_size["height"]
        size = {side: round(pixels * share) for side, pixels in before.size.items()}
        changed = {"size": size, "crop_size": recipe.image_size}
        processor.image_processor = type(before).from_dict({**before.to_dict(), **changed})
    return processor


def _counted(recipe: Recipe, output: addresses.Place) -> tuple[Recipe, Source | Mixture]:
    """States a recipe's epochs in steps; also returns its data, opened, whose pairs are counted.

    What was counted is kept in the output: to go on does not read shards through once more.
    """
    opened, size = open_sources(*recipe.drawn(), index=output / COUNTS_NAME), recipe.batch_size
    for options in recipe.validations().values():
        if options["task"] != "zero-shot":
            open_source(options["data"], index=output / COUNTS_NAME)
    opened.check(size)
    # The last records of a pass, which fill no batch, wait for another.
    steps = recipe.steps or recipe.epochs * (opened.count // size)
    return recipe.counted(steps), opened


def make_model(
    recipe: Recipe, processor: AlignProcessor, device_count: int, blank: bool = False
) -> AlignModel:
    """Makes the model of a recipe whose steps are counted, ready for `fit`.

    Args:
        recipe: the settings.
        processor: its AlignProcessor.
        device_count: how many share a batch.
        blank: give the variables of a preset shapes alone, which take no memory, to compile a
            step and run none.
    """
    if recipe.model is not None:
        vision = {"virtual_batch_size": recipe.virtual_batch_size}
        given = {"vision_config": vision} if recipe.virtual_batch_size else None
        model = AlignModel.from_pretrained(recipe.model, dtype=recipe.dtype, config=given)
        if model.active_adapter is not None:
            if recipe.lora_rank is not None:
                raise ValueError(
                    f"model={recipe.model!r}: an adapter; with lora_rank expected a whole model, "
                    "which align-tf convert --to hf makes of it"
                )
            model.merge_adapter()
    else:
        config = AlignConfig.from_preset(recipe.preset)
        vocab_size = len(processor.tokenizer)
        text_config = dataclasses.replace(config.text_config, vocab_size=vocab_size)
        size = recipe.virtual_batch_size
        vision_config = dataclasses.replace(config.vision_config, virtual_batch_size=size)
        config = dataclasses.replace(config, text_config=text_config, vision_config=vision_config)
        with _drawn(not blank):
            model = AlignModel(config, dtype=recipe.dtype)
    height, _, _ = processor.image_processor.output_shape
    if height is not None:
        model.vision_model.config.image_size = height
    model.label_smoothing = recipe.label_smoothing
    model.loss_reduction = recipe.loss_reduction
    if recipe.loss == "sigmoid":
        model.use_sigmoid_loss(recipe.batch_size)
    if recipe.batch_norm == "frozen":
        model.freeze_batch_norm()
    elif recipe.batch_norm == "trained" or recipe.model is None:
        model.unfreeze_batch_norm(synchronized=device_count > 1)
    if recipe.lora_rank is not None:
        model.enable_lora(recipe.lora_rank, alpha=recipe.lora_alpha, towers=recipe.adapted())
    for tower, blocks in recipe.frozen().items():
        model.freeze(tower, blocks)
    optimizer = make_optimizer(
        model,
        optimizer=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_steps,
        total_steps=recipe.steps,
        schedule=recipe.schedule,
        text_rate=recipe.text_rate,
        vision_rate=recipe.vision_rate,
        layer_decay=recipe.layer_decay,
        clip_norm=recipe.clip_norm,
        ema_momentum=recipe.ema_momentum,
        watch_gradients=True,
    )
    model.compile(
        optimizer=optimizer,
        accumulation=recipe.accumulation,
        remat=recipe.remat,
        loop_blocks=recipe.loop_blocks,
    )
    with _drawn(not blank):  # so that a checkpoint finds its place
        model.optimizer.build(model.trainable_variables)
    return model


def _drawn(drawn: bool) -> contextlib.AbstractContextManager:
    """Has variables that are made in it get values, or none."""
    if drawn:
        return contextlib.nullcontext()
    return keras.StatelessScope(initialize_variables=False)


def _fit(
    model: AlignModel,
    processor: AlignProcessor,
    recipe: Recipe,
    output: addresses.Place,
    step: int,
    pairs: int,
    best: Best,
) -> None:
    lengths = recipe.lengths(devices.has_tpu())
    index, processes = hosts.place()
    sharing = {"batch_size": recipe.batch_size // processes, "shard": (index, processes)}
    sources, weights = recipe.drawn()
    dataset = make_dataset(
        sources,
        processor,
        **sharing,
        training=True,
        weights=weights,
        seed=recipe.seed,
        start_step=step,
        augment=recipe.augment,
        length_buckets=lengths,
        max_errors=recipe.max_errors,
    )
    validation, evaluations = make_validation(recipe, processor, lengths)
    steps = None if validation is None else count_steps(validation)
    checkpoints = Checkpoints(recipe, processor, output, step, best)
    epoch_steps = pairs // recipe.batch_size
    with (
        Bar("Training", recipe.steps, "steps", step) as bar,
        Log(recipe, output, step, epoch_steps, bar) as log,
        _signals(checkpoints),
        _data_errors(),
    ):
        if best.key is not None and step and step not in best.values:
            _validate(model, validation, [*evaluations, log, best])
            if best.over:
                return
        model.fit(
            dataset,
            # An epoch is what lies between two checkpoints; `Checkpoints` ends the last one.
            epochs=math.ceil((recipe.steps - step) / recipe.save_every),
            steps_per_epoch=recipe.save_every,
            validation_data=validation if steps is None else validation.repeat(),
            validation_steps=steps,  # where they are known, Keras keeps its iterator
            # The log reads what the evaluations have found.
            callbacks=[*evaluations, log, best, checkpoints],
            shuffle=False,  # the dataset is
            verbose=0,
        )


def _validate(model: AlignModel, validation: Any, callbacks: list) -> None:
    """Validates a checkpoint that was written, and no more before the training was stopped."""
    values = {}
    if validation is not None:
        with resume.averaged(model):
            values = model.evaluate(validation, verbose=0, return_dict=True)
    logs = {f"val_{name}": value for name, value in values.items()}
    for callback in callbacks:
        callback.set_model(model)
        callback.on_epoch_end(0, logs)


class Checkpoints(resume.MeasuresAverages):
    """Writes the checkpoints of a training, and ends it.

    Args:
        recipe: the settings.
        processor: saved with the model.
        output: the folder of the training.
        step: steps taken before.
        best: knows the step whose checkpoint stays.
    """

    def __init__(
        self,
        recipe: Recipe,
        processor: AlignProcessor,
        output: addresses.Place,
        step: int,
        best: Best,
    ) -> None:
        super().__init__()
        self.recipe, self.processor, self.output, self.step = recipe, processor, output, step
        self.first, self.best = step, best
        self.stopping = False  # set from outside to end after the running step

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.step += 1
        # Of several processes a signal stops all, which hear of it at the next line of progress.
        asked = hosts.place()[1] == 1 or self.step % self.recipe.log_every == 0
        stopping = asked and hosts.any_of(self.stopping)
        ending = stopping or self.step == self.recipe.steps
        if not math.isfinite(logs["loss"]):  # a mean over steps, so the first that is not
            raise ValueError(
                f"step {self.step}: the loss is {logs['loss']}, so no checkpoint is written; a "
                "lower learning_rate, a longer warmup or clip_norm may keep it finite, unless it "
                f"is one of its pairs: {self._said_batch()}"
            )
        # Where an epoch ends too, and so where it is validated.
        if not ending and (self.step - self.first) % self.recipe.save_every:
            return
        kept = self.recipe.keep, self.best.step
        resume.save(self.output, self.step, self.model, self.processor, *kept)
        if stopping:
            say(f"Stopped at step {self.step}; the same command goes on from there.")
            raise KeyboardInterrupt  # past the validation
        if ending:
            self.model.stop_training = True

    def _said_batch(self) -> str:
        """Names the pairs of the step, in a file where they are many."""
        recipe = self.recipe
        sources, weights = recipe.drawn()
        keys = batch_keys(sources, recipe.batch_size, recipe.seed, self.step - 1, weights)
        if len(keys) <= KEYS_SAID:
            return ", ".join(keys)
        path = self.output / BATCH_NAME
        if hosts.is_first():
            files.write_text(path, "".join(f"{key}\n" for key in keys))
        return f"{', '.join(keys[:KEYS_SAID])} and {len(keys) - KEYS_SAID} more, listed in {path}"


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    """Has data that cannot be read end in an error of one line, as other mistakes do."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(plain(error.message)) from error


@contextlib.contextmanager
def _signals(checkpoints: Checkpoints) -> Iterator[None]:
    """Has SIGINT and SIGTERM end the training after a checkpoint, and the second one at once."""

    def stop(number: int, frame: Any) -> None:
        if checkpoints.stopping:
            raise KeyboardInterrupt
        checkpoints.stopping = True
        say("Stopping after this step and its checkpoint; once more stops at once.")

    if threading.current_thread() is not threading.main_thread():  # gets no signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
