from .align import AlignModel as AlignModel
from .text import AlignTextModel as AlignTextModel
from .vision import AlignVisionModel as AlignVisionModel
