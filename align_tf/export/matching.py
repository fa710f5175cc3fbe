"""Whether a model and a processor fit each other, seen before anything slow is done with them."""

from align_tf.configuration.blocks import block_table
from align_tf.configuration.vision import AlignVisionConfig
from align_tf.models.align import AlignModel
from align_tf.preprocessing.processor import AlignProcessor


def check_fit(model: AlignModel, processor: AlignProcessor) -> None:
    """Checks that a model takes what a processor makes.

    Args:
        model: the model.
        processor: its processor.

    Raises:
        ValueError: one of them is none, the tokenizer has ids that the model has no embedding
            of, or images are too small for the image tower or of other channels.
    """
    for value, kind in ((model, AlignModel), (processor, AlignProcessor)):
        if not isinstance(value, kind):
            raise ValueError(f"{type(value).__name__}: expected an {kind.__name__}")
    words, rows = len(processor.tokenizer), model.config.text_config.vocab_size
    if words > rows:
        raise ValueError(f"a vocabulary of {words} words, the model knows {rows}")
    height, width, channels = processor.image_processor.output_shape
    vision, least = model.config.vision_config, _least_side(model.config.vision_config)
    if channels != vision.num_channels:
        raise ValueError(
            f"the processor's images have {channels} channels, the model takes "
            f"{vision.num_channels}"
        )
    for side, pixels in (("high", height), ("wide", width)):
        if pixels is not None and pixels < least:
            raise ValueError(
                f"the processor's images are {pixels} pixels {side}: the model takes {least} or "
                "more"
            )


def _least_side(config: AlignVisionConfig) -> int:
    """Computes the side of which one pixel is left after the last block."""
    margins = [2]  # of each convolution of stride 2: what its kernel is larger than its padding
    for spec in block_table(config):
        if spec.stride == 2:
            after = spec.kernel_size // 2
            padding = 2 * after if spec.square_padding else 2 * after - 1
            margins.append(spec.kernel_size - padding)
    side = 1
    for margin in reversed(margins):
        side = 2 * (side - 1) + margin
    return side
