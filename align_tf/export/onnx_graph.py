"""An ONNX graph under construction: operations and weights by readable names."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import align_tf
from align_tf import addresses
from align_tf.extras import extra
from align_tf.hub import WHOLE

# Of 2022: every runtime of today reads it, and it is the first that has LayerNormalization.
OPSET = 17
IR_VERSION = 8


def check_installed(quantize: str | None) -> None:
    """Tells what an ONNX export needs and is not there.

    Raises:
        ModuleNotFoundError: onnx is not installed, or onnxruntime, which quantizes.
    """
    with extra("onnx", "ONNX export needs onnx and onnxruntime"):
        import onnx  # noqa: F401

        if quantize:
            import onnxruntime.quantization  # noqa: F401


def check_free(directory: addresses.Place) -> None:
    """Checks that a folder is none of a checkpoint, whose config.json an export would replace.

    Raises:
        FileExistsError: it is.
    """
    found = sorted(set(addresses.names(directory)) & set(WHOLE))
    if found:
        raise FileExistsError(
            f"{directory}: a checkpoint, of {found[0]}; expected another folder, such as "
            f"{directory / 'onnx'}, since the export has a config.json of its own"
        )


class Graph:
    """Operations, in the order they run, and the weights that they take.

    A value has the name of the operation that computes it, so that both are found in a viewer and
    in a runtime's messages.

    Args:
        name: of the graph.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}

    def weight(self, name: str, value: Any) -> str:
        """Adds a constant; returns its name. One of this name is there once."""
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinity: the embeddings would be NaN")
        self.weights.setdefault(name, np.asarray(value, order="C"))
        return name

    def number(self, name: str, value: float) -> str:
        """Adds a float32 without dimensions; returns its name."""
        return self.weight(f"constants/{name}", np.float32(value))

    def integer(self, name: str, value: int) -> str:
        """Adds an int64 without dimensions; returns its name."""
        return self.weight(f"constants/{name}", np.int64(value))

    def integers(self, name: str, *values: int) -> str:
        """Adds a vector of int64; returns its name."""
        return self.weight(f"constants/{name}", np.array(values, "int64"))

    def add(self, operation: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operation.

        Args:
            operation: such as `Conv`.
            name: of its place in the model, such as `block_0/expand_conv`.
            *inputs: names of values and weights.
            **attributes: of the operation.

        Returns:
            The name of its output.
        """
        import onnx

        output = f"{name}/{operation}"
        node = onnx.helper.make_node(operation, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def finish(
        self,
        inputs: Mapping[str, tuple[Any, Sequence[int | str]]],
        output: tuple[str, str, int],
    ) -> Any:
        """Makes the model.

        Args:
            inputs: name -> dtype, and the shape, in which a name stands for any size.
            output: its name, the value, and the width: float32 (batch_size, width).

        Returns:
            The `onnx.ModelProto`.
        """
        import onnx

        def described(name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            return onnx.helper.make_tensor_value_info(name, kind, shape)

        name, value, width = output
        graph = onnx.helper.make_graph(
            [*self.nodes, onnx.helper.make_node("Identity", [value], [name], name=name)],
            self.name,
            [described(name, *row) for name, row in inputs.items()],
            [described(name, np.float32, ["batch_size", width])],
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="align_tf",
            producer_version=align_tf.__version__,
        )
        for name, value in self.weights.items():  # in their place: whole graphs are copied above
            model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(value, name))
        return model
