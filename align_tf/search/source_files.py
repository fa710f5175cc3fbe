"""Whether the files of a collection's source are still those it was begun with."""

from align_tf.addresses import Place, is_local, names
from align_tf.data.listing import Listing
from align_tf.search import own_pictures
from align_tf.search.collection import Settings, read_header, shard_files

LISTING_NAME = "_listing.npz"  # which those who read the folder as one table leave out


def check_own(output: Place) -> None:
    """Checks, before there is a model, that a folder is free for a collection, or holds one.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: it holds other files, among which the shards would be lost.
    """
    if is_local(output) and output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: a file; expected a folder for the shards")
    if shard_files(output):
        return
    own = (LISTING_NAME, own_pictures.NAME)
    others = sorted(name for name in names(output) if name not in own)
    others = [name for name in others if not name.startswith(".")]  # of a killed process, or hidden
    if others:
        raise ValueError(
            f"{output}: not empty, and no collection, but {others[0]}; expected a folder of its own"
        )


def claim(output: Place, settings: Settings, listing: Listing | None) -> None:
    """Keeps the listing of a collection that is begun, or holds it to that of one gone on with.

    Args:
        output: the folder of the collection.
        settings: of the collection.
        listing: of its source today; None where it has no files.

    Raises:
        ValueError: the files have changed since, or there is no listing to tell.
    """
    files = shard_files(output)
    if files:
        theirs, _ = read_header(files[0])
        if theirs.source != settings.source:
            return  # another collection, as its shards will tell
        _check_same(output, theirs, settings, listing)
    if listing is not None and not (files and LISTING_NAME in names(output)):
        listing.save(output / LISTING_NAME)


def check_unchanged(settings: Settings, before: Listing, now: Listing) -> None:
    """Checks the files once more, after they were embedded.

    Raises:
        ValueError: some have changed.
    """
    changes = before.changes(now, settings.source) if before.digest() != now.digest() else ""
    if changes:
        raise ValueError(
            f"{settings.source}: changed while it was embedded: {changes}; expected another folder "
            "to embed it into again"
        )


def check_listed(output: Place, settings: Settings, listing: Listing) -> None:
    """Checks files that another process lists.

    Raises:
        ValueError: they are not those that the collection was begun with.
    """
    _check_same(output, settings, settings, listing)


def _check_same(
    output: Place, theirs: Settings, settings: Settings, listing: Listing | None
) -> None:
    if theirs.listing is None:
        raise ValueError(
            f"{output}: begun before listings were kept, so that nothing tells whether "
            f"{settings.source} has changed; expected another folder"
        )
    digest = "" if listing is None else listing.digest()
    if digest == theirs.listing:
        return
    before = Listing.read(output / LISTING_NAME)
    known = before is not None and listing is not None and before.digest() == theirs.listing
    changes = before.changes(listing, settings.source) if known else ""
    raise ValueError(
        f"{settings.source}: changed since {output} was begun{changes and f': {changes}'}; "
        "expected the same files, or another folder"
    )
