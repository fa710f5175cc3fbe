"""BERT, the text tower: embeddings, self-attention, encoder layer.

Architecture: arXiv 1810.04805; relative positions: arXiv 1803.02155 (relative_key) and
arXiv 2009.13658, method 4 (relative_key_query), as Hugging Face's transformers 4 has them.
"""

from typing import Any

import keras
from keras import layers, ops

from align_tf.configuration.text import AlignTextConfig
from align_tf.models.activation import get_activation
from align_tf.models.configured import Configured
from align_tf.models.fused_training import gelu_for
from align_tf.models.initialization import kernel_initializer

# The lowest float32: a row whose every key is masked attends evenly instead of to NaN.
MASKED_SCORE = -3.4028235e38


def dense(config: AlignTextConfig, units: int, **options: Any) -> layers.Layer:
    """Returns a dense layer with the tower's initializer."""
    return layers.Dense(units, kernel_initializer=kernel_initializer(config), **options)


def embedding(config: AlignTextConfig, rows: int, width: int, **options: Any) -> layers.Layer:
    """Returns an embedding with the tower's initializer."""
    initializer = kernel_initializer(config)
    return layers.Embedding(rows, width, embeddings_initializer=initializer, **options)


def look_up(table: layers.Embedding, ids: Any, training: bool) -> Any:
    """Looks up rows of an embedding.

    In training the gradient is one array, as in PyTorch and on JAX. TensorFlow's own is a list of
    rows, a row for each occurrence of a token, and Keras's optimizers would square these one by
    one for the second moment and for the norm of the gradient.
    """
    if not training or table.quantization_mode:  # quantized, it does not train
        return table(ids)
    rows = ops.take(table.embeddings * 1.0, ids, axis=0)  # the product makes the gradient dense
    return ops.cast(rows, table.compute_dtype)


def flat(x: Any) -> Any:
    """Puts the tokens of (n, t, width) in one dimension.

    A dense layer is then a product of two matrices, which TensorFlow's kernels fuse with the bias
    and the activation; of three dimensions Keras leaves them apart.
    """
    return ops.reshape(x, (-1, x.shape[-1]))


@keras.saving.register_keras_serializable(package="align_tf")
class TextEmbeddings(Configured, layers.Layer):
    """Sum of the word, position and token type embeddings, normalised."""

    config_class = AlignTextConfig

    def __init__(self, config: AlignTextConfig, *, name: str = "embeddings", dtype: Any = None):
        super().__init__(name=name, dtype=dtype)
        self.config = config
        width, options = config.hidden_size, {"dtype": self.dtype_policy}
        self.word_embeddings = embedding(
            config, config.vocab_size, width, name="word_embeddings", **options
        )
        self.position_embeddings = embedding(
            config, config.max_position_embeddings, width, name="position_embeddings", **options
        )
        self.token_type_embeddings = embedding(
            config, config.type_vocab_size, width, name="token_type_embeddings", **options
        )
        self.layer_norm = layers.LayerNormalization(
            epsilon=config.layer_norm_eps, name="layer_norm", **options
        )
        self.dropout = layers.Dropout(config.hidden_dropout_prob, name="dropout", **options)

    def build(self, input_shape: Any = None) -> None:
        for layer in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            layer.build((None, None))
        self.layer_norm.build((None, None, self.config.hidden_size))

    def call(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        training: bool = False,
    ) -> Any:
        x = inputs_embeds
        if x is None:
            x = look_up(self.word_embeddings, input_ids, training)
        length = ops.shape(x)[1]
        if token_type_ids is None:
            token_type_ids = ops.zeros((1, length), dtype="int32")
        x = x + look_up(self.token_type_embeddings, token_type_ids, training)
        if self.config.position_embedding_type == "absolute":
            if position_ids is None:
                position_ids = ops.arange(length, dtype="int32")[None]
            x = x + look_up(self.position_embeddings, position_ids, training)
        return self.dropout(self.layer_norm(x), training=training)


@keras.saving.register_keras_serializable(package="align_tf")
class SelfAttention(Configured, layers.Layer):
    """Multi-head self-attention and its output projection.

    Args:
        config: the text tower's configuration.
        num_heads: heads that are left in this layer.
    """

    config_class = AlignTextConfig
    arguments = ("num_heads",)

    def __init__(
        self,
        config: AlignTextConfig,
        num_heads: int,
        *,
        name: str = "attention",
        dtype: Any = None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.config = config
        self.num_heads = num_heads
        width, options = num_heads * config.head_size, {"dtype": self.dtype_policy}
        self.query = dense(config, width, name="query", **options)
        self.key = dense(config, width, name="key", **options)
        self.value = dense(config, width, name="value", **options)
        self.output_dense = dense(config, config.hidden_size, name="output", **options)
        self.dropout = layers.Dropout(
            config.attention_probs_dropout_prob, name="dropout", **options
        )
        if config.position_embedding_type != "absolute":
            self.distance_embedding = embedding(
                config,
                2 * config.max_position_embeddings - 1,
                config.head_size,
                name="distance_embedding",
                **options,
            )

    def build(self, input_shape: Any = None) -> None:
        inputs = (None, None, self.config.hidden_size)
        for layer in (self.query, self.key, self.value):
            layer.build(inputs)
        self.output_dense.build((None, None, self.num_heads * self.config.head_size))
        if self.config.position_embedding_type != "absolute":
            self.distance_embedding.build((None, None))

    def call(
        self,
        inputs: Any,
        attention_mask: Any,
        first_token_only: bool = False,
        training: bool = False,
    ) -> tuple[Any, Any]:
        asking = inputs[:, :1] if first_token_only else inputs
        rows = flat(inputs)
        projected = self.project(flat(asking) if first_token_only else rows, rows)
        query, key, value = (
            self._in_heads(y, ops.shape(x)[1])
            for x, y in zip((asking, inputs, inputs), projected, strict=True)
        )
        x, probs = self.attend(query, key, value, attention_mask, training=training)
        x = ops.transpose(x, (0, 2, 1, 3))  # (n, t or 1, heads, head_size)
        x = self.output_dense(ops.reshape(x, (-1, self.num_heads * self.config.head_size)))
        return ops.reshape(x, ops.shape(asking)), probs

    def project(self, asking: Any, inputs: Any) -> tuple[Any, Any, Any]:
        """Returns query, key and value, in which the heads lie side by side.

        Args:
            asking: rows (k, hidden_size) of those tokens that ask.
            inputs: rows (m, hidden_size) of all tokens.
        """
        return self.query(asking), self.key(inputs), self.value(inputs)

    def attend(
        self, query: Any, key: Any, value: Any, attention_mask: Any, training: bool = False
    ) -> tuple[Any, Any]:
        """Attends with the heads apart.

        Args:
            query: (n, heads, t, head_size), or t = 1 for the first token alone.
            key, value: (n, heads, t, head_size).
            attention_mask: bool, as (n, 1, 1, t).
            training: apply dropout.

        Returns:
            What the queries get, in their shape, and the attentions (n, heads, t or 1, t).
        """
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))  # (n, heads, t or 1, t)
        if self.config.position_embedding_type != "absolute":
            scores = scores + self._relative_scores(query, key, training)
        # The softmax runs in float32 whatever the policy, as in the reference.
        scores = ops.cast(scores, "float32") * self.config.head_size**-0.5
        scores = ops.where(attention_mask, scores, MASKED_SCORE)
        probs = ops.cast(ops.softmax(scores, axis=-1), query.dtype)
        return ops.matmul(self.dropout(probs, training=training), value), probs

    def _in_heads(self, rows: Any, length: Any) -> Any:
        heads = (-1, length, self.num_heads, self.config.head_size)
        return ops.transpose(ops.reshape(rows, heads), (0, 2, 1, 3))

    def _relative_scores(self, query: Any, key: Any, training: bool) -> Any:
        asking, asked = (ops.arange(ops.shape(x)[2], dtype="int32") for x in (query, key))
        distance = asking[:, None] - asked[None, :] + self.config.max_position_embeddings - 1
        embeds = look_up(self.distance_embedding, distance, training)  # (t or 1, t, head_size)
        scores = ops.einsum("nhld,lrd->nhlr", query, embeds)
        if self.config.position_embedding_type == "relative_key_query":
            scores = scores + ops.einsum("nhrd,lrd->nhlr", key, embeds)
        return scores


@keras.saving.register_keras_serializable(package="align_tf")
class EncoderLayer(Configured, layers.Layer):
    """Self-attention and feed-forward, each with a residual and a LayerNorm after it."""

    config_class = AlignTextConfig
    arguments = ("num_heads",)

    def __init__(self, config: AlignTextConfig, num_heads: int, *, name: str, dtype: Any = None):
        super().__init__(name=name, dtype=dtype)
        self.config = config
        options = {"dtype": self.dtype_policy}
        norm = {"epsilon": config.layer_norm_eps, **options}
        self.attention = SelfAttention(config, num_heads, **options)
        self.attention_norm = layers.LayerNormalization(name="attention_norm", **norm)
        self.intermediate = dense(config, config.intermediate_size, name="intermediate", **options)
        self.activation = get_activation(config.hidden_act)
        self.output_dense = dense(config, config.hidden_size, name="output", **options)
        self.output_norm = layers.LayerNormalization(name="output_norm", **norm)
        self.dropout = layers.Dropout(config.hidden_dropout_prob, name="dropout", **options)

    @property
    def num_heads(self) -> int:
        """How many heads are left."""
        return self.attention.num_heads

    def build(self, input_shape: Any = None) -> None:
        hidden = (None, None, self.config.hidden_size)
        self.attention.build(hidden)
        self.attention_norm.build(hidden)
        self.intermediate.build(hidden)
        self.output_dense.build((None, None, self.config.intermediate_size))
        self.output_norm.build(hidden)

    def call(
        self,
        inputs: Any,
        attention_mask: Any,
        first_token_only: bool = False,
        training: bool = False,
    ) -> tuple[Any, Any]:
        attended, probs = self.attention(
            inputs, attention_mask, first_token_only=first_token_only, training=training
        )
        x = inputs[:, :1] if first_token_only else inputs
        return self.after_attention(x, attended, training=training), probs

    def after_attention(self, x: Any, attended: Any, training: bool = False) -> Any:
        """Adds what attention gave to the states of as many tokens, and feeds them forward."""
        x = self.attention_norm(x + self.dropout(attended, training=training))
        activation = gelu_for(self.activation, x) if training else self.activation
        forwarded = self.output_dense(activation(self.intermediate(flat(x))))
        forwarded = self.dropout(ops.reshape(forwarded, ops.shape(x)), training=training)
        return self.output_norm(x + forwarded)
