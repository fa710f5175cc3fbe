"""What the models share: reading and writing checkpoints and configurations."""

import dataclasses
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from keras import ops

from align_tf import addresses, files, hub
from align_tf.cards import CARD_NAME, make_card
from align_tf.checkpoints import name_table, original
from align_tf.checkpoints.import_plan import plan_import
from align_tf.checkpoints.tensors import is_original, read_tensors, weight_files, write_tensors
from align_tf.configuration.config_file import CONFIG_NAME
from align_tf.models.effective_weights import effective_weights
from align_tf.models.initialization import no_init_weights
from align_tf.models.quantization import quantizations, quantize_again
from align_tf.models.sharded_state import check_gathered, check_not_gathered, undistributed

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="Pretrained")


# What a caller may change on a built layer.
SETTINGS = ("activation", "epsilon")


class Pretrained:
    """Reading and writing of weights, shared by the three models."""

    config_class: type
    table: tuple  # this model's rows of the name table
    prefix = ""  # what a larger checkpoint puts before this model's names
    unused: tuple[str, ...] = ()  # what a larger checkpoint holds beside this model
    name_or_path: str | None = None  # what it was loaded from
    revision: str | None = None

    @classmethod
    @hub.names_options
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike,
        *,
        config: Any = None,
        dtype: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Model:
        """Builds the model of a checkpoint and fills every weight from it.

        Args:
            name_or_path: a folder with `config.json` and `model.safetensors` (whole or in
                shards) or `pytorch_model.bin`; `align-tiny`; or a Hugging Face id such as
                `kakaobrain/align-base`. A tower also loads from a joint checkpoint. Also a
                folder, id or prefix of a checkpoint of the original training code
                (`model-weights.index` and `.data-*`), such as
                `kakaobrain/coyo-align-b7-base`. That one needs no `config.json`: sizes come
                from the shapes of the weights, and what these cannot say from EfficientNet's
                stages and strides, BERT's heads of width 64, images of 289 pixels and the
                defaults of the configurations (activations, epsilons, dropout, padding).
                An adapter's folder or id gives the model that it names, with the adapter on it.
            config: a configuration of this model, or some keys of `config.json`, nested as
                there, that go before those of the checkpoint. A size that is not that of the
                weights is an error.
            dtype: a dtype or policy of the model, such as `mixed_bfloat16`.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Returns:
            The model.

        Raises:
            FileNotFoundError: there is no such checkpoint, or a file of it is missing.
            CheckpointError: a file is broken, a weight is missing, a tensor
                is left over, or a shape or a size differs; the message names each.
            TypeError: an option is not known; the message says what to use in its place.
        """
        folder = hub.resolve_folder(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=True,
        )
        source = hub.original_index(name_or_path) or folder
        if hub.is_adapter(source):
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            return cls._from_adapter(source, config=config, dtype=dtype, **options)
        config = cls._read_config(source, config)
        with no_init_weights():
            model = cls(config, dtype=dtype)
        model._load(source, prefix=cls.prefix, unused=cls.unused)
        model._start_fine_tuning()
        model.name_or_path, model.revision = str(name_or_path), revision
        return model

    @classmethod
    def _from_adapter(cls: type[Model], folder: pathlib.Path, **options: Any) -> Model:
        raise ValueError(f"{folder}: an adapter: expected AlignModel, of which a tower is a part")

    @classmethod
    def _read_config(cls, source: pathlib.Path, given: Any) -> Any:
        file = weight_files(source)[0]
        if isinstance(given, cls.config_class):
            return given
        path, values = file.parent / CONFIG_NAME, {}
        if path.is_file() or not is_original(file):
            values = files.read_json(path)
        for key, value in (given or {}).items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        if is_original(file):
            values = original.read_config(file, values)
        return cls.config_class.from_dict(values)

    def _check_config(self, config: Any) -> None:
        if not isinstance(config, self.config_class):
            name, wanted = type(self).__name__, self.config_class.__name__
            raise TypeError(
                f"{name} of {type(config).__name__}: expected an {wanted}; "
                f"{name}.from_pretrained takes the name of a checkpoint, {wanted}.from_dict a dict"
            )

    def _vision_tower(self) -> Any:
        return None

    def _start_fine_tuning(self) -> None:
        """Freezes BatchNorm, unless the configuration says which it is."""
        tower = self._vision_tower()
        if tower is not None and tower.config.freeze_batch_norm is None:
            tower._set_batch_norm(frozen=True)

    def _relative_weights(self) -> dict[str, Any]:
        return {weight.path.removeprefix(f"{self.path}/"): weight for weight in self.weights}

    def _load(
        self,
        folder: pathlib.Path,
        *,
        prefix: str = "",
        unused: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
    ) -> list[str]:
        """Fills the weights from a checkpoint folder: all of them, or none and an error.

        Args:
            folder: as `tensors.weight_files` takes it.
            prefix, unused, optional: as `import_plan.plan_import` takes them.

        Returns:
            The parts of the checkpoint that `unused` left out.
        """
        weights = self._relative_weights()
        shapes = {path: tuple(weight.shape) for path, weight in weights.items()}
        plan, left_out, kept = plan_import(
            shapes,
            weight_files(folder),
            self.table,
            prefix=prefix,
            unused=unused,
            optional=optional,
        )
        for file, rows in plan.items():
            # Largest first: what reading it takes beside is over before the others come.
            names = sorted(rows, key=lambda name: -math.prod(shapes[rows[name][0]]))
            for name, array in read_tensors(file, names):
                path, transform = rows[name]
                array = name_table.permute(array, transform, to_keras=True)
                weights[path].assign(array.astype(weights[path].dtype, copy=False))
                del array  # before the next one is read
        if kept:
            logger.warning("%s: %s has no %s: new", self.name, folder, ", ".join(kept))
        return left_out

    def _remember_layers(self) -> None:
        """Keeps what the configuration has made of the layers, for `save_pretrained`."""
        self._made = self._layer_settings()

    def _layer_settings(self) -> dict[str, tuple]:
        layers = self._flatten_layers(include_self=False)
        return {
            layer.path: (type(layer).__name__, *(getattr(layer, name, None) for name in SETTINGS))
            for layer in layers
        }

    def _check_layers(self) -> None:
        """Checks that the configuration says what the layers compute."""
        for path, settings in self._layer_settings().items():
            for name, made, found in zip(
                ("class", *SETTINGS), self._made.get(path, settings), settings, strict=True
            ):
                if made != found:
                    raise ValueError(
                        f"{path}: its {name} is no longer what the configuration says, so that a "
                        "checkpoint would compute another thing; export_saved_model takes over "
                        f"{' and '.join(SETTINGS)}"
                    )

    def save_pretrained(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes `config.json` and `model.safetensors` as transformers reads them.

        LoRA is merged into the weights, and what Keras quantized to int8 or int4 is written in
        floating point. NaN is written as it is: what a training went wrong by is to be seen.

        Args:
            folder: made if it is not there; also a remote one, such as `gs://bucket/align`.
            dtype: `float32`, `float16` or `bfloat16`; None keeps the weights' own.

        Raises:
            ValueError: there is no such dtype or it cannot hold a weight, a weight is quantized
                to another thing or lies in parts in several processes, or a layer was changed to
                compute what no configuration says.
            CheckpointError: a weight has no name in the checkpoint.
        """
        self._check_layers()
        weights = effective_weights(self)
        names = name_table.to_hugging_face(weights, self.table)
        tensors = {
            hf: name_table.permute(ops.convert_to_numpy(weights[path]), transform, to_keras=False)
            for path, (hf, transform) in names.items()
        }
        extra = {"architectures": [type(self).__name__], "dtype": dtype or self.variable_dtype}
        config = dataclasses.replace(self.config, extra={**self.config.extra, **extra})
        folder = addresses.place(folder)
        write_tensors(folder, tensors, dtype)
        config.save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face hub, with a card.

        Args:
            repo_id: such as `me/my-align`; made if it is not there.
            private: whether a new repository is seen by its owner alone.
            token: access token of the hub.
            revision: the branch.
            commit_message: of the commit.
            create_pr: propose it instead.

        Returns:
            The commit's address.

        Raises:
            ValueError: as `save_pretrained`; or the repository's name is none.
            OSError: the hub refuses, or is not reached.
        """
        return self._push(
            self.save_pretrained,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def _push(self, write: Callable[[pathlib.Path], None], repo_id: str, **options: Any) -> str:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write(folder)
            files.write_text(folder / CARD_NAME, make_card(folder, repo_id))
            return hub.push(folder, repo_id, **options)

    def save(
        self, filepath: str | os.PathLike, overwrite: bool = True, zipped: bool | None = None
    ) -> None:
        """As Keras's `save`; a model whose layers were changed leaves a file as it is.

        Raises:
            ValueError: a layer was changed to compute what no configuration says, a weight lies in
                parts in several processes, or the name is that of a .h5 file, from which Keras
                could not load it.
        """
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"{filepath}: expected a name that ends in .keras; save_weights writes .weights.h5"
            )
        check_gathered(self.weights)  # before Keras opens the file
        self.get_config()
        with undistributed():
            super().save(filepath, overwrite=overwrite, zipped=zipped)

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **options: Any) -> None:
        """As Keras's.

        Raises:
            ValueError: the model is gathered to be saved.
        """
        check_not_gathered(self)
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **options)

    def set_weights(self, weights: list) -> None:
        check_not_gathered(self)
        super().set_weights(weights)

    def get_config(self) -> dict[str, Any]:
        # For copies and .keras files. A subclass may make its layers otherwise, and do so again.
        if "config_class" in vars(type(self)):
            self._check_layers()
        return self._make_config()

    def _trains(self, layer: Any) -> bool:
        return layer.trainable

    def _make_config(self) -> dict[str, Any]:
        layers = self._flatten_layers(include_self=False)
        frozen = [layer.path for layer in layers if layer.weights and not self._trains(layer)]
        state = {"frozen": frozen}
        if self._vision_tower() is not None:
            state["batch_norm"] = self._vision_tower().batch_norm
        quantized = quantizations(self)
        if quantized:
            state["quantized"] = quantized
        return {**super().get_config(), "config": self.config.to_dict(), **state}

    @classmethod
    def from_config(cls: type[Model], config: Any, custom_objects: Any = None) -> Model:
        if isinstance(config, cls.config_class):  # as Hugging Face's AutoModel has it
            return cls(config)
        config = dict(config)
        frozen, trainable = config.pop("frozen"), config.pop("trainable")
        batch_norm, quantized = config.pop("batch_norm", None), config.pop("quantized", {})
        model = cls(cls.config_class.from_dict(config.pop("config")), **config)
        if batch_norm is not None:
            model._vision_tower()._set_batch_norm(**batch_norm)
        quantize_again(model, quantized)
        model.trainable = trainable
        for layer in model._flatten_layers(include_self=False):  # what holds others before them
            if layer.weights:
                layer.trainable = layer.path not in frozen
        return model
