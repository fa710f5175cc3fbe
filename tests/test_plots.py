"""Plots: what is drawn, the two formats, mistakes."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from align_tf import fonts, plots
from align_tf.cli.main import main
from align_tf.hub import BUNDLED

pytest.importorskip("matplotlib")

EXAMPLES = BUNDLED["align-tiny"] / "examples"

LOG = [
    {"step": 10, "loss": 3.0, "temperature": 0.1, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.0, "temperature": 0.09, "learning_rate": 2e-3, "accuracy_i2t": 0.5},
    {"step": 20, "val_r1_i2t": 0.25, "val_r1_t2i": 0.5, "val_loss": 2.5},
    {"step": 30, "loss": 1.0, "temperature": 0.08, "learning_rate": 1e-3},
]


def test_heatmap_writes_each_number_in_its_place(tmp_path):
    values = np.array([[0.5, -0.25, 0.125], [0.0, 1.0, 0.75]])
    pictures = [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 10), "blue")]
    figure = plots.heatmap(values, ["one", "two"], ["a", "b", "cost: $5 or $6"], pictures)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[(1, 0)] == "-0.25" and written[(2, 1)] == "0.75" and len(written) == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    plots.save(figure, tmp_path / "a.png")
    plots.save(figure, tmp_path / "a.svg")
    assert Image.open(tmp_path / "a.png").width > 500
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match=r"expected \(3, 3\)"):
        plots.heatmap(values, ["one", "two", "three"], ["a", "b", "c"])


@pytest.fixture
def one_thread():
    """For t-SNE: several threads wait for one another at every step, long on busy cores."""
    pytest.importorskip("sklearn")
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embeddings_of_one_label_lie_together(method, one_thread):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 20))
    kinds = np.arange(60) % 3
    embeds = centers[kinds] + 0.05 * rng.normal(size=(60, 20))
    figure = plots.embeddings(embeds, [f"kind {kind}" for kind in kinds], method)
    groups = {c.get_label(): np.array(c.get_offsets()) for c in figure.axes[0].collections}
    assert {name: len(points) for name, points in groups.items()} == {
        f"kind {kind}": 20 for kind in range(3)
    }
    means = np.array([points.mean(axis=0) for points in groups.values()])
    apart = min(np.linalg.norm(means[i] - means[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert apart > 3 * max(points.std() for points in (p - p.mean(0) for p in groups.values()))


def test_points_without_a_label_are_told_apart():
    pytest.importorskip("sklearn")
    labels = ["a", "", "a", " ", "b", ""]
    figure = plots.embeddings(np.random.default_rng(0).normal(size=(6, 4)), labels)
    groups = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    assert groups == {"a": 2, "b": 1, "without a label (3)": 3}


def test_points_that_are_all_the_same_are_drawn(one_thread, recwarn):
    figure = plots.embeddings(np.ones((4, 3)), ["a\x1b[31m", "\ud83e", "a\x1b[31m", "b"])
    labels = [c.get_label() for c in figure.axes[0].collections]
    assert labels == [r"a\x1b[31m", r"\ud83e", "b"]
    assert figure.axes[0].get_xlabel() == "PC 1: 0% of variance"
    figure = plots.embeddings(np.ones((4, 3)), ["a"] * 4, "tsne")
    assert np.isfinite(figure.axes[0].collections[0].get_offsets()).all() and not recwarn.list


def test_a_confusion_writes_its_counts_in_their_places():
    counts = np.array([[5, 1, 0], [0, 7, 1200]])
    figure = plots.confusion(counts, ["cat", "dog"], ["cat", "dog", "others"])
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()}
    assert written == {(0, 0): "5", (1, 0): "1", (1, 1): "7", (2, 1): "1,200"}
    shares = axes.images[0].get_array()
    assert shares[0].tolist() == [5 / 6, 1 / 6, 0] and shares[1].sum() == 1
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        plots.confusion(counts, ["cat", "dog"], ["cat", "dog"])


def test_labels_beyond_ten_are_gray():
    pytest.importorskip("sklearn")
    labels = [str(i // 2) for i in range(24)] + ["0"] * 2
    figure = plots.embeddings(np.random.default_rng(0).normal(size=(26, 4)), labels)
    groups = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    assert groups["2 other labels"] == 4 and groups["0"] == 4 and len(groups) == 11
    for embeds, labels in ((np.zeros((2, 4)), ["a", "b"]), (np.zeros((4, 4)), ["a"])):
        with pytest.raises(ValueError, match="three or more"):
            plots.embeddings(embeds, labels)


def test_curves_have_a_panel_for_each_kind_of_value():
    figure = plots.curves(LOG, "run")
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert set(panels) == {
        "loss",
        "accuracy within the batch",
        "validation: recall",
        "temperature",
        "learning rate",
    }
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels["loss"].lines}
    assert lines == {"training": [[10, 3], [20, 2], [30, 1]], "validation": [[20, 2.5]]}
    recall = [line.get_label() for line in panels["validation: recall"].lines]
    assert recall == ["image to text, R@1", "text to image, R@1"]
    assert len(panels["validation: recall"].lines) == 2
    with pytest.raises(ValueError, match="no line"):
        plots.curves([{"step": 1}])


def test_curves_have_whole_steps():
    figure = plots.curves([{"step": step, "loss": 1.0} for step in (3, 4, 5)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [place for place in axes.get_xticks() if 3 <= place <= 5] == [3, 4, 5]
    assert {"3", "4", "5"} <= {label.get_text() for label in axes.get_xticklabels()}


def test_a_log_is_read_up_to_a_line_that_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(line) for line in LOG]
    path.write_text("\n".join([*lines, '{"step": 40, "lo']))
    assert plots.read_metrics(tmp_path) == plots.read_metrics(path) == LOG
    broken = ["[]", "[" * 100_000, '{"step": true}', '{"step": 1e999}', '{"loss": 1}', "", "\x00"]
    for line in [*broken, f'{{"step": 1{"0" * 4000}}}']:
        path.write_text("\n".join([lines[0], line, *lines]))
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a line of a log"):
            plots.read_metrics(tmp_path)
    path.write_bytes(b'{"step": 1, "loss": 2, "note": "\xff", "on": [1]}\n')
    assert plots.read_metrics(tmp_path) == [{"step": 1, "loss": 2}]


# --- fonts -----------------------------------------------------------------------------------


@pytest.fixture
def panda_font(tmp_path, monkeypatch):
    """A font of the system that has the three characters of a panda alone: each a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, builder = pen.glyph(), FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "panda"])
    builder.setupCharacterMap({ord(character): "panda" for character in "大熊猫"})
    builder.setupGlyf({".notdef": square, "panda": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "panda": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Panda", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "panda.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    found = [str(tmp_path / "broken.ttf"), str(tmp_path / "panda.ttf")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    monkeypatch.setattr(fonts, "PACKAGES", ())
    for cached in (fonts._font_files, fonts._tell_missing):
        cached.cache_clear()
    yield str(tmp_path / "panda.ttf")
    for cached in (fonts._font_files, fonts._tell_missing):
        cached.cache_clear()


def test_a_text_is_drawn_by_the_systems_fonts(panda_font, tmp_path, caplog, recwarn):
    figure = plots.heatmap(np.eye(2), ["a", "大熊猫"], ["نجمة", "Привет"])
    names = figure.axes[0].get_yticklabels()
    assert names[1].get_fontfamily()[-1] == panda_font
    plots.save(figure, tmp_path / "a.png")
    assert not caplog.records and not recwarn.list
    # Three squares, as dark as the ink is: not the frames of characters that are not there.
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    left = pixels[:, : pixels.shape[1] // 4]
    assert (left < 50).mean() > 0.01


def test_what_no_font_has_is_told_in_one_line(panda_font, tmp_path, caplog, recwarn, monkeypatch):
    for _ in range(2):
        figure = plots.heatmap(np.eye(2), ["a", "大熊猫"], ["🧁", "赤\u200d\ufe0f \x07"])
        plots.save(figure, tmp_path / "a.png")
    assert [record.getMessage() for record in caplog.records] == [
        "no font for 赤 🧁: expected one of them among the system's fonts"
    ]
    assert not recwarn.list
    monkeypatch.setattr(fonts, "PACKAGES", ("no_such_package",))
    fonts._tell_missing.cache_clear()
    plots.heatmap(np.eye(1), ["赤"], ["a"])
    assert caplog.records[-1].getMessage() == 'no font for 赤: pip install "align-tf[fonts]"'


# --- the commands ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in LOG))
    output = tmp_path / "curves.svg"
    assert main(["plot", "curves", str(tmp_path), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert "<svg" in output.read_text()
    arguments = ["plot", "heatmap", "--images", *map(str, sorted(EXAMPLES.glob("*.png"))[:2])]
    arguments += ["--texts", "a panda", "a cupcake", "--output", str(tmp_path / "heat.png")]
    assert main(arguments) == 0
    assert Image.open(tmp_path / "heat.png").format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "nowhere", "--output", "a.png"], "nowhere: no such file"),
        (["curves", ".", "--output", "a.jpg"], "a.jpg: expected a name that ends in .png or .svg"),
        (["heatmap", "--images", "no.png", "--texts", "a", "--output", "a.png"], "no.png: no such"),
        (["embeddings", "nowhere", "--output", "a.png"], "nowhere: no embeddings"),
        (["curves", "nowhere", "--output", "."], ".: a folder; expected a .png or .svg file"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, arguments, message):
    assert main(["plot", *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and message in last
    assert not pathlib.Path("a.png").exists()
