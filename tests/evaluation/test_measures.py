"""The field's own measures, mteb and CLIP_benchmark, give of a model the figures that we give."""

import importlib
import io
import json
import pathlib
import sys
import tarfile

import keras
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from align_tf import AlignModel, AlignProcessor
from align_tf.evaluation import Embedder, retrieval_metrics, zero_shot_metrics
from align_tf.hub import BUNDLED

torch = pytest.importorskip("torch")
if torch.version.cuda is None:
    # torchvision's wheels are for a torch with CUDA: beside another they lack two operations, which
    # nothing here calls, and it asks for their names.
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)
mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
metrics = pytest.importorskip("clip_benchmark.metrics")

from align_tf.evaluation import clip_benchmark  # noqa: E402
from align_tf.evaluation.mteb import MtebEncoder  # noqa: E402

NAMES = ["cupcake", "panda", "pineapple", "police car", "rose", "star"]
# What is made of a picture, in a mode of PIL's each, and what is said of it.
KINDS = {
    "a picture of a {}": lambda image: image.convert("RGBA"),
    "a grey {}": lambda image: image.convert("RGB").convert("L"),
    "a {} upside down": lambda image: PIL.ImageOps.flip(image.convert("RGB")).convert("P"),
    "a pale {}": lambda image: PIL.Image.blend(
        image.convert("RGB"), PIL.Image.new("RGB", image.size, "white"), 0.8
    ),
    "the middle of a {}": lambda image: PIL.ImageOps.crop(image.convert("RGB"), 22).convert("1"),
}
PICTURES = [
    kind(PIL.Image.open(BUNDLED["align-tiny"] / "examples" / f"{name.replace(' ', '_')}.png"))
    for kind in KINDS.values()
    for name in NAMES
]
TEXTS = [text.format(name) for text in KINDS for name in NAMES]
CLASSES = list(range(len(NAMES))) * len(KINDS)
ABOUT = {
    "reference": None,
    "dataset": {"path": "of this test", "revision": "1"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "modalities": ["image", "text"],
}


class EmojiZeroShot(mteb.abstasks.AbsTaskZeroShotClassification):
    metadata = mteb.TaskMetadata(
        name="EmojiZeroShot",
        description="The class of a picture.",
        type="ZeroShotClassification",
        category="i2t",
        main_score="accuracy",
        **ABOUT,
    )

    def load_data(self, **_):
        split = datasets.Dataset.from_dict({"image": PICTURES, "label": CLASSES})
        self.dataset = datasets.DatasetDict(test=split)
        self.data_loaded = True

    def get_candidate_labels(self):
        return [f"a picture of a {name}" for name in NAMES]


class EmojiRetrieval(mteb.abstasks.AbsTaskRetrieval):
    """Pictures of texts; in a subclass, texts of pictures, and pictures of both."""

    metadata = mteb.TaskMetadata(
        name="EmojiT2IRetrieval",
        description="The picture of a text.",
        type="Any2AnyRetrieval",
        category="t2i",
        main_score="recall_at_1",
        **ABOUT,
    )
    queries, corpus = {"text": TEXTS}, {"image": PICTURES}

    def load_data(self, **_):
        ids = [str(i) for i in range(len(TEXTS))]
        split = {
            "queries": datasets.Dataset.from_dict({"id": ids, **self.queries}),
            "corpus": datasets.Dataset.from_dict({"id": ids, **self.corpus}),
            "relevant_docs": {i: {i: 1} for i in ids},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class EmojiI2TRetrieval(EmojiRetrieval):
    metadata = EmojiRetrieval.metadata.model_copy(
        update={"name": "EmojiI2TRetrieval", "category": "i2t"}
    )
    queries, corpus = {"image": PICTURES}, {"text": TEXTS}


class EmojiIT2IRetrieval(EmojiRetrieval):
    """The picture that a text makes of the first of its kind."""

    metadata = EmojiRetrieval.metadata.model_copy(
        update={"name": "EmojiIT2IRetrieval", "category": "it2i"}
    )
    queries = {"text": TEXTS, "image": PICTURES[: len(NAMES)] * len(KINDS)}


@pytest.fixture(scope="module")
def tiny():
    return AlignModel.from_pretrained("align-tiny"), AlignProcessor.from_pretrained("align-tiny")


@pytest.fixture(scope="module")
def encoder(tiny):
    return MtebEncoder(*tiny, name="tiny")


@pytest.fixture(scope="module")
def embeds(tiny):
    """Of the pictures, the texts and the classes."""
    model, processor = tiny
    embedder = Embedder(model)
    labels = [f"a picture of a {name}" for name in NAMES]
    return (
        embedder.images(processor(images=PICTURES)["pixel_values"]),
        embedder.texts(processor(text=TEXTS)),
        embedder.texts(processor(text=labels)),
    )


@pytest.fixture(scope="module")
def ours(embeds):
    """The figures of align_tf.evaluation, none of them 0 or 1."""
    images, texts, classes = embeds
    pairs = np.stack([np.arange(len(TEXTS))] * 2, axis=1)
    fused = images[CLASSES] + texts
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    figures = {
        **retrieval_metrics(images, texts, pairs),
        **zero_shot_metrics(images, classes, CLASSES),
        "fused": retrieval_metrics(images, fused, pairs)["r1_t2i"],
    }
    assert all(0 < figures[name] < 1 for name in ("r1_i2t", "r1_t2i", "top1", "fused"))
    return figures


def run(encoder, *tasks, cache=None, **settings):
    result = mteb.evaluate(encoder, tasks, cache=cache, show_progress_bar=False, **settings)
    return [task.scores["test"][0] for task in result.task_results]


def test_mteb_gives_our_figures(encoder, ours):
    tasks = (EmojiZeroShot(), EmojiRetrieval(), EmojiI2TRetrieval())
    settings = {"batch_size": 7, "show_progress_bar": False}
    zero_shot, t2i, i2t = run(encoder, *tasks, num_proc=2, encode_kwargs=settings)
    assert zero_shot["accuracy"] == ours["top1"]
    for found, way in ((t2i, "t2i"), (i2t, "i2t")):  # which mteb rounds
        assert found["recall_at_1"] == pytest.approx(ours[f"r1_{way}"], abs=1e-5)
        assert found["recall_at_10"] == pytest.approx(ours[f"r10_{way}"], abs=1e-5)


def test_a_text_and_an_image_are_the_sum_of_unit_lengths(encoder, embeds, ours):
    (found,) = run(encoder, EmojiIT2IRetrieval())
    assert found["recall_at_1"] == pytest.approx(ours["fused"], abs=1e-5)
    images, texts, _ = embeds
    batch = {"text": TEXTS[:2], "image": PICTURES[:2], "id": ["0", "1"]}
    total = images[:2] + texts[:2]
    expected = total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode([batch]), expected, atol=1e-5)


def test_results_are_filed_under_the_weights(tiny, tmp_path):
    """Those of one checkpoint are not taken for another's of the same name."""
    model, processor = tiny
    other = AlignModel(model.config)  # untrained
    cache, scores = mteb.ResultCache(tmp_path), []
    for weights in (model, other, model):
        encoder = MtebEncoder(weights, processor, name="tiny")
        scores.append(run(encoder, EmojiZeroShot(), cache=cache)[0]["accuracy"])
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)  # which were read, and rounded
    assert scores[1] < 0.5 < scores[0]
    assert len(list(tmp_path.glob("results/align_tf__tiny/*/EmojiZeroShot.json"))) == 2
    about = json.loads(next(tmp_path.glob("results/*/*/model_meta.json")).read_text())
    assert about["framework"] == [{"jax": "JAX"}.get(keras.backend.backend(), "TensorFlow")]
    assert (about["embed_dim"], about["modalities"]) == (192, ["image", "text"])


@pytest.mark.parametrize(
    ("batch", "settings", "line"),
    [
        ({"text": ["a"]}, {"precision": "int8"}, "precision='int8': expected 'float32'"),
        ({"audio": [0], "id": ["0"]}, {}, "a batch of audio, id: expected text or image"),
        ({"image": [PIL.Image.new("F", (9, 9))]}, {}, "images[0]: a PIL image of mode F: "),
    ],
)
def test_what_it_does_not_take_is_a_line(encoder, batch, settings, line):
    with pytest.raises(ValueError) as error:
        encoder.encode([batch], **settings)
    assert str(error.value).startswith(line)


# --- beside what was published --------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("published")


def test_ours_stand_beside_what_was_published(published, encoder, ours):
    scores = {"EmojiZeroShot": [("accuracy", 0.5, "mteb")]}
    (row,) = published.beside(encoder, [EmojiZeroShot()], scores, None)
    assert (row["published"], row["ours"]) == (0.5, ours["top1"])
    assert row["difference"] == round(ours["top1"] - 0.5, 4) > 0
    for name, scores in published.PUBLISHED.items():
        main = mteb.get_task(name).metadata.main_score
        assert scores[0][0] == main
        assert all(0 < score < 1 and source in published.SOURCES for _, score, source in scores)


def test_without_the_hub_it_is_a_line(published, offline):
    with pytest.raises(SystemExit, match=r"^nobody/nothing: not on this machine, and the hub"):
        published.main(["--model", "nobody/nothing"])
    with pytest.raises(SystemExit, match=r"^the data cannot be had of the hub: .*mteb/dtd"):
        published.main(["--model", "align-tiny", "--tasks", "DTDZeroShot"])


# --- CLIP_benchmark -------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    classes = NAMES

    def __init__(self, transform, targets):
        self.transform, self.targets = transform, targets

    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, index):
        return self.transform(PICTURES[index]), self.targets[index]


@pytest.fixture(scope="module")
def loaded(tiny):
    return clip_benchmark.load(*tiny, model_name="align", device="cpu")


def test_clip_benchmark_gives_our_figures(loaded, ours):
    model, transform, tokenizer = loaded
    settings = {"device": "cpu", "amp": False}
    found = metrics.zeroshot_classification.evaluate(
        model,
        torch.utils.data.DataLoader(Pictures(transform, CLASSES), batch_size=7),
        tokenizer,
        NAMES,
        ["a picture of a {c}"],
        **settings,
    )
    top1, top5 = ours["top1"], ours["top5"]
    assert (found["acc1"], found["acc5"]) == (pytest.approx(top1), pytest.approx(top5))
    found = metrics.zeroshot_retrieval.evaluate(
        model,
        torch.utils.data.DataLoader(
            Pictures(transform, [[text] for text in TEXTS]),
            batch_size=7,
            collate_fn=clip_benchmark.cli.get_dataset_collate_fn("flickr8k"),
        ),
        tokenizer,
        recall_k_list=[1, 5],
        **settings,
    )
    for k in (1, 5):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"r{k}_t2i"])
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"r{k}_i2t"])


def test_its_command_runs_on_a_local_set(tmp_path, monkeypatch, offline, ours):
    """By its own options, on shards: no network, and its defaults but for what is given."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a picture of a {c}")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for row, (picture, target) in enumerate(zip(PICTURES, CLASSES, strict=True)):
            file = io.BytesIO()
            picture.save(file, "PNG")
            for suffix, content in (("png", file.getvalue()), ("cls", str(target).encode())):
                info = tarfile.TarInfo(f"{row:03}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(sys, "argv", ["clip_benchmark"])
    words = ["eval", "--pretrained", "align-tiny", "--dataset", "wds/emoji", "--no_amp"]
    words += ["--dataset_root", str(tmp_path), "--task", "zeroshot_classification"]
    with pytest.raises(SystemExit, match="--output: expected a file"):
        clip_benchmark.main(words)
    words += ["--output", str(tmp_path / "{dataset}.json")]
    with pytest.raises(SystemExit, match=r"^clip_benchmark: .*nobody/nothing"):
        clip_benchmark.main([*words, "--pretrained", "nobody/nothing"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^clip_benchmark: .*adapter_config.json: r is missing$"):
        clip_benchmark.main([*words, "--pretrained", str(tmp_path)])
    clip_benchmark.main(words)
    found = json.loads((tmp_path / "emoji.json").read_text())["metrics"]
    assert found["acc1"] == pytest.approx(ours["top1"])


def test_workers_are_refused_by_a_line(loaded):
    pictures = Pictures(loaded[1], CLASSES)
    with pytest.raises(RuntimeError, match="num_workers: expected 0, since TensorFlow"):
        next(iter(torch.utils.data.DataLoader(pictures, num_workers=1)))
