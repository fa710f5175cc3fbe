from .image_processing import AlignImageProcessor as AlignImageProcessor
from .processor import AlignProcessor as AlignProcessor
from .tokenization import AlignTokenizer as AlignTokenizer
