"""The configuration of the text tower, a BERT encoder."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from align_tf.configuration.checks import (
    require,
    require_activation,
    require_positive_integers,
    require_rates,
)
from align_tf.configuration.config_file import ConfigFile, jsonable_activation

TEXT_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "gelu_new")
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")


@dataclasses.dataclass(kw_only=True)
class AlignTextConfig(ConfigFile):
    """Configuration of the text tower, a BERT encoder.

    Arguments and defaults are those of Hugging Face's `AlignTextConfig`; `use_cache` is kept
    and has no effect in an encoder. `pruned_heads` maps a layer's index to the heads that
    were taken out of it. `extra` holds the keys this package does not know.
    """

    model_type: ClassVar[str] = "align_text_model"
    joint_key: ClassVar[str] = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    use_cache: bool = True
    pruned_heads: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # JSON has no integer keys.
        self.pruned_heads = {int(k): sorted(set(v)) for k, v in (self.pruned_heads or {}).items()}
        require_positive_integers(
            self,
            (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
            ),
        )
        require_rates(self, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
        require_activation(self.hidden_act, TEXT_ACTIVATIONS)
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.position_embedding_type in POSITION_EMBEDDING_TYPES,
            "position_embedding_type",
            self.position_embedding_type,
            f"one of {', '.join(POSITION_EMBEDDING_TYPES)}",
        )
        for layer, heads in self.pruned_heads.items():
            valid = layer in range(self.num_hidden_layers)
            valid = valid and set(heads) < set(range(self.num_attention_heads))
            require(
                valid,
                f"pruned_heads[{layer}]",
                heads,
                f"a layer below {self.num_hidden_layers} and some, not all, of its "
                f"{self.num_attention_heads} heads",
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as config.json holds it, unknown keys included."""
        values = super().to_dict()
        values["hidden_act"] = jsonable_activation(self.hidden_act)
        return values
