"""What an error inside a TensorFlow graph says, without the graph around it."""

import codecs
import contextlib
import re
import sys
from collections.abc import Iterator

_ASSERTED = re.compile(
    r"assertion failed: \[(.*?)\](?:\n|\s*\[\[|\s*\[Op:|$)|Summarized data: b(['\"].*['\"])",
    re.DOTALL,
)
_NODE = re.compile(r"\{\{node ([^}]+)\}\}")
_AROUND = re.compile(
    r"\{\{function_node [^}]*\}\}\s*|Error in user-defined function passed to .*? with iterator: "
    r"\S+: |^\(\d+\) [A-Z_]+:\s*|\s*\[Op:.*|\x1b\[\d*m",
    re.DOTALL,
)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Has an InvalidArgumentError of TensorFlow within it say in one line what was wrong."""
    try:
        yield
    except Exception as error:
        tf = sys.modules.get("tensorflow")
        if tf is None or not isinstance(error, tf.errors.InvalidArgumentError):
            raise
        raise tf.errors.InvalidArgumentError(None, None, plain(error.message)) from None


def plain(message: str) -> str:
    """Takes the message of an error from a graph to the line in it that says what was wrong.

    Args:
        message: of a `tf.errors.OpError`: the line lies behind a trace, the names of nodes and of
            the data sets around it, and before more of them.

    Returns:
        What an assertion says, as it was before TensorFlow escaped it; of other operations their
        line, and the node.
    """
    asserted = _ASSERTED.search(message)
    if asserted:
        told = asserted[1] if asserted[1] is not None else asserted[2][1:-1]
        told, _ = codecs.escape_decode(told.replace("] [", " ").encode())
        return told.decode(errors="replace")
    lines = [line.strip() for line in re.split(r"\s*\[\[", message)[0].splitlines()]
    told = _AROUND.sub("", next((line for line in reversed(lines) if line), message))
    node = _NODE.search(message)
    return f"{told} (in {node[1]})" if node else told
