"""A web page: zero-shot classification, search over a collection, and text+image queries."""

import contextlib
import functools
import html
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from align_tf.client.align_client import AlignClient, AlignServerError
from align_tf.data.sources import IMAGE
from align_tf.hub import BUNDLED
from align_tf.search.collection import Settings, Shard, write_shard
from align_tf.search.encoder import Encoder
from align_tf.search.index import Index, build_index
from align_tf.search.required import require_gradio
from align_tf.search.searcher import Searcher
from align_tf.search.thumbnail import thumbnail

MAX_UPLOAD = 10 * 2**20  # bytes of a picture
MAX_PROMPTS = 1000  # labels times templates
TRIED = 5  # example pictures, a row of them
SHOWN = 12  # results of a search
PICTURE = 320  # pixels of a result

ASKED = "a red flower"
TITLE = "Classify and search pictures by words"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXAMPLES = sorted((BUNDLED["align-tiny"] / "examples").glob("*.png"))
LABELS = ("panda", "police car", "pineapple", "cupcake", "rose", "star")
FONTS = ("system-ui", "sans-serif")
CSS = """
.mistake { border-left: 4px solid #c2410c; margin: 0; padding: 4px 12px; }
.grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; }
.gradio-container { margin: 0 auto !important; max-width: 1100px !important; width: 100%; }
"""
MISTAKES = (ValueError, OSError, AlignServerError)


def build_page(encoder: Encoder | AlignClient, searcher: Searcher, name: str) -> Any:
    """Builds the page.

    Args:
        encoder: what classifies and embeds.
        searcher: of the collection that is searched.
        name: of the model, shown.

    Returns:
        A gradio Blocks.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    gradio = require_gradio()
    with gradio.Blocks(title=f"{TITLE} · ALIGN", analytics_enabled=False) as page:
        about = f"ALIGN, {name} · {len(searcher.index):,} pictures to search"
        gradio.HTML(f"<h1>{TITLE}</h1><p>{html.escape(about)}</p>")
        with gradio.Tab("Classify"):
            _classify_tab(gradio, encoder)
        with gradio.Tab("Search"):
            _search_tab(gradio, searcher)
        with gradio.Tab("Picture + words"):
            _arithmetic_tab(gradio, searcher)
    return page


def serve(
    page: Any, host: str = "127.0.0.1", port: int | None = 7860
) -> tuple[str, Callable[[], None]]:
    """Serves the page, from threads of its own.

    Args:
        page: what `build_page` returned.
        host: the address to listen on.
        port: the port; None takes a free one from 7860 on.

    Returns:
        The page's URL, and what stops it.

    Raises:
        OSError: the port is taken.
    """
    gradio = require_gradio()
    theme = gradio.themes.Default(primary_hue="blue", font=FONTS, font_mono=FONTS).set(
        button_primary_background_fill="*primary_600",  # white on it can be read
        button_primary_background_fill_hover="*primary_700",
    )
    with reached_directly(host):
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=theme,
            css=CSS,
            prevent_thread_lock=True,
        )
    return url, page.close


@contextlib.contextmanager
def reached_directly(host: str) -> Iterator[None]:
    """Has this process ask no proxy for its own page, as Gradio does to see whether it is up.

    Args:
        host: the address that the page listens on.
    """
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    excepted = [*filter(None, before.values()), *LOOPBACK, host]
    os.environ |= dict.fromkeys(before, ",".join(excepted))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def example_searcher(encoder: Encoder | AlignClient) -> Searcher:
    """Indexes the pictures that come with align-tiny, by any model."""
    embeds = encoder.embed_images(EXAMPLES)
    captions = [path.stem.replace("_", " ") for path in EXAMPLES]
    count, dim = embeds.shape
    settings = Settings("examples", count, count, "float32", dim, "", "")
    columns = {
        "id": [path.stem for path in EXAMPLES],
        "path": [str(path) for path in EXAMPLES],
        "caption": captions,
        "thumbnail": [None] * count,
        "image_embeds": embeds,
        "text_embeds": encoder.embed_texts(captions),
    }
    # The index stays mapped when its folder is gone; Windows keeps the folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        output = pathlib.Path(folder)
        write_shard(output / "embeds", settings, Shard(0, count, 0, {}), columns)
        build_index(output / "embeds", output / "index")
        return Searcher(Index(output / "index", EXAMPLES[0].parent), client=encoder)


# --- the tabs ------------------------------------------------------------------------------


def _classify_tab(gradio: Any, encoder: Encoder | AlignClient) -> None:
    with gradio.Row():
        with gradio.Column():
            image = _picture(gradio)
            labels = gradio.Textbox(
                "\n".join(LABELS), lines=6, max_lines=12, label="Labels, one a line"
            )
            templates = gradio.Textbox(
                "{}",
                lines=2,
                label="Templates, one a line",
                info="{} stands for the label, as in: a photo of a {}",
            )
            button = gradio.Button("Classify", variant="primary")
        with gradio.Column():
            message = _message(gradio)
            result = gradio.Label(num_top_classes=10, label="Probabilities")
    button.click(
        _answer(gradio, functools.partial(classify, encoder)),
        [image, labels, templates],
        [result, message],
        api_visibility="private",
    )


def _search_tab(gradio: Any, searcher: Searcher) -> None:
    text = gradio.Textbox(label="What the pictures show", placeholder=ASKED)
    button = gradio.Button("Search", variant="primary")
    message, results = _message(gradio), _results(gradio)
    for asked in (button.click, text.submit):
        asked(
            _answer(gradio, lambda text: find(searcher, text=text)),
            [text],
            [results, message],
            api_visibility="private",
        )


def _arithmetic_tab(gradio: Any, searcher: Searcher) -> None:
    with gradio.Row():
        with gradio.Column():
            image = _picture(gradio)
        with gradio.Column():
            add = gradio.Textbox(lines=2, label="Add, one a line", placeholder="in the snow")
            subtract = gradio.Textbox(lines=2, label="Subtract, one a line", placeholder="forest")
            button = gradio.Button("Search", variant="primary")
    message, results = _message(gradio), _results(gradio)

    def ask(image: str | None, add: str, subtract: str) -> list:
        return find(searcher, image=_chosen(image), add=_lines(add), subtract=_lines(subtract))

    button.click(
        _answer(gradio, ask), [image, add, subtract], [results, message], api_visibility="private"
    )


def _picture(gradio: Any) -> Any:
    """Makes the place for a picture, with some to try beneath it."""
    image = gradio.Image(
        type="filepath", sources=["upload", "clipboard"], label="Picture", height=280, buttons=[]
    )
    # The file as it was sent, so that what is wrong with it is told on the page. Not a subclass,
    # for which Gradio writes a file beside this one.
    image.preprocess = lambda payload: None if payload is None else payload.path
    tried = [[str(path)] for path in EXAMPLES[:TRIED]]
    gradio.Examples(tried, [image], label="Try one of these")
    return image


def _message(gradio: Any) -> Any:
    return gradio.HTML(visible=False)


def _results(gradio: Any) -> Any:
    return gradio.Gallery(
        label="Results, the nearest first",
        show_label=False,
        columns=4,
        object_fit="contain",
        height="auto",
        buttons=[],
    )


# --- what the buttons do --------------------------------------------------------------------


def _answer(gradio: Any, function: Callable) -> Callable:
    """Has a function's result shown, or in its place the message of a mistake."""

    def answer(*inputs: Any) -> Iterator[tuple[Any, Any]]:
        yield gradio.skip(), gradio.HTML(visible=False)  # of the run before
        try:
            yield function(*inputs), gradio.HTML(visible=False)
        except MISTAKES as error:
            said = str(error)
            for path in (value for value in inputs if isinstance(value, str) and _is_file(value)):
                said = said.replace(path, os.path.basename(path))  # not where the upload lies
            line = f'<p class="mistake" role="alert">{html.escape(said)}</p>'
            yield None, gradio.HTML(line, visible=True)

    return answer


def _is_file(text: str) -> bool:
    return os.path.isabs(text) and "\n" not in text and os.path.isfile(text)


def warm_up(encoder: Encoder | AlignClient, searcher: Searcher) -> None:
    """Asks once what the page asks, so that whoever comes first waits no longer than others.

    Args:
        encoder: as in `build_page`.
        searcher: as in `build_page`.

    Raises:
        AlignServerError: the server does not answer.
    """
    classify(encoder, str(EXAMPLES[0]), "\n".join(LABELS), "{}")
    searcher.search(ASKED, k=SHOWN)


def classify(
    encoder: Encoder | AlignClient, image: str | None, labels: str, templates: str
) -> dict[str, float]:
    """Classifies one picture.

    Args:
        encoder: what classifies.
        image: its file.
        labels: one a line.
        templates: one a line; the logits are the mean of theirs.

    Returns:
        Label -> probability.

    Raises:
        ValueError: there is no picture, no label or too many, or a template without `{}`.
    """
    image, names = _chosen(image), list(dict.fromkeys(_lines(labels)))
    templates = _lines(templates) or ["{}"]
    if not names:
        raise ValueError("No labels: type one a line.")
    if len(names) * len(templates) > MAX_PROMPTS:
        raise ValueError(
            f"{len(names)} labels in {len(templates)} templates: expected {MAX_PROMPTS} texts at "
            "most."
        )
    answers = [encoder.classify([image], names, template) for template in templates]
    logits = np.mean([answer.logits[0] for answer in answers], axis=0)
    probs = np.exp(logits - logits.max())
    return dict(zip(names, map(float, probs / probs.sum()), strict=True))


def find(searcher: Searcher, **query: Any) -> list[tuple[Any, str]]:
    """Searches, as `Searcher.search`; returns pictures with what is written under them."""
    hits = searcher.search(**query, k=SHOWN)
    pictures = [(thumbnail(hit.picture, PICTURE), hit) for hit in hits]
    shown = [
        (picture, f"{hit.score:.2f} · {hit.caption or hit.id}")
        for picture, hit in pictures
        if picture is not None
    ]
    if not shown and any(hit.outside for hit in hits):
        raise ValueError(
            "The pictures are not below the folder that was embedded here: expected the demo "
            "started with --pictures and their folder."
        )
    if not shown:
        raise ValueError("The picture files of the collection are not on this machine.")
    return shown


def _chosen(image: str | None) -> str:
    if image is None:
        raise ValueError(f"No picture: drop one, a {', '.join(IMAGE)} file.")
    return image


def _lines(text: str | None) -> Sequence[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
