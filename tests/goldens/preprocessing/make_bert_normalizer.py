"""Probes Hugging Face's BERT normalizer and writes align_tf/preprocessing/bert_normalizer.npz.

Every Unicode code point goes through each step of `tokenizers.normalizers.BertNormalizer` and
through `BertPreTokenizer` on its own. Run with the `tokenizers` package installed:

    python tests/goldens/preprocessing/make_bert_normalizer.py
"""

import pathlib
import unicodedata

import numpy as np
import tokenizers
from tokenizers.normalizers import NFD, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

OUTPUT = pathlib.Path(__file__).parents[3] / "align_tf" / "preprocessing" / "bert_normalizer.npz"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
STEPS = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")


def changed_by(step: str) -> dict[int, str]:
    """Returns what one step of the normalizer turns each code point into, where it does."""
    normalize = BertNormalizer(**{name: name == step for name in STEPS}).normalize_str
    return {c: out for c in CODE_POINTS if (out := normalize(chr(c))) != chr(c)}


def isolated() -> list[int]:
    """Returns the code points that the pre-tokenizer makes a word of their own."""
    split = BertPreTokenizer().pre_tokenize_str
    return [c for c in CODE_POINTS if [w for w, _ in split(f"a{chr(c)}b")] == ["a", chr(c), "b"]]


def canonical_order(deleted: set[int]) -> tuple[dict[int, int], list[int]]:
    """Probes NFD's canonical reordering.

    Args:
        deleted: the code points that strip_accents deletes.

    Returns:
        the rank of the combining class of each mark that strip_accents keeps, and the deleted code
        points that other marks do not move across.
    """
    normalize = NFD().normalize_str
    # One mark of each combining class, in the order of the classes.
    classes = {unicodedata.combining(chr(c)): chr(c) for c in reversed(CODE_POINTS)}
    marks = [classes[k] for k in sorted(classes) if k and normalize(classes[k]) == classes[k]]
    first, last = marks[0], marks[-1]
    ranks, barriers = {}, []
    for c in CODE_POINTS:
        m = chr(c)
        if c in deleted:
            out = normalize(last + m + first)
            if out.index(last) < out.index(first):
                barriers.append(c)
        elif normalize(last + m) == m + last or normalize(m + first) == first + m:
            ranks[c] = 1 + sum(normalize(m + mark) == mark + m for mark in marks if mark != m)
    return ranks, barriers


def main() -> None:
    clean = changed_by("clean_text")
    arrays = {
        "deleted": [c for c, out in clean.items() if out == ""],
        "blank": [c for c, out in clean.items() if out == " "],
        "chinese": sorted(changed_by("handle_chinese_chars")),
        "isolated": isolated(),
    }
    assert len(clean) == len(arrays["deleted"]) + len(arrays["blank"])
    for name, step in (("decomposed", "strip_accents"), ("lower", "lowercase")):
        table = changed_by(step)
        arrays[name] = sorted(table)
        # One string for all, cut at spaces: no output holds one.
        assert not any(" " in out for out in table.values())
        text = " ".join(table[c] for c in sorted(table))
        arrays[f"{name}_to"] = np.frombuffer(text.encode("utf-8"), np.uint8)
        if name == "decomposed":
            ranks, arrays["barriers"] = canonical_order({c for c, out in table.items() if not out})
    arrays["marks"] = sorted(ranks)
    arrays["marks_rank"] = np.array([ranks[c] for c in sorted(ranks)], np.uint8)
    arrays = {
        name: values if isinstance(values, np.ndarray) else np.array(values, np.int32)
        for name, values in arrays.items()
    }
    # Sorted code points are kept as differences, which compress well.
    for name, values in arrays.items():
        if values.dtype == np.int32:
            arrays[name] = np.diff(values, prepend=0).astype(np.int32)
    np.savez_compressed(OUTPUT, tokenizers=np.array(tokenizers.__version__), **arrays)
    print(OUTPUT, OUTPUT.stat().st_size, {k: v.shape for k, v in arrays.items()})


if __name__ == "__main__":
    main()
