"""Packages of extras that the rooms of search need: asked for before anything slow is loaded."""

import os
from typing import Any

from align_tf.extras import extra


def require_pyarrow() -> None:
    """Asks for the extra that a collection needs.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    with extra("data", "a collection needs pyarrow"):
        import pyarrow.parquet  # noqa: F401


def require_faiss() -> None:
    """Asks for the extra that an index needs.

    Raises:
        ModuleNotFoundError: FAISS or pyarrow is not installed.
    """
    with extra("search", "an index needs FAISS"):
        import faiss  # noqa: F401
    require_pyarrow()


def require_ray() -> None:
    """Asks for the extra that Ray's engine needs.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would be sent to Ray's makers
    with extra("ray", 'engine="ray" needs Ray'):
        import ray.data  # noqa: F401


def require_gradio() -> Any:
    """Imports Gradio.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asks for nothing outside
    with extra("demo", "the demo needs Gradio"):
        import gradio
    return gradio
