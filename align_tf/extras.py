"""Packages that an extra of setup.cfg brings: where one is absent, a line names the pip command."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Makes the error of an import within it say what to install.

    Args:
        name: of the extra.
        need: what needs which package, such as `an index needs FAISS`.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{need}: pip install "align-tf[{name}]"', name=error.name
        ) from error
