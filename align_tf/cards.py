"""The card of a model on the Hugging Face hub: what it is, how it is used, and how good it is."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from align_tf import files
from align_tf.hub import ADAPTER_CONFIG_NAME, BUNDLED, HUB_ID, RECIPE_NAME

CARD_NAME = "README.md"

# Settings of a recipe that name places of the machine that trained.
PLACES = ("model", "data", "validation_data", "output", "processor")

MODEL = """```python
from align_tf import AlignModel, AlignProcessor

model, processor = AlignModel.from_pretrained("{id}"), AlignProcessor.from_pretrained("{id}")
```

{theirs}"""
THEIRS = """or in PyTorch:

```python
from transformers import AlignModel, AlignProcessor

model, processor = AlignModel.from_pretrained("{id}"), AlignProcessor.from_pretrained("{id}")
```
"""
ADAPTER = """```python
from align_tf import AlignModel

model = AlignModel.from_pretrained("{base}")
model.load_adapter("{id}")
```

or in PyTorch:

```python
from peft import PeftModel
from transformers import AlignModel

model = PeftModel.from_pretrained(AlignModel.from_pretrained("{on_hub}"), "{id}")
```
"""
EXPORT = """A SavedModel of raw image bytes and strings, for TensorFlow Serving or here:

```sh
hf download {id} --local-dir exported
align-tf serve exported
```
"""

# kind: (what is said of it, how it is used, the library that loads it)
KINDS = {
    "model": ("An ALIGN: an image tower and a text tower that agree.", MODEL, "transformers"),
    "adapter": ("A LoRA adapter of an ALIGN.", ADAPTER, "peft"),
    "export": ("An ALIGN, exported.", EXPORT, "align-tf"),
}


def kind_of(folder: pathlib.Path) -> str:
    """Tells what a folder holds: a model, an adapter or an export.

    Raises:
        ValueError: it is none of them.
    """
    if (folder / "config.json").is_file():
        return "model"
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return "adapter"
    if any(folder.glob("[0-9]*/saved_model.pb")) or (folder / "saved_model.pb").is_file():
        return "export"
    raise ValueError(
        f"{folder}: expected the folder of a checkpoint, an adapter or an export, found none of "
        f"config.json, {ADAPTER_CONFIG_NAME} and saved_model.pb"
    )


def make_card(
    folder: pathlib.Path,
    repo_id: str,
    *,
    licence: str | None = None,
    data: str | None = None,
    figures: Iterable[pathlib.Path] = (),
) -> str:
    """Writes the card of a folder, in Markdown.

    Args:
        folder: a checkpoint, an adapter or an export; of a training, its recipe is told but for
            the places that it names.
        repo_id: where it goes.
        licence: as the hub names it, such as `apache-2.0`.
        data: what it was trained on, in words.
        figures: files that `align-tf evaluate --output` wrote.

    Returns:
        The text of `README.md`.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or none that it should be.
    """
    kind = kind_of(folder)
    said, use, library = KINDS[kind]
    recipe = _recipe(folder)
    base = recipe.get("model")
    if kind == "adapter":
        path = folder / ADAPTER_CONFIG_NAME
        base = files.read_json(path).get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise ValueError(f"{path}: base_model_name_or_path={base!r}: expected a text")
    known = _on_hub(base)
    header = {"license": licence, "library_name": library, "base_model": base if known else None}
    header |= {"pipeline_tag": "zero-shot-image-classification", "tags": ["align", "align-tf"]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items() if value]
    parts = [
        "---",
        *lines,
        "---",
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        said,
        "",
        "## Use",
        "",
    ]
    theirs = THEIRS.format(id=repo_id) if _transformers_has(folder) else ""
    on_hub = base if known else "the model that it was trained on"
    named = base if isinstance(base, str) and base in BUNDLED else on_hub
    parts.append(use.format(id=repo_id, base=named, on_hub=on_hub, theirs=theirs).rstrip())
    parts += ["", "## Data", "", data or "Not told."]
    parts += _figures(figures)
    settings = {key: value for key, value in recipe.items() if key not in PLACES}
    if settings:
        parts += ["", "## Training", "", "By `align-tf train`:", "", "```yaml"]
        parts += [*(f"{key}: {json.dumps(value)}" for key, value in settings.items()), "```"]
    return "\n".join(parts) + "\n"


def _recipe(folder: pathlib.Path) -> dict[str, Any]:
    import yaml

    path = folder / RECIPE_NAME
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}


def _on_hub(name: Any) -> bool:
    known = isinstance(name, str) and HUB_ID.fullmatch(name) and name not in BUNDLED
    return bool(known and not pathlib.Path(name).exists())


def _transformers_has(folder: pathlib.Path) -> bool:
    """Whether transformers loads a model too: it has no projection of images."""
    path = folder / "config.json"
    return path.is_file() and not files.read_json(path).get("image_projection")


def _figures(paths: Iterable[pathlib.Path]) -> list[str]:
    lines = []
    for path in paths:
        report = files.read_json(path)
        metrics = report.get("metrics")
        numbers = isinstance(metrics, dict) and all(
            isinstance(value, (int, float)) for value in metrics.values()
        )
        if not numbers or "task" not in report or not isinstance(report.get("images", 0), int):
            raise ValueError(f"{path}: expected what align-tf evaluate --output writes")
        images = f"{report['images']:,} images" if "images" in report else "images"
        name = pathlib.PurePath(str(report.get("data", ""))).name
        lines += ["", f"{report['task']}, {images} of {name}:", "", "| figure | |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
    return ["", "## Figures", *lines] if lines else []
