"""Images and texts to what the models take, inside the TensorFlow graph.

processor           both halves; what they return is a batch_feature
tokenization        texts to ids, over tokenizer_files and normalizer
image_processing    pixels to pixel_values, over resampling and levels; image_input takes what
                    callers have
apart               what a data set calls as it is
decoding            encoded images to pixels, a file a format
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
