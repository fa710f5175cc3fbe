"""ALIGN for TensorFlow and Keras: load, fine-tune, export and serve."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use, so that `import align_tf` and the command line start at once.
# public name: module
_PUBLIC = {
    "AlignConfig": "configuration",
    "AlignTextConfig": "configuration",
    "AlignVisionConfig": "configuration",
    "AlignModel": "model",
    "AlignTextModel": "model",
    "AlignVisionModel": "model",
    "AlignProcessor": "processor",
    "AlignImageProcessor": "image_processing",
    "AlignTokenizer": "tokenization",
    "export_litert": "litert",
    "export_saved_model": "export",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
