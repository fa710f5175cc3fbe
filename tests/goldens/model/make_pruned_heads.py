"""Makes pruned_heads.npz: a tiny ALIGN text tower before and after heads are pruned.

Only transformers 4 prunes heads; run it with an interpreter that has torch and
transformers 4.51:

    python tests/goldens/model/make_pruned_heads.py
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
INPUT_IDS = [[2, 11, 5, 38, 7, 3], [2, 9, 30, 14, 6, 3]]
# layer: heads, in two steps, numbered as in the unpruned model
STEPS = ({0: [1], 1: [0, 2]}, {0: [3]})


@torch.no_grad()
def main() -> None:
    generator = torch.Generator().manual_seed(0)
    model = AlignTextModel(AlignTextConfig(**CONFIG)).eval()
    weights = {
        name: (0.3 * torch.randn(tensor.shape, generator=generator)).half()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    input_ids = torch.tensor(INPUT_IDS)
    expected = [model(input_ids).last_hidden_state]
    for step in STEPS:
        for layer, heads in step.items():
            model.encoder.layer[layer].attention.prune_heads(heads)
        expected.append(model(input_ids).last_hidden_state)
    np.savez_compressed(
        pathlib.Path(__file__).parent / "pruned_heads.npz",
        config=json.dumps({**CONFIG, "model_type": "align_text_model"}),
        steps=json.dumps(STEPS),
        input_ids=np.array(INPUT_IDS),
        expected=torch.stack(expected).numpy(),
        **{f"weights/{name}": tensor.numpy() for name, tensor in weights.items()},
    )


if __name__ == "__main__":
    main()
