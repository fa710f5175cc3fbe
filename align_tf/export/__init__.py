"""A model made ready to be used elsewhere.

convert         a checkpoint from one format to another
interpolation   between a model and those fine-tuned from it
saved_model     for TensorFlow Serving: raw bytes and strings in, by signatures with requirements
litert          for phones: a file a tower
onnx            for ONNX Runtime and OpenVINO: a file a tower, over onnx_towers and onnx_graph
matching, temporary   what all of them do first: check, and make a folder to write in
tower_files     what those of a file a tower have beside it, and are compared by
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
