"""What Keras's files name of align_tf: known to Keras from its import on, loaded when it is met."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

PACKAGE = "align_tf"

# Registered class: where it is. `keras.saving.load_model` asks a registry that the class enters
# itself when its file is imported, and nothing imports it where `import align_tf` stands alone.
CLASSES = {
    "AlignModel": "align_tf.models.align",
    "AlignTextModel": "align_tf.models.text",
    "AlignVisionModel": "align_tf.models.vision",
    "EncoderLayer": "align_tf.models.bert",
    "SelfAttention": "align_tf.models.bert",
    "TextEmbeddings": "align_tf.models.bert",
    "MBConvBlock": "align_tf.models.efficientnet",
    "GhostBatchNormalization": "align_tf.models.ghost_batch_norm",
    "AdamW": "align_tf.training.optimization",
    "Lamb": "align_tf.training.optimization",
    "WarmupDecay": "align_tf.training.optimization",
}


def announce() -> None:
    """Enters the classes into Keras's registry, at once or when Keras is imported."""
    if "keras" in sys.modules:
        _enter(sys.modules["keras"])
    else:
        sys.meta_path.insert(0, _WithKeras())


class _Announced:
    """Stands for a class in Keras's registry until its file is imported."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def from_config(self, config: dict[str, Any]) -> Any:
        return getattr(importlib.import_module(self.module), self.name).from_config(config)


class _WithKeras:
    """Of the import of Keras: has it followed by `_enter`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _enter(module)

            spec.loader.exec_module = exec_module
        return spec


def _enter(keras: ModuleType) -> None:
    known = keras.saving.get_custom_objects()
    for name, module in CLASSES.items():
        known.setdefault(f"{PACKAGE}>{name}", _Announced(name, module))
