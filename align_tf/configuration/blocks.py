"""The block table of an EfficientNet: its stages, scaled by width and depth, block by block."""

import dataclasses

from align_tf.configuration.vision import AlignVisionConfig


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One MBConv block after scaling by width and depth."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: int
    residual: bool
    drop_rate: float
    square_padding: bool


def block_table(config: AlignVisionConfig) -> list[BlockSpec]:
    """Scales the stages of a configuration and lays them out block by block.

    Args:
        config: the image tower's configuration.

    Returns:
        One row for each block, in order. Its index is the one in layer names and in
        `depthwise_padding`.
    """
    blocks = []
    stages = zip(
        config.in_channels,
        config.out_channels,
        config.kernel_sizes,
        config.strides,
        config.num_block_repeats,
        config.expand_ratios,
        strict=True,
    )
    for in_channels, out_channels, kernel_size, stride, repeats, expand_ratio in stages:
        for repeat in range(config.round_repeats(repeats)):
            first = repeat == 0
            before = config.round_filters(in_channels if first else out_channels)
            after = config.round_filters(out_channels)
            same_shape = stride == 1 and before == after
            blocks.append(
                BlockSpec(
                    in_channels=before,
                    out_channels=after,
                    kernel_size=kernel_size,
                    stride=stride if first else 1,
                    expand_ratio=expand_ratio,
                    residual=not first or (config.first_block_residual and same_shape),
                    drop_rate=config.drop_connect_rate * len(blocks) / config.num_hidden_layers,
                    square_padding=len(blocks) in config.depthwise_padding,
                )
            )
    return blocks
