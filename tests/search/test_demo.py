"""The demo page in a real browser: results, mistakes, keyboard, a narrow screen; by a server."""

import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from align_tf import AlignModel, AlignProcessor
from align_tf.cli.main import main
from align_tf.hub import BUNDLED

pytest.importorskip("gradio", reason='pip install "align-tf[demo]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from align_tf.search import build_index, demo, embed  # noqa: E402
from align_tf.search.encoder import Encoder  # noqa: E402

EXAMPLES = BUNDLED["align-tiny"] / "examples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("ALIGN_TF_BROWSER") or next(
    filter(None, map(shutil.which, BROWSERS)), None
)
SECONDS = 60_000  # milliseconds, for a page on a busy machine

needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no browser: apt-get install chromium, or ALIGN_TF_BROWSER=/path/to/chromium",
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(
        AlignModel.from_pretrained("align-tiny"), AlignProcessor.from_pretrained("align-tiny")
    )


@pytest.fixture(scope="module")
def url(encoder):
    page = demo.build_page(encoder, demo.example_searcher(encoder), "align-tiny")
    url, stop = demo.serve(page, port=None)
    yield url
    stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(url, browser):
    """The page, which may ask this machine alone."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(SECONDS)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_role("button", name="Classify", exact=True).wait_for()
    yield page
    outside = [at for at in asked if not at.startswith((url, "data:", "blob:"))]
    page.close()
    assert not outside


def choose(page, path: pathlib.Path, tab: int = 0) -> None:
    """Uploads a picture to the tab that is open."""
    page.locator("input[type=file]").nth(tab).set_input_files(path)
    page.locator("img[src*='/file=']").filter(visible=True).first.wait_for()


def message(page) -> str:
    found = page.get_by_role("alert").filter(visible=True)
    found.wait_for()
    return found.inner_text()


# --- in the browser ------------------------------------------------------------------------


@needs_browser
def test_classify(page):
    choose(page, EXAMPLES / "panda.png")
    page.get_by_label("Labels, one a line").fill("rocket\npanda\npizza")
    page.get_by_label("Templates, one a line").fill("{}\na picture of a {}")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_test_id("label-output-value").filter(has_text="panda").wait_for()
    bars = [page.get_by_test_id(f"{name}-confidence-set") for name in ("panda", "rocket", "pizza")]
    shown = [float(re.search(r"(\d+)%", bar.inner_text())[1]) for bar in bars]
    assert shown[0] == max(shown) and sum(shown) == pytest.approx(100, abs=2)


@needs_browser
def test_search_finds_by_words(page):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What the pictures show").fill("a panda")
    page.get_by_role("button", name="Search", exact=True).filter(visible=True).click()
    first = page.locator(".thumbnail-item").filter(visible=True).first
    first.wait_for()
    assert re.fullmatch(r"\d\.\d\d · panda", first.inner_text().strip())  # long ones are cut
    assert page.locator(".thumbnail-item").filter(visible=True).count() == 6


@needs_browser
def test_a_picture_with_words_added_and_subtracted(page):
    page.get_by_role("tab", name="Picture + words").click()
    choose(page, EXAMPLES / "panda.png", tab=1)
    page.get_by_label("Add, one a line").fill("police car")
    page.get_by_label("Subtract, one a line").fill("panda")
    page.get_by_role("button", name="Search", exact=True).filter(visible=True).click()
    first = page.locator(".thumbnail-item").filter(visible=True).first
    first.wait_for()
    assert "police car" in first.inner_text()


@needs_browser
def test_mistakes_are_told_on_the_page(page, tmp_path):
    classify = page.get_by_role("button", name="Classify", exact=True)
    classify.click()
    assert "No picture" in message(page)
    (tmp_path / "broken.png").write_bytes((EXAMPLES / "panda.png").read_bytes()[:300])
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    page.locator("img[src*='broken.png']").first.wait_for(state="attached")
    classify.click()
    page.get_by_role("alert").filter(has_text="broken.png").wait_for()
    said = message(page)
    assert said.startswith("broken.png: not a decodable image") and "tmp" not in said
    page.get_by_label("Templates, one a line").fill("a photo")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("alert").filter(has_text="expected a {}").wait_for()
    page.get_by_label("Labels, one a line").fill("\n")
    classify.click()
    page.get_by_role("alert").filter(has_text="No labels").wait_for()


@needs_browser
def test_a_mistake_is_shown_once_and_literally_and_goes_when_asked_again(page):
    classify = page.get_by_role("button", name="Classify", exact=True)
    choose(page, EXAMPLES / "panda.png")
    page.get_by_label("Templates, one a line").fill("*a* <b>photo</b>")
    classify.click()
    assert "'*a* <b>photo</b>'" in message(page)
    bars = "[...document.querySelectorAll('*')].filter(e => e.offsetParent && parseInt("
    bars += "getComputedStyle(e).borderLeftWidth) >= 4).length"
    assert page.evaluate(bars) == 1
    page.get_by_label("Templates, one a line").fill("{}")
    classify.click()
    page.get_by_test_id("label-output-value").filter(has_text="panda").wait_for()
    assert page.get_by_role("alert").filter(visible=True).count() == 0


@needs_browser
def test_the_page_says_what_it_is(page):
    assert page.title() == "Classify and search pictures by words · ALIGN"
    heading = page.get_by_role("heading", name="Classify and search pictures by words")
    assert heading.count() == 1
    page.get_by_text("ALIGN, align-tiny · 6 pictures to search").wait_for()


@needs_browser
@pytest.mark.parametrize("width", [1200, 400])
def test_the_gallery_is_as_high_as_its_pictures(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What the pictures show").fill("a panda")
    page.get_by_role("button", name="Search", exact=True).filter(visible=True).click()
    pictures = page.locator(".thumbnail-item").filter(visible=True)
    pictures.last.wait_for()
    last = pictures.last.bounding_box()
    gallery = page.locator(".grid-wrap").filter(visible=True).bounding_box()
    left = gallery["y"] + gallery["height"] - last["y"] - last["height"]
    assert 0 <= left < 40


@needs_browser
def test_a_picture_that_is_too_large_is_refused(page, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (2000, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > demo.MAX_UPLOAD
    page.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


@needs_browser
def test_by_the_keyboard_alone(page):
    def go_to(name: str) -> None:
        """Presses Tab until an element of that name or label has the focus."""
        script = (
            "() => { const e = document.activeElement; return [e.innerText, e.ariaLabel,"
            " ...(e.labels || [])].map(x => x && (x.innerText || x)).join('|') }"
        )
        for _ in range(60):
            page.keyboard.press("Tab")
            if name in page.evaluate(script):
                return
        raise AssertionError(f"{name}: not reached")

    go_to("Search")
    page.keyboard.press("Enter")
    go_to("What the pictures show")
    page.keyboard.type("pineapple")
    page.keyboard.press("Enter")
    page.locator(".thumbnail-item").filter(visible=True).first.wait_for()
    assert "pineapple" in page.locator(".thumbnail-item").filter(visible=True).first.inner_text()


@needs_browser
def test_a_screen_400_pixels_wide(page):
    page.set_viewport_size({"width": 400, "height": 800})
    for tab in ("Classify", "Search", "Picture + words"):
        page.get_by_role("tab", name=tab).click()
        button = page.get_by_role("button", name=tab.replace("Picture + words", "Search"))
        button = button.filter(visible=True).last
        button.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 400


# --- without one ---------------------------------------------------------------------------


def test_a_server_answers_as_the_model_does(encoder, tmp_path):
    pytest.importorskip("tensorflow_serving")
    from align_tf import export_saved_model
    from align_tf.client import AlignClient
    from align_tf.server import ModelServer

    export_saved_model(encoder.model, encoder.processor, tmp_path / "align")
    asked = (str(EXAMPLES / "rose.png"), "rose\npanda\n", "{}\na drawing of a {}")
    with (
        ModelServer(tmp_path / "align", model_name="align") as server,
        AlignClient(f"127.0.0.1:{server.rest_port}") as client,
    ):
        probs = demo.classify(client, *asked)
        found = demo.find(demo.example_searcher(client), text="a rose")
    assert probs == pytest.approx(demo.classify(encoder, *asked), abs=1e-5)
    expected = demo.find(demo.example_searcher(encoder), text="a rose")
    assert [text for _, text in found] == [text for _, text in expected]


def test_a_server_that_is_not_there(capsys):
    assert main(["demo", "--server", "127.0.0.1:1"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("align-tf: error:") and "127.0.0.1:1: cannot reach" in last


def test_the_model_has_answered_before_the_page_is_there(encoder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "embeds"
    embed(EXAMPLES, output, model="align-tiny")
    build_index(output, tmp_path / "index")
    done = []
    for name in ("embed_images", "embed_texts"):
        asked = getattr(Encoder, name)
        monkeypatch.setattr(
            Encoder, name, lambda *given, name=name, asked=asked: done.append(name) or asked(*given)
        )

    def serve(*given):
        done.append("served")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "serve", serve)
    assert main(["demo", "--index", str(tmp_path / "index")]) == 130
    assert done == ["embed_texts", "embed_images", "embed_texts", "served"]


def test_pictures_of_an_index_of_someone_else_are_not_shown(encoder, tmp_path, monkeypatch):
    searcher = demo.example_searcher(encoder)
    monkeypatch.setattr(searcher.index, "pictures", None)
    with pytest.raises(ValueError, match="expected the demo started with --pictures"):
        demo.find(searcher, text="a rose")
    monkeypatch.setattr(searcher.index, "pictures", str(EXAMPLES))
    assert len(demo.find(searcher, text="a rose")) == 6
