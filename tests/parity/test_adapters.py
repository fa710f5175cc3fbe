"""LoRA adapters beside Hugging Face's PEFT: made by either, they compute the same in the other."""

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignModel
from align_tf.files import CheckpointError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.0")

EMBEDS = ("image_embeds", "text_embeds")


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    mask = np.ones((4, 6), "int32")
    mask[2:, 4:] = 0
    return {
        "pixel_values": rng.random((4, 16, 16, 3), "float32"),
        "input_ids": rng.integers(1, 40, (4, 6), "int32") * mask,
        "attention_mask": mask,
    }


def theirs(model, inputs):
    as_torch = {key: torch.tensor(value).long() for key, value in inputs.items()}
    as_torch["pixel_values"] = torch.tensor(inputs["pixel_values"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        output = model.eval()(**as_torch)
    return {name: output[name].numpy() for name in EMBEDS}


def ours(model, inputs):
    output = model(inputs)
    return {name: ops.convert_to_numpy(output[name]) for name in EMBEDS}


def assert_same(found, expected, plain):
    for name in EMBEDS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)
        assert np.abs(expected[name] - plain[name]).max() > 0.01


def drawn(model):
    """Gives every matrix of an adapter values, as a training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def test_what_is_made_here_runs_there(checkpoint, inputs, tmp_path):
    model = AlignModel.from_pretrained(checkpoint)
    plain = ours(model, inputs)
    keras.utils.set_random_seed(0)
    model.enable_lora(3, alpha=5, use_rslora=True)
    model.compile(keras.optimizers.SGD(3.0))
    model.fit(inputs, batch_size=4, epochs=3, verbose=0)
    model.save_adapter(tmp_path / "adapter")

    base = transformers.AlignModel.from_pretrained(checkpoint)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same(theirs(adapted, inputs), ours(model, inputs), plain)
    merged = adapted.merge_and_unload()
    assert_same(theirs(merged, inputs), ours(model, inputs), plain)
    # By transformers alone, and by the adapter's own words on its base.
    alone = transformers.AlignModel.from_pretrained(tmp_path / "adapter")
    assert_same(theirs(alone, inputs), ours(model, inputs), plain)
    alone = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert_same(theirs(alone, inputs), ours(model, inputs), plain)


CONFIGS = {
    "names": {"target_modules": ["query", "value", "output.dense", "text_projection"]},
    "expression": {"target_modules": r"vision_model\..*(expand|project)_conv|.*\.reduce"},
    "rslora": {"target_modules": ["key", "expand"], "use_rslora": True},
    "stem and words": {"target_modules": ["convolution", "word_embeddings", "pooler.dense"]},
    "patterns": {
        "target_modules": ["query", "intermediate.dense", "project_conv"],
        "rank_pattern": {"query": 3, "blocks.1.projection.project_conv": 1},
        "alpha_pattern": {"intermediate.dense": 16},
    },
    "layers": {"target_modules": ["query", "key"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["query", "key"], "exclude_modules": r".*layer\.0.*key"},
    "all-linear": {"target_modules": "all-linear"},
    "dropout and eva": {"target_modules": ["query"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_made_there_runs_here(settings, checkpoint, inputs, tmp_path):
    base = transformers.AlignModel.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, lora_alpha=6, **settings)
    adapted = drawn(peft.get_peft_model(base, config))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = theirs(adapted, inputs)

    model = AlignModel.from_pretrained(checkpoint)
    plain = ours(model, inputs)
    model.load_adapter(tmp_path / "adapter")
    assert_some(ours(model, inputs), expected, plain)
    model.save_adapter(tmp_path / "again")
    model.merge_adapter()
    assert_some(ours(model, inputs), expected, plain)
    base = transformers.AlignModel.from_pretrained(checkpoint)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again")
    assert_some(theirs(again, inputs), expected, plain)


def assert_some(found, expected, plain):
    """As `assert_same`, where one tower may be as it was."""
    moved = [np.abs(expected[name] - plain[name]).max() for name in EMBEDS]
    assert max(moved) > 0.01
    for name in EMBEDS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


REFUSED = {
    "use_dora=True is not supported: expected False": {"use_dora": True},
    "bias='lora_only' is not supported: expected 'none'": {"bias": "lora_only"},
    r"modules_to_save=\['text_projection'\] is not": {"modules_to_save": ["text_projection"]},
    "init_lora_weights='pissa' is not supported": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize(("message", "settings"), REFUSED.items())
def test_what_is_not_supported_is_told(message, settings, checkpoint, tmp_path):
    base = transformers.AlignModel.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, target_modules=["query"], **settings)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        AlignModel.from_pretrained(checkpoint).load_adapter(tmp_path / "adapter")
