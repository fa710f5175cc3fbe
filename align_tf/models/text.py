"""The text tower: a BERT encoder."""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from align_tf.checkpoints import name_table
from align_tf.configuration.text import AlignTextConfig
from align_tf.models.bert import EncoderLayer, TextEmbeddings, dense, embedding
from align_tf.models.block_loop import run_blocks
from align_tf.models.exports import Exports
from align_tf.models.freezing import Tower
from align_tf.models.inputs import ID_INPUTS, PAIR_INPUTS, TakesNames, check_ids, check_known
from align_tf.models.outputs import ModelOutput
from align_tf.models.pretrained import Pretrained
from align_tf.models.remat import rematerialize
from align_tf.models.sharded_state import whole
from align_tf.models.surgery import check_plain, replace_layer

HEADED = ("query", "key", "value")  # the layers of an attention whose columns are the heads

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


@keras.saving.register_keras_serializable(package="align_tf")
class AlignTextModel(TakesNames, Exports, Pretrained, Tower, keras.Model):
    """The text tower: a BERT encoder.

    It gives several outputs by name. In a `keras.Sequential` one of them is taken for the layer
    behind by `keras.layers.Lambda(lambda output: output.pooler_output)`; a functional model takes
    `tower(inputs).pooler_output`.

    Args:
        config: its configuration.
        name: the name of the model, and the first part of its weights' paths.
        dtype: a dtype or policy such as `mixed_bfloat16`; None takes Keras's global policy.
    """

    config_class = AlignTextConfig
    table = name_table.TEXT_TABLE
    prefix = "text_model."
    unused = name_table.UNUSED_BY_TEXT_TOWER
    input_names = TEXT_INPUTS

    def __init__(
        self, config: AlignTextConfig, *, name: str = "text_model", dtype: Any = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self._check_config(config)
        self.config = config = copy.deepcopy(config)
        options = {"dtype": self.dtype_policy}
        self.embeddings = TextEmbeddings(config, **options)
        self.blocks = [
            EncoderLayer(
                config,
                config.num_attention_heads - len(config.pruned_heads.get(index, ())),
                name=f"layer_{index}",
                **options,
            )
            for index in range(config.num_hidden_layers)
        ]
        self.pooler = dense(config, config.hidden_size, activation="tanh", name="pooler", **options)
        self.remat = False
        self.loop_blocks = False  # see `block_loop`
        self.build()
        self._remember_layers()

    def build(self, input_shape: Any = None) -> None:
        self.embeddings.build()
        for block in self.blocks:
            block.build()
        self.pooler.build((None, self.config.hidden_size))

    def call(
        self,
        inputs: Any,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        first_token_only: bool = False,
        training: bool = False,
    ) -> ModelOutput:
        """Encodes tokens.

        Args:
            inputs: `input_ids` int (m, t), or a dict of `input_ids` or `inputs_embeds`
                float (m, t, hidden_size), and if wanted `attention_mask` (m, t), 1 for a token
                and 0 for padding, `token_type_ids` (m, t) and `position_ids` (m, t).
            output_hidden_states: also return `hidden_states`, those after the embeddings and
                after each layer, each (m, t, hidden_size).
            output_attentions: also return `attentions`, one (m, heads, t, t) for each layer.
            first_token_only: compute of the last layer what the embedding needs, the state of
                the first token: `last_hidden_state` is (m, 1, hidden_size).
            training: apply dropout.

        Returns:
            `last_hidden_state` (m, t, hidden_size) and `pooler_output` (m, hidden_size).

        Raises:
            ValueError: both or neither of ids and embeddings are given, or the text is longer
                than max_position_embeddings.
        """
        inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        given = {key: inputs[key] for key in TEXT_INPUTS if inputs.get(key) is not None}
        attention_mask = given.pop("attention_mask", None)
        length = ops.shape(given.get("input_ids", given.get("inputs_embeds")))[1]
        if attention_mask is None:
            attention_mask = ops.ones((1, length), dtype="bool")
        attention_mask = ops.expand_dims(ops.cast(attention_mask, "bool"), (1, 2))  # (m, 1, 1, t)

        x = whole(self.embeddings)(**given, training=training)
        hidden_states, attentions = [x], []
        wanted = output_hidden_states or output_attentions or first_token_only
        looped = training and self.loop_blocks and not wanted
        if looped:
            x = run_blocks(self.blocks, x, attention_mask, keep_inputs_alone=self.remat)
        for block in () if looped else self.blocks:
            run = (rematerialize if self.remat and training else whole)(block)
            if first_token_only and block is self.blocks[-1]:
                run = functools.partial(whole(block), first_token_only=True)
            x, probs = run(x, attention_mask, training=training)
            hidden_states.append(x)
            attentions.append(probs)

        output = ModelOutput(last_hidden_state=x, pooler_output=whole(self.pooler)(x[:, 0]))
        if output_hidden_states:
            output["hidden_states"] = tuple(hidden_states)
        if output_attentions:
            output["attentions"] = tuple(attentions)
        return output

    @property
    def output_shape(self) -> dict[str, Any]:
        """The shapes of the outputs by name, None for what depends on the inputs."""
        width = self.config.hidden_size
        return {"last_hidden_state": (None, None, width), "pooler_output": (None, width)}

    def _check_inputs(self, inputs: Any) -> None:
        if not isinstance(inputs, dict):
            inputs = {"input_ids": inputs}
        others = ("pixel_values", *PAIR_INPUTS)  # of the batch that the text comes from
        check_known((name for name in inputs if name not in others), TEXT_INPUTS)
        given = [inputs.get(key) for key in ("input_ids", "inputs_embeds")]
        given = [value for value in given if value is not None]
        if len(given) != 1:
            raise ValueError("expected input_ids or inputs_embeds, not both and not neither")
        shape = getattr(given[0], "shape", ())
        if len(shape) < 2:
            kind = f"of shape {tuple(shape)}" if shape else f"of {type(given[0]).__name__}"
            raise ValueError(f"input_ids {kind}: expected an array or a tensor (texts, tokens)")
        limit = self.config.max_position_embeddings
        if isinstance(shape[1], int) and shape[1] > limit:
            raise ValueError(
                f"a text of {shape[1]} tokens: expected at most max_position_embeddings={limit}"
            )
        if isinstance(shape[1], int) and shape[1] < 1:
            raise ValueError("a text of 0 tokens: expected 1 or more")
        for name in TEXT_INPUTS[1:-1]:
            other = tuple(getattr(inputs.get(name), "shape", ()) or ())
            broadcast = name == "position_ids" and other[:1] == (1,)
            if other and not _alike(other, (1, shape[1]) if broadcast else shape[:2]):
                first = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
                raise ValueError(
                    f"{name} of shape {other}: expected that of {first}, {tuple(shape[:2])}"
                )
        sizes = (self.config.vocab_size, self.config.type_vocab_size, limit)
        for name, size in zip(ID_INPUTS, sizes, strict=True):
            check_ids(name, inputs.get(name), size)

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Cuts the word embeddings, or adds rows drawn as new ones are; compile again after it.

        Args:
            vocab_size: rows to have.

        Raises:
            ValueError: it is no positive integer, the embeddings are quantized, or the model has
                LoRA, of which they are no part.
        """
        if self.base_frozen:
            raise ValueError(
                "new word embeddings are no part of an adapter: expected "
                "resize_token_embeddings(vocab_size) after merge_adapter(), or before LoRA"
            )
        config = dataclasses.replace(self.config, vocab_size=vocab_size)  # checks the value
        layer = self.embeddings.word_embeddings
        check_plain(layer)
        new = embedding(
            config,
            vocab_size,
            config.hidden_size,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        kept = ops.convert_to_numpy(layer.embeddings)[:vocab_size]
        added = new.embeddings_initializer((vocab_size - len(kept), config.hidden_size))
        rows = np.concatenate([kept, ops.convert_to_numpy(added).astype(kept.dtype)])
        replace_layer(self.embeddings, "word_embeddings", new, [rows])
        self.config.vocab_size = vocab_size

    def prune_heads(self, heads: dict[int, Iterable[int]]) -> None:
        """Takes attention heads out; compile again after it.

        Args:
            heads: layer's index -> heads to take out, numbered as in the unpruned model.

        Raises:
            ValueError: there is no such layer or head, or none would be left, or the layer is
                quantized or has LoRA.
        """
        before = self.config.pruned_heads
        after = {**before, **{i: sorted({*before.get(i, ()), *h}) for i, h in heads.items()}}
        dataclasses.replace(self.config, pruned_heads=after)  # checks the values
        for index in heads:
            attention = self.blocks[index].attention
            check_plain(*(getattr(attention, name) for name in (*HEADED, "output_dense")))
        for index in heads:
            attention = self.blocks[index].attention
            left = [
                h for h in range(self.config.num_attention_heads) if h not in before.get(index, ())
            ]
            kept = np.array([head not in after[index] for head in left])
            columns = np.repeat(kept, self.config.head_size)
            attention.num_heads = int(kept.sum())
            for attribute in HEADED:
                kernel, bias = getattr(attention, attribute).get_weights()
                self._replace_dense(attention, attribute, kernel[:, columns], bias[columns])
            kernel, bias = attention.output_dense.get_weights()
            self._replace_dense(attention, "output_dense", kernel[columns], bias)
        self.config.pruned_heads = after

    def _replace_dense(self, parent: layers.Layer, attribute: str, kernel: Any, bias: Any) -> None:
        old = getattr(parent, attribute)
        new = dense(self.config, kernel.shape[1], name=old.name, dtype=old.dtype_policy)
        replace_layer(parent, attribute, new, [kernel, bias])


def _alike(shape: Sequence[int | None], other: Sequence[int | None]) -> bool:
    """Says whether two shapes are the same as far as they are known."""
    sides = zip(shape, other, strict=False)
    known = ((a, b) for a, b in sides if isinstance(a, int) and isinstance(b, int))
    return len(shape) == len(other) and all(a == b for a, b in known)
