"""Whether a model and a processor fit each other, seen before anything slow is done with them."""

from align_tf.models.align import AlignModel
from align_tf.models.inputs import LARGEST_PIXEL
from align_tf.preprocessing.processor import AlignProcessor


def check_fit(model: AlignModel, processor: AlignProcessor) -> None:
    """Checks that a model takes what a processor makes.

    Args:
        model: the model.
        processor: its processor.

    Raises:
        ValueError: one of them is none, the tokenizer has ids that the model has no embedding
            of, or images are too small for the image tower, of other channels or not scaled.
    """
    for value, kind in ((model, AlignModel), (processor, AlignProcessor)):
        if not isinstance(value, kind):
            raise ValueError(f"{type(value).__name__}: expected an {kind.__name__}")
    words, rows = len(processor.tokenizer), model.config.text_config.vocab_size
    if words > rows:
        raise ValueError(f"a vocabulary of {words} words, the model knows {rows}")
    height, width, channels = processor.image_processor.output_shape
    vision, least = model.config.vision_config, model.config.vision_config.least_side
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
    largest = processor.image_processor.largest_value
    if not largest <= LARGEST_PIXEL:
        raise ValueError(
            f"the processor's pixel_values reach {largest:.6g}: the model takes {LARGEST_PIXEL:g} "
            "at most; expected do_rescale or do_normalize"
        )
