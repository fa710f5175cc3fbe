"""Makes towers.npz: a tiny ALIGN of transformers 5, its inputs and what each stage returns.

Run it with an interpreter that has torch and transformers>=5:

    python tests/goldens/model/make_towers.py
"""

import json
import pathlib

import numpy as np
import torch
from transformers import AlignConfig, AlignModel

CONFIG = {
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "max_position_embeddings": 16,
    },
    # 8, 8, 8 and 16 channels; strides of 2 with both paddings; one residual block.
    "vision_config": {
        "image_size": 21,
        "width_coefficient": 0.25,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 5, 3],
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "depthwise_padding": [3],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 6, 4],
        "hidden_dim": 64,
    },
    "projection_dim": 16,
    "temperature_init_value": 0.07,
}


def randomize(model: torch.nn.Module) -> None:
    """Draws every weight and statistic, in numbers that float16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            drawn = 0.5 + noise.abs()
        elif "norm" in name.lower() and name.endswith("weight"):
            drawn = 1.0 + 0.2 * noise
        elif "num_batches_tracked" in name or name == "temperature":
            continue
        else:
            drawn = 0.2 * noise
        tensor.copy_(drawn.half().float())


@torch.no_grad()
def main() -> None:
    model = AlignModel(AlignConfig(**CONFIG, attn_implementation="eager")).eval()
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pixel_values": torch.rand((2, 3, 21, 21), generator=generator).half().float(),
        "input_ids": torch.tensor([[2, 11, 5, 38, 7, 3], [2, 9, 3, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]]),
    }
    asked = {"output_hidden_states": True, "output_attentions": True}
    output = model(**inputs, return_loss=True, **asked)
    text, vision = output.text_model_output, output.vision_model_output

    channels_last = (0, 2, 3, 1)
    arrays = {
        "temperature": model.temperature,
        "pooler_output": text.pooler_output,
        "image_features": vision.pooler_output,
        **{f"vision_{i}": x.permute(channels_last) for i, x in enumerate(vision.hidden_states)},
        **{f"text_{i}": x for i, x in enumerate(text.hidden_states)},
        **{f"attention_{i}": x for i, x in enumerate(text.attentions)},
        **{key: output[key] for key in ("image_embeds", "text_embeds", "logits_per_text", "loss")},
    }
    inputs["pixel_values"] = inputs["pixel_values"].permute(channels_last)
    weights = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    weights["temperature"] = weights["temperature"].float()
    np.savez_compressed(
        pathlib.Path(__file__).parent / "towers.npz",
        config=json.dumps({**CONFIG, "model_type": "align"}),
        **{f"expected/{name}": x.numpy() for name, x in arrays.items()},
        **{f"inputs/{name}": x.numpy() for name, x in inputs.items()},
        **{
            f"weights/{name}": x.numpy() if x.ndim == 0 else x.half().numpy()
            for name, x in weights.items()
        },
    )


if __name__ == "__main__":
    main()
