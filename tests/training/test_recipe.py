"""The recipe: defaults, YAML and flags, and mistakes that are named."""

import argparse
import math
import pathlib

import pytest

from align_tf.cli.main import main
from align_tf.cli.settings import add_settings, read_settings
from align_tf.training import Recipe, read_recipe

RECIPES = pathlib.Path(__file__).parents[2] / "recipes"
LEAST = {"model": "align-tiny", "data": "pairs", "output": "out", "steps": 100}


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers_and_gentle_where_a_model_is_fine_tuned():
    preset = {**LEAST, "model": None, "preset": "align-base", "processor": "align-tiny"}
    for start, given, expected in (
        (preset, {}, ("lamb", 1e-3, 0)),
        (preset, {"optimizer": "adamw"}, ("adamw", 1e-3, 0)),
        (LEAST, {}, ("adamw", 1e-5, 10)),
        (LEAST, {"optimizer": "lamb"}, ("lamb", 1e-3, 10)),
        (LEAST, {"learning_rate": 3e-4, "warmup_steps": 0}, ("adamw", 3e-4, 0)),
    ):
        recipe = Recipe(**start, **given).counted(100)
        assert (recipe.optimizer, recipe.learning_rate, recipe.warmup_steps) == expected
        assert (recipe.schedule, recipe.weight_decay) == ("linear", 1e-5)
        assert recipe.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("steps", "log_every", "save_every"),
    [(1, 1, 1), (60, 1, 6), (250, 3, 25), (2000, 20, 200), (60_000_000, 100, 1000)],
)
def test_the_pace_follows_the_number_of_steps(steps, log_every, save_every):
    recipe = Recipe(**{**LEAST, "steps": None, "epochs": 2}).counted(steps)
    assert (recipe.steps, recipe.epochs) == (steps, None)
    assert (recipe.log_every, recipe.save_every) == (log_every, save_every)
    recipe = Recipe(**LEAST, log_every=7, save_every=9).counted(steps)
    assert (recipe.log_every, recipe.save_every) == (7, 9)


def test_absent_tensorboard_is_told_before_anything_is_written(absent, tmp_path, capsys):
    absent("tensorboard")
    output = tmp_path / "out"
    given = ["--model", "align-tiny", "--data", "pairs", "--output", str(output), "--steps", "1"]
    assert main(["train", *given, "--tensorboard"]) == 2
    assert capsys.readouterr().err == (
        "align-tf: error: tensorboard: true needs TensorBoard: "
        'pip install "align-tf[tensorboard]"\n'
    )
    assert not output.exists()


def test_yaml_and_flags_make_a_recipe(tmp_path):
    path = written(
        tmp_path,
        "model: align-tiny\ndata: pairs\nsteps: 100\nlearning_rate: 1e-4\n"
        "freeze: {text: [0, 1]}\nclip_norm: 1\n",
    )
    recipe = read_recipe(path, {"output": "out", "steps": "200", "tensorboard": "true"})
    assert recipe.learning_rate == 1e-4  # for YAML, 1e-4 is text
    assert recipe.steps == 200
    assert recipe.tensorboard is True
    assert recipe.frozen() == {"text": [0, 1]}
    recipe = read_recipe(path, {"output": "out", "preset": "align-mini", "processor": "align-tiny"})
    assert recipe.model is None
    assert read_recipe(path, {"output": "out", "epochs": "2"}).steps is None
    assert Recipe(**LEAST, freeze="vision").frozen() == {"vision": None}
    assert Recipe(**LEAST, freeze=["text"]).frozen() == {"text": None}


def test_an_adapter_learns_faster_and_leaves_out_what_is_frozen():
    recipe = Recipe(**LEAST, lora_rank=8, freeze="vision")
    assert (recipe.learning_rate, recipe.adapted()) == (1e-4, ["text"])
    recipe = Recipe(**LEAST, lora_rank=8, freeze={"vision": [0]}, optimizer="lamb")
    assert (recipe.learning_rate, recipe.adapted()) == (1e-3, ["text", "vision"])


def test_sets_of_validation_have_names():
    recipe = Recipe(**LEAST, validation_data="pairs", early_stop=1)
    assert (recipe.watched(), recipe.figures()[:2]) == ("val_loss", ["val_loss", "val_r1_i2t"])
    sets = {"a": "pairs", "b": {"data": "classes", "task": "zero-shot"}}
    recipe = Recipe(**LEAST, validation_data=sets, keep_best="val_b_top1")
    assert recipe.figures()[:2] == ["val_loss", "val_a_r1_i2t"]
    assert recipe.validations() == {
        "a": {"task": "retrieval", "data": "pairs"},
        "b": {"task": "zero-shot", "data": "classes"},
    }
    flag = {"validation_data": "{a: pairs}", "model": "x", "data": "d", "output": "o", "steps": "1"}
    assert read_recipe(None, flag).validations() == {"a": {"task": "retrieval", "data": "pairs"}}


@pytest.mark.parametrize(
    ("data", "sources", "weights", "said"),
    [
        ("[x].tar: y", ["[x].tar: y"], [1], ["[x].tar: y"]),
        ("[a.tar, b.tar]", [["a.tar", "b.tar"]], [1], ["a.tar, b.tar"]),
        ("[{source: a, weight: 2}]", ["a"], [2], ["a"]),
        (
            "[{source: a, weight: 3}, {source: [b, c], weight: 5e-1}, d]",
            ["a", ["b", "c"], "d"],
            [3, 0.5, 1],
            ["a (66.7%)", "b, c (11.1%)", "d (22.2%)"],
        ),
    ],
)
def test_data_are_a_source_or_several_with_weights(tmp_path, data, sources, weights, said):
    recipe = read_recipe(None, {**LEAST, "data": data})
    assert recipe.drawn() == (sources, weights)
    assert recipe.said_data() == said
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("given", "data"),
    [
        (["--data", "a"], "a"),
        (["--data", "a", "b"], ["a", "b"]),
        (["--data", "a", "--data", "b"], ["a", "b"]),
        (["--data", "a", "recipe.yml"], "a"),
        (
            ["recipe.yml", "--data", "a", "b", "--data-weights", "3", "1"],
            [{"source": "a", "weight": 3}, {"source": "b", "weight": 1}],
        ),
        (["recipe.yml"], [{"source": "c", "weight": 2}]),
    ],
)
def test_flags_name_several_sources(tmp_path, monkeypatch, given, data):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("recipe.yml").write_text("batch_size: 6\ndata: [{source: c, weight: 2}]\n")
    parser = argparse.ArgumentParser()
    add_settings(parser)
    least = ["--model", "align-tiny", "--output", "out", "--steps", "1"]
    recipe = read_settings(parser.parse_args([*least, *given]))
    assert recipe.data == data
    assert recipe.batch_size == (6 if "recipe.yml" in given else 64)


def test_a_saved_recipe_reads_back_alike(tmp_path):
    recipe = Recipe(**LEAST, freeze={"vision": [0]}, ema_momentum=0.9, learning_rate=2e-5)
    recipe.save(tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert "weight_decay" not in (tmp_path / "recipe.yaml").read_text()


def test_example_recipes_are_read():
    recipe = read_recipe(RECIPES / "finetune.yaml", {"output": "out"})
    assert recipe.model == "kakaobrain/align-base"
    recipe = read_recipe(RECIPES / "pretrain.yaml", {"output": "out"})
    assert (recipe.preset, recipe.batch_size, recipe.steps) == ("align-base", 16384, 1200000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"lr_scheduler": 1}, "unknown key 'lr_scheduler'; did you mean 'schedule'?"),
        ({"steps": 0}, "steps=0: expected a whole number of 1 or more"),
        ({"steps": None}, "expected steps or epochs (--steps, --epochs), and one of them; found n"),
        ({"epochs": 2}, "expected steps or epochs (--steps, --epochs), and one of them; found b"),
        ({"data": None}, "data: missing"),
        ({"data": ""}, "data='': expected a source, a list of files of one kind, or of {source: "),
        ({"data": {"a": 1}}, "data={'a': 1}: expected a source, a list"),
        ({"data": [{"path": "a"}]}, "data={'path': 'a'}: expected a source, a list"),
        ({"data": [{"source": "a", "weight": 0}]}, "'weight': 0}: expected a weight above 0"),
        ({"data": [{"source": "a", "weight": None}]}, "None}: expected a weight above 0"),
        ({"data": [{"source": "a", "weight": math.nan}]}, "nan}: expected a weight above 0"),
        ({"data": [{"source": "a", "weight": -2}, "b"]}, "-2}: expected a weight above 0"),
        ({"batch_size": 1}, "batch_size=1: expected a whole number of 2 or more, since a pair is"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number"),
        ({"batch_size": "many"}, "batch_size='many': expected a whole number"),
        ({"batch_size": True}, "batch_size=True: expected a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast': expected a number above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: expected a number of 0 or more, below 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd': expected one of lamb, adamw"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: expected a number above 0"),
        ({"weight_decay": float("inf")}, "weight_decay=inf: expected a number of 0 or more"),
        ({"freeze": [["text"]]}, "freeze=[['text']]: expected text, vision, or"),
        ({"freeze": {"text": [True]}}, "freeze={'text': [True]}: expected text, vision, or"),
        ({"validation_data": {"a": {"data": "x", "task": [1]}}}, "expected a source of pairs, or"),
        ({"freeze": "both"}, "freeze='both': expected text, vision, or"),
        ({"freeze": {"text": 3}}, "freeze={'text': 3}: expected text, vision, or"),
        ({"preset": "align-mini"}, "expected model, a checkpoint to fine-tune, or preset"),
        ({"model": None}, "expected model, a checkpoint to fine-tune, or preset"),
        ({"model": None, "preset": "align-mini"}, "processor: missing"),
        ({"model": None, "preset": "align-bse", "processor": "x"}, "preset='align-bse': expected"),
        ({"accumulation": 5}, "accumulation=5: expected a divisor of batch_size=64"),
        ({"tensorboard": "maybe"}, "tensorboard='maybe': expected true or false"),
        ({"schedule": None}, "schedule=None: expected one of linear"),
        ({"lora_rank": 0}, "lora_rank=0: expected a whole number of 1 or more"),
        (
            {"keep_best": "val_loss"},
            "keep_best='val_loss': expected a figure of validation_data: t",
        ),
        (
            {"keep_best": "val_r1", "validation_data": "x"},
            "keep_best='val_r1': expected a figure of validation_data: val_loss, val_r1_i2t, val_",
        ),
        ({"early_stop": 2}, "early_stop=2: expected keep_best, a figure of validation_data: there"),
        ({"validation_data": {"a": {"task": "zero-shot"}}}, "expected a source of pairs, or sets"),
        ({"validation_data": {"a b": "x"}}, "expected a source of pairs, or sets of these by name"),
        (
            {"validation_data": {"a": {"data": "x", "task": "knn"}}},
            "expected a source of pairs, or",
        ),
        ({"validation_data": 3}, "validation_data=3: expected a source of pairs, or sets of these"),
        ({"lora_rank": 2, "lora_alpha": 10**400}, "0: expected a number above 0"),
        ({"learning_rate": 10**400}, "0: expected a number above 0"),
        ({"weight_decay": 10**400}, "0: expected a number of 0 or more"),
        ({"lora_alpha": 8}, "lora_alpha=8: expected lora_rank beside it"),
        ({"virtual_batch_size": 16}, "virtual_batch_size=16: expected batch_norm='trained' besi"),
        ({"lora_rank": 2, "batch_norm": "trained"}, "batch_norm='trained': not with lora_rank, wh"),
        ({"lora_rank": 2, "loss": "sigmoid"}, "loss='sigmoid': not with lora_rank, which trains"),
        (
            {"lora_rank": 2, "freeze": {"text": None, "vision": None}},
            "expected a tower for lora_rank to adapt",
        ),
        (
            {"lora_rank": 2, "model": None, "preset": "align-mini", "processor": "align-tiny"},
            "lora_rank=2: expected model, which it adapts",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError) as error:
        read_recipe(None, {**LEAST, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--batch-size", "0"], "error: --batch-size 0: expected a whole number of 2 or more"),
        (["--batch-size", "["], "error: --batch-size '[', line 1: not valid YAML"),
        (["--accumulation", "5"], "error: --accumulation 5: expected a divisor of --batch-size 64"),
        (["--epochs", "5"], "error: expected steps or epochs (--steps, --epochs), and one of them"),
        (["--data", "a", "--data-weights", "1"], "error: --data-weights 1: expected one fo"),
        (
            ["--data-weights", "nan"],
            "error: --data {'source': 'pairs', 'weight': 'nan'}: expected a",
        ),
        (["--output", ""], "error: --output: an empty name; expected a path"),
        (["recipe.yaml"], "error: recipe.yaml: accumulation=3: expected a divisor of batch_size"),
        (["recipe.yaml", "--accumulation", "5"], "error: --accumulation 5: expected a divisor"),
    ],
)
def test_a_flag_is_told_by_its_name(tmp_path, monkeypatch, capsys, given, expected):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "accumulation: 3\n")
    least = [word for key, value in LEAST.items() for word in (f"--{key}", str(value))]
    place = 1 if given[0].endswith(".yaml") else 0
    assert main(["train", *given[:place], *least, *given[place:]]) == 2
    assert expected in capsys.readouterr().err


def test_what_is_missing_is_told_with_its_flag(capsys):
    assert main(["train", "--model", "align-tiny", "--data", "x", "--steps", "1"]) == 2
    assert capsys.readouterr().err == (
        "align-tf: error: output: missing; the recipe has to state it, or --output\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: the key 'steps' comes twice"),
        ("freeze:\n  text: [0]\n  text: [1]\n", "line 3: the key 'text' comes twice"),
        ("a: &a {b: 1, b: 2}\nc: *a\n", "line 1: the key 'b' comes twice"),
    ],
)
def test_a_key_that_comes_twice_is_told(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"recipe\.yaml: not valid YAML: {message}$"):
        read_recipe(written(tmp_path, text))


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such recipe file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="no such recipe file, but a folder; one of pairs"):
        read_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.yaml, line 1: not valid YAML"):
        read_recipe(written(tmp_path, "data: [1"))
    with pytest.raises(ValueError, match=r"expected lines of 'key: value', found 'model'"):
        read_recipe(written(tmp_path, "model"))
    with pytest.raises(ValueError, match=r"recipe\.yaml: data: missing"):
        read_recipe(written(tmp_path, "model: align-tiny"))


def test_texts_have_one_length_on_a_tpu_unless_the_recipe_states_several():
    recipe = Recipe(**LEAST)
    assert recipe.lengths(on_tpu=False) == [8, 16, 32, 64]
    assert recipe.lengths(on_tpu=True) == [64]
    flags = {**LEAST, "length_buckets": "[32, 16]"}
    assert read_recipe(flags=flags).lengths(on_tpu=True) == [16, 32]
    assert read_recipe(flags={**LEAST, "length_buckets": "32"}).lengths(on_tpu=False) == [32]
    for wrong in ("[]", "[1]", "[8, x]", "0", "true", "x", "{8: 16}"):
        with pytest.raises(ValueError, match="length_buckets"):
            read_recipe(flags={**LEAST, "length_buckets": wrong})


def test_settings_that_nobody_states_are_taken_where_no_alternative_is():
    silent = {"data": "none", "output": "none", "steps": 1000}
    assert read_recipe(flags={"model": "align-tiny"}, silent=silent).steps == 1000
    recipe = read_recipe(flags={"model": "align-tiny", "epochs": "2", "data": "x"}, silent=silent)
    assert (recipe.steps, recipe.epochs, recipe.data) == (None, 2, "x")
