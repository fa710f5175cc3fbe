"""The listing of a source's files, kept beside what was made of them."""

from align_tf.data.listing import Listing


def test_a_listing_is_read_as_it_was_written_and_a_broken_one_is_none(tmp_path):
    file, kept = tmp_path / "ö.png", tmp_path / "listing.npz"
    file.write_bytes(b"12345")
    listing = Listing()
    for path in (file, tmp_path / "gone.png"):
        listing.add(path)
    listing.records = 7
    listing.save(kept)
    again = Listing.read(kept)
    assert again.records == 7
    assert again.paths == [str(file), str(tmp_path / "gone.png")]
    assert (list(again.sizes), again.digest()) == ([5, -1], listing.digest())
    whole = kept.read_bytes()
    for place in range(len(whole)):  # cut off there, and changed there
        kept.write_bytes(whole[:place])
        assert Listing.read(kept) is None
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        read = Listing.read(kept)
        assert read is None or read.digest() == listing.digest()
    kept.unlink()
    assert Listing.read(kept) is None
