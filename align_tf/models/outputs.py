"""The output of a model: a dict whose values are also attributes, and a tuple's."""

from typing import Any

import keras
import optree


class ModelOutput(dict):
    """Outputs of a model by name, as `output["image_embeds"]` and as `output.image_embeds`.

    It holds only what was computed: `loss`, `hidden_states` and `attentions` are there when
    asked for. `output[0]` is the first of them in the reference's order, as of `to_tuple()`.
    """

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """Returns the values, those of the towers as tuples too."""
        values = self.values()
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}") from None


def _flatten(output: ModelOutput) -> tuple[list, tuple]:
    names = tuple(output)
    return [output[name] for name in names], names


def _unflatten(names: tuple, values: list) -> ModelOutput:
    return ModelOutput(zip(names, values, strict=True))


# Keras and JAX walk into plain dicts alone unless told.
optree.register_pytree_node(
    ModelOutput, lambda output: (*_flatten(output), tuple(output)), _unflatten, namespace="keras"
)
if keras.backend.backend() == "jax":
    import jax

    jax.tree_util.register_pytree_node(ModelOutput, _flatten, _unflatten)
