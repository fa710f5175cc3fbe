"""What the tests of search share."""

import functools
from collections.abc import Iterator

import pytest

from align_tf.evaluation import Embedder
from align_tf.models.fingerprint import load_model
from align_tf.search import embedding, encoder, searcher


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """Loads a model once by its name, and traces it once."""
    load_once, embedder_of = functools.cache(load_model), functools.cache(Embedder)
    with pytest.MonkeyPatch.context() as patch:
        for room in (embedding, searcher):
            patch.setattr(room, "load_model", load_once)
        for room in (embedding, encoder):
            patch.setattr(room, "Embedder", embedder_of)
        yield
