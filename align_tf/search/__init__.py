"""A collection of images: embedded, indexed, searched and shown.

demo            a web page over all of it
gallery         what a search found, as a page and as a picture
searcher        queries of text, image or both
encoder         a model in this process, asked as a client asks a server
index, recall   the FAISS index, and how many of its lists are searched
embedding       embedding a collection, by one of two engines:
shard_writer    this process
ray_engine      Ray
source_files    whether they are those the collection was begun with
collection      the Parquet shards
own_pictures    whose pictures may be shown
thumbnail, writing, vectors, required
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
