"""The files of a tokenizer's folder, read and written as Hugging Face's BertTokenizer does."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from align_tf import files

VOCAB_NAME = "vocab.txt"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"

MAX_WORD_LENGTH = 100  # in characters; a longer word is unknown
SUFFIX = "##"  # before a piece that goes on with a word

ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# setting: what it is
SETTINGS = {
    **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), bool),
    "model_max_length": (int, float),
}

# The names that tokenizer.json's normalizer has for the settings.
# setting: key
NORMALIZER_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}

# Settings of tokenizer_config.json that have one value here.
FIXED = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
# Keys that list tokens by name: the vocabulary's id is theirs, or the next one after it.
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def read(folder: pathlib.Path) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Reads vocab.txt, or tokenizer.json in its absence, and the settings beside it.

    Returns:
        the vocabulary, the settings as AlignTokenizer takes them, and the keys of
        tokenizer_config.json that have no use here.

    Raises:
        FileNotFoundError: the folder holds no vocabulary.
        ValueError: a file cannot be read, or states what cannot be kept.
    """
    config = _read_if_there(folder / TOKENIZER_CONFIG_NAME)
    for name, expected in FIXED.items():
        if config.get(name) not in (None, expected):
            path = folder / TOKENIZER_CONFIG_NAME
            raise ValueError(f"{path}: {name}={config[name]!r}, expected {expected!r}")
    serialized = _read_if_there(folder / TOKENIZER_NAME)
    settings = {}
    if (folder / VOCAB_NAME).is_file():
        vocab = _read_vocab(folder / VOCAB_NAME)
    elif serialized:
        vocab, settings = _read_tokenizer(folder / TOKENIZER_NAME, serialized)
    else:
        raise FileNotFoundError(f"{folder}: expected {VOCAB_NAME} or {TOKENIZER_NAME}")

    stated = dict(config)
    listed = stated.pop("added_tokens_decoder", None)
    if listed is None:  # older files state it in several places
        stated |= _read_if_there(folder / SPECIAL_TOKENS_NAME)
        older = _read_if_there(folder / ADDED_TOKENS_NAME)
    try:
        if listed is None:
            names = {_content(stated.get(role)) for role in ROLES}
            listed = {
                i: {"content": token, "normalized": token not in names, "special": token in names}
                for token, i in older.items()
            }
            listed |= {token.get("id"): token for token in serialized.get("added_tokens") or ()}
        settings |= {
            name: _content(stated[name])
            for name in (*SETTINGS, *ROLES)
            if stated.get(name) is not None
        }
        settings["added_tokens_decoder"] = _added_tokens(vocab, listed, stated)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: the added tokens are not in the form of an id and "
            '{"content": ..., "normalized": ..., "special": ...}'
        ) from error
    kinds = {**SETTINGS, "added_tokens_decoder": dict}
    for name, value in settings.items():
        # A tokenizer.json states strip_accents as null where do_lower_case decides.
        if value is not None and not isinstance(value, kinds.get(name, str)):
            raise ValueError(f"{folder}: {name}={value!r}, expected another kind of value")
    used = (*SETTINGS, *ROLES, *EXTRA_TOKENS, "added_tokens_decoder")
    return vocab, settings, {k: v for k, v in config.items() if k not in used}


def _added_tokens(
    vocab: list[str], listed: Mapping[Any, Mapping[str, Any]], stated: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """Puts the tokens listed with an id and those stated by name alone into one table."""
    added = {int(i): dict(token) for i, token in listed.items()}
    if not all(isinstance(token["content"], str) for token in added.values()):
        raise TypeError
    known = {token: i for i, token in enumerate(vocab)}
    known |= {token["content"]: i for i, token in added.items()}
    by_name = [stated.get(role) for role in ROLES]
    for key in EXTRA_TOKENS:
        extra = stated.get(key) or ()
        by_name += extra.values() if isinstance(extra, Mapping) else extra
    for token in filter(None, by_name):
        flags = dict(token) if isinstance(token, Mapping) else {"content": token}
        i = known.setdefault(flags["content"], max([len(vocab) - 1, *added]) + 1)
        added.setdefault(i, {**flags, "special": True})
    return added


def _read_if_there(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _read_vocab(path: pathlib.Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, one token a line") from error
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _read_tokenizer(path: pathlib.Path, values: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Takes the vocabulary and the normalizer's settings from a tokenizer.json."""
    model, normalizer = (
        value if isinstance(value := values.get(name), dict) else {}
        for name in ("model", "normalizer")
    )
    ids = model.get("vocab")
    if model.get("type") != "WordPiece" or not isinstance(ids, dict):
        raise ValueError(f"{path}: expected a WordPiece model, found {model.get('type')!r}")
    vocab = sorted(ids, key=lambda token: _id_of(path, token, ids[token]))
    for place, token in enumerate(vocab):
        if ids[token] != place:
            raise ValueError(
                f"{path}: token {token!r} has id {ids[token]}, expected the ids 0 to "
                f"{len(ids) - 1}, each once"
            )
    return vocab, {name: normalizer[k] for name, k in NORMALIZER_KEYS.items() if k in normalizer}


def _id_of(path: pathlib.Path, token: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{path}: token {token!r} has id {value!r}, expected a whole number")
    return value


def _content(value: Any) -> Any:
    """Returns a setting of tokenizer_config.json, where a token may be an object of its own."""
    return value["content"] if isinstance(value, Mapping) else value


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """Describes the tokenizer in the format of Hugging Face's tokenizers library."""

    def piece(name: str, type_id: int) -> dict[str, Any]:
        kind = "Sequence" if name in ("A", "B") else "SpecialToken"
        return {kind: {"id": name, "type_id": type_id}}

    cls_token, sep_token = tokenizer.cls_token, tokenizer.sep_token
    single = [piece(cls_token, 0), piece("A", 0), piece(sep_token, 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in tokenizer.added_tokens_decoder.items()],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            **{key: getattr(tokenizer, name) for name, key in NORMALIZER_KEYS.items()},
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, piece("B", 1), piece(sep_token, 1)],
            "special_tokens": {
                token: {
                    "id": token,
                    "ids": [tokenizer.convert_tokens_to_ids(token)],
                    "tokens": [token],
                }
                for token in (cls_token, sep_token)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": SUFFIX, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokenizer.unk_token,
            "continuing_subword_prefix": SUFFIX,
            "max_input_chars_per_word": MAX_WORD_LENGTH,
            "vocab": {token: i for i, token in enumerate(tokenizer.vocab)},
        },
    }


def check_added(vocab: Sequence[str], added: Mapping[int, Mapping[str, Any]]) -> None:
    """Checks that added tokens can be kept.

    Raises:
        ValueError: one is empty, asks to be a word of its own, or has an id that is neither the
            vocabulary's nor the next one after it.
    """
    ids, free = {token: i for i, token in enumerate(vocab)}, len(vocab)
    for i, token in sorted(added.items()):
        content = token["content"]
        where = f"the added token {content!r}"
        if not content:
            raise ValueError(f"{where}, id {i}: expected some text")
        if token.get("single_word"):
            raise ValueError(f"{where}: single_word=True, expected False")
        if i != ids.get(content, free):
            raise ValueError(f"{where}: id {i}, expected {ids.get(content, free)}")
        free += content not in ids
