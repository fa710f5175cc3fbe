"""LoRA on a model: what trains, adapters by name, their files, and what becomes of the weights."""

import copy
import json

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from align_tf import AlignConfig, AlignModel, AlignProcessor, AlignTextModel
from align_tf.files import CheckpointError
from align_tf.models import fused_training
from align_tf.models.fingerprint import fingerprint
from align_tf.models.plain_copy import plain_copy

EMBEDS = ("image_embeds", "text_embeds")


def embeds(model, pairs):
    output = model(pairs)
    return [ops.convert_to_numpy(output[name]) for name in EMBEDS]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def moved(found, expected):
    """Which of the two embeddings differ."""
    both = zip(EMBEDS, found, expected, strict=True)
    return [name for name, one, other in both if np.abs(one - other).max() > 1e-3]


def draw(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.2, weight.shape))


def values(model):
    return {weight.path: np.array(ops.convert_to_numpy(weight)) for weight in model.weights}


def adapt(checkpoint):
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2, alpha=3)
    draw(model)
    return model


@pytest.fixture
def adapted(checkpoint):
    """The model of `checkpoint` with an adapter of rank 2 that computes another thing."""
    return adapt(checkpoint)


@pytest.fixture(scope="module")
def unchanged(checkpoint):
    """The same, made once: not to be changed."""
    return adapt(checkpoint)


def names(model):
    return [weight.path.removeprefix("align/") for weight in model.trainable_weights]


def test_an_adapter_alone_trains(checkpoint, pairs):
    model = AlignModel.from_pretrained(checkpoint)
    plain = embeds(model, pairs)
    model.enable_lora(2)
    assert_same(embeds(model, pairs), plain)
    found = names(model)
    assert [name for name in found if name.startswith("text_model/layer_1/")] == [
        f"text_model/layer_1/{layer}/lora_kernel_{side}"
        for layer in (
            *(f"attention/{part}" for part in ("query", "key", "value", "output")),
            "intermediate",
            "output",
        )
        for side in "ab"
    ]
    assert [name for name in found if name.startswith("vision_model/block_0/")] == [
        f"vision_model/block_0/{layer}/lora_kernel_{side}"
        for layer in ("se_reduce", "se_expand", "project_conv")
        for side in "ab"
    ]
    assert found[-2:] == [f"text_projection/lora_kernel_{side}" for side in "ab"]
    assert len(found) == 2 * (2 * 6 + 3 + 2 * 4 + 1)
    draw(model)
    before = values(model)
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(pairs, batch_size=4, epochs=2, verbose=0)
    after = values(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {weight.path for weight in model.trainable_weights}


def test_what_is_frozen_and_unfrozen_is_the_adapter(checkpoint):
    model = AlignModel.from_pretrained(checkpoint)
    before = names(model)
    model.enable_lora(1)
    both = names(model)
    model.freeze("text")
    assert names(model) == [n for n in both if n.startswith(("vision_model", "text_projection"))]
    model.unfreeze()
    assert names(model) == both
    model.trainable = False
    assert names(model) == []
    model.trainable = True
    model.text_model.blocks[0].trainable = True  # of Keras, past all of ours
    model.compile()
    assert names(model) == both
    assert not model.vision_model.blocks[0].depthwise_bn.trainable
    with pytest.raises(ValueError, match="BatchNorm is no part of an adapter: expected"):
        model.unfreeze_batch_norm()
    model.merge_adapter()
    assert names(model) == before


@pytest.mark.parametrize(("tower", "expected"), [("text", EMBEDS[1:]), ("vision", EMBEDS[:1])])
def test_a_tower_is_adapted_alone(tower, expected, checkpoint, pairs):
    model = AlignModel.from_pretrained(checkpoint)
    plain = embeds(model, pairs)
    model.enable_lora(2, towers=(tower,))
    draw(model)
    assert moved(embeds(model, pairs), plain) == list(expected)


@pytest.mark.slow
def test_adapters_go_by_name(adapted, checkpoint, pairs, tmp_path):
    plain = embeds(AlignModel.from_pretrained(checkpoint), pairs)
    first = embeds(adapted, pairs)
    adapted.predict(pairs, batch_size=4, verbose=0)  # traced with the first
    adapted.enable_lora(3, towers="vision", name="images")
    draw(adapted, 1)
    second = embeds(adapted, pairs)
    assert moved(second, plain) == ["image_embeds"]
    assert (adapted.adapters, adapted.active_adapter) == (["default", "images"], "images")
    adapted.set_adapter("default")
    assert_same(embeds(adapted, pairs), first)
    adapted.save_adapter(tmp_path / "images", name="images")
    adapted.set_adapter(None)
    assert_same(embeds(adapted, pairs), plain)
    adapted.delete_adapter("images")
    adapted.load_adapter(tmp_path / "images", "read")
    assert_same(embeds(adapted, pairs), second)
    predicted = adapted.predict(pairs, batch_size=4, verbose=0)
    assert_same([predicted[name] for name in EMBEDS], second)
    adapted.delete_adapter("read")
    assert (adapted.adapters, adapted.active_adapter) == (["default"], None)
    assert_same(embeds(adapted, pairs), plain)


def test_an_adapter_of_the_same_layers_is_exchanged_for_another(adapted, pairs, tmp_path):
    first = embeds(adapted, pairs)
    adapted.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -3}))
    adapted.compile()
    adapted.load_adapter(tmp_path, name="against")
    assert adapted.compiled
    predicted = adapted.predict(pairs, batch_size=4, verbose=0)
    second = [predicted[name] for name in EMBEDS]
    assert moved(second, first) == list(EMBEDS)
    adapted.set_adapter("default")
    predicted = adapted.predict(pairs, batch_size=4, verbose=0)
    assert_same([predicted[name] for name in EMBEDS], first)


def test_each_adapter_trains_when_it_is_active(checkpoint):
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2, towers="text", name="texts")
    model.freeze()
    model.unfreeze()
    texts = names(model)
    model.enable_lora(3, towers="vision", name="images")
    images = names(model)
    assert len(texts) == 2 * (2 * 6 + 1)
    assert len(images) == 2 * (3 + 2 * 4)
    assert all(name.startswith("vision_model/") for name in images)
    model.set_adapter(None)
    assert names(model) == []
    model.set_adapter("texts")
    assert names(model) == texts
    model.set_adapter("images")
    assert names(model) == images


def test_a_copy_has_the_adapter_merged_and_trains_what_trained_before(checkpoint, pairs):
    model = AlignModel.from_pretrained(checkpoint)
    model.freeze("text")
    before = names(model)
    model.enable_lora(2)
    draw(model)
    again = copy.deepcopy(model)
    assert again.adapters == []
    assert_same(embeds(again, pairs), embeds(model, pairs))
    assert names(again) == before


def test_an_adapter_lies_at_an_address(unchanged, checkpoint, pairs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    unchanged.save_adapter("memory://bucket/adapter")
    assert list(tmp_path.iterdir()) == []
    again = AlignModel.from_pretrained(checkpoint)
    again.load_adapter("memory://bucket/adapter")
    assert_same(embeds(again, pairs), embeds(unchanged, pairs))
    model = AlignModel.from_pretrained("memory://bucket/adapter")
    assert_same(embeds(model, pairs), embeds(unchanged, pairs))
    with pytest.raises(ValueError, match="xx://bucket/adapter: not an address that is read or wr"):
        unchanged.save_adapter("xx://bucket/adapter")


def test_a_merged_adapter_is_in_the_weights(adapted, pairs, checkpoint, tmp_path):
    expected = embeds(adapted, pairs)
    adapted.save_pretrained(tmp_path / "saved")
    assert_same(embeds(AlignModel.from_pretrained(tmp_path / "saved"), pairs), expected)
    assert_same(embeds(plain_copy(adapted, "float32"), pairs), expected)
    adapted.merge_adapter()
    assert_same(embeds(adapted, pairs), expected)
    assert [w.path for w in adapted.weights] == [
        w.path for w in AlignModel.from_pretrained(checkpoint).weights
    ]
    assert adapted.adapters == []
    with pytest.raises(ValueError, match="no adapter is active: expected enable_lora or load_ad"):
        adapted.merge_adapter()
    adapted.enable_lora(2)
    adapted.save_adapter(tmp_path / "next")  # of no model that has a name
    with pytest.raises(ValueError, match="an adapter that names no model"):
        AlignModel.from_pretrained(tmp_path / "next")


@pytest.mark.parametrize("quantized", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_keras_weight_file_keeps_the_adapter_and_its_base(quantized, checkpoint, pairs, tmp_path):
    def made():
        model = AlignModel.from_pretrained(checkpoint)
        model.enable_lora(2, alpha=3)
        if quantized:
            model.quantize(quantized)
        return model

    model, again = made(), made()
    draw(model)
    model.save_weights(tmp_path / "model.weights.h5")
    again.load_weights(tmp_path / "model.weights.h5")
    found = values(again)
    for path, value in values(model).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert_same(embeds(again, pairs), embeds(model, pairs))
    # A file without an adapter leaves that of the model.
    AlignModel.from_pretrained(checkpoint).save_weights(tmp_path / "plain.weights.h5")
    if not quantized:
        again.load_weights(tmp_path / "plain.weights.h5")
        assert_same(embeds(again, pairs), embeds(model, pairs))


@pytest.mark.slow
def test_a_broken_off_fit_goes_on_with_its_adapter(checkpoint, pairs, tmp_path):
    class Broken(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2)
    draw(model)
    model.compile(keras.optimizers.SGD(1.0))
    with pytest.raises(KeyboardInterrupt):
        model.fit(pairs, batch_size=4, epochs=2, verbose=0, callbacks=[backup, Broken()])
    stopped = values(model)
    for weight in model.trainable_weights:  # where both matrices are zero, neither learns
        weight.assign(np.zeros(weight.shape))
    model.fit(pairs, batch_size=4, epochs=2, verbose=0, callbacks=[backup])
    found = values(model)
    for weight in model.trainable_weights:
        assert np.abs(found[weight.path]).max() > 0, weight.path
    base = stopped.keys() - {weight.path for weight in model.trainable_weights}
    for path in base:
        np.testing.assert_array_equal(found[path], stopped[path], err_msg=path)


@pytest.mark.parametrize("options", [None, {"rank": 3}, {"rank": 2, "alpha": 8}], ids=str)
def test_a_weight_file_of_another_adapter_is_told(options, unchanged, checkpoint, tmp_path):
    unchanged.save_weights(tmp_path / "model.weights.h5")
    other = AlignModel.from_pretrained(checkpoint)
    if options:
        other.enable_lora(**options)
        draw(other, seed=1)
    before = values(other)
    with pytest.raises(ValueError, match=r"h5: has an adapter, and of .* expected enable_lora"):
        other.load_weights(tmp_path / "model.weights.h5")
    for path, value in values(other).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_a_collection_knows_a_model_by_what_it_computes(unchanged, checkpoint, tmp_path):
    processor = AlignProcessor.from_pretrained(checkpoint)
    found = fingerprint(unchanged, processor)
    assert found != fingerprint(AlignModel.from_pretrained(checkpoint), processor)
    unchanged.save_adapter(tmp_path / "adapter")
    unchanged.save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert fingerprint(AlignModel.from_pretrained(tmp_path / name), processor) == found
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 4}))
    other = AlignModel.from_pretrained(tmp_path / "adapter")
    assert fingerprint(other, processor) != found


def test_a_folder_of_an_adapter_is_a_model(unchanged, checkpoint, pairs, tmp_path):
    unchanged.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint)
    again = AlignModel.from_pretrained(tmp_path)
    assert again.active_adapter == "default"
    assert_same(embeds(again, pairs), embeds(unchanged, pairs))
    assert len(AlignProcessor.from_pretrained(tmp_path).tokenizer) == 10
    assert AlignConfig.from_pretrained(tmp_path).projection_dim == 8
    with pytest.raises(ValueError, match="an adapter: expected AlignModel, of which a tower is"):
        AlignTextModel.from_pretrained(tmp_path)
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"an adapter, of a model not found: .*gone': no s"):
        AlignModel.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(ValueError, match="an adapter that names no model: expected a checkpoint"):
        AlignModel.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path)})
    )
    with pytest.raises(ValueError, match="which is an adapter itself: expected the model that bot"):
        AlignModel.from_pretrained(tmp_path)


# --- training by other ways ----------------------------------------------------------------


def trained(checkpoint, pairs, **options):
    keras.utils.set_random_seed(0)
    model = AlignModel.from_pretrained(checkpoint)
    model.enable_lora(2)
    draw(model)
    for block in model.vision_model.blocks:  # which draw another way in parts
        if hasattr(block, "drop_connect"):
            block.drop_connect.rate = 0.0
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    model.compile(keras.optimizers.SGD(0.5), **options)
    model.fit(pairs, batch_size=4, epochs=2, verbose=0)
    return [np.array(ops.convert_to_numpy(weight)) for weight in model.trainable_weights]


@pytest.mark.slow
def test_each_way_to_train_takes_the_same_steps(checkpoint, pairs, monkeypatch):
    fused = trained(checkpoint, pairs)
    parts = trained(checkpoint, pairs, accumulation=2, remat=True)
    monkeypatch.setattr(fused_training, "_on_cpu", lambda: False)
    plain = trained(checkpoint, pairs)
    loop = trained(checkpoint, pairs, loop_blocks=keras.backend.backend() == "jax")
    for *others, expected in zip(fused, parts, loop, plain, strict=True):
        for found in others:
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_an_optimizer_of_other_weights_is_told(checkpoint, pairs):
    model = AlignModel.from_pretrained(checkpoint)
    model.compile()
    model.enable_lora(2)
    with pytest.raises(ValueError, match="call `compile"):
        model.fit(pairs, batch_size=4, verbose=0)


# --- what cannot be had --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0: expected a positive integer"),
        ({"rank": 2.0}, "rank=2.0: expected a positive integer"),
        ({"rank": 2, "alpha": 0}, "alpha=0: expected a positive number"),
        ({"rank": 2, "alpha": float("inf")}, "alpha=inf: expected a positive number"),
        ({"rank": 2, "alpha": 10**400}, "alpha=10{400}: expected a positive number"),
        ({"rank": 10**11}, r"rank=10{11}: expected no more than a layer has inputs, \d+$"),
        ({"rank": 2, "use_rslora": "no"}, "use_rslora='no': expected True or False"),
        ({"rank": 2, "name": None}, "name=None: expected a text, the name of an adapter"),
        ({"rank": 2, "name": ""}, "name='': expected a text, the name of an adapter"),
        ({"rank": 2, "name": ["a"]}, r"name=\['a'\]: expected a text, the name of an adapter"),
        ({"rank": 2, "towers": 3}, r"towers=\[3\]: expected some of text, vision"),
        ({"rank": 2, "towers": [["text"]]}, r"towers=\[\['text'\]\]: expected some of text"),
        ({"rank": 2, "towers": ("image",)}, r"towers=\['image'\]: expected some of text, vision"),
        ({"rank": 2, "towers": ()}, r"towers=\[\]: expected some of text, vision"),
        ({"rank": 2, "name": "default"}, "name='default': there is such an adapter; expected ano"),
    ],
)
def test_an_argument_that_is_none_is_told(arguments, message, unchanged):
    with pytest.raises(ValueError, match=message):
        unchanged.enable_lora(**arguments)


def test_a_name_that_is_none_is_told(unchanged, checkpoint):
    for call in (unchanged.set_adapter, unchanged.delete_adapter):
        with pytest.raises(ValueError, match="name='x': no such adapter; there are: default"):
            call("x")
        with pytest.raises(ValueError, match=r"name=\['x'\]: no such adapter; there are: default"):
            call(["x"])
    with pytest.raises(ValueError, match="the bias of the sigmoid loss is no part of an adapter"):
        unchanged.use_sigmoid_loss(4)
    with pytest.raises(ValueError, match="new word embeddings are no part of an adapter: expected"):
        unchanged.resize_token_embeddings(50)
    plain = AlignModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="no adapter is active: expected enable_lora or load_ad"):
        plain.save_adapter("nowhere")
    plain.text_projection.enable_lora(2)
    with pytest.raises(ValueError, match="text_projection has LoRA by its own enable_lora: expec"):
        plain.enable_lora(2)


QUERY = "base_model.model.text_model.encoder.layer.0.attention.self.query"
CHANGES = {
    f"{QUERY}.lora_A.weight is (2, 5), expected (2, 16)": {"lora_A.weight": (2, 5)},
    f"{QUERY}.lora_B.weight is (16, 3), expected (16, 2)": {"lora_B.weight": (16, 3)},
    f"missing {QUERY}.lora_B.weight": {"lora_B.weight": None},
    f"{QUERY}.lora_A.bias: the model has no such layer to adapt": {"lora_A.bias": (2,)},
    f"{QUERY}.lora_magnitude_vector: the model has no such": {"lora_magnitude_vector": (16,)},
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items())
def test_an_adapter_that_does_not_fit_is_told(message, change, unchanged, pairs, tmp_path):
    expected = embeds(unchanged, pairs)
    unchanged.save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, shape in change.items():
        tensors[f"{QUERY}.{name}"] = shape and np.zeros(shape, "float32")
    present = {key: value for key, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(present, path)
    with pytest.raises(CheckpointError) as error:
        unchanged.load_adapter(tmp_path, name="other")
    assert str(error.value).startswith(f"{path}: {message}")
    assert unchanged.adapters == ["default"]
    assert_same(embeds(unchanged, pairs), expected)


SETTINGS = {
    "peft_type='LOHA' is not supported: expected 'LORA'": {"peft_type": "LOHA"},
    "use_dora=True is not supported: expected False": {"use_dora": True},
    "bias='all' is not supported: expected 'none'": {"bias": "all"},
    "modules_to_save=['pooler'] is not supported: expected none": {"modules_to_save": ["pooler"]},
    "kasa_config={'beta': 1} is not supported: expected none": {"kasa_config": {"beta": 1}},
    "lora_alpha=1" + 400 * "0" + ": expected a number": {"lora_alpha": 10**400},
    "r=0: expected a positive integer": {"r": 0},
    "query='2': expected a positive integer": {"rank_pattern": {"query": "2"}},
    "lora_alpha='1': expected a number": {"lora_alpha": "1"},
    "target_modules=3: expected names, or an expression": {"target_modules": 3},
    "target_modules is missing": {"target_modules": None},
    "r is missing": {"r": None},
    "use_rslora='no': expected true or false": {"use_rslora": "no"},
    "base_model_name_or_path=3: expected a text": {"base_model_name_or_path": 3},
    "missing ), unterminated subpattern at position 0": {"target_modules": "("},
    "rank_pattern=[]: expected numbers by the ends of names": {"rank_pattern": []},
}


@pytest.mark.parametrize(("message", "settings"), SETTINGS.items())
def test_settings_that_are_not_supported_are_told(message, settings, unchanged, tmp_path):
    unchanged.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(CheckpointError) as error:
        unchanged.load_adapter(tmp_path, name="other")
    assert str(error.value) == f"{path}: {message}"


def test_a_quantized_layer_is_merged_where_it_is_written(changeable, pairs, tmp_path):
    changeable.text_projection.quantize("int8")
    changeable.enable_lora(2, towers="text")
    draw(changeable)
    with pytest.raises(ValueError, match="text_projection is quantized to int8: expected float"):
        changeable.merge_adapter()
    changeable.save_pretrained(tmp_path)
    again = AlignModel.from_pretrained(tmp_path)
    for one, other in zip(embeds(again, pairs), embeds(changeable, pairs), strict=True):
        assert np.sum(one * other, axis=-1).min() > 0.99
