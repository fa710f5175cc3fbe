"""Makes relative_positions.npz: a tiny ALIGN text tower with each kind of relative position.

Only transformers 4 has them; run it with an interpreter that has torch and transformers 4.51:

    python tests/goldens/model/make_relative_positions.py
"""

import json
import pathlib

import numpy as np
import torch
from transformers import AlignTextConfig, AlignTextModel

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 10,
}
INPUTS = {
    "input_ids": [[2, 11, 5, 38, 7, 3], [2, 9, 3, 0, 0, 0]],
    "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
}


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    arrays, weights = {}, None
    for kind in ("relative_key", "relative_key_query"):
        config = AlignTextConfig(**CONFIG, position_embedding_type=kind)
        model = AlignTextModel(config).eval()
        if weights is None:  # both kinds have the same tensors
            weights = {
                name: (0.6 * torch.randn(tensor.shape, generator=generator)).half()
                for name, tensor in model.state_dict().items()
            }
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        inputs = {name: torch.tensor(ids) for name, ids in INPUTS.items()}
        output = model(**inputs, output_attentions=True)
        arrays[f"{kind}/last_hidden_state"] = output.last_hidden_state
        arrays[f"{kind}/pooler_output"] = output.pooler_output
        for layer, attention in enumerate(output.attentions):
            arrays[f"{kind}/attention_{layer}"] = attention
    np.savez_compressed(
        pathlib.Path(__file__).parent / "relative_positions.npz",
        config=json.dumps({**CONFIG, "model_type": "align_text_model"}),
        **{name: array.numpy() for name, array in arrays.items()},
        **{f"inputs/{name}": np.array(ids) for name, ids in INPUTS.items()},
        **{f"weights/{name}": tensor.numpy() for name, tensor in weights.items()},
    )


if __name__ == "__main__":
    main()
