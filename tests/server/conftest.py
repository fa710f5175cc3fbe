"""Servers that several files ask."""

import pytest
from asking import (
    PROBE,
)

from align_tf.server import Limits, ModelServer
from align_tf.server.prometheus import DEFAULT_PATH


@pytest.fixture(scope="module")
def server():
    with ModelServer(PROBE, metrics_path=DEFAULT_PATH) as running:
        yield running


@pytest.fixture(scope="module")
def small():
    """One with room for two predictions, which takes 1000 bytes."""
    limits = Limits(1000, max_concurrent_requests=1, max_queued_requests=1)
    with ModelServer(PROBE, limits=limits) as running:
        yield running
