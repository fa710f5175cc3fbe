"""LoRA on a model (arXiv 2106.09685): adapters as Hugging Face's PEFT has them, read and made."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from keras import layers, ops

from align_tf import addresses, hub
from align_tf.checkpoints import adapters, name_table
from align_tf.checkpoints.adapters import AdapterConfig, Sides
from align_tf.configuration.checks import is_finite
from align_tf.models import lora
from align_tf.models.effective_weights import effective_weights
from align_tf.models.freezing import KeepsFrozen
from align_tf.models.sharded_state import check_gathered, check_not_gathered

Model = TypeVar("Model", bound="Adapters")

# What is adapted of each tower: the ends of Hugging Face's names.
TARGETS = {
    "text": ("query", "key", "value", "output.dense", "intermediate.dense", "text_projection"),
    "vision": (
        *("expand_conv", "project_conv", "squeeze_excite.reduce", "squeeze_excite.expand"),
        "image_projection",
    ),
}

DEFAULT = "default"  # the name of an adapter that is given none, as in PEFT


@dataclasses.dataclass
class _Held:
    """An adapter of a model; the matrices of the active one are those in the layers."""

    config: AdapterConfig
    sides: Sides


class _All:
    """The adapters of a model, and what trained before there was one; to Keras, one thing."""

    def __init__(self) -> None:
        self.held: dict[str, _Held] = {}
        self.active: str | None = None
        self.flags: lora.Flags | None = None


class Adapters(KeepsFrozen):
    """What a model of two towers needs to be adapted by LoRA, and to hand the adapter on."""

    def enable_lora(
        self,
        rank: int,
        *,
        alpha: float | None = None,
        towers: Iterable[str] = ("text", "vision"),
        use_rslora: bool = False,
        name: str = DEFAULT,
    ) -> None:
        """Adds an adapter, which alone trains from here on; compile after it.

        Of the text tower the attention's and the feed-forward's dense layers and the projection
        are adapted, of the image tower the 1x1 convolutions. All other weights are frozen,
        BatchNorm's averages and the temperature among them: `freeze` and `unfreeze` choose among
        the adapted layers.

        Args:
            rank: of the two matrices that are learned for a layer.
            alpha: their product counts `alpha / rank` times; None means rank.
            towers: which are adapted, of `text` and `vision`.
            use_rslora: it counts `alpha / sqrt(rank)` times (arXiv 2312.03732).
            name: of the adapter.

        Raises:
            ValueError: the rank is no positive integer or alpha no positive number, there is no
                such tower, or the name is none or that of an adapter.
        """
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank={rank!r}: expected a positive integer")
        alpha = rank if alpha is None else alpha
        if not is_finite(alpha) or alpha <= 0:
            raise ValueError(f"alpha={alpha!r}: expected a positive number")
        several = isinstance(towers, Iterable) and not isinstance(towers, str)
        towers = list(towers) if several else [towers]
        if not towers or any(tower not in tuple(TARGETS) for tower in towers):
            raise ValueError(f"towers={towers!r}: expected some of {', '.join(TARGETS)}")
        if not isinstance(use_rslora, bool):
            raise ValueError(f"use_rslora={use_rslora!r}: expected True or False")
        config = AdapterConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=[end for tower in TARGETS if tower in towers for end in TARGETS[tower]],
            use_rslora=use_rslora,
            base_model_name_or_path=self.name_or_path,
            revision=self.revision,
        )
        shapes = {hf: shape for hf, (_, _, shape) in self._adaptable().items()}
        adapted = [hf for hf in shapes if config.targets(hf)]
        most = max(size for hf in adapted for size in shapes[hf][-2:])
        if rank > most:
            raise ValueError(f"rank={rank!r}: expected no more than a layer has inputs, {most}")
        self._add(name, config, dict.fromkeys(adapted))

    @addresses.naming()
    def load_adapter(
        self,
        name_or_path: str | os.PathLike,
        name: str = DEFAULT,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Adds an adapter that `save_adapter` or Hugging Face's PEFT wrote, and makes it active.

        Args:
            name_or_path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or
                a Hugging Face id.
            name: of the adapter, in this model.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Raises:
            FileNotFoundError: there is no such adapter.
            CheckpointError: it is of a kind that is not supported, such as DoRA, or does not fit
                the model.
            ValueError: an adapter has that name.
        """
        self._check_free(name)
        folder = hub.resolve_folder(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            adapter=True,
        )
        config = adapters.read_config(folder)
        kinds = {hf: (kind, shape) for hf, (_, kind, shape) in self._adaptable().items()}
        self._add(name, config, adapters.read_sides(folder, config, kinds))

    def save_adapter(self, folder: str | os.PathLike, *, name: str | None = None) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json` in PEFT's format.

        `peft.PeftModel.from_pretrained` puts it on transformers' AlignModel.

        Args:
            folder: made if it is not there; also a remote one, such as `gs://bucket/adapter`.
            name: of the adapter; None means the active one.

        Raises:
            ValueError: there is no such adapter.
        """
        held = self._all.held[self._active_or(name)]
        self._park()
        kinds = {hf: kind for hf, (_, kind, _) in self._adaptable().items()}
        adapters.write_adapter(addresses.place(folder), held.config, held.sides, kinds)

    def push_adapter_to_hub(
        self,
        repo_id: str,
        *,
        name: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_adapter` writes to the Hugging Face hub, with a card.

        Args:
            repo_id: such as `me/my-adapter`; made if it is not there.
            name: of the adapter; None means the active one.
            private: whether a new repository is seen by its owner alone.
            token: access token of the hub.
            revision: the branch.
            commit_message: of the commit.
            create_pr: propose it instead.

        Returns:
            The commit's address.

        Raises:
            ValueError: there is no such adapter, or the repository's name is none.
            OSError: the hub refuses, or is not reached.
        """
        return self._push(
            functools.partial(self.save_adapter, name=name),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def set_adapter(self, name: str | None) -> None:
        """Makes another adapter the active one; compile after it, to train.

        Args:
            name: of an adapter; None has the model compute what it does without any.

        Raises:
            ValueError: there is no such adapter.
        """
        check_not_gathered(self)
        held = None if name is None else self._all.held[self._active_or(name)]
        self._park()
        self._activate(name, held)

    def delete_adapter(self, name: str | None) -> None:
        """Forgets an adapter; without the active one, the model computes what it does without any.

        Args:
            name: of the adapter; None means the active one.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self._active_or(name)
        if name == self.active_adapter:
            self.set_adapter(None)
        del self._all.held[name]
        if not self._all.held:
            self._leave()

    def merge_adapter(self) -> None:
        """Adds the active adapter to the weights, and takes all adapters off; compile after it.

        The model is then one without LoRA, and what trained before `enable_lora` trains again. An
        adapter that is made of it names no model: save it too.

        Raises:
            ValueError: no adapter is active, or a layer that it adapts is quantized.
        """
        check_not_gathered(self)
        self._active_or(None)
        adapted = self._adapted()
        for layer in adapted.values():
            if layer.quantization_mode:
                raise ValueError(
                    f"{layer.path} is quantized to {layer.quantization_mode}: expected floating "
                    "point; save_pretrained and the exports merge into what it stands for"
                )
        merged = effective_weights(self)
        self._activate(None, None)
        weights = self._relative_weights()
        for layer in adapted.values():
            path = f"{layer.path}/{lora.adapted_weight(layer)}".removeprefix(f"{self.path}/")
            weights[path].assign(merged[path])
        self.name_or_path = self.revision = None  # the next adapter is of other weights
        self._leave()

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(self._all.held)

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter that the model computes with; None without one."""
        return self._all.active

    @classmethod
    def _from_adapter(cls: type[Model], folder: pathlib.Path, **options: Any) -> Model:
        """Builds the model that an adapter names, and puts the adapter on it."""
        config = adapters.read_config(folder)
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(
                f"{folder}: an adapter that names no model: expected a checkpoint, whose "
                "load_adapter takes this folder"
            )
        if hub.is_adapter(pathlib.Path(base).expanduser()):
            raise ValueError(
                f"{folder}: an adapter of {base}, which is an adapter itself: expected the model "
                "that both adapt"
            )
        try:
            model = cls.from_pretrained(base, **{**options, "revision": config.revision})
        except FileNotFoundError as error:
            message = f"{folder}: an adapter, of a model not found: {error}"
            raise FileNotFoundError(message) from error
        model.load_adapter(folder)
        return model

    # --- below -----------------------------------------------------------------------------

    @property
    def _all(self) -> _All:
        if "_own_adapters" not in vars(self):
            self._own_adapters = _All()
        return self._own_adapters

    def _adaptable(self) -> dict[str, tuple[layers.Layer, str, tuple[int, ...]]]:
        """By Hugging Face's name, each layer that can be adapted: its weight's kind and shape."""
        found = {}
        for layer in self._flatten_layers(include_self=False):
            weight = lora.adapted_weight(layer)
            if weight is not None:
                path = f"{layer.path}/{weight}".removeprefix(f"{self.path}/")
                found[path] = (layer, lora.adapted_shape(layer))
        names = name_table.to_hugging_face(found, self.table)
        return {
            hf.removesuffix(".weight"): (found[path][0], kind, found[path][1])
            for path, (hf, kind) in names.items()
        }

    def _adapted(self) -> dict[str, layers.Layer]:
        """The layers that have LoRA."""
        found = ((hf, layer) for hf, (layer, _, _) in self._adaptable().items())
        return {hf: layer for hf, layer in found if layer.lora_enabled}

    def _adapter_weights(self) -> list:
        return [side for layer in self._adapted().values() for side in lora.sides(layer)]

    def _active_or(self, name: str | None) -> str:
        name = self.active_adapter if name is None else name
        if name is None:
            raise ValueError("no adapter is active: expected enable_lora or load_adapter before it")
        if name not in self.adapters:  # a list, that what cannot be a key is as wrong as others
            known = ", ".join(self._all.held) or "none"
            raise ValueError(f"name={name!r}: no such adapter; there are: {known}")
        return name

    def _trains(self, layer: layers.Layer) -> bool:
        # A copy has the adapter merged, and trains what trained before there was one.
        flags = self._all.flags
        return super()._trains(layer) if flags is None else flags.trained(layer)

    def _check_free(self, name: str) -> None:
        check_not_gathered(self)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: expected a text, the name of an adapter")
        if name in self._all.held:
            raise ValueError(f"name={name!r}: there is such an adapter; expected another name")
        foreign = [] if self.active_adapter else list(self._adapted().values())
        for layer in foreign[:1]:
            raise ValueError(
                f"{layer.path} has LoRA by its own enable_lora: expected that of the model, which "
                "gives an adapter its name"
            )

    def _add(self, name: str, config: AdapterConfig, sides: dict[str, Any]) -> None:
        self._check_free(name)
        self._park()
        if self._all.flags is None:
            self._all.flags = lora.Flags(self)
            self._set_base_frozen(True)
        held = _Held(config, sides)
        self._activate(name, held)
        self._all.held[name] = held

    def _park(self) -> None:
        """Takes note of the matrices of the active adapter, as they are now."""
        if self.active_adapter is not None:
            sides = {hf: lora.sides(layer) for hf, layer in self._adapted().items()}
            check_gathered(side for pair in sides.values() for side in pair)
            self._all.held[self.active_adapter].sides = {
                hf: tuple(np.array(ops.convert_to_numpy(side)) for side in pair)
                for hf, pair in sides.items()
            }

    def _activate(self, name: str | None, held: _Held | None) -> None:
        """Puts the matrices of an adapter into the layers, or for None takes all off them."""
        sides = {} if held is None else held.sides
        wanted = {hf: held.config.rank(hf) for hf in sides}
        found = {hf: layer.lora_rank for hf, layer in self._adapted().items()}
        if wanted != found or None in sides.values():
            for layer in self._adapted().values():
                lora.detach(layer)
            adaptable = self._adaptable()
            strategy = getattr(self, "_distribute_strategy", None)  # TensorFlow's alone
            with contextlib.nullcontext() if strategy is None else strategy.scope():
                for hf, rank in wanted.items():
                    lora.attach(adaptable[hf][0], rank)
            self.compiled = False  # the optimizer is of the weights that there were
        for hf, layer in self._adapted().items():
            layer.lora_alpha = held.config.scale(hf) * layer.lora_rank
            for side, value in zip(lora.sides(layer), sides[hf] or (), strict=False):
                side.assign(value)
        self._all.active = name
        self._keep_frozen()
        # Each computes with the scale of the adapter that was active when it was traced.
        self.train_function = self.test_function = self.predict_function = None

    def _leave(self) -> None:
        """Has the model be one without adapters."""
        self._all.held.clear()
        self._set_base_frozen(False)
        self._all.flags.restore()
        self._all.flags = None

    def _set_base_frozen(self, value: bool) -> None:
        for owner in (self, *self._towers(None), *self.vision_model.blocks):
            owner.base_frozen = value
