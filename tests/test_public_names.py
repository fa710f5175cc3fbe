"""The packages: their public names, loaded when they are asked for, and the maps of their rooms."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

import align_tf

# package: its names
PUBLIC = {
    "align_tf": "AlignConfig AlignImageProcessor AlignModel AlignProcessor AlignTextConfig "
    "AlignTextModel AlignTokenizer AlignVisionConfig AlignVisionModel client data evaluation "
    "export_litert export_onnx export_saved_model plots search server training",
    "align_tf.data": "make_dataset records write_tfrecords",
    "align_tf.evaluation": "Embedder class_embeddings class_figures confusion_matrix "
    "distinct_pairs holdout knn_metrics linear_probe_metrics retrieval_metrics zero_shot_metrics "
    "zero_shot_predictions",
    "align_tf.training": "CompilationCount Recipe ResumableCheckpoint RetrievalEvaluation "
    "ZeroShotEvaluation data_parallel describe_devices gathered make_optimizer read_recipe train",
    "align_tf.search": "Hit Index Searcher build_index embed",
    "align_tf.server": "Limits ModelServer",
    "align_tf.client": "AlignClient AlignServerError AsyncAlignClient Classification Signature "
    "TensorSpec Tls VersionStatus",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_hands_its_names_on(package):
    module = importlib.import_module(package)
    names = PUBLIC[package].split()
    assert dir(module) == sorted(module.__all__) == names
    if "server" not in package:  # that one needs an extra
        for name in names:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"No {package} attribute nothing"):
        getattr(module, "nothing")  # noqa: B009


def test_a_package_maps_its_rooms():
    root = pathlib.Path(align_tf.__file__).parent
    for init in root.rglob("__init__.py"):
        rooms = {path.stem for path in init.parent.glob("[!_]*.py")}
        rooms |= {path.parent.name for path in init.parent.glob("*/__init__.py")}
        mapped = re.findall(r"\w+", init.read_text().split('"""')[1])
        assert rooms - set(mapped) == set(), init


def test_nothing_is_loaded_before_it_is_asked_for():
    script = (
        "import json, sys, align_tf\n"
        "for name in ('data', 'evaluation', 'training', 'search', 'server', 'client'):\n"
        "    dir(getattr(align_tf, name))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    loaded = set(json.loads(shown.stdout))
    assert "align_tf.client" in loaded
    assert not loaded & {"tensorflow", "keras", "numpy", "PIL", "rich", "yaml", "grpc"}
