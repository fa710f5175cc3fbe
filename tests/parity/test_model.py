"""The models beside transformers' own, stage by stage, from the same random weights.

KERAS_BACKEND chooses the backend; both TensorFlow and JAX are expected to pass.
"""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from align_tf import AlignModel
from align_tf.checkpoints import name_table as tensors_module

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
# 8 to 16 channels; strides of 2 at both kernel sizes; two residual blocks.
VISION = {
    "image_size": 33,
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 5, 3],
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 2, 2],
    "expand_ratios": [1, 6, 4],
    "hidden_dim": 64,
}
JOINT = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}

# argument: values beside the tiny tower's own. What acts in training alone is here to show
# that it does nothing else; position_embedding_type, which transformers 5 lacks, has goldens.
TEXT_ARGUMENTS = {
    "vocab_size": [57],
    "hidden_size": [24],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [1, 2],
    "intermediate_size": [7],
    "hidden_act": ["gelu", "relu", "silu", "swish", "gelu_new"],
    "hidden_dropout_prob": [0.5],
    "attention_probs_dropout_prob": [0.5],
    "max_position_embeddings": [9],
    "type_vocab_size": [3],
    "initializer_range": [0.5],
    "layer_norm_eps": [0.1],
    "pad_token_id": [3, None],
    "use_cache": [False],
}
VISION_ARGUMENTS = {
    "num_channels": [1, 4],
    "image_size": [64],
    "width_coefficient": [0.3, 0.5],
    "depth_coefficient": [0.5, 1.5],
    "depth_divisor": [4, 16],
    "kernel_sizes": [[5, 3, 7]],
    "in_channels": [[32, 24, 24]],
    "out_channels": [[24, 24, 64]],
    "depthwise_padding": [[1], [3], [0, 1, 2, 3, 4]],
    "strides": [[2, 1, 1], [1, 1, 2]],
    "num_block_repeats": [[2, 1, 3]],
    "expand_ratios": [[2, 1, 3]],
    "squeeze_expansion_ratio": [0.5, 0.01],
    "hidden_act": ["swish", "gelu", "relu", "selu", "gelu_new", "silu", "mish"],
    "hidden_dim": [48],
    "pooling_type": ["mean", "max"],
    "initializer_range": [0.5],
    "batch_norm_eps": [0.1],
    "batch_norm_momentum": [0.5],
    "drop_connect_rate": [0.0, 0.9],
}
# Values that need another one beside them.
TOGETHER = {
    "in_channels": {"out_channels": [24, 24, 40]},
    "out_channels": {"in_channels": [32, 24, 24]},
}
TEXT_CASES = [{key: value} for key, values in TEXT_ARGUMENTS.items() for value in values]
VISION_CASES = [
    {key: value, **TOGETHER.get(key, {})}
    for key, values in VISION_ARGUMENTS.items()
    for value in values
]


def name_of(case: dict[str, Any]) -> str:
    key, value = next(iter(case.items()))
    return f"{key}={value}"


def texts(length: int, vocab_size: int = 40, types: int = 2, seed: int = 0) -> dict[str, Any]:
    """Two texts; the second is padded."""
    rng = np.random.default_rng(seed)
    attention_mask = np.ones((2, length), "int32")
    attention_mask[1, length // 2 :] = 0
    return {
        "input_ids": rng.integers(1, vocab_size, (2, length), "int32"),
        "attention_mask": attention_mask,
        "token_type_ids": rng.integers(0, types, (2, length), "int32"),
    }


def images(size: int, channels: int = 3, count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, size, size, channels)).astype("float32")


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    tensors = {}
    for key, value in inputs.items():
        value = np.transpose(value, (0, 3, 1, 2)) if key == "pixel_values" else value
        tensors[key] = torch.from_numpy(np.ascontiguousarray(value))
        if value.dtype.kind == "i":
            tensors[key] = tensors[key].long()
    return tensors


def last(image: Any) -> Any:
    """(n, c, h, w) to (n, h, w, c)."""
    return image.permute(0, 2, 3, 1)


def assert_close(ours: Any, theirs: Any, what: str, tolerance: float = 1e-5) -> None:
    """Holds the largest difference to a share of the largest value."""
    ours, theirs = ops.convert_to_numpy(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape, what
    apart, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert apart <= tolerance * largest, f"{what}: {apart:.2e} apart, values to {largest:.2e}"


def assert_same_texts(ours: Any, theirs: Any) -> None:
    # The error of a probability is a share of it, as large as the error of its score. Without
    # AVX-512 JAX's products are twice as far from float64 as PyTorch's: 0.97e-5 of the largest of
    # nearly even probabilities, and 0.46e-5.
    of_attentions = 2e-5 if keras.backend.backend() == "jax" else 1e-5
    for stage, tolerance in (("hidden_states", 1e-5), ("attentions", of_attentions)):
        for index, (one, other) in enumerate(zip(ours[stage], theirs[stage], strict=True)):
            assert_close(one, other, f"{stage}[{index}]", tolerance)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, "last_hidden_state")
    assert_close(ours.pooler_output, theirs.pooler_output, "pooler_output")


def assert_same_images(ours: Any, theirs: Any) -> None:
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    for index, (one, other) in enumerate(pairs):
        assert_close(one, last(other), f"hidden_states[{index}]")
    assert_close(ours.last_hidden_state, last(theirs.last_hidden_state), "last_hidden_state")
    assert_close(ours.pooler_output, theirs.pooler_output, "pooler_output")


# --- the towers ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", TEXT_CASES, ids=name_of)
def test_every_argument_of_the_text_tower(case, twins):
    config = {**TEXT, **case, "model_type": "align_text_model"}
    theirs, ours = twins(config)
    inputs = texts(9, config["vocab_size"], case.get("type_vocab_size", 2))
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        assert_same_texts(ours(inputs, **asked), theirs(**to_torch(inputs), **asked))


@pytest.mark.parametrize(
    "given",
    [
        ("input_ids",),
        ("input_ids", "attention_mask"),
        ("input_ids", "token_type_ids"),
        ("input_ids", "attention_mask", "position_ids"),
        ("inputs_embeds", "attention_mask", "token_type_ids", "position_ids"),
    ],
    ids="+".join,
)
def test_inputs_of_the_text_tower(given, twins):
    theirs, ours = twins({**TEXT, "model_type": "align_text_model"})
    inputs = texts(7)
    inputs["position_ids"] = np.array([[3, 1, 4, 1, 5, 9, 2], [0, 2, 1, 3, 6, 5, 4]], "int32")
    inputs["inputs_embeds"] = np.random.default_rng(2).normal(size=(2, 7, 16)).astype("float32")
    inputs = {key: inputs[key] for key in given}
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        assert_same_texts(ours(inputs, **asked), theirs(**to_torch(inputs), **asked))


@pytest.mark.parametrize("case", VISION_CASES, ids=name_of)
def test_every_argument_of_the_image_tower(case, twins, monkeypatch):
    from transformers.activations import ACT2FN

    # The reference documents selu and leaves it out of its own table.
    monkeypatch.setitem(ACT2FN, "selu", torch.nn.SELU)
    config = {**VISION, **case, "model_type": "align_vision_model"}
    theirs, ours = twins(config)
    pixels = {"pixel_values": images(33, case.get("num_channels", 3))}
    with torch.no_grad():
        expected = theirs(**to_torch(pixels), output_hidden_states=True)
    assert_same_images(ours(pixels, output_hidden_states=True), expected)


@pytest.mark.parametrize("size", [32, 35, 40])
def test_image_sizes(size, twins):
    theirs, ours = twins({**VISION, "model_type": "align_vision_model"})
    pixels = {"pixel_values": images(size)}
    with torch.no_grad():
        expected = theirs(**to_torch(pixels), output_hidden_states=True)
    assert_same_images(ours(pixels, output_hidden_states=True), expected)


# --- the joint model -----------------------------------------------------------------------


def assert_same_outputs(ours: Any, theirs: Any, temperature: float) -> None:
    for key in ("image_embeds", "text_embeds"):
        assert_close(ours[key], theirs[key], key)
    assert temperature in (1.0, 0.07)
    for key in ("logits_per_image", "logits_per_text"):
        apart = np.abs(ops.convert_to_numpy(ours[key]) - theirs[key].detach().numpy()).max()
        assert apart <= (1e-5 if temperature == 1.0 else 1e-3), f"{key}: {apart:.2e} apart"
    if "loss" in ours:
        assert_close(ours.loss, theirs.loss, "loss", 1e-5 if temperature == 1.0 else 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
@pytest.mark.parametrize("padded", [True, False])
def test_joint_outputs(padded, temperature, twins):
    theirs, ours = twins({**JOINT, "temperature_init_value": temperature, "model_type": "align"})
    inputs = {"pixel_values": images(33), **texts(9)}
    if not padded:
        del inputs["attention_mask"]
    asked = {"output_hidden_states": True, "return_loss": True}
    with torch.no_grad():
        expected = theirs(**to_torch(inputs), **asked, output_attentions=True)
        features = theirs.get_text_features(**to_torch({"input_ids": inputs["input_ids"]}))
    output = ours(inputs, **asked, output_attentions=True)
    assert_same_texts(output.text_model_output, expected.text_model_output)
    assert_same_images(output.vision_model_output, expected.vision_model_output)
    assert_same_outputs(output, expected, temperature)
    actual = ours.get_text_features(inputs["input_ids"])
    assert_close(actual, features.pooler_output, "get_text_features")
    actual = ours.get_image_features(inputs["pixel_values"])
    assert_close(actual, expected.vision_model_output.pooler_output, "get_image_features")


# --- gradients and steps -------------------------------------------------------------------

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {
    **JOINT,
    "text_config": {**TEXT, **STILL},
    "vision_config": {**VISION, "drop_connect_rate": 0.0},
    "temperature_init_value": 0.5,
    "model_type": "align",
}


def gradients(model: AlignModel, inputs: dict[str, Any], training: bool) -> list[np.ndarray]:
    """Gradients of the loss by the trainable weights, in their order, on either backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model(inputs, return_loss=True, training=training).loss
        found = tape.gradient(loss, model.trainable_weights)
        return [tf.convert_to_tensor(gradient).numpy() for gradient in found]
    import jax

    def loss_of(trainable: list) -> Any:
        frozen = [weight.value for weight in model.non_trainable_variables]
        output, _ = model.stateless_call(
            trainable, frozen, inputs, return_loss=True, training=training
        )
        return output["loss"]

    found = jax.jit(jax.grad(loss_of))([weight.value for weight in model.trainable_variables])
    return [np.asarray(gradient) for gradient in found]


def by_name(model: AlignModel, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the trainable weights under their Hugging Face names and layouts."""
    weights = model._relative_weights()
    paths = {id(weight): path for path, weight in weights.items()}
    names = tensors_module.to_hugging_face(weights, model.table)
    named = {}
    for weight, array in zip(model.trainable_weights, arrays, strict=True):
        name, transform = names[paths[id(weight)]]
        named[name] = tensors_module.permute(array, transform, to_keras=False)
    return named


def assert_each_close(ours: dict, theirs: dict, relative: float) -> None:
    assert ours.keys() == theirs.keys()
    # A key's bias shifts all scores of a row alike: its gradient is nothing but rounding.
    floor = 1e-6 * max(np.abs(array).max() for array in theirs.values())
    for name, expected in theirs.items():
        apart = np.abs(ours[name] - expected).max()
        allowed = relative * np.abs(expected).max() + floor
        assert apart <= allowed, f"{name}: {apart:.2e} apart, {allowed:.2e} allowed"


@pytest.mark.parametrize("training", [False, True], ids=["averages", "batch statistics"])
def test_gradients_of_the_loss_by_every_weight(training, twins):
    theirs, ours = twins(NO_DROPOUT)
    ours.unfreeze_batch_norm()
    inputs = {"pixel_values": images(33), **texts(9)}
    theirs.train(training)
    theirs(**to_torch(inputs), return_loss=True).loss.backward()
    expected = {
        name: weight.grad.numpy()
        for name, weight in theirs.named_parameters()
        if weight.grad is not None
    }
    assert not [name for name in expected if "pooler" in name]
    actual = by_name(ours, gradients(ours, inputs, training))
    assert_each_close(actual, expected, relative=1e-4)


def torch_steps(model: Any, inputs: dict[str, Any], steps: int) -> dict[str, np.ndarray]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**to_torch(inputs), return_loss=True).loss.backward()
        optimizer.step()
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def assert_same_weights(ours: AlignModel, theirs: dict, before: dict) -> None:
    actual = by_name(ours, [ops.convert_to_numpy(weight) for weight in ours.trainable_weights])
    moved = max(np.abs(actual[name] - before[name]).max() for name in actual)
    assert moved > 0.01
    for name, array in actual.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_weights_after_three_steps(twins):
    """BatchNorm by its averages on both sides, its scale and offset training."""
    theirs, ours = twins(NO_DROPOUT)
    ours.unfreeze_batch_norm()
    inputs = {"pixel_values": images(33), **texts(9)}
    before = {name: tensor.numpy().copy() for name, tensor in theirs.state_dict().items()}
    optimizer = keras.optimizers.SGD(0.5)
    for _ in range(3):
        optimizer.apply(gradients(ours, inputs, training=False), ours.trainable_weights)
    assert_same_weights(ours, torch_steps(theirs, inputs, 3), before)


def test_weights_after_three_steps_of_fit(twins):
    """The same through compile and fit, with BatchNorm frozen on both sides."""
    theirs, ours = twins(NO_DROPOUT)
    inputs = {"pixel_values": images(33), **texts(9)}
    before = {name: tensor.numpy().copy() for name, tensor in theirs.state_dict().items()}
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    ours.compile(optimizer=keras.optimizers.SGD(0.5))
    ours.fit(inputs, batch_size=2, epochs=3, shuffle=False, verbose=0)
    assert_same_weights(ours, torch_steps(theirs, inputs, 3), before)


# --- full size -----------------------------------------------------------------------------


def run(model: AlignModel, inputs: dict[str, Any], **asked: bool) -> Any:
    """Calls the model; under JAX compiled as one, since op by op takes minutes at this size."""
    if keras.backend.backend() != "jax":
        return model(inputs, **asked)
    import jax

    @jax.jit
    def call(trainable: list, frozen: list, inputs: dict) -> Any:
        return model.stateless_call(trainable, frozen, inputs, **asked)[0]

    trainable = [weight.value for weight in model.trainable_variables]
    frozen = [weight.value for weight in model.non_trainable_variables]
    return call(trainable, frozen, inputs)


def test_full_size(twins):
    """EfficientNet-B7 and BERT-base, at three image sizes, one of them in a batch of two."""
    theirs, ours = twins(
        {
            "text_config": {},
            "vision_config": {"image_size": 289, "hidden_dim": 640, "depthwise_padding": [4, 18]},
            "temperature_init_value": 0.07,
            "model_type": "align",
        },
        tempered=True,
    )
    for size, count, padded in ((289, 2, True), (224, 1, False), (345, 1, False)):
        inputs = {"pixel_values": images(size, count=count), **texts(64, 30522)}
        if not padded:
            del inputs["attention_mask"]
        asked = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            expected = theirs(**to_torch(inputs), **asked)
        output = run(ours, inputs, **asked)
        assert_same_texts(output["text_model_output"], expected.text_model_output)
        assert_same_images(output["vision_model_output"], expected.vision_model_output)
        assert_same_outputs(output, expected, 0.07)
