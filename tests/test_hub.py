"""The name of a checkpoint to a folder, and the options of `from_pretrained`."""

import logging
import pathlib
import shutil
import typing

import pytest

from align_tf import AlignConfig, AlignModel, AlignTextModel, AlignVisionModel
from align_tf.hub import BUNDLED, is_available, resolve_folder


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, 'torch_dtype: expected dtype="mixed_bfloat16" of a model'),
        ({"device_map": "auto"}, "device_map: expected nothing: Keras places the model, and keras"),
        ({"trust_remote_code": True}, "trust_remote_code: expected nothing: no code of a checkpo"),
        ({"attn_implementation": "sdpa"}, "attn_implementation: expected nothing: there is one"),
        ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage: expected nothing: a tensor is read at"),
        ({"load_in_8bit": True}, r'load_in_8bit: expected model.quantize\("int8"\) after it'),
        ({"from_pt": True}, "from_pt: expected nothing: the files of the checkpoint"),
        ({"local_files": True}, "local_files: expected one of .*cache_dir, local_files_only$"),
    ],
)
@pytest.mark.parametrize("of", [AlignModel, AlignTextModel, AlignVisionModel, AlignConfig])
def test_an_option_of_transformers_is_told_what_to_use(option, expected, of):
    with pytest.raises(TypeError, match=f"^from_pretrained has no {expected}") as error:
        of.from_pretrained("align-tiny", **option)
    assert "\n" not in str(error.value)


def test_what_is_loaded_is_typed_as_the_class_that_loads_it():
    for of in (AlignModel, AlignConfig):
        for method in (of.from_pretrained, of.from_config if of is AlignModel else of.from_dict):
            hints = typing.get_type_hints(method)
            assert typing.get_args(hints["cls"]) == (hints["return"],)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.keras"])
def test_a_file_is_told_as_one(name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        way = (
            "a checkpoint's folder; keras.saving.load_model reads"
            if "keras" in name
            else "the folder"
        )
        message = f"^{path}: a file; expected {way}"
        with pytest.raises(FileNotFoundError, match=message):
            AlignModel.from_pretrained(path)
        assert not is_available(path)


def test_an_id_without_an_owner_is_asked_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--bert-base-uncased" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--bert-base-uncased" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert resolve_folder("bert-base-uncased", **options) == snapshot
    with pytest.raises(FileNotFoundError, match="'bert-base-cased': no such folder, and the Hugg"):
        resolve_folder("bert-base-cased", **options)
    for name in ("nowhere", "-x", ".hidden-folder", "a--b", "x-/y/z"):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint folder, align-tiny, or"):
            resolve_folder(name, **options)


def test_a_folder_with_the_name_of_the_bundled_one_is_said_to_be_taken(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING, "align_tf")
    monkeypatch.chdir(BUNDLED["align-tiny"].parent)
    assert resolve_folder("align-tiny").samefile(BUNDLED["align-tiny"])
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("align-tiny") == BUNDLED["align-tiny"]
    assert not caplog.messages
    shutil.copytree(BUNDLED["align-tiny"], "align-tiny")
    for _ in range(2):
        assert resolve_folder("align-tiny") == pathlib.Path("align-tiny")
        assert AlignConfig.from_pretrained("align-tiny").projection_dim == 192
    folder = tmp_path / "align-tiny"
    expected = f"align-tiny: taken from {folder}, not the bundled one of that name"
    assert caplog.messages == [expected]
