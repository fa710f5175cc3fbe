"""Search over a million embeddings: recall against exact search, and the time of one query.

The collection is made, not embedded: vectors around centers whose sizes differ, as the embeddings
of pictures of many kinds are. python benchmarks/search.py --rows 1000000
"""

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np
import rich.console
import rich.table

from align_tf.progress import track
from align_tf.search import Index, build_index
from align_tf.search.collection import Settings, Shard, write_shard
from align_tf.search.index import TOP_K

SHARD = 20_000
SPREAD = 0.7  # of a vector around its center, beside the center's length 1
WIDTH = 96  # dimensions that a cluster spreads in
TEXT_SPREAD = 1.0  # of a caption around its image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kind", choices=("flat", "ivf"), default="ivf")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(pathlib.Path(folder), arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    table = rich.table.Table("", "", title="Search", title_justify="left")
    for name, value in report.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    rich.console.Console().print(table)


def measure(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    images, texts = make_collection(folder / "embeds", arguments)
    started = time.perf_counter()
    about = build_index(folder / "embeds", folder / "index", kind=arguments.kind, progress=True)
    built = time.perf_counter() - started
    index = Index(folder / "index")
    report = {name: about[name] for name in ("rows", "dim", "kind", "nlist", "nprobe")}
    report["build_seconds"] = round(built, 1)
    report["recall_at_10_at_build"] = about["recall_at_10"]
    exact = Exact(folder / "embeds")
    for name, queries in (("image", images), ("text", texts)):
        seconds, found = [], []
        index.search(queries[:1])  # the first one opens the file
        for query in queries:
            started = time.perf_counter()
            found.append(index.search(query[None])[1][0])
            seconds.append(time.perf_counter() - started)
        true = exact.neighbors(queries)
        recall = np.mean([np.isin(a, b).mean() for a, b in zip(true, found, strict=True)])
        report[f"{name}_recall_at_10"] = round(float(recall), 4)
        report[f"{name}_median_ms"] = round(1e3 * float(np.median(seconds)), 2)
        report[f"{name}_p99_ms"] = round(1e3 * float(np.percentile(seconds, 99)), 2)
    report["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return report


def make_collection(folder: pathlib.Path, arguments: argparse.Namespace) -> tuple:
    """Writes a collection, and returns new images (q, d) and captions (q, d) to ask for."""
    rng = np.random.default_rng(0)
    rows, dim = arguments.rows, arguments.dim
    centers = unit(rng.normal(size=(max(rows // 500, 10), dim)).astype(np.float32))
    sizes = rng.pareto(1.5, len(centers)) + 0.1  # a few kinds of picture are most of them
    bases = rng.normal(size=(8, WIDTH, dim)).astype(np.float32) / dim**0.5

    def draw(count: int) -> np.ndarray:
        kinds = rng.choice(len(centers), count, p=sizes / sizes.sum())
        spread = np.empty((count, dim), np.float32)
        for number, base in enumerate(bases):
            own = kinds % len(bases) == number
            noise = rng.normal(size=(own.sum(), WIDTH)).astype(np.float32) / WIDTH**0.5
            spread[own] = noise @ base
        return unit(centers[kinds] + SPREAD * spread * dim**0.5 / WIDTH**0.5)

    def describe(images: np.ndarray) -> np.ndarray:
        return unit(images + TEXT_SPREAD * unit(rng.normal(size=images.shape).astype(np.float32)))

    settings = Settings("synthetic", rows, SHARD, "float16", dim, "", "synthetic")
    for number in track(range(settings.shards), "Making the collection"):
        count = min(SHARD, rows - number * SHARD)
        images = draw(count)
        columns = {
            "id": [str(number * SHARD + row) for row in range(count)],
            "path": [None] * count,
            "caption": ["made"] * count,
            "thumbnail": [None] * count,
            "image_embeds": images,
            "text_embeds": describe(images),
        }
        write_shard(folder, settings, Shard(number, count, 0, {}), columns)
    images = draw(arguments.queries)
    return images, describe(images)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Exact:
    """Compares with every vector of a collection, in NumPy."""

    def __init__(self, folder: pathlib.Path):
        from align_tf.search.collection import Collection

        self.collection = Collection(folder)

    def neighbors(self, queries: np.ndarray) -> np.ndarray:
        """Returns the rows of the nearest ten (q, 10), in any order."""
        best = np.full((len(queries), TOP_K), -np.inf, np.float32)
        rows, start = np.zeros((len(queries), TOP_K), np.int64), 0
        for embeds in self.collection.image_embeds():
            scores = np.concatenate([best, queries @ embeds.astype(np.float32).T], axis=1)
            numbers = np.broadcast_to(np.arange(start, start + len(embeds)), scores[:, 10:].shape)
            numbers = np.concatenate([rows, numbers], axis=1)
            top = np.argpartition(scores, -TOP_K, axis=1)[:, -TOP_K:]
            best, rows = (np.take_along_axis(x, top, axis=1) for x in (scores, numbers))
            start += len(embeds)
        return rows


if __name__ == "__main__":
    sys.exit(main())
