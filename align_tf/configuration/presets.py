"""The presets: named architectures, to be trained from scratch."""

# Presets: only what differs from the defaults.
# name: (text_config, vision_config, joint)
PRESETS = {
    "align-base": (
        {},
        {"image_size": 289, "hidden_dim": 640},
        {},
    ),
    # The original's small pair: EfficientNet-B3 and BERT-mini.
    "align-mini": (
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        {
            "image_size": 289,
            "width_coefficient": 1.2,
            "depth_coefficient": 1.4,
            "hidden_dim": 384,
        },
        {"image_projection": True},
    ),
    # The paper's best: EfficientNet-L2 and BERT-large.
    "align-large": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        {
            "image_size": 289,
            "width_coefficient": 4.3,
            "depth_coefficient": 5.3,
            "hidden_dim": 1376,
        },
        {"projection_dim": 1376},
    ),
    # The bundled model: small pictures, a vocabulary of its own, early strides for speed.
    "align-tiny": (
        {
            "vocab_size": 6000,
            "hidden_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "max_position_embeddings": 64,
        },
        {
            "image_size": 96,
            "width_coefficient": 0.6,
            "depth_coefficient": 0.6,
            "strides": [2, 2, 1, 2, 1, 2, 1],
            "expand_ratios": [1, 4, 6, 6, 6, 6, 6],
            "hidden_dim": 192,
        },
        {"projection_dim": 192},
    ),
}
