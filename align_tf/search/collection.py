"""A collection of images as Parquet shards of embeddings: what they hold, written and read."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from align_tf import addresses
from align_tf.files import replacing
from align_tf.search.required import require_pyarrow

EMBEDDING_DTYPES = ("float16", "float32")
SKIPPED_NAMED = 10  # of the records that are left out
SHARD_NAME, SHARD = "shard-{:06}.parquet", re.compile(r"shard-.*\.parquet")
METADATA = b"align_tf"  # key of the JSON in a shard's metadata
COLUMNS = {"id": "string", "path": "string", "caption": "string", "thumbnail": "binary"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shards of one collection have in common; it stands in the metadata of each.

    Attributes:
        source: where the records come from.
        records: how many there are.
        shard_size: records of a shard, whether or not their images can be embedded.
        dtype: of the embeddings.
        dim: their width.
        model: the name the model was loaded by; "" where it came as an object.
        fingerprint: of the model.
        listing: digest of the names, sizes and times of the source's files; "" where it has none,
            None in a collection of before there were listings.
        image_key, caption_key: the names of images and captions that were asked for.
    """

    source: str
    records: int
    shard_size: int
    dtype: str
    dim: int
    model: str
    fingerprint: str
    listing: str | None = ""
    image_key: str | None = None
    caption_key: str | None = None

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_size)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard's metadata says of it.

    Attributes:
        number: its place in the collection.
        rows: images embedded.
        skipped: records left out.
        named: the first of them, id -> why.
    """

    number: int
    rows: int
    skipped: int
    named: dict[str, str]


def write_shard(
    output: addresses.Place, settings: Settings, shard: Shard, columns: dict[str, Any]
) -> None:
    """Writes one shard, at once or not at all.

    Args:
        output: the folder.
        settings: of the collection.
        shard: what its metadata will say.
        columns: those of `COLUMNS`, lists (n,), None where there is none, and `image_embeds` and
            `text_embeds` (n, d).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()}
    none = np.array([text is None for text in columns["caption"]], bool)
    for name, empty in (("image_embeds", np.zeros_like(none)), ("text_embeds", none)):
        values = pa.array(columns[name].astype(settings.dtype).ravel())
        mask = pa.array(empty)
        arrays[name] = pa.FixedSizeListArray.from_arrays(values, settings.dim, mask=mask)
    about = {**dataclasses.asdict(settings), "shard": dataclasses.asdict(shard)}
    table = pa.table(arrays).replace_schema_metadata({METADATA: json.dumps(about)})
    with replacing(output / SHARD_NAME.format(shard.number)) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


# --- reading -------------------------------------------------------------------------------


class Collection:
    """The shards of one collection, all of them there.

    Args:
        folder: what `embed` wrote; a remote one is copied to this machine.

    Attributes:
        settings: what the shards have in common.
        rows: images in all.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
        ValueError: a file is broken or of another collection, or the collection is not whole.
    """

    @addresses.naming()
    def __init__(self, folder: str | os.PathLike):
        require_pyarrow()
        self.folder = addresses.fetched_folder(addresses.place(folder))
        files = shard_files(self.folder)
        if not files:
            raise FileNotFoundError(
                f"{folder}: no embeddings; expected what `align-tf embed` wrote"
            )
        self.settings = read_header(files[0])[0]
        shards = read_shards(self.folder, self.settings)
        if len(shards) < self.settings.shards:
            raise ValueError(
                f"{folder}: {len(shards)} of {self.settings.shards} shards are there; the same "
                "`align-tf embed` goes on"
            )
        self.rows = sum(shard.rows for shard in shards)

    def tables(self, columns: list[str]) -> Iterator[Any]:
        """Yields the columns of each shard, as a `pyarrow.Table`."""
        import pyarrow.parquet as pq

        for file in shard_files(self.folder):
            with _whole(file):
                table = pq.read_table(file, columns=columns, page_checksum_verification=True)
                table.validate(full=True)
                if table.column_names != columns:
                    raise ValueError(f"columns {table.column_names}")
            yield table

    def image_embeds(self) -> Iterator[np.ndarray]:
        """Yields the image embeddings of each shard, (n, d) in the collection's dtype."""
        for table in self.tables(["image_embeds"]):
            yield _array(table["image_embeds"], self.settings.dim)

    def text_embeds(self) -> Iterator[np.ndarray]:
        """Yields the caption embeddings of each shard, (m, d); m is less where some have none."""
        for table in self.tables(["text_embeds"]):
            yield _array(table["text_embeds"].drop_null(), self.settings.dim)

    def labelled(self, limit: int, by: str | None = None) -> tuple[np.ndarray, list[str]]:
        """Reads images with a label each, for a plot.

        Args:
            limit: how many at most, spread evenly.
            by: `folder`, the name of the folder an image is in; `caption`; or None, which takes
                the folders if they differ.

        Returns:
            Image embeddings float32 (n, d), and labels (n), "" where there is none.
        """
        wanted = np.unique(np.linspace(0, self.rows - 1, min(limit, self.rows)).astype(int))
        parts, found, start = [], {"folder": [], "caption": []}, 0
        for table in self.tables(["path", "caption", "image_embeds"]):
            first, last = np.searchsorted(wanted, (start, start + len(table)))
            start, table = start + len(table), table.take(wanted[first:last] - start)
            parts.append(_array(table["image_embeds"], self.settings.dim))
            paths = table["path"].to_pylist()
            found["folder"] += [os.path.basename(os.path.dirname(path or "")) for path in paths]
            found["caption"] += [text or "" for text in table["caption"].to_pylist()]
        if by is None:
            by = "folder" if len(set(found["folder"])) > 1 else "caption"
        return np.concatenate(parts).astype(np.float32), found[by]


def _array(column: Any, dim: int) -> np.ndarray:
    values = column.combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def shard_files(folder: addresses.Place) -> list[addresses.Place]:
    return [folder / name for name in addresses.names(folder) if SHARD.fullmatch(name)]


def read_shards(folder: addresses.Place, settings: Settings) -> list[Shard]:
    """Reads what the shards of a folder say, and checks that they are of one collection."""
    shards = []
    for file in shard_files(folder):
        theirs, shard = read_header(file)
        for name, value in dataclasses.asdict(settings).items():
            found = getattr(theirs, name)
            if name != "model" and found != value:
                raise ValueError(
                    f"{folder}: holds another collection, {name} {found!r}, not {value!r}; "
                    "expected the settings it was begun with, or another folder"
                )
        shards.append(shard)
    return shards


def read_header(file: addresses.Place) -> tuple[Settings, Shard]:
    import pyarrow.parquet as pq

    with _whole(file):
        metadata = pq.read_metadata(addresses.opened(file))
        about = json.loads(metadata.metadata[METADATA])
        shard = Shard(**about.pop("shard"))
        settings = Settings(**{"listing": None, **about})
        for values in (settings, shard):
            for field in dataclasses.fields(values):
                if field.type in (int, str) and type(getattr(values, field.name)) is not field.type:
                    raise ValueError(f"{field.name} {getattr(values, field.name)!r}")
        if shard.rows != metadata.num_rows or min(settings.shard_size, settings.dim) < 1:
            raise ValueError(f"{metadata.num_rows} rows")
    return settings, shard


@contextlib.contextmanager
def _whole(file: addresses.Place) -> Iterator[None]:
    """Makes one line of whatever Arrow and JSON say of a file that is broken or another."""
    try:
        yield
    except addresses.AddressError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{file}: not a whole shard of `align-tf embed`") from error
