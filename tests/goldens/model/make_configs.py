"""Makes config_transformers_4.json or _5.json: a config.json as transformers writes it.

Run it with an interpreter of each major version of transformers:

    python tests/goldens/model/make_configs.py
"""

import pathlib
import tempfile

import transformers

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"image_size": 289, "depthwise_padding": [18], "pooling_type": "max"}


def main() -> None:
    config = transformers.AlignConfig(
        text_config=transformers.AlignTextConfig(**TEXT).to_dict(),
        vision_config=transformers.AlignVisionConfig(**VISION).to_dict(),
        temperature_init_value=0.5,
    )
    major = transformers.__version__.split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (pathlib.Path(folder) / "config.json").read_text()
    (pathlib.Path(__file__).parent / f"config_transformers_{major}.json").write_text(text)


if __name__ == "__main__":
    main()
