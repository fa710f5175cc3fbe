"""Ours beside the published scores of kakaobrain/align-base, on the tasks of mteb.

    pip install -e '.[mteb]'
    python benchmarks/published.py [--model my-align] [--tasks DTDZeroShot] [--json FILE]

The model and the data come from the Hugging Face hub. What mteb has measured it keeps, and does not
measure again. Tasks of a text and an image in one are not among these: mteb's ALIGN sums the two
embeddings as they come, and ours are of unit length.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from side_by_side import show

from align_tf.files import write_text
from align_tf.hub import is_available

MODEL = "kakaobrain/align-base"
# Where a score was published.
SOURCES = {
    "mteb": "github.com/embeddings-benchmark/results, kakaobrain__align-base, mteb 1.14.15",
    "coyo": "github.com/kakaobrain/coyo-align, README, COYO-ALIGN-B7-Base: align-base's original",
}
# task: (figure, as mteb calls it; the score; its source), mteb's main figure first. Of some tasks
# the data has been uploaded anew since.
PUBLISHED = {
    "CIFAR10ZeroShot": [("accuracy", 0.7559, "mteb")],
    "CIFAR100ZeroShot": [("accuracy", 0.5146, "mteb")],
    "DTDZeroShot": [("accuracy", 0.5771, "mteb")],
    "EuroSATZeroShot": [("accuracy", 0.3687, "mteb")],
    "Food101ZeroShot": [("accuracy", 0.8098, "mteb")],
    "Imagenet1kZeroShot": [("accuracy", 0.6270, "mteb")],
    "OxfordPetsZeroShot": [("accuracy", 0.8430, "mteb")],
    "STL10ZeroShot": [("accuracy", 0.9373, "mteb")],
    "STS13VisualSTS": [("cosine_spearman", 0.5750, "mteb")],
    "Flickr30kI2TRetrieval": [
        ("ndcg_at_10", 0.8228, "mteb"),
        ("hit_rate_at_1", 0.873, "mteb"),
        ("hit_rate_at_1", 0.881, "coyo"),
    ],
    "Flickr30kT2IRetrieval": [
        ("ndcg_at_10", 0.8521, "mteb"),
        ("hit_rate_at_1", 0.7356, "mteb"),
        ("hit_rate_at_1", 0.732, "coyo"),
    ],
    "MSCOCOI2TRetrieval": [
        ("ndcg_at_10", 0.5326, "mteb"),
        ("hit_rate_at_1", 0.593, "mteb"),
        ("hit_rate_at_1", 0.612, "coyo"),
    ],
    "MSCOCOT2IRetrieval": [
        ("ndcg_at_10", 0.5834, "mteb"),
        ("hit_rate_at_1", 0.4211, "mteb"),
        ("hit_rate_at_1", 0.431, "coyo"),
    ],
}
# Without --tasks: those of a few thousand images.
SMALL = ("DTDZeroShot", "OxfordPetsZeroShot", "Flickr30kI2TRetrieval", "Flickr30kT2IRetrieval")


def beside(
    encoder: Any, tasks: Iterable[Any], published: Mapping[str, list], cache: Any
) -> Iterable[dict[str, Any]]:
    """Measures a model, task by task, and yields a row for each score that was published.

    Args:
        encoder: a model as mteb takes it.
        tasks: mteb's.
        published: as PUBLISHED.
        cache: where mteb keeps results.

    Raises:
        OSError: the data of a task cannot be had.
    """
    import mteb

    for task in tasks:
        name = task.metadata.name
        (result,) = mteb.evaluate(encoder, [task], cache=cache).task_results
        (scores,) = next(iter(result.scores.values()))
        for figure, score, source in published[name]:
            ours = float(scores[figure])
            row = {"task": name, "figure": figure, "published": score, "ours": ours}
            yield {**row, "difference": round(ours - score, 4), "source": source}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="a folder or an id of the hub")
    parser.add_argument("--tasks", nargs="+", default=SMALL, choices=PUBLISHED, metavar="TASK")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows")
    arguments = parser.parse_args(words)
    if not is_available(arguments.model):
        sys.exit(f"{arguments.model}: not on this machine, and the hub has no answer: expected it")
    try:
        from align_tf.evaluation.mteb import MtebEncoder
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    import mteb

    encoder, rows, failed = MtebEncoder(arguments.model), [], None
    tasks = mteb.get_tasks(tasks=list(arguments.tasks))
    try:
        for row in beside(encoder, tasks, PUBLISHED, mteb.ResultCache()):
            rows.append(row)  # each as it comes, so that nothing is lost
    except OSError as error:
        failed = f"the data cannot be had of the hub: {error}"
    if rows:
        show([{"title": f"{arguments.model} beside {MODEL} as published", "table": rows}])
        for name in dict.fromkeys(row["source"] for row in rows):
            print(f"{name}: {SOURCES[name]}")
    if arguments.json:
        write_text(arguments.json, json.dumps({"rows": rows, "sources": SOURCES}, indent=2) + "\n")
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
