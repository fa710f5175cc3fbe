"""Text to token ids, inside the TensorFlow graph."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text
from tensorflow_text.core.pybinds import (
    pywrap_fast_wordpiece_tokenizer_model_builder as wordpiece_model,
)

from align_tf import addresses, files, hub
from align_tf.preprocessing import apart, tokenizer_files
from align_tf.preprocessing.batch_feature import BatchFeature, as_tensors
from align_tf.preprocessing.normalizer import BertNormalizer, placeholder
from align_tf.preprocessing.tokenizer_files import MAX_WORD_LENGTH, SUFFIX

# What a text becomes: what `embed_tokens` and the text tower take.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MAX_LENGTH = 64  # what ALIGN's text tower was trained with
NO_LIMIT = 1_000_000  # files say 1e30 where they mean that there is none
# Of an added token, as Hugging Face names them; what lstrip and rstrip concern are blanks alone.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
PADDINGS = ("max_length", "longest", "do_not_pad")
# Of one text, Hugging Face's ways to cut are the same.
TRUNCATIONS = {
    True: True,
    False: False,
    "longest_first": True,
    "only_first": True,
    "do_not_truncate": False,
}

# Tokens that decoded text attaches to the word before them (tokenizers' WordPiece decoder).
ATTACHED = {".", ",", "?", "!", "n't", "'m", "'s", "'ve", "'re"}


class AlignTokenizer:
    """Splits text into WordPiece ids as Hugging Face's BertTokenizer does.

    Args:
        vocab: the tokens, in the order of their ids.
        do_lower_case: lower-cases the text.
        strip_accents: removes accents; None does as do_lower_case says.
        tokenize_chinese_chars: makes each CJK ideograph a word.
        unk_token: stands for a word that the vocabulary cannot spell.
        sep_token: ends a sequence.
        pad_token: fills a sequence up.
        cls_token: begins a sequence.
        mask_token: a word left out, in masked language modeling.
        model_max_length: the longest sequence, special tokens included; where a file gives none
            (1e30), 64.
        added_tokens_decoder: tokens to find in a text before its words, besides those above:
            id -> {"content": str, "normalized": bool, "special": bool}. A normalized one is found
            in the normalized text, another in the text as it is. The id is the vocabulary's, or
            the next one after it.

    Raises:
        ValueError: a special token is not in the vocabulary, or an added one cannot be kept.
    """

    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]

    def __init__(
        self,
        vocab: Sequence[str],
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        unk_token: str = "[UNK]",
        sep_token: str = "[SEP]",
        pad_token: str = "[PAD]",
        cls_token: str = "[CLS]",
        mask_token: str = "[MASK]",
        model_max_length: int = MAX_LENGTH,
        added_tokens_decoder: Mapping[int, Mapping[str, Any]] | None = None,
    ):
        self.vocab = list(vocab)
        self.do_lower_case = do_lower_case
        self.strip_accents = strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.unk_token = unk_token
        self.sep_token = sep_token
        self.pad_token = pad_token
        self.cls_token = cls_token
        self.mask_token = mask_token
        self.model_max_length = (
            int(model_max_length) if model_max_length <= NO_LIMIT else MAX_LENGTH
        )
        added = dict(added_tokens_decoder or {})
        tokenizer_files.check_added(self.vocab, added)
        self._tokens = dict(enumerate(self.vocab)) | {i: t["content"] for i, t in added.items()}
        self._ids = {token: i for i, token in self._tokens.items()}
        for role in tokenizer_files.ROLES:
            if getattr(self, role) not in self._ids:
                raise ValueError(f"{role}={getattr(self, role)!r}: not in the vocabulary")
            added.setdefault(self._ids[getattr(self, role)], {"special": True})
        self.added_tokens_decoder = {
            i: {"content": self._tokens[i], **{name: bool(token.get(name)) for name in FLAGS}}
            for i, token in sorted(added.items())
        }
        self._extra: dict[str, Any] = {}  # keys of tokenizer_config.json without a use here
        self._make_graph()

    def _make_graph(self) -> None:
        # What is found in a text by itself has a placeholder each: the raw ones, then the others.
        flags = sorted(self.added_tokens_decoder.values(), key=lambda token: token["normalized"])
        self._found = [token["content"] for token in flags]
        raw = sum(not token["normalized"] for token in flags)
        normalizer = BertNormalizer(
            lowercase=self.do_lower_case,
            strip_accents=self.do_lower_case if self.strip_accents is None else self.strip_accents,
            handle_chinese_chars=self.tokenize_chinese_chars,
            special_tokens=self._found[:raw],
            normalized_tokens=self._found[raw:],
        )
        scalar = tf.TensorSpec([], tf.int32)
        self._encode = tf.function(
            functools.partial(self._tokenize, normalizer),
            input_signature=[tf.TensorSpec([None], tf.string), scalar, scalar],
            autograph=False,
        )

    def __getstate__(self) -> dict[str, Any]:
        # For copies and other processes: a graph can be neither copied nor pickled.
        return {name: value for name, value in vars(self).items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_graph()

    # --- files -----------------------------------------------------------------------------

    @classmethod
    @hub.names_options
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "AlignTokenizer":
        """Reads vocab.txt, or tokenizer.json in its absence, and tokenizer_config.json.

        Args:
            name_or_path: a checkpoint folder, or what `hub.resolve_folder` takes besides.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.

        Raises:
            FileNotFoundError: the folder holds no vocabulary.
            ValueError: a file cannot be read, or its vocabulary lacks a special token.
        """
        folder = hub.resolve_settings(
            name_or_path,
            (tokenizer_files.VOCAB_NAME, tokenizer_files.TOKENIZER_NAME),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        vocab, settings, extra = tokenizer_files.read(folder)
        tokenizer = cls(vocab, **settings)
        tokenizer._extra = extra
        return tokenizer

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes vocab.txt, tokenizer_config.json, special_tokens_map.json and tokenizer.json."""
        folder = addresses.place(folder)
        special = {role: getattr(self, role) for role in tokenizer_files.ROLES}
        config = {
            **self._extra,
            "tokenizer_class": "BertTokenizer",
            **{name: getattr(self, name) for name in tokenizer_files.SETTINGS},
            **special,
            "added_tokens_decoder": {str(i): t for i, t in self.added_tokens_decoder.items()},
        }
        vocab = "".join(f"{token}\n" for token in self.vocab)
        files.write_text(folder / tokenizer_files.VOCAB_NAME, vocab)
        for name, values in (
            (tokenizer_files.TOKENIZER_CONFIG_NAME, config),
            (tokenizer_files.SPECIAL_TOKENS_NAME, special),
            (tokenizer_files.TOKENIZER_NAME, tokenizer_files.tokenizer_json(self)),
        ):
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            files.write_text(folder / name, text)

    # --- the vocabulary --------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def unk_token_id(self) -> int:
        return self._ids[self.unk_token]

    @property
    def sep_token_id(self) -> int:
        return self._ids[self.sep_token]

    @property
    def pad_token_id(self) -> int:
        return self._ids[self.pad_token]

    @property
    def cls_token_id(self) -> int:
        return self._ids[self.cls_token]

    @property
    def mask_token_id(self) -> int:
        return self._ids[self.mask_token]

    @property
    def all_special_tokens(self) -> list[str]:
        roles = [getattr(self, role) for role in tokenizer_files.ROLES]
        added = [t["content"] for t in self.added_tokens_decoder.values() if t["special"]]
        return list(dict.fromkeys([*roles, *added]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._ids[token] for token in self.all_special_tokens]

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of each token, those that were added included."""
        return dict(self._ids)

    def tokenize(self, text: str) -> list[str]:
        """Returns the tokens of a text, without those that begin and end a sequence."""
        ids = self(text, padding="longest", truncation=False, return_tensors="np").input_ids[0]
        return self.convert_ids_to_tokens(ids[1:-1])

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        """Returns the token of each id, or of one."""
        if isinstance(ids, int | np.integer):
            return self.convert_ids_to_tokens([ids])[0]
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError("ids: expected whole numbers (n,), those of one text")
        wrong = [int(i) for i in ids if i not in self._tokens]
        if wrong:
            raise ValueError(f"ids: {wrong[0]} is not in the vocabulary of {len(self)}")
        return [self._tokens[i] for i in ids.tolist()]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Returns the id of each token, or of one; [UNK]'s where the vocabulary lacks it."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_token_id)
        return [self._ids.get(token, self.unk_token_id) for token in tokens]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Joins the tokens of one sequence of ids into text, as Hugging Face's decoder does."""
        special = self.all_special_tokens if skip_special_tokens else ()
        text = ""
        for token in self.convert_ids_to_tokens(ids):
            if token in special:
                continue
            if not text or token in ATTACHED:
                text += token
            elif token.startswith(SUFFIX):
                text += token.removeprefix(SUFFIX)
            else:
                text += f" {token}"
        return text

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Joins the tokens of each sequence of ids into text."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    # --- the graph -------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def encode(
        self, texts: tf.Tensor | str, *, max_length: int = MAX_LENGTH, padding: str = "longest"
    ) -> dict[str, tf.Tensor] | list[int]:
        """Takes strings to ids in TensorFlow operations, for tf.data and tf.function.

        Args:
            texts: UTF-8 strings (n,); bytes that are not UTF-8 are left out. Time and memory grow
                with the length of the strings alone, whatever is in them. A Python string gives
                the list of its ids, as Hugging Face's `encode` does.
            max_length: the longest sequence, special tokens included; what is longer is cut.
            padding: "longest" (t is the length of the longest sequence) or "max_length".

        Returns:
            input_ids, token_type_ids and attention_mask, int32 (n, t).
        """
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding={padding!r}: expected 'longest' or 'max_length'")
        _check_max_length(max_length)
        if isinstance(texts, str):
            ids = self(texts, padding=padding, max_length=max_length, return_tensors="np")
            return ids.input_ids[0].tolist()
        if not tf.is_tensor(texts):
            if np.ndim(texts) != 1:
                raise ValueError("texts: expected strings (n,), or one as a str")
            texts = tf.constant([_utf8(text) for text in texts], tf.string)
        if padding == "longest":
            return apart.call(self._encode, texts, max_length, 0)
        output = apart.call(self._encode, texts, max_length, max_length)
        return {k: tf.ensure_shape(v, [None, max_length]) for k, v in output.items()}

    def _tokenize(
        self,
        normalizer: BertNormalizer,
        texts: tf.Tensor,
        max_length: tf.Tensor,
        min_width: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Takes strings (n,) to int32 ids and masks (n, t); t is min_width or more.

        All it needs are constants of its graph.
        """
        words = tf.strings.split(normalizer.normalize(texts))  # (n, words)
        words = words[:, : max_length - 2]  # a word gives at least one token
        some_long = tf.reduce_any(tf.strings.length(words.values) > MAX_WORD_LENGTH)
        unknown = placeholder(self._found.index(self.unk_token))
        flat = tf.cond(
            some_long,
            lambda: tf.where(
                tf.strings.length(words.values, "UTF8_CHAR") > MAX_WORD_LENGTH,
                unknown,
                words.values,
            ),
            lambda: words.values,
        )

        # A placeholder is a word of its own, with an id after the vocabulary's.
        placeholders = [placeholder(i) for i in range(len(self._found))]
        model = wordpiece_model.build_fast_wordpiece_model(
            [*_distinct(self.vocab), *placeholders],
            4 * MAX_WORD_LENGTH,  # bytes of a word; a character takes 4 at most
            SUFFIX,
            self.unk_token,
            True,  # the words are split
            False,  # no way back to text
        )
        # Of a vocabulary, tf-text would make a constant number by number.
        wordpiece = tf_text.FastWordpieceTokenizer(
            model_buffer=tf.constant(np.frombuffer(model, np.uint8)), token_out_type=tf.int32
        )
        pieces = words.with_values(wordpiece.tokenize(flat)).merge_dims(1, 2)  # (n, tokens)
        index = tf.maximum(pieces.values - self.vocab_size, 0)
        found = tf.gather(tf.constant([self._ids[token] for token in self._found]), index)
        ids = tf.where(pieces.values < self.vocab_size, pieces.values, found)

        lengths = tf.minimum(tf.cast(pieces.row_lengths(), tf.int32), max_length - 2)
        width = tf.reduce_max(tf.concat([lengths + 2, [2, min_width]], 0))
        shape = tf.stack([tf.shape(texts)[0], width - 2])
        body = pieces.with_values(ids).to_tensor(self.pad_token_id, shape=shape)
        body = tf.pad(body, [[0, 0], [1, 1]], constant_values=self.pad_token_id)
        column, end = tf.range(width)[None], lengths[:, None] + 1
        body = tf.where(column == 0, self.cls_token_id, body)
        input_ids = tf.where(column == end, self.sep_token_id, body)
        return {
            "input_ids": input_ids,
            "token_type_ids": tf.zeros_like(input_ids),
            "attention_mask": tf.cast(column <= end, tf.int32),
        }

    # --- the call --------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} tokens, do_lower_case={self.do_lower_case}, "
            f"model_max_length={self.model_max_length})"
        )

    def __call__(
        self,
        texts: str | bytes | Sequence[str | bytes],
        *,
        padding: str | bool = "max_length",
        truncation: bool | str = True,
        max_length: int | None = MAX_LENGTH,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Encodes a text or several.

        Args:
            texts: a string, or n of them: a list, a tuple, an array or a tensor, in a graph too.
            padding: "max_length", "longest" (or True), "do_not_pad" (or False).
            truncation: cuts what is longer than max_length; also as Hugging Face's "longest_first",
                "only_first" or "do_not_truncate".
            max_length: special tokens included; None is model_max_length.
            return_tensors: as AlignProcessor takes it.

        Returns:
            input_ids, token_type_ids and attention_mask, int32 (n, t); ragged with "do_not_pad".

        Raises:
            ValueError: a text is no string, or a setting is not one of those named.
        """
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r}: expected one of {', '.join(PADDINGS)}")
        max_length = self.model_max_length if max_length is None else max_length
        _check_max_length(max_length)
        if truncation not in tuple(TRUNCATIONS):
            raise ValueError(f"truncation={truncation!r}: expected True or False")
        truncation = TRUNCATIONS[truncation]
        texts = _strings(texts)
        limit = max_length if truncation else np.iinfo(np.int32).max
        output = self._encode(texts, limit, max_length if padding == "max_length" else 0)
        if padding == "do_not_pad":
            lengths = tf.reduce_sum(output["attention_mask"], axis=1)
            output = {k: tf.RaggedTensor.from_tensor(v, lengths) for k, v in output.items()}
        return as_tensors(output, return_tensors)


def _distinct(vocab: Sequence[str]) -> list[str]:
    """Renames tokens that no word gets: a blank line, and one that a later line repeats."""
    last = {token: i for i, token in enumerate(vocab)}
    return [t if t and last[t] == i else f"\x11{i}" for i, t in enumerate(vocab)]


def _check_max_length(max_length: int) -> None:
    if not isinstance(max_length, int | np.integer) or max_length < 2:
        raise ValueError(f"max_length={max_length!r}: expected 2 or more, for the special tokens")


def _strings(texts: Any) -> tf.Tensor:
    """Takes what a caller has, a string or several, to a tensor of strings (n,)."""
    if tf.is_tensor(texts) and texts.dtype == tf.string and texts.shape.rank in (0, 1):
        return tf.reshape(texts, [-1])
    texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
    texts = [texts] if isinstance(texts, str | bytes) else texts
    if not isinstance(texts, list | tuple):
        raise ValueError(f"text: expected a string or a list of them, found {_kind(texts)}")
    return tf.constant([_utf8(text) for text in texts], tf.string, shape=[len(texts)])


def _kind(value: Any) -> str:
    if tf.is_tensor(value):
        return f"a tensor of {value.dtype.name} and shape {value.shape}"
    return type(value).__name__


def _utf8(text: Any) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise ValueError(f"text: expected strings, found {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: {text!r} holds a lone surrogate, which UTF-8 lacks") from error
