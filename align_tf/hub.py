"""The name of a checkpoint to a local folder: a path, the bundled model, or Hugging Face's hub."""

import contextlib
import functools
import http.client
import inspect
import logging
import os
import pathlib
import re
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from align_tf import addresses
from align_tf.files import CheckpointError, read_json

BUNDLED = {"align-tiny": pathlib.Path(__file__).parent / "pretrained" / "align-tiny"}

# The hub's oldest ids have no owner: bert-base-uncased. A single word is taken for a folder.
HUB_ID = re.compile(r"(?![.-])[\w.-]+/[\w.-]+|[A-Za-z]\w*(-[\w.]+)+")

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TORCH_WEIGHTS_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

WHOLE = (WEIGHTS_NAME, INDEX_NAME, TORCH_WEIGHTS_NAME, TORCH_INDEX_NAME)  # of these, one

# Of an adapter, as Hugging Face's PEFT names them.
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_TORCH_NAME = "adapter_model.bin"

RECIPE_NAME = "recipe.yaml"  # of a training, which stays beside the model that it gave
# Of a training, what is no part of that model.
OF_TRAINING = (
    *("checkpoint-*/*", ".*", "metrics.jsonl", "data_*", "tensorboard/*", "runs.json"),
    *(RECIPE_NAME, "training_state.*"),  # a recipe names places of the machine
)

# Of a remote folder: what is small, and the formats of weights in the order of preference.
SMALL = (".json", ".txt", ".index")
WEIGHTS = (r"model.*\.safetensors", r"pytorch_model.*\.bin", r".*\.data-\d+-of-\d+")
WEIGHTS_OF_ADAPTERS = (re.escape(ADAPTER_WEIGHTS_NAME), re.escape(ADAPTER_TORCH_NAME))

_DTYPE = 'dtype="mixed_bfloat16" of a model, or another policy of Keras'
_PLACED = "nothing: Keras places the model, and keras.distribution spreads it over devices"
_QUANTIZED = 'model.quantize("int8") after it'
_FORMAT = "nothing: the files of the checkpoint are looked at"
# Options of transformers' `from_pretrained`, and what to give in their place.
IN_THEIR_PLACE = {
    "torch_dtype": _DTYPE,
    "device_map": _PLACED,
    "device": _PLACED,
    "max_memory": _PLACED,
    "tp_plan": _PLACED,
    "low_cpu_mem_usage": "nothing: a tensor is read at a time",
    "trust_remote_code": "nothing: no code of a checkpoint is run",
    "attn_implementation": "nothing: there is one attention",
    "quantization_config": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED.replace("8", "4"),
    "use_safetensors": _FORMAT,
    "from_tf": _FORMAT,
    "from_pt": _FORMAT,
    "from_flax": _FORMAT,
    "use_fast": "nothing: there is one tokenizer and one image processor",
    "use_auth_token": "token",
    "force_download": "revision, or another cache_dir",
    "ignore_mismatched_sizes": "a checkpoint that fits, or AlignModel.from_towers",
}

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def names_options(load: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Has a `from_pretrained` say what to use in the place of an option that it does not have.

    Args:
        load: a function of keywords that are all named.

    Returns:
        The same; of an unknown keyword it raises a TypeError of one line.
    """
    known = inspect.signature(load).parameters
    named = ", ".join(key for key, value in known.items() if value.kind == value.KEYWORD_ONLY)

    @functools.wraps(load)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        for name in options:
            if name not in known:
                in_its_place = IN_THEIR_PLACE.get(name, f"one of {named}")
                raise TypeError(f"from_pretrained has no {name}: expected {in_its_place}")
        with addresses.naming():
            return load(*args, **options)

    return call


def resolve_folder(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    weights: bool = False,
    adapter: bool = False,
) -> pathlib.Path:
    """Turns the name of a checkpoint into a local folder.

    Args:
        name_or_path: a folder, also a remote one such as `gs://bucket/align`, the prefix of a
            TensorFlow checkpoint in it, `align-tiny`, or a Hugging Face id.
        revision: branch, tag or commit on the hub.
        token: access token of the hub.
        cache_dir: the hub's cache folder.
        local_files_only: never ask the hub, use its cache.
        weights: fetch the weights too, not only the configuration and vocabulary files.
        adapter: fetch an adapter's.

    Returns:
        A folder that exists.

    Raises:
        FileNotFoundError: there is no such folder and no such id, or it is a file.
        CheckpointError: the hub's index of shards is broken.
        AddressError: a remote folder cannot be reached.
    """
    if addresses.is_remote(name_or_path):
        if local_files_only:
            raise FileNotFoundError(f"{name_or_path}: not on this machine, which alone is asked")
        kinds = (*WEIGHTS, *WEIGHTS_OF_ADAPTERS) if weights else WEIGHTS_OF_ADAPTERS * adapter
        return _fetched(addresses.place(name_or_path), kinds)
    folder = pathlib.Path(name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if not name:  # to pathlib the working directory
        raise FileNotFoundError("'': an empty name; expected a checkpoint's folder or id")
    if folder.is_dir():
        if name in BUNDLED and not folder.samefile(BUNDLED[name]):
            _tell_taken(name, folder.resolve())
        return folder
    if original_index(folder):
        return folder.parent
    if folder.is_file():
        way = "the folder it lies in"
        if folder.suffix == ".keras":
            way = "a checkpoint's folder; keras.saving.load_model reads this, and align-tf convert"
        raise FileNotFoundError(f"{folder}: a file; expected {way}")
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
        patterns = ["*.json", "*.txt", "*.index"]
        patterns += [ADAPTER_WEIGHTS_NAME, ADAPTER_TORCH_NAME] if adapter else []
        folder = huggingface_hub.snapshot_download(allow_patterns=patterns, **options)
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


@functools.cache  # once, though model, processor and configuration each ask
def _tell_taken(name: str, folder: pathlib.Path) -> None:
    logger.warning("%s: taken from %s, not the bundled one of that name", name, folder)


def _fetched(folder: addresses.Place, kinds: Iterable[str]) -> pathlib.Path:
    """Copies what a remote checkpoint is read from; of several formats of weights the first."""
    names = addresses.names(folder)
    wanted = [name for name in names if name.endswith(SMALL)]
    for kind in kinds:
        if found := [name for name in names if re.fullmatch(kind, name)]:
            wanted += found
            break
    return addresses.fetched_folder(folder, wanted)


def is_available(name_or_path: str | os.PathLike, timeout: float = 5.0) -> bool:
    """Says at once whether a checkpoint can be had: it is here, or the hub has it and answers.

    Args:
        name_or_path: as `resolve_folder` takes it.
        timeout: seconds that the hub has for its answer.
    """
    if addresses.is_remote(name_or_path):
        with contextlib.suppress(addresses.AddressError):
            return bool(addresses.names(addresses.place(name_or_path)))
        return False
    try:
        resolve_folder(name_or_path, local_files_only=True, weights=True)
        return True
    except FileNotFoundError:
        path = pathlib.Path(name_or_path).expanduser()
        if path.is_file() or not HUB_ID.fullmatch(os.fspath(name_or_path)):
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
    names = [WEIGHTS_NAME, TORCH_WEIGHTS_NAME]
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        names += [ADAPTER_WEIGHTS_NAME, ADAPTER_TORCH_NAME]
    for name in names:
        try:
            huggingface_hub.hf_hub_download(filename=name, **options)
            return
        except huggingface_hub.errors.EntryNotFoundError:
            if name == names[-1] and not any(folder.glob("*.index")):
                raise
    huggingface_hub.snapshot_download(allow_patterns=["*.data-*"], **options)


def push(
    folder: pathlib.Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder to the hub, into a repository that is made if it is not there.

    Args:
        folder: what to upload; of a training, the model alone.
        repo_id: such as `me/my-align`.
        private: whether a new repository is seen by its owner alone; None is the owner's default.
        token: access token of the hub; None takes the one that `hf auth login` has kept.
        revision: the branch; made if it is not there.
        commit_message: of the commit.
        create_pr: propose it instead.

    Returns:
        The commit's address.

    Raises:
        ValueError: the repository's name is none.
        OSError: the hub refuses, or is not reached.
    """
    import huggingface_hub

    check_id(repo_id)
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload by align-tf",
            create_pr=create_pr,
            ignore_patterns=list(OF_TRAINING),
        )
    except Exception as error:  # the hub, its HTTP client and the system raise kinds of their own
        reason = " ".join(str(error).split())
        raise OSError(f"{repo_id}: the Hugging Face hub took nothing: {reason}") from error
    return commit.pr_url if create_pr else commit.commit_url


def check_id(repo_id: str) -> None:
    """Checks that a repository's name is one.

    Raises:
        ValueError: it is none.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected an owner and a name, such as me/my-align")


def is_adapter(folder: pathlib.Path) -> bool:
    """Says whether a folder holds an adapter, and no weights of a whole model."""
    whole = any((folder / name).is_file() for name in WHOLE)
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not whole


def resolve_settings(
    name_or_path: str | os.PathLike, names: Iterable[str], **options: Any
) -> pathlib.Path:
    """As `resolve_folder`; of an adapter that has no such file, the folder of the model it adapts.

    Args:
        name_or_path: as `resolve_folder` takes it.
        names: files one of which is to be read.
        **options: those of `resolve_folder`.
    """
    folder = resolve_folder(name_or_path, **options)
    if not (folder / ADAPTER_CONFIG_NAME).is_file() or any((folder / n).is_file() for n in names):
        return folder
    values = read_json(folder / ADAPTER_CONFIG_NAME)
    base = values.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        return folder
    return resolve_folder(base, **{**options, "revision": values.get("revision")})


def original_index(path: str | os.PathLike) -> pathlib.Path | None:
    """Finds the `.index` file of the TensorFlow checkpoint whose prefix, or index, a path is."""
    if addresses.is_remote(path):
        return None
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
