from .align import AlignConfig as AlignConfig
from .blocks import BlockSpec as BlockSpec, block_table as block_table
from .presets import PRESETS as PRESETS
from .text import AlignTextConfig as AlignTextConfig
from .vision import AlignVisionConfig as AlignVisionConfig
