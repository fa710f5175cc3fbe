"""Search: the index and its recall, queries and their arithmetic, the page and the picture."""

import base64
import copy
import html.parser
import io
import json
import os
import pathlib
import shutil
import struct
import urllib.parse

import keras
import numpy as np
import pytest
from PIL import Image

from align_tf import AlignModel
from align_tf.cli.main import main
from align_tf.search import (
    Hit,
    Index,
    Searcher,
    build_index,
    embed,
    gallery,
    index as index_module,
    recall,
)
from align_tf.search.collection import Collection, Settings, Shard, write_shard
from align_tf.search.encoder import Encoder
from align_tf.search.thumbnail import thumbnail

pytest.importorskip("faiss")
pa = pytest.importorskip("pyarrow")

COLORS = ["red", "green", "blue", "gray", "black", "white"]
DIM = 16


def write_collection(
    folder: pathlib.Path, embeds: np.ndarray, texts: np.ndarray | None = None, dtype="float16"
) -> pathlib.Path:
    """Writes vectors as a collection of shards of 500; texts are of every other row."""
    settings = Settings("vectors", len(embeds), 500, dtype, embeds.shape[1], "", "none")
    for number in range(settings.shards):
        rows = range(500 * number, min(500 * number + 500, len(embeds)))
        columns = {
            "id": [f"image {row}" for row in rows],
            "path": [None for _ in rows],
            "caption": [f"text {row}" if texts is not None and row % 2 else None for row in rows],
            "thumbnail": [None for _ in rows],
            "image_embeds": embeds[rows],
            "text_embeds": embeds[rows] if texts is None else texts[rows],
        }
        write_shard(folder, settings, Shard(number, len(rows), 0, {}), columns)
    return folder


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    """2,000 vectors around 40 centers."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, DIM))
    return unit(centers[rng.integers(0, 40, 2000)] + 0.5 * rng.normal(size=(2000, DIM)))


@pytest.fixture(scope="module")
def queries(embeds) -> np.ndarray:
    rng = np.random.default_rng(1)
    return unit(embeds[:100] + 0.1 * rng.normal(size=(100, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def collection(embeds, tmp_path_factory) -> pathlib.Path:
    rng = np.random.default_rng(2)
    texts = unit(embeds + 0.2 * rng.normal(size=embeds.shape))
    return write_collection(tmp_path_factory.mktemp("collection"), embeds, texts)


# --- the index -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_flat_finds_what_numpy_finds(embeds, queries, tmp_path, dtype):
    folder = write_collection(tmp_path / "embeds", embeds, dtype=dtype)
    about = build_index(folder, tmp_path / "index")
    assert (about["kind"], about["rows"], about["recall_at_10"]) == ("flat", 2000, {"image": 1.0})
    index = Index(tmp_path / "index")
    scores, rows = index.search(queries, 5)
    stored = embeds.astype(dtype).astype(np.float32)
    expected = queries @ stored.T
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :5], atol=1e-5)
    (hit,) = index.hits(scores[7, :1], rows[7, :1])
    assert hit.id == f"image {rows[7, 0]}" and hit.path is None


def test_ivf_searches_as_many_lists_as_recall_needs(collection, embeds, queries, tmp_path):
    about = build_index(collection, tmp_path / "index", kind="ivf")
    assert about["nlist"] == 179 and 1 < about["nprobe"] < 100
    assert set(about["recall_at_10"]) == {"image", "text"}
    assert min(about["recall_at_10"].values()) >= 0.96
    assert json.loads((tmp_path / "index" / "index.json").read_text()) == about
    _, rows = Index(tmp_path / "index").search(queries, 10)
    true = np.argsort(-queries @ embeds.T, axis=1)[:, :10]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(true, rows, strict=True)])
    assert 0.9 < recall < 1


def test_recall_counts_what_is_not_found(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "RECALL", 0.0)  # the first setting will do
    about = build_index(collection, tmp_path / "index", kind="ivf")
    assert about["nprobe"] == 1
    assert 0.1 < about["recall_at_10"]["image"] < 0.9


def test_a_large_collection_gets_an_ivf(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "FLAT_ROWS", 1999)
    assert build_index(collection, tmp_path / "a")["kind"] == "ivf"
    monkeypatch.setattr(index_module, "FLAT_ROWS", 2000)
    assert build_index(collection, tmp_path / "b")["kind"] == "flat"


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_is_mapped_into_memory(collection, queries, tmp_path, kind):
    build_index(collection, tmp_path / "index", kind=kind)
    index = Index(tmp_path / "index")
    index.search(queries, 3)
    maps = pathlib.Path("/proc/self/maps").read_text()
    for name in ("index.faiss", "records.arrow"):
        assert str(tmp_path / "index" / name) in maps


def test_few_images(embeds, tmp_path):
    for kind in ("flat", "ivf"):
        folder = write_collection(tmp_path / "embeds", embeds[:1])
        about = build_index(folder, tmp_path / kind, kind=kind)
        assert about["recall_at_10"] == {"image": 1.0}
        scores, rows = Index(tmp_path / kind).search(embeds[:1], 10)
        assert rows.tolist() == [[0]] and scores[0, 0] == pytest.approx(1, abs=2e-3)


def test_an_index_is_replaced_and_nothing_else(collection, embeds, tmp_path):
    output = tmp_path / "index"
    build_index(write_collection(tmp_path / "few", embeds[:10]), output)
    build_index(collection, output)
    assert len(Index(output)) == 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "index"]
    with pytest.raises(ValueError, match="no index"):
        build_index(collection, collection)
    assert Collection(collection).rows == 2000
    with pytest.raises(ValueError, match="kind='tree'"):
        build_index(collection, output, kind="tree")
    with pytest.raises(FileNotFoundError, match="align-tf embed"):
        build_index(output, tmp_path / "other")


def test_a_broken_index_is_named(collection, tmp_path):
    build_index(collection, tmp_path / "index")
    (tmp_path / "index" / "index.faiss").write_bytes(b"no index")
    with pytest.raises(ValueError, match="a broken index"):
        Index(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="align-tf index"):
        Index(tmp_path / "nowhere")


def test_queries_are_checked(collection, queries, tmp_path):
    build_index(collection, tmp_path / "index")
    index = Index(tmp_path / "index")
    for wrong in (queries[0], queries[:, :5]):
        with pytest.raises(ValueError, match=r"expected \(q, 16\)"):
            index.search(wrong)
    with pytest.raises(ValueError, match="k=0"):
        index.search(queries, 0)


# --- queries -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(4)
    for name in COLORS:
        ground = np.array(Image.new("RGB", (20, 20), name), int)
        noisy = np.clip(ground + rng.integers(-60, 60, (20, 20, 3)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{name}.png")
    (folder / "red.txt").write_text("<b>red</b> & more")
    return folder


@pytest.fixture(scope="module")
def index(one_model, pictures, checkpoint, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("search")
    embed(pictures, folder / "embeds", model=str(checkpoint))
    build_index(folder / "embeds", folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def searcher(index) -> Searcher:
    return Searcher(index)  # by the name that the index holds


def test_a_picture_finds_itself(searcher, pictures):
    for name in COLORS:
        hits = searcher.search(image=pictures / f"{name}.png", k=3)
        assert len(hits) == 3
        assert hits[0].id == name and hits[0].score == pytest.approx(1, abs=2e-3)
        assert hits[0].path == str(pictures / f"{name}.png")
        assert hits[0].score >= hits[1].score >= hits[2].score
    assert searcher.search(image=pictures / "red.png", k=1)[0].caption == "<b>red</b> & more"


def test_the_parts_of_a_query_are_added_and_scaled(searcher, pictures):
    image = searcher.encoder.embed_images([pictures / "red.png"])[0]
    red, green, blue, picture = searcher.encoder.embed_texts(["red", "green", "blue", "a picture"])
    query = searcher.embed_query(
        "a picture", pictures / "red.png", add=["green", "blue"], subtract="red"
    )
    np.testing.assert_allclose(query, unit(image + picture + green + blue - red), atol=1e-5)
    np.testing.assert_allclose(searcher.embed_query("red"), red, atol=1e-5)
    expected = unit(image - blue)
    query = searcher.embed_query(image=pictures / "red.png", subtract=["blue"])
    np.testing.assert_allclose(query, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "a text or an image"),
        ({"text": " "}, "blank"),
        ({"text": "red", "add": [""]}, "blank"),
        ({"text": "red", "subtract": ["red"]}, "cancel out"),
        ({"image": __file__}, "test_search.py: not a decodable image"),
    ],
)
def test_a_query_that_is_none(searcher, query, message):
    with pytest.raises(ValueError, match=message):
        searcher.search(**query)


def test_another_model_is_refused(index, tiny_config, processor, tmp_path, capsys):
    keras.utils.set_random_seed(2)
    other = AlignModel(tiny_config)
    with pytest.raises(ValueError, match="not of the model given"):
        Searcher(index, model=other, processor=processor)
    with pytest.raises(ValueError, match="serves another model"):
        Searcher(index, client=Encoder(other, processor))
    other.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["search", str(index), "red", "--model", str(tmp_path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and "fingerprint" in last


def test_a_server_of_the_model_answers_alike(index, searcher):
    served = Searcher(index, client=searcher.encoder)
    for ours, theirs in zip(searcher.search("red"), served.search("red"), strict=True):
        assert theirs.id == ours.id and theirs.score == pytest.approx(ours.score, abs=1e-5)


def test_an_encoder_classifies_by_the_models_own_logits(tiny_config, processor):
    biased = copy.deepcopy(tiny_config)
    biased.logit_bias_init_value = -2.5
    for config in (tiny_config, biased):
        model = AlignModel(config)
        pictures = [np.full((20, 30, 3), level, "uint8") for level in (0, 90, 250)]
        inputs = processor(images=pictures, text=["red", "a green picture"], padding="longest")
        own = np.asarray(model(inputs).logits_per_image)
        answer = Encoder(model, processor).classify(pictures, ["red", "a green picture", "red", ""])
        np.testing.assert_allclose(answer.logits[:, :2], own, atol=1e-5)
        assert (answer.logits[:, 2] == answer.logits[:, 0]).all()
        assert (answer.logits[:, 3] == np.finfo(np.float32).min).all()
        odds = np.exp(own)
        probs = odds / odds.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(answer.probs[:, :2], probs, atol=1e-6)
        np.testing.assert_allclose(answer.probs[:, 2:], [[p, 0] for p in probs[:, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [([], "{}", "labels: expected at least one"), (["a"], "b", "template='b'")],
)
def test_an_encoder_refuses_as_a_client_does(searcher, labels, template, message):
    with pytest.raises(ValueError, match=message):
        searcher.encoder.classify([np.zeros((9, 9, 3), "uint8")], labels, template)


# --- the page, the picture, the command ------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "b") and "id" not in dict(attributes)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "a":
            self.links.append(dict(attributes)["href"])

    def handle_data(self, data):
        self.text += data


def decoded(image: dict[str, str]) -> Image.Image:
    data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(data))


def test_the_page_holds_its_pictures(pictures, tmp_path):
    hits = [
        Hit(0.5, "red", str(pictures / "red.png"), "<b>red</b> & more"),
        Hit(0.25, "lost", str(pictures / "lost.png"), None),
        Hit(-0.125, "in a shard", None, None),
        Hit(-0.25, "private", str(pictures / "blue.png"), "\x1b[31m\ud83e", None, True),
    ]
    gallery.write_html(tmp_path / "page.html", "a <b> query", hits)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in content
    page = Page(content)
    for text in ("a <b> query", "<b>red</b> & more", "0.500", "-0.125", r"\x1b[31m\ud83e"):
        assert text in page.text
    assert [page.text.count(text) for text in ("lost", "in a shard", "not shown")] == [1, 1, 1]
    (image,) = page.images
    assert image["alt"] == "<b>red</b> & more"
    mean = np.asarray(decoded(image)).mean(axis=(0, 1))
    assert mean[0] > 200 and mean[1] < 60
    (link,) = page.links
    assert (tmp_path / urllib.parse.unquote(link)).resolve() == pictures / "red.png"


def test_the_page_shows_the_picture_of_the_query(pictures, tmp_path):
    odd = tmp_path / "a#b? <c>&d.png"
    odd.write_bytes((pictures / "blue.png").read_bytes())
    gallery.write_html(tmp_path / "page.html", "blue", [Hit(0.5, "x", None, None)], odd)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    (image,) = page.images
    mean = np.asarray(decoded(image)).mean(axis=(0, 1))
    assert mean[2] > 200 and mean[0] < 60
    assert page.links == ["a%23b%3F%20%3Cc%3E%26d.png"]


def test_a_picture_that_pillow_chokes_on_is_shown_or_left_out(tmp_path, recwarn):
    thin, turned, cut = (tmp_path / name for name in ("thin.png", "turned.jpg", "cut.jpg"))
    Image.new("RGB", (1, 5000), "red").save(thin)
    # EXIF whose one value is said to have a kind that there is not, and to lie beyond the end.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"
    Image.new("RGB", (30, 20), "red").save(turned, exif=exif)
    cut.write_bytes(turned.read_bytes()[:300])
    assert thumbnail(thin, 320).size == (1, 320)
    assert thumbnail(turned, 60).size == (60, 40)
    assert thumbnail(turned.read_bytes(), 60).getpixel((9, 9))[0] > 200
    assert thumbnail(cut, 60) is None and thumbnail(b"", 60) is None
    hits = [Hit(0.5, path.stem, str(path), None) for path in (thin, turned, cut)]
    gallery.write_html(tmp_path / "page.html", "red", hits)
    gallery.write_montage(tmp_path / "page.png", "red", hits)
    assert len(Page((tmp_path / "page.html").read_text()).images) == 2 and not recwarn.list


@pytest.mark.parametrize("broken", [struct.error, KeyError, ZeroDivisionError, RecursionError])
def test_whatever_exif_raises_the_picture_is_shown(tmp_path, monkeypatch, broken):
    def raises(picture):
        raise broken("no EXIF")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", raises)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    assert thumbnail(tmp_path / "a.png", 60).size == (60, 40)


def test_the_montage_shows_each_picture_in_its_place(tmp_path):
    rgba = Image.new("RGBA", (30, 10), (255, 0, 0, 255))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    rgba.save(tmp_path / "wide.png")
    Image.new("RGB", (10, 10), (0, 0, 255)).save(tmp_path / "square.png")
    hits = [
        Hit(0.9, "wide", str(tmp_path / "wide.png"), "a caption that is far too long for a cell"),
        Hit(0.8, "lost", None, None),
        Hit(0.7, "square", str(tmp_path / "square.png"), None),
    ]
    image = gallery.montage("query", hits, columns=2)
    assert image.size == (16 + 2 * 240, 56 + 2 * 280)
    center = [(16 + 112, 56 + 112), (256 + 112, 56 + 112), (16 + 112, 336 + 112)]
    assert [image.getpixel(place) for place in center] == [
        (255, 0, 0),
        (236, 239, 243),
        (0, 0, 255),
    ]
    assert image.getpixel((16 + 112, 56 + 10)) == (236, 239, 243)  # above the wide one


def test_the_command(index, pictures, tmp_path, capsys):
    arguments = ["search", index, "--image", pictures / "red.png", "--add", "red", "blue"]
    arguments += ["--subtract", "green", "-k", 4, "--html", tmp_path / "p.html"]
    arguments = [str(part) for part in [*arguments, "--montage", tmp_path / "p.png"]]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["query"] == "red.png + red + blue − green"  # noqa: RUF001
    assert [set(row) for row in answer["results"]] == [{"score", "id", "path", "caption"}] * 4
    assert Image.open(tmp_path / "p.png").format == "PNG"
    assert "data:image/jpeg" in (tmp_path / "p.html").read_text()


def test_a_montage_writes_every_script(tmp_path):
    pytest.importorskip("matplotlib")
    hits = [Hit(0.5, "x", None, text) for text in ("Привет", "سلام", "a" * 10**6, "‎\x07")]
    written = np.asarray(gallery.montage("Привет", hits).convert("L"))
    texts = [written[280 + 4 : 300, 16 + 240 * place : 176 + 240 * place] for place in range(4)]
    assert all((text < 128).any() for text in texts[:3])
    # Two letters of one script differ, as the frames of letters that are not there do not.
    letters = [gallery.montage(letter, hits[:1]).convert("L") for letter in "Дش"]
    assert letters[0].tobytes() != letters[1].tobytes()


# --- an index of someone else's ---------------------------------------------------------------


@pytest.fixture
def foreign(index, pictures, tmp_path) -> pathlib.Path:
    """An index that names two pictures that were not embedded with the others."""
    private = tmp_path / "private"
    private.mkdir()
    shutil.copytree(index, tmp_path / "foreign")
    records = pa.ipc.open_file(tmp_path / "foreign" / "records.arrow").read_all()
    paths = records["path"].to_pylist()
    named = (
        private / "red.png",
        f"{pictures}/../{os.path.relpath(private, pictures.parent)}/b.png",
    )
    for row, (name, path) in enumerate(zip(("red", "blue"), named, strict=True)):
        shutil.copy(pictures / f"{name}.png", path)
        paths[row] = str(path)
    records = records.set_column(1, "path", pa.array(paths, "string"))
    with pa.ipc.new_file(tmp_path / "foreign" / "records.arrow", records.schema) as file:
        file.write_table(records)
    about = json.loads((tmp_path / "foreign" / "index.json").read_text())
    del about["files"]  # whoever changes the one changes the other
    (tmp_path / "foreign" / "index.json").write_text(json.dumps(about))
    return tmp_path / "foreign"


def asked(index, tmp_path, *arguments) -> tuple[list[bool], Page]:
    """Searches an index of six pictures; returns which are outside, and the page."""
    options = ["--html", tmp_path / "p.html", "--montage", tmp_path / "p.png", *arguments]
    assert main(["search", *map(str, [index, "red", *options])]) == 0
    hits = Index(index).hits(np.zeros(6), np.arange(6))
    return [hit.outside for hit in hits], Page((tmp_path / "p.html").read_text())


def test_pictures_beside_the_folder_that_was_embedded_are_not_shown(
    foreign, pictures, tmp_path, capsys
):
    outside, page = asked(foreign, tmp_path)
    assert outside == [True, True, False, False, False, False]
    assert len(page.images) == len(page.links) == 4 and page.text.count("not shown") == 2
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning.startswith("align-tf: warning: 2 of 6 pictures are not shown, such as /")
    _, page = asked(foreign, tmp_path, "--pictures", tmp_path)
    assert len(page.images) == 2 + 4 * (tmp_path in pictures.parents)


def test_the_folder_that_an_index_names_has_to_be_signed(foreign, tmp_path, monkeypatch):
    about = json.loads((foreign / "index.json").read_text())
    for said in (
        {**about["pictures"], "folder": "/"},
        {"folder": "/"},
        "/",
        None,
    ):
        (foreign / "index.json").write_text(json.dumps({**about, "pictures": said}))
        outside, page = asked(foreign, tmp_path)
        assert all(outside) and page.images == page.links == []
    (foreign / "index.json").write_text(json.dumps(about))
    assert not all(asked(foreign, tmp_path)[0])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    assert all(asked(foreign, tmp_path)[0])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of pictures"):
        Index(foreign, "nowhere")


def test_a_server_is_not_sent_what_an_index_of_someone_else_names(foreign, searcher, monkeypatch):
    sent = []
    embed_images = Encoder.embed_images
    monkeypatch.setattr(
        Encoder,
        "embed_images",
        lambda self, images: sent.extend(images) or embed_images(self, images),
    )
    Searcher(foreign, client=searcher.encoder)
    assert len(sent) == 1 and "private" not in str(sent[0])


@pytest.mark.parametrize("name", ["someone/a-model", "a-model", "nowhere/at/all"])
def test_a_model_that_an_index_names_is_not_fetched(index, tmp_path, capsys, monkeypatch, name):
    import huggingface_hub

    asked, fetch = [], huggingface_hub.snapshot_download

    def looked_up(**options):
        asked.append(options.pop("local_files_only"))
        return fetch(**options, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", looked_up)
    folder = shutil.copytree(index, tmp_path / "index")
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**about, "model": name}))
    assert main(["search", str(folder), "red"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:")
    assert f"of a model {name!r}, which is not on this machine: expected --model" in last
    assert all(asked)


# --- the commands ----------------------------------------------------------------------------


def test_the_index_command(collection, tmp_path, capsys):
    assert main(["index", str(collection), "--output", str(tmp_path / "index")]) == 0
    captured = capsys.readouterr()
    assert "2,000 images, recall@10 100.0% (image), 100.0% (text)" in captured.out
    assert "Chose flat" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "nowhere", "red"], "nowhere: no index"),
        (["search", "nowhere"], "expected a TEXT or --image"),
        (["index", "nowhere", "--output", "x"], "nowhere: no embeddings"),
        (["embed", "nowhere", "--output", "x"], "nowhere: no such file"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and message in last
