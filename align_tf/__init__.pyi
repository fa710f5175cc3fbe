from . import (
    client as client,
    data as data,
    evaluation as evaluation,
    plots as plots,
    search as search,
    server as server,
    training as training,
)
from .configuration.align import AlignConfig as AlignConfig
from .configuration.text import AlignTextConfig as AlignTextConfig
from .configuration.vision import AlignVisionConfig as AlignVisionConfig
from .export.litert import export_litert as export_litert
from .export.onnx import export_onnx as export_onnx
from .export.saved_model import export_saved_model as export_saved_model
from .models.align import AlignModel as AlignModel
from .models.text import AlignTextModel as AlignTextModel
from .models.vision import AlignVisionModel as AlignVisionModel
from .preprocessing.image_processing import AlignImageProcessor as AlignImageProcessor
from .preprocessing.processor import AlignProcessor as AlignProcessor
from .preprocessing.tokenization import AlignTokenizer as AlignTokenizer

__version__: str
