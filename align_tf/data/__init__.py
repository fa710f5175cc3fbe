"""Image-text data: files to records to batches.

dataset         batches for `fit`, `evaluate` and `predict`
readers         which files a source is, and those whose records are known by their paths
mixing, weights     several sources in shares of a batch
streams         records that come in a row: TFRecord, tar, Parquet, a tf.data.Dataset
tables, tars    the rows of a .csv, .tsv, .jsonl or .parquet; the members of a tar
folders         which files of a folder are data
patterns        names with wildcards and braces
sources         what a source of records is
counting        how many records each shard holds, counted once
listing         a source's files, and what has changed of them
lengths         what texts of a batch are padded to
label_files     the labels of classes
left_out, limit records that are no pairs: why, and how many are too many
writers         pairs into TFRecord files
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
