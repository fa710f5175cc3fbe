"""The name of a checkpoint to a local folder: a path, the bundled model, or Hugging Face's hub."""

import http.client
import os
import pathlib
import re
import urllib.request
from typing import Any

from align_tf.files import CheckpointError, read_json

BUNDLED = {"align-tiny": pathlib.Path(__file__).parent / "pretrained" / "align-tiny"}

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TORCH_WEIGHTS_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"


def resolve_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    weights: bool = False,
) -> pathlib.Path:
    """Turns the name of a checkpoint into a local folder.

    Args:
        name_or_path: a folder, the prefix of a TensorFlow checkpoint in it, `align-tiny`, or a
            Hugging Face id.
        revision: branch, tag or commit on the hub.
        token: access token of the hub.
        cache_dir: the hub's cache folder.
        local_files_only: never ask the hub, use its cache.
        weights: fetch the weights too, not only the configuration and vocabulary files.

    Returns:
        A folder that exists.

    Raises:
        FileNotFoundError: there is no such folder and no such id.
        CheckpointError: the hub's index of shards is broken.
    """
    folder = pathlib.Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if original_index(folder):
        return folder.parent
    name = os.fspath(name_or_path)
    if name in BUNDLED:
        return BUNDLED[name]
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r}: no such folder; expected a checkpoint folder, "
            f"{', '.join(BUNDLED)}, or a Hugging Face id such as kakaobrain/align-base"
        )
    import huggingface_hub

    options = {
        "repo_id": name,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    try:
        folder = huggingface_hub.snapshot_download(
            allow_patterns=["*.json", "*.txt", "*.index"], **options
        )
        if weights:
            _download_weights(pathlib.Path(folder), options)
    except CheckpointError:
        raise
    except Exception as error:  # the hub, its HTTP client and the system raise kinds of their own
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name!r}: no such folder, and the Hugging Face hub gave nothing: {reason}"
        ) from error
    return pathlib.Path(folder)


def is_available(name_or_path: str | os.PathLike, timeout: float = 5.0) -> bool:
    """Says at once whether a checkpoint can be had: it is here, or the hub has it and answers.

    Args:
        name_or_path: as `resolve_folder` takes it.
        timeout: seconds that the hub has for its answer.
    """
    try:
        resolve_folder(name_or_path, local_files_only=True, weights=True)
        return True
    except FileNotFoundError:
        if not HUB_ID.fullmatch(os.fspath(name_or_path)):
            return False
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    url = huggingface_hub.hf_hub_url(os.fspath(name_or_path), "config.json")
    headers = huggingface_hub.utils.build_hf_headers()  # with the token, where there is one
    request = urllib.request.Request(url, method="HEAD", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except (OSError, http.client.HTTPException):  # no network, or no such checkpoint
        return False


def _download_weights(folder: pathlib.Path, options: dict[str, Any]) -> None:
    import huggingface_hub

    for index in (INDEX_NAME, TORCH_INDEX_NAME):
        if (folder / index).is_file():  # fetched with the other JSON files
            for name in shard_names(folder / index):
                huggingface_hub.hf_hub_download(filename=name, **options)
            return
    for name in (WEIGHTS_NAME, TORCH_WEIGHTS_NAME):
        try:
            huggingface_hub.hf_hub_download(filename=name, **options)
            return
        except huggingface_hub.errors.EntryNotFoundError:
            if name == TORCH_WEIGHTS_NAME and not any(folder.glob("*.index")):
                raise
    huggingface_hub.snapshot_download(allow_patterns=["*.data-*"], **options)


def original_index(path: str | os.PathLike) -> pathlib.Path | None:
    """Finds the `.index` file of the TensorFlow checkpoint whose prefix, or index, a path is."""
    path = pathlib.Path(path).expanduser()
    beside = path.with_name(f"{path.name}.index") if path.name else path
    return next((p for p in (path, beside) if p.suffix == ".index" and p.is_file()), None)


def shard_names(index: pathlib.Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map
    if not valid or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensors to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
    return names
