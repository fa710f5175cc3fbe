"""The command line: results, machine-readable output, mistakes that end in one line."""

import csv
import importlib.abc
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import urllib.request

import keras
import numpy as np
import pytest
from PIL import Image

import align_tf
from align_tf import AlignModel, AlignProcessor
from align_tf.cli import common, entry
from align_tf.cli.main import main
from align_tf.data.label_files import is_file_of_labels, read_labels
from align_tf.export import saved_model
from align_tf.hub import BUNDLED

if keras.backend.backend() != "tensorflow":
    pytest.skip("export runs on the TensorFlow backend", allow_module_level=True)

TESTS = pathlib.Path(__file__).parents[1]
SERVING = TESTS.parent / "serving"
MODELS = TESTS / "goldens" / "tf_serving" / "models.config"
EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from align_tf.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for command in ("quickstart", "classify", "train", "evaluate", "search", "export", "serve"):
        assert command in shown.stdout


@pytest.mark.slow  # the import of another process
def test_tensorflow_comes_without_what_no_command_needs():
    script = (
        "import sys\n"
        "from align_tf.cli.common import OPTIONAL, import_tensorflow\n"
        "import_tensorflow()\n"
        "import keras\n"
        "assert not OPTIONAL & set(sys.modules), OPTIONAL & set(sys.modules)\n"
        "import scipy.sparse, sklearn.linear_model"  # which evaluate does
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_the_backend_of_keras_is_found_as_keras_finds_it(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert common._on_tensorflow()
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert not common._on_tensorflow()
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert common._on_tensorflow()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed):
    program = f"'{sys.executable}' -m align_tf classify - --labels a {closed}; echo $?"
    done = subprocess.run(program, shell=True, capture_output=True, text=True, input="")
    assert done.stdout == "2\n" and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(["search", "index", "a", option] for option in ("--html", "--montage")),
        *(["evaluate", "--data", "x", option] for option in ("--output", "--plot")),
        ["embed", "x", "--output"],
        ["plot", "curves", "x", "--output"],
        ["tpu-check", "--model", "align-tiny", "--program"],
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(capsys, tmp_path, arguments):
    (tmp_path / "file").touch()
    code, _, err = run(capsys, *arguments, tmp_path / "file" / "new.png")
    said = f"align-tf: error: {tmp_path}/file/new.png: cannot be written: Not a directory\n"
    assert (code, err) == (2, said)
    assert run(capsys, *arguments, "")[2].endswith(": an empty name; expected a path\n")
    if arguments[-1] in ("--html", "--montage", "--plot", "--program"):
        folder = f"align-tf: error: {tmp_path}: a folder; expected a file\n"
        assert run(capsys, *arguments, tmp_path)[2] == folder


@pytest.mark.parametrize(
    "arguments",
    [
        *(["export", "--format", to, "--output"] for to in ("saved_model", "litert", "onnx")),
        ["quickstart", "--output"],
        ["interpolate", "align-tiny", "align-tiny", "--output"],
    ],
)
def test_a_file_where_a_folder_is_to_be_is_told_before_the_work(capsys, tmp_path, arguments):
    (tmp_path / "file").touch()
    code, _, err = run(capsys, *arguments, tmp_path / "file")
    assert code == 2
    assert len(err.splitlines()) == 1  # and none of what is loaded
    assert err.startswith(f"align-tf: error: {tmp_path}/file: ")
    if "onnx" in arguments:
        (tmp_path / "model.safetensors").touch()
        code, _, err = run(capsys, *arguments, tmp_path)
        said = f"align-tf: error: {tmp_path}: a checkpoint, of model.safetensors; expected another"
        assert (code, err.startswith(said), len(err.splitlines())) == (2, True, 1)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["classify", "x", "--labels", "a", "--model"], "--model"),
        (["interpolate", "--output", "x", "align-tiny"], "tuned"),
        (["train", "--model"], "--model"),
        (["convert", "--from", "align-tiny", "--to", "hf", "--output", "x", "--processor"], None),
    ],
)
def test_a_name_of_a_model_that_is_none_is_told_before_the_work(capsys, arguments, place):
    code, _, err = run(capsys, *arguments, "")
    said = f"align-tf: error: {place or '--processor'}: an empty name; expected a path\n"
    assert (code, err) == (2, said)
    code, _, err = run(capsys, *arguments, "ftp://bucket/align")
    assert code == 2
    assert err.startswith("align-tf: error: ftp://bucket/align: not an address that is read or w")


def test_no_command_shows_help_and_fails(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "quickstart" in err


def test_classify_prints_json_with_probabilities_that_sum_to_one(capsys):
    labels = ["pizza", "rocket", "snake"]
    code, out, _ = run(capsys, "classify", *EXAMPLES[:2], "--json", "--labels", *labels)
    assert code == 0
    results = json.loads(out)
    assert [result["image"] for result in results] == [str(path) for path in EXAMPLES[:2]]
    for result in results:
        assert list(result["probs"]) == labels
        assert sum(result["probs"].values()) == pytest.approx(1.0, abs=1e-5)


def test_classify_names_a_model_that_gives_no_numbers(capsys, tmp_path):
    model = AlignModel.from_pretrained("align-tiny")
    model.text_projection.bias.assign(np.full(model.text_projection.bias.shape, np.nan))
    model.save_pretrained(tmp_path)
    AlignProcessor.from_pretrained("align-tiny").save_pretrained(tmp_path)
    model = ["--model", str(tmp_path)]
    code, out, err = run(capsys, "classify", *EXAMPLES[:2], *model, "--labels", "pizza", "rocket")
    assert (code, out) == (2, "")
    assert err.count("the model gives NaN or infinity: expected weights that are finite") == 1


def test_classify_takes_a_template_with_other_braces(capsys):
    template = ["--template", "{} in {x} {"]
    code, out, _ = run(
        capsys, "classify", EXAMPLES[0], "--json", "--labels", "pizza", "rocket", *template
    )
    assert code == 0 and list(json.loads(out)[0]["probs"]) == ["pizza", "rocket"]


def test_classify_prints_a_table(capsys):
    code, out, err = run(capsys, "classify", EXAMPLES[0], "--labels", "pizza", "rocket")
    assert code == 0
    assert "pizza" in out and "%" in out
    assert "Loading align-tiny" in err


def test_what_is_shown_is_text_not_markup(capsys, tmp_path):
    folder = tmp_path / "holiday [edited] [b]"
    folder.mkdir()
    bytes_name = os.path.join(os.fsencode(folder), b"caf\xe9\x1b[2J.png")
    shutil.copy(EXAMPLES[0], bytes_name)
    labels = ["[cat]", "x[/b]", ":dog:", "\x1b[31mred\nrow"]
    code, out, _ = run(capsys, "classify", os.fsdecode(bytes_name), "--labels", *labels)
    assert code == 0 and "\x1b" not in out
    written = "".join(out.split())
    for said in ("[cat]", "x[/b]", ":dog:", r"\x1b[31mred\nrow", r"[b]/caf\xe9\x1b[2J.png"):
        assert said in written.replace("│", "").replace("|", ""), said
    code, _, err = run(capsys, "classify", "\x1b[2J.png", "--labels", "a")
    assert (code, err) == (2, "align-tf: error: \\x1b[2J.png: no such file\n")
    with pytest.raises(SystemExit):
        main(["classify", "--\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def test_a_broken_image_is_named_and_the_others_are_answered(capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(EXAMPLES[0].read_bytes()[:200])
    code, out, err = run(
        capsys, "classify", broken, EXAMPLES[0], "--json", "--labels", "pizza", "rocket"
    )
    assert code == 2
    assert [result["image"] for result in json.loads(out)] == [str(EXAMPLES[0])]
    assert "broken.png" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["classify", "none.png", "--labels", "a"], "none.png: no such file"),
        (["classify", __file__, "--labels", "a", "--template", "a photo"], "--template"),
        (["classify", __file__, "--labels", "a", ""], "label 2 of 2 is blank"),
        (["classify", __file__, "--labels", "classes.txt"], "classes.txt: no such file"),
        (["classify", __file__, "--labels", "a", __file__], "is a file; expected labels"),
        (["classify", __file__, "--labels", str(TESTS)], "is a folder; expected labels, or one"),
        (["classify", __file__, "--labels", "a", "\udce9"], "--labels: '\\udce9' is not UTF-8"),
        (["search", "x", "\udce9"], "TEXT: '\\udce9' is not UTF-8"),
        (["search", "x", "a", "--add", "\udce9"], "--add: '\\udce9' is not UTF-8"),
        (["evaluate", "--data", "x", "--labels", "\udce9"], "--labels: '\\udce9' is not UTF-8"),
        (
            ["plot", "heatmap", "--images", "x", "--texts", "\udce9", "--output", "x.png"],
            "--texts: '\\udce9' is not UTF-8",
        ),
        (["search", "x", "--image", "none.png"], "error: none.png: no such file"),
        (
            ["plot", "heatmap", "--images", str(SERVING), "--texts", "a", "--output", "x.png"],
            "serving: no images; expected .jpg",
        ),
        (["plot", "curves", "x", "--output", str(TESTS)], "tests: a folder; expected a .png or"),
        (["classify", "nowhere/*.png", "--labels", "a"], "nowhere/*.png: no such file"),
        (["classify", str(SERVING), "--labels", "a"], "serving: no images; expected .jpg"),
        (["classify", __file__, "--labels", "a", "--model", "nowhere"], "'nowhere'"),
        (["evaluate", "--data", "./nowhere"], "./nowhere"),
        (["evaluate", "--data", "x", "--task", "knn", "--labels", "a"], "--labels"),
        (["evaluate", "--data", "x", "--train-data", "y"], "--train-data"),
        (["evaluate", "--data", "x", "--output", "."], "--output ."),
        (["export", "--model", "./nowhere", "--output", "x"], "./nowhere"),
        (["export", "--quantize", "int8", "--output", "x"], "--format litert"),
        (["export", "--format", "litert", "--dtype", "bfloat16", "--output", "x"], "--dtype"),
        (["export", "--format", "onnx", "--dtype", "float16", "--output", "x"], "not with"),
        (["serve"], "--model-config-file"),
        (["serve", "./nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, arguments, expected):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and expected in last


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["classify", __file__, "hf://a/b.png", "--labels", "a"], "hf://a/b.png"),
        (["quickstart", "--output", "memory://x"], "memory://x"),
        (["search", "x", "a cat", "--html", "gs://bucket/x.html"], "gs://bucket/x.html"),
        (["serve", "gs://bucket/x"], "gs://bucket/x"),
    ],
)
def test_a_remote_folder_is_refused_before_anything_is_made(
    capsys, tmp_path, monkeypatch, arguments, path
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"align-tf: error: {path}: remote folders are not supported here; ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--lerning-rate", "1"], "--lerning-rate; did you mean --learning-rate?"),
        (["train", "--learning_rate", "1"], "--learning_rate; did you mean --learning-rate?"),
        (["export", "--ouput", "x"], "unknown flag --ouput; did you mean --output?"),
        (["export", "-model", "x"], "unknown flag -model; did you mean --model?"),
        (["serve", "--qqq=1"], "unknown flag --qqq (see align-tf serve --help)"),
        (["--versoin"], "unknown flag --versoin; did you mean --version?"),
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyz"], "unknown command 'xyz'; expected one of quickstart, classify"),
        (["classify", "--labels", "a", "b", "x.png"], '-- has to stand between: --labels "a cat"'),
        (["evaluate"], "the following arguments are required: --data (see"),
        (["classify", "x", "--labels", "a", "--top", "0"], "--top: expected 1 or more, found '0'"),
        (["embed", "x", "--output", "y", "--batch-size", "0"], "--batch-size: expected 1 or more"),
        (["search", "x", "y", "-k", "x"], "argument -k: expected 1 or more, found 'x'"),
        (["serve", "x", "--rest-port", "65536"], "--rest-port: expected 0 to 65535, found '65536'"),
        (["demo", "--port=-1"], "argument --port: expected 0 to 65535, found '-1'"),
    ],
)
def test_a_misspelled_command_line_is_answered_in_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_a_flag_may_be_cut_short_and_what_follows_two_dashes_is_none(capsys):
    code, _, err = run(capsys, "classify", "--lab", "a", "--", "--lables")
    assert (code, "--lables: no such file" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("cat\na dog\n", "txt", [(None, "cat"), (None, "a dog")]),
        ("id,label\n0,cat\n1,'a dog, big'\n", "csv", [("0", "cat"), ("1", "a dog, big")]),
        ("Label\ncat\n", "csv", [(None, "cat")]),
        ("label;id\n'a dog; big';1\n", "csv", [("1", "a dog; big")]),
        ("cat;dog\n", "csv", [(None, "cat;dog")]),
        ("cat\n'a dog, big'\n", "csv", [(None, "cat"), (None, "a dog, big")]),
        ("label,folder\na cat,c\ndog\n", "csv", [("c", "a cat"), (None, "dog")]),
        ("folder\tlabel\nc\ta 'cat\n", "tsv", [("c", 'a "cat')]),
        ("c\ta cat\n", "tsv", [("c", "a cat")]),
    ],
)
def test_a_file_of_labels_is_lines_or_a_table_with_a_header(tmp_path, text, suffix, expected):
    file = tmp_path / f"labels.{suffix}"
    file.write_text(text.replace("'", '"'))
    assert is_file_of_labels([str(file)])
    assert read_labels(str(file)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,1\n", "labels.csv, line 1: 2 values; expected one label a line, or a header with"),
        ("label\n", "labels.csv: a header alone, expected labels below it"),
        ("'cat\n", "labels.csv: not a .csv: "),
    ],
)
def test_a_table_without_labels_is_told(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text.replace("'", '"'))
    with pytest.raises(ValueError, match=message):
        read_labels(str(tmp_path / "labels.csv"))


def test_names_of_folders_may_be_labels(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_file_of_labels(["cat", "dog"])
    for folders in (["cat"], ["dog", "../" + tmp_path.name + "/cat"]):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            is_file_of_labels(folders)


def test_an_empty_file_of_labels_is_a_mistake(capsys, tmp_path):
    (tmp_path / "labels").write_text(" \n\n")
    code, _, err = run(capsys, "classify", EXAMPLES[0], "--labels", tmp_path / "labels")
    assert (code, err) == (2, f"align-tf: error: {tmp_path}/labels: empty, expected one a line\n")


def test_classify_takes_folders_globs_stdin_and_a_file_of_labels(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    names = {path.stem: shutil.copy(path, folder) for path in EXAMPLES}
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "labels").write_text("rose\npanda\nrose\npo\tpolice car\n\nstar\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{names['rose']}\n\n"))
    given = ["-", tmp_path / "pictures", str(folder / "p*a.png")]
    code, out, err = run(
        capsys, "classify", "--csv", "--top", "1", "--labels", tmp_path / "labels", "--", *given
    )
    assert (code, "Note:" in err) == (0, False)
    header, *rows = csv.reader(out.splitlines())
    assert header == ["image", "label", "probability"]
    # The list, then the folder, sorted, then the glob.
    expected = ["rose", "cupcake", "panda", "pineapple", "police_car", "rose", "star", "panda"]
    assert [row[0] for row in rows] == [str(names[name]) for name in expected]
    found = [(name, row[1]) for name, row in zip(expected, rows, strict=True)]
    for pair in (("rose", "rose"), ("panda", "panda"), ("police_car", "police car")):
        assert pair in found
    assert float(rows[0][2]) > 0.5


def test_classify_says_what_it_leaves_out(capsys):
    labels = [f"label {number}" for number in range(11)] + ["a rose"]
    code, out, err = run(capsys, "classify", EXAMPLES[4], "--top", "3", "--labels", *labels)
    assert (code, out.count("%"), "9 more" in out) == (0, 3, True)
    assert "a rose" in out and "Note:" not in err


def test_align_tiny_says_that_a_photograph_is_nothing_for_it(capsys):
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = pathlib.Path(datasets.__file__).parent / "images" / "china.jpg"
    code, _, err = run(capsys, "classify", EXAMPLES[0], photograph, "--labels", "a temple")
    assert code == 0
    one, tiny = err.splitlines()[-2:]
    assert one == "Note: one label alone always has 100 %; give others to choose from"
    assert tiny.startswith("Note: align-tiny knows emoji") and f"{photograph} looks" in tiny


def test_labels_with_commas_between_them_are_told(capsys):
    code, _, err = run(capsys, "classify", EXAMPLES[0], "--labels", "a cat, a dog")
    assert code == 0
    assert err.splitlines()[-1] == (
        "Note: one label alone always has 100 %; spaces set labels apart, not commas: "
        '"a cat" "a dog"'
    )


def test_the_help_of_train_groups_the_settings_and_lists_their_choices(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    titles = ["model and data:", "batch:", "optimizer:", "what trains:", "output:"]
    places = [out.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    optimizer = out[places[2] : places[3]]
    for choices in ("{lamb,adamw}", "{linear,cosine,constant}"):
        assert choices in optimizer
    assert "(adamw with model, lamb with preset)" in " ".join(optimizer.split())
    assert "{true,false}" in out[places[4] :]
    assert "align-base, align-" in " ".join(out.split())


class Interrupting(importlib.abc.MetaPathFinder):
    """Ctrl-C as the commands are imported."""

    def find_spec(self, name, path, target=None):
        if name == "align_tf.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_while_the_commands_are_imported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "align_tf.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert entry.main() == 130
    assert capsys.readouterr() == ("", "align-tf: stopped\n")


def test_the_package_is_a_program():
    command = [sys.executable, "-m", "align_tf", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout == f"{align_tf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "zero-shot"], "no images"),
        (["--task", "zero-shot", "--templates", "none.txt"], "none.txt: no such file"),
        (["--task", "knn"], 'pip install "align-tf[eval]"'),
        (["--task", "zero-shot", "--plot", "a.png"], 'pip install "align-tf[plot]"'),
        (["--task", "zero-shot", "--plot", "a.jpg"], "a.jpg: expected a name that ends in .png"),
        (["--plot", "a.png"], "--plot: of no use to --task retrieval, but to zero-shot and knn"),
        (["--data", "gone.csv"], "gone.csv: no such file"),
    ],
)
def test_evaluate_sees_what_is_wrong_before_it_loads_a_model(capsys, absent, arguments, expected):
    for package in ("sklearn", "matplotlib"):
        absent(package)
    code, out, err = run(capsys, "evaluate", "--data", SERVING, "--model", "nowhere", *arguments)
    assert (code, out) == (2, "")
    assert expected in err.splitlines()[-1] and "Loading" not in err


@pytest.mark.slow
def test_embed_and_index_say_what_comes_next(capsys, tmp_path):
    pytest.importorskip("faiss")
    shards, index = tmp_path / "my photos", tmp_path / "my photos-index"
    code, _, err = run(capsys, "embed", EXAMPLES[0].parent, "--output", shards)
    assert (code, err.splitlines()[-1]) == (
        0,
        f"Next: align-tf index '{shards}' --output '{index}'",
    )
    code, _, err = run(capsys, "index", shards, "--output", index)
    assert (code, err.splitlines()[-1]) == (0, f"Next: align-tf search '{index}' 'a red car'")


@pytest.mark.slow
def test_export_prints_the_folder_alone(capsys, checkpoint, tmp_path):
    code, out, err = run(capsys, "export", "--model", checkpoint, "--output", tmp_path / "align")
    assert code == 0
    assert out.strip() == str(tmp_path / "align" / "1")
    assert (tmp_path / "align" / "1" / "saved_model.pb").is_file()
    assert err.splitlines()[-1] == f"Next: align-tf serve {tmp_path}/align"


def test_quickstart_gives_the_same_answer_three_ways(capsys, monkeypatch, tiny_export, tmp_path):
    """The export is a copy of the one that others serve, of the same model: it takes long."""
    pytest.importorskip("tensorflow_serving")

    def export(model, processor, output):
        assert (model.config.projection_dim, processor.tokenizer.vocab_size) == (192, 6000)
        return shutil.copytree(tiny_export / "1", output / "1")

    monkeypatch.setattr(saved_model, "export_saved_model", export)
    code, out, err = run(capsys, "quickstart", "--json", "--output", tmp_path)
    assert code == 0
    assert err.splitlines()[-2:] == [
        f"The SavedModel stays in {tmp_path} until you remove it.",
        f"Next: align-tf serve {tmp_path}",
    ]
    report = json.loads(out)
    assert report["saved_model"] == str(tmp_path / "1")
    assert len(report["results"]) == len(EXAMPLES) >= 6
    for row in report["results"]:
        assert row["grpc"] == pytest.approx(row["keras"], abs=1e-5)
        assert row["rest"] == pytest.approx(row["keras"], abs=1e-5)
    right = [row["label"].replace(" ", "_") == row["image"][:-4] for row in report["results"]]
    assert np.mean(right) >= 0.8


def test_serve_answers_as_its_flags_say_until_ctrl_c(capsys, monkeypatch):
    pytest.importorskip("tensorflow_serving")
    from align_tf.client import AlignClient, AlignServerError
    from align_tf.server import ModelServer

    seen, wait = {}, ModelServer.wait

    def ask(port, protocol, inputs):
        settings = {"model_name": "probe", "version_label": "stable", "protocol": protocol}
        with AlignClient(f"127.0.0.1:{port}", **settings) as client:
            return client.predict({"x": inputs})["y"].shape

    def asked_and_stopped(server, announce):
        def announce_and_stop():
            announce()
            seen["REST"] = ask(server.rest_port, "rest", np.ones((1, 4)))
            seen["gRPC"] = ask(server.grpc_port, "grpc", np.ones((1, 4)))
            with pytest.raises(AlignServerError, match="larger than 1000 bytes"):
                ask(server.rest_port, "rest", np.ones((100, 4)))
            page = f"http://127.0.0.1:{server.rest_port}/monitoring/prometheus/metrics"
            seen["metrics"] = urllib.request.urlopen(page, timeout=60).read()
            os.kill(os.getpid(), signal.SIGINT)

        wait(server, announce_and_stop)

    monkeypatch.setattr(ModelServer, "wait", asked_and_stopped)
    flags = ["--model-config-file", MODELS, "--grpc-port", "0", "--rest-port", "0"]
    flags += ["--enable-batching", "--batching-parameters-file", SERVING / "batching.config"]
    flags += ["--monitoring-config-file", SERVING / "monitoring.config"]
    code, out, err = run(capsys, "serve", *flags, "--max-request-bytes", "1000")
    assert (code, out) == (0, "")
    assert b"wrapped_run_count" in seen.pop("metrics")
    assert seen == {"REST": (1, 3), "gRPC": (1, 3)}
    first, *_, last = err.splitlines()
    assert first.startswith("Serving probe (versions 1, 2): gRPC at 127.0.0.1:")
    assert last == "Stopping ..."


@pytest.mark.slow
def test_quickstart_keeps_serving_until_it_is_stopped(tmp_path):
    pytest.importorskip("tensorflow_serving")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "align_tf.cli",
            "quickstart",
            "--keep-serving",
            "--output",
            os.fspath(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = next(line for line in process.stdout if "curl" in line)
        url = next(word for word in line.split() if word.startswith("http"))
        status = urllib.request.urlopen(url.removesuffix(":predict"), timeout=300).read()
        assert b"AVAILABLE" in status
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    finally:
        process.kill()


def test_classify_accepts_any_picture_file(capsys, tmp_path):
    path = tmp_path / "gray.jpg"
    Image.fromarray(np.full((30, 300), 128, np.uint8)).save(path)
    code, out, _ = run(capsys, "classify", path, "--json", "--labels", "a dog", "a gray square")
    assert code == 0
    assert len(json.loads(out)[0]["probs"]) == 2


@pytest.mark.parametrize("command", [["serve", "models"], ["quickstart"]])
def test_an_absent_extra_names_the_pip_command(capsys, absent, command):
    absent("tensorflow_serving", "align_tf.server")
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and 'pip install "align-tf[serve]"' in last
