"""What the parity tests share: a transformers model with random weights, and its twin here."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

from align_tf import AlignModel, AlignTextModel, AlignVisionModel

TWINS = {
    "AlignModel": AlignModel,
    "AlignTextModel": AlignTextModel,
    "AlignVisionModel": AlignVisionModel,
}


def _randomize(model: Any, seed: int = 0) -> Any:
    """Draws every weight and every BatchNorm statistic, at the size of a trained model's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if not tensor.is_floating_point() or name.endswith("temperature"):
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + 0.5 * noise.abs())
            elif tensor.ndim == 1 and name.endswith("weight"):  # of a norm
                tensor.copy_(1.0 + 0.1 * noise)
            elif "embeddings.weight" in name:
                tensor.copy_(noise)
            elif tensor.ndim > 1:
                tensor.copy_(1.4 * noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.1 * noise)
    return model.eval()


def _temper(vision_model: Any) -> None:
    """Makes the branch of each residual block small beside what it is added to, as in training.

    Without it 55 random blocks in a row grow to 1e10 and amplify a rounding error to the whole
    of the result: transformers in float32 then differs from itself in float64 by as much.
    """
    import torch

    with torch.no_grad():
        for block in vision_model.encoder.blocks:
            if block.projection.apply_dropout:
                block.projection.project_bn.weight *= 0.2


@pytest.fixture
def randomize() -> Callable:
    """Draws every weight of a model of transformers, and sets it to inference."""
    return _randomize


@pytest.fixture
def twins(tmp_path: pathlib.Path) -> Callable:
    """Builds a model of transformers from a config, saves it, and loads it here."""
    import transformers

    def build(config: dict[str, Any], tempered: bool = False) -> tuple[Any, keras.Model]:
        name = config["model_type"].title().replace("_", "").removesuffix("Model") + "Model"
        values = {key: value for key, value in config.items() if key != "model_type"}
        config_class = getattr(transformers, name.replace("Model", "Config"))
        theirs = getattr(transformers, name)(config_class(**values, attn_implementation="eager"))
        _randomize(theirs)
        if tempered:
            _temper(theirs.vision_model)
        theirs.save_pretrained(tmp_path / "theirs")
        return theirs, TWINS[name].from_pretrained(tmp_path / "theirs")

    return build
