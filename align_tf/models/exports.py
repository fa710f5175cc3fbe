"""A model from outside: its inputs by shape, and Keras's own export of it."""

import os
from typing import Any

import keras

# The inputs that a model is exported with: shape and dtype.
INPUTS = {
    "pixel_values": ((None, None, None, 3), "float32"),
    "input_ids": ((None, None), "int32"),
    "attention_mask": ((None, None), "int32"),
    "token_type_ids": ((None, None), "int32"),
}


class Exports:
    """`export` of a model whose inputs are named."""

    def export(
        self,
        filepath: str | os.PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kw: Any,
    ) -> None:
        """As Keras's `export`, with the outputs by name, those of the towers left out.

        For TensorFlow Serving there is `align_tf.export_saved_model`: images and texts in.

        Args:
            filepath: the folder or file to write.
            format: as Keras takes it.
            verbose: as Keras takes it.
            input_signature: a list of one dict from input names to `keras.InputSpec`, or of the
                `InputSpec` of the first input; None for the inputs that a processor gives, of
                any number and size. On JAX, whose exports have fixed sizes, it is needed.
            **kw: Keras's for this format.

        Raises:
            ValueError: the signature is another thing, or on JAX leaves a size open.
        """
        specs = self._input_specs(input_signature)
        if keras.backend.backend() == "jax":
            _check_sized(specs)
        inputs = _symbolic(specs)
        outputs = {key: value for key, value in self(inputs).items() if not isinstance(value, dict)}
        functional = keras.Model(inputs, outputs, name=self.name)
        functional.export(filepath, format, verbose, **kw)

    def _input_specs(self, signature: Any) -> dict[str, Any]:
        """Returns the specifications of the inputs by name, out of a signature or of `INPUTS`."""
        if signature is None:
            names = (name for name in self.input_names if name in INPUTS)
            specs = {name: keras.InputSpec(INPUTS[name][1], INPUTS[name][0]) for name in names}
            if "pixel_values" in specs:
                channels = self._vision_tower().config.num_channels
                specs["pixel_values"].shape = (None, None, None, channels)
            return specs
        one = isinstance(signature, (list, tuple)) and len(signature) == 1
        given = signature[0] if one else signature
        given = given if isinstance(given, dict) else {self.input_names[0]: given}
        if not all(hasattr(spec, "shape") and hasattr(spec, "dtype") for spec in given.values()):
            raise ValueError(
                f"input_signature={signature!r}: expected [{{name: keras.InputSpec(dtype, shape)}}]"
                f" of some of {', '.join(self.input_names)}"
            )
        return given


def _check_sized(specs: dict[str, Any]) -> None:
    if any(size is None for spec in specs.values() for size in tuple(spec.shape)[1:]):
        shapes = {
            name: "height, width, 3" if name == "pixel_values" else "tokens" for name in specs
        }
        example = ", ".join(
            f"{name!r}: keras.InputSpec({INPUTS[name][1]!r}, (None, {shape}))"
            for name, shape in shapes.items()
        )
        raise ValueError(
            "on the JAX backend an export has fixed sizes: expected "
            f"input_signature=[{{{example}}}], with the sizes that the processor gives"
        )


def _symbolic(specs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: keras.Input(
            batch_shape=tuple(spec.shape),
            dtype=keras.backend.standardize_dtype(spec.dtype),
            name=name,
        )
        for name, spec in specs.items()
    }
