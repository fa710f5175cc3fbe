"""The configurations: defaults, checks, config.json both ways, presets."""

import json
import pathlib

import pytest

from align_tf import AlignConfig, AlignTextConfig, AlignVisionConfig
from align_tf.configuration.presets import PRESETS
from align_tf.files import CheckpointError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "model"

TEXT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "use_cache": True,
    "pruned_heads": {},
    "model_type": "align_text_model",
}
VISION_DEFAULTS = {
    "num_channels": 3,
    "image_size": 600,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "depth_divisor": 8,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "depthwise_padding": [],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "hidden_dim": 2560,
    "pooling_type": "mean",
    "initializer_range": 0.02,
    "batch_norm_eps": 0.001,
    "batch_norm_momentum": 0.99,
    "drop_connect_rate": 0.2,
    "num_hidden_layers": 55,
    "model_type": "align_vision_model",
}
JOINT_DEFAULTS = {
    "text_config": TEXT_DEFAULTS,
    "vision_config": VISION_DEFAULTS,
    "projection_dim": 640,
    "temperature_init_value": 1.0,
    "initializer_range": 0.02,
    "model_type": "align",
}


@pytest.mark.parametrize(
    ("config_class", "expected"),
    [
        (AlignTextConfig, TEXT_DEFAULTS),
        (AlignVisionConfig, VISION_DEFAULTS),
        (AlignConfig, JOINT_DEFAULTS),
    ],
)
def test_defaults_are_those_of_align_base_in_the_reference(config_class, expected):
    assert config_class().to_dict() == expected


SEVEN = "7 values, one for each stage"


@pytest.mark.parametrize(
    ("config_class", "arguments", "message"),
    [
        (AlignTextConfig, {"vocab_size": 0}, "vocab_size=0: expected a positive integer"),
        (AlignTextConfig, {"vocab_size": True}, "vocab_size=True: expected a positive integer"),
        (AlignTextConfig, {"hidden_size": "768"}, "hidden_size='768': expected a positive integer"),
        (AlignTextConfig, {"num_hidden_layers": 1.5}, "num_hidden_layers=1.5: expected a positive"),
        (AlignTextConfig, {"num_attention_heads": -1}, "num_attention_heads=-1: expected a posit"),
        (AlignTextConfig, {"intermediate_size": None}, "intermediate_size=None: expected a posit"),
        (AlignTextConfig, {"max_position_embeddings": 0}, "max_position_embeddings=0: expected a"),
        (AlignTextConfig, {"type_vocab_size": 0}, "type_vocab_size=0: expected a positive integer"),
        (
            AlignTextConfig,
            {"hidden_size": 100, "num_attention_heads": 12},
            "hidden_size=100: expected a multiple of num_attention_heads=12",
        ),
        (
            AlignTextConfig,
            {"hidden_act": "tanh"},
            "hidden_act='tanh': expected one of gelu, relu, silu, swish, gelu_new, or a callable",
        ),
        (AlignTextConfig, {"hidden_act": None}, "hidden_act=None: expected one of gelu, relu, "),
        (
            AlignTextConfig,
            {"position_embedding_type": "rotary"},
            "position_embedding_type='rotary': expected one of absolute, relative_key, rel",
        ),
        (
            AlignTextConfig,
            {"hidden_dropout_prob": 1.0},
            "hidden_dropout_prob=1.0: expected a rate in [0, 1)",
        ),
        (
            AlignTextConfig,
            {"attention_probs_dropout_prob": -0.1},
            "attention_probs_dropout_prob=-0.1: expected a rate in [0, 1)",
        ),
        (
            AlignTextConfig,
            {"pruned_heads": {12: [0]}},
            "pruned_heads[12]=[0]: expected a layer below 12 and some, not all, of its 12 heads",
        ),
        (AlignTextConfig, {"pruned_heads": {0: [12]}}, "pruned_heads[0]=[12]: expected a layer"),
        (AlignTextConfig, {"pruned_heads": {0: range(12)}}, "pruned_heads[0]=[0, 1, 2, 3, 4, 5, "),
        (AlignVisionConfig, {"num_channels": 0}, "num_channels=0: expected a positive integer"),
        (AlignVisionConfig, {"image_size": 31}, "image_size=31: expected 32 or more, of which a p"),
        (AlignVisionConfig, {"depth_divisor": 0}, "depth_divisor=0: expected a positive integer"),
        (AlignVisionConfig, {"hidden_dim": 0}, "hidden_dim=0: expected a positive integer"),
        (
            AlignVisionConfig,
            {"width_coefficient": 0},
            "width_coefficient=0: expected a positive number",
        ),
        (
            AlignVisionConfig,
            {"depth_coefficient": "3.1"},
            "depth_coefficient='3.1': expected a positive number",
        ),
        (
            AlignVisionConfig,
            {"squeeze_expansion_ratio": -1},
            "squeeze_expansion_ratio=-1: expected a positive number",
        ),
        (
            AlignVisionConfig,
            {"drop_connect_rate": 1},
            "drop_connect_rate=1: expected a rate in [0, 1)",
        ),
        (
            AlignVisionConfig,
            {"hidden_act": "tanh"},
            "hidden_act='tanh': expected one of swish, gelu, relu, selu, gelu_new, silu, mish, or",
        ),
        (
            AlignVisionConfig,
            {"pooling_type": "cls"},
            "pooling_type='cls': expected one of mean, max",
        ),
        (
            AlignVisionConfig,
            {"kernel_sizes": [3, 3]},
            f"kernel_sizes=[3, 3]: expected {SEVEN}",
        ),
        (AlignVisionConfig, {"out_channels": [16]}, f"out_channels=[16]: expected {SEVEN}"),
        (AlignVisionConfig, {"strides": []}, f"strides=[]: expected {SEVEN}"),
        (AlignVisionConfig, {"num_block_repeats": [1]}, "num_block_repeats=[1]: expected 7 values"),
        (
            AlignVisionConfig,
            {"expand_ratios": [1, 6, 6, 6, 6, 6, 0]},
            "expand_ratios=[1, 6, 6, 6, 6, 6, 0]: expected positive integers",
        ),
        (
            AlignVisionConfig,
            {"strides": [1, 2, 2, 2, 1, 3, 1]},
            "strides=[1, 2, 2, 2, 1, 3, 1]: expected 1 or 2 for each stage",
        ),
        (
            AlignVisionConfig,
            {"in_channels": [32, 16, 24, 48, 80, 112, 192]},
            "in_channels[3]=48: expected a stage that chains: out_channels[2] has 80 channels",
        ),
        (
            AlignVisionConfig,
            {"in_channels": [64, 16, 24, 40, 80, 112, 192]},
            "in_channels[0]=64: expected a stage that chains: the stem's output has 64 channels",
        ),
        (AlignConfig, {"projection_dim": 0}, "projection_dim=0: expected a positive integer"),
        (
            AlignConfig,
            {"temperature_init_value": 10**400},
            f"temperature_init_value={10**400}: expected a positive number",
        ),
        (
            AlignConfig,
            {"logit_bias_init_value": 10**400},
            f"logit_bias_init_value={10**400}: expected a number, or nothing",
        ),
        (
            AlignConfig,
            {"temperature_init_value": 0.0},
            "temperature_init_value=0.0: expected a positive number",
        ),
        (
            AlignConfig,
            {"projection_dim": 512},
            "projection_dim=512: expected 640, the channels that the image tower ends in, or",
        ),
        (
            AlignConfig,
            {"text_config": {"model_type": "bert"}},
            "model_type='bert': expected 'align_text_model'",
        ),
    ],
)
def test_wrong_values_name_key_value_and_what_was_expected(config_class, arguments, message):
    with pytest.raises(ValueError) as caught:
        config_class(**arguments)
    assert str(caught.value).startswith(message)


def test_a_callable_activation_is_accepted_and_cannot_be_written():
    config = AlignTextConfig(hidden_act=abs)
    assert config.hidden_act is abs
    with pytest.raises(ValueError, match=r"hidden_act=<built-in .* cannot be written to config"):
        config.to_dict()


def test_an_image_projection_frees_the_projection_dim():
    config = AlignConfig(projection_dim=512, image_projection=True)
    assert AlignConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["image_projection"] is True


def test_from_text_vision_configs_keeps_the_towers():
    text, vision = AlignTextConfig(vocab_size=99), AlignVisionConfig(pooling_type="max")
    config = AlignConfig.from_text_vision_configs(text, vision, temperature_init_value=0.07)
    assert (config.text_config, config.vision_config) == (text, vision)
    assert config.temperature_init_value == 0.07


def test_unknown_keys_survive_a_round_trip(tmp_path):
    values = {
        "transformers_version": "4.51.3",
        "text_config": {"vocab_size": 99, "id2label": {"0": "a"}},
        "vision_config": {"torchscript": False},
    }
    AlignConfig.from_dict(values).save_pretrained(tmp_path)
    config = AlignConfig.from_pretrained(tmp_path)
    assert config.extra == {"transformers_version": "4.51.3"}
    assert config.text_config.extra == {"id2label": {"0": "a"}}
    assert config.vision_config.extra == {"torchscript": False}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["id2label"] == {"0": "a"}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_from_dict_leaves_the_given_dict_alone():
    values = {"text_config": {"vocab_size": 99}, "model_type": "align"}
    config = AlignConfig.from_dict(values)
    config.text_config.vocab_size = 100
    assert values == {"text_config": {"vocab_size": 99}, "model_type": "align"}


def test_pruned_heads_survive_json(tmp_path):
    AlignTextConfig(pruned_heads={3: [5, 1, 5]}).save_pretrained(tmp_path)
    assert AlignTextConfig.from_pretrained(tmp_path).pruned_heads == {3: [1, 5]}


@pytest.mark.parametrize("version", [4, 5])
def test_reads_what_transformers_writes(version, tmp_path):
    written = (GOLDENS / f"config_transformers_{version}.json").read_text()
    (tmp_path / "config.json").write_text(written)
    config = AlignConfig.from_pretrained(tmp_path)
    assert config.temperature_init_value == 0.5
    assert config.text_config == AlignTextConfig.from_pretrained(tmp_path)
    assert config.vision_config == AlignVisionConfig.from_pretrained(tmp_path)
    assert config.text_config.hidden_size == 16
    assert config.vision_config.depthwise_padding == [18]
    assert config.vision_config.pooling_type == "max"
    # transformers 4 wrote 64 here, four times the repeats; it has no meaning of its own.
    assert config.vision_config.num_hidden_layers == 55

    again = config.to_dict()
    for key, value in json.loads(written).items():
        if isinstance(value, dict):
            assert {**again[key], **value, "num_hidden_layers": 0} == {
                **again[key],
                "num_hidden_layers": 0,
            }
        else:
            assert again[key] == value


def test_a_file_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="model_type='clip': expected 'align'"):
        AlignConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='clip': expected 'align_vision_model'"):
        AlignVisionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"projection_dim": ', "config.json: not valid JSON"),
        ("[]", "config.json: expected a JSON object, found list"),
        (b"\xff\xfe\x00", "config.json: not valid JSON"),
    ],
)
def test_a_broken_file_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        AlignConfig.from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        AlignConfig.from_pretrained(tmp_path)


# preset: (blocks, stem channels, image embedding, layers, hidden size, projection)
PRESET_FACTS = {
    "align-base": (55, 64, 640, 12, 768, 640),
    "align-mini": (26, 40, 384, 4, 256, 640),
    "align-large": (88, 136, 1376, 24, 1024, 1376),
    "align-tiny": (13, 24, 192, 2, 192, 192),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = AlignConfig.from_preset(name)
    vision, text = config.vision_config, config.text_config
    assert PRESET_FACTS[name] == (
        vision.num_hidden_layers,
        vision.stem_channels,
        vision.embed_dim,
        text.num_hidden_layers,
        text.hidden_size,
        config.projection_dim,
    )
    assert config.image_projection == (name == "align-mini")
    assert vision.image_size == (96 if name == "align-tiny" else 289)
    assert AlignConfig.from_dict(config.to_dict()) == config


def test_each_call_gives_a_preset_of_its_own():
    first = AlignConfig.from_preset("align-base")
    first.vision_config.strides[0] = 2
    first.text_config.vocab_size = 1
    assert AlignConfig.from_preset("align-base").vision_config.strides[0] == 1
    assert AlignConfig.from_preset("align-base").text_config.vocab_size == 30522


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="preset 'align-huge': expected one of align-base, align-"):
        AlignConfig.from_preset("align-huge")


@pytest.mark.parametrize(
    ("width", "channels", "expected"),
    [
        (2.0, 32, 64),
        (2.0, 320, 640),
        (1.2, 16, 24),  # 19.2 rounds to 16, which is under 90 %
        (1.2, 24, 32),  # 28.8 rounds to 32
        (0.25, 40, 16),  # 10 rounds to 8, which is under 90 %
        (0.25, 16, 8),  # 4: never under the divisor
        (4.3, 192, 824),  # 825.6
    ],
)
def test_round_filters(width, channels, expected):
    config = AlignVisionConfig()
    config.width_coefficient = width
    assert config.round_filters(channels) == expected


def test_round_repeats_rounds_up():
    config = AlignVisionConfig()
    assert [config.round_repeats(n) for n in (1, 2, 3, 4)] == [4, 7, 10, 13]
