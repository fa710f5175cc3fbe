"""Ctrl-C that foreign code, as TensorFlow's while it loads, took for an error of its own."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_came = False


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Notes each Ctrl-C, beside the KeyboardInterrupt that Python makes of it.

    Where another handler is in place, or signals come to another thread, it does nothing.
    """
    global _came
    before = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not main_thread:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _came = False


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block, as some libraries swallow what stops an import."""
    if threading.current_thread() is not threading.main_thread():  # gets no signals
        yield
        return
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def check() -> None:
    """Raises KeyboardInterrupt, if one was noted that ended nothing."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
