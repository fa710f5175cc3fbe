"""An ALIGN as small as a training needs it."""

import pytest

from align_tf import AlignConfig


@pytest.fixture(scope="session")
def small_config() -> AlignConfig:
    """One layer, two blocks of which the second drops out, 8 dimensions: not to be set."""
    return AlignConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 20,
            "max_position_embeddings": 16,
            "initializer_range": 0.3,
        },
        vision_config={
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3],
            "in_channels": [16],
            "out_channels": [16],
            "strides": [1],
            "num_block_repeats": [2],
            "expand_ratios": [1],
            "hidden_dim": 8,
            "initializer_range": 0.3,
        },
        projection_dim=8,
    )
