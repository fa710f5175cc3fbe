"""Embedding a collection on Ray: a pool of actors, each writing whole shards."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from align_tf.addresses import Place, place
from align_tf.models.fingerprint import fingerprint, load_model
from align_tf.search import source_files
from align_tf.search.collection import Settings, Shard
from align_tf.search.required import require_ray
from align_tf.search.shard_writer import ShardWriter


def write_shards(
    reading: tuple[Any, str | None, str | None],
    settings: Settings,
    output: Place,
    batch_size: int,
    numbers: list[int],
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[Shard]:
    """Writes shards in any order; one whose actor dies is written by another.

    The source and the output have to lie at the same paths on each machine of the cluster.

    Args:
        reading: what the source is opened with: paths, image_key, caption_key.
        settings: of the collection.
        output: its folder.
        batch_size: images embedded at a time.
        numbers: of the shards to write.
        workers: how many actors.
        advance: is told how many records a shard has brought.

    Yields:
        The `Shard` of each that is written.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    require_ray()
    import ray.data

    if not numbers:
        return
    started = not ray.is_initialized()
    if started:
        # A cluster knows its processors; on this machine each worker counts as one.
        options = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False, **options)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        items = [{"number": number} for number in numbers]
        shards = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_args=(reading, settings, str(output.absolute()), batch_size),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        )
        for row in shards.iter_rows():
            shard = Shard(**json.loads(row["shard"]))
            advance(shard.rows + shard.skipped)
            yield shard
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """An actor: it has a model of its own, and takes the numbers of shards."""

    def __init__(self, reading: tuple, settings: Settings, output: str, batch_size: int):
        from align_tf.data.readers import list_files, open_source
        from align_tf.evaluation.embedder import Embedder

        model, processor = load_model(settings.model, None)
        found = fingerprint(model, processor)
        if found != settings.fingerprint:
            raise ValueError(
                f"{settings.model}: its fingerprint here is {found[:8]}, expected "
                f"{settings.fingerprint[:8]}, that of the machine the work was started on"
            )
        listing = list_files(*reading[:2])
        source_files.check_listed(place(output), settings, listing)
        opened = open_source(*reading, need_captions=False)
        self.writer = ShardWriter(
            opened, settings, place(output), batch_size, Embedder(model), processor
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        number = int(batch["number"][0])
        (shard,) = self.writer.write(range(number, number + 1))
        return {"shard": [json.dumps(dataclasses.asdict(shard))]}
