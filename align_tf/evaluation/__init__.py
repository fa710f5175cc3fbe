"""Evaluation: arrays in, numbers out; and over data sets.

tasks               the four tasks of `align-tf evaluate`, over files
identity            which rows are one image or one text
embedder            a model's towers, compiled: batches in, arrays out
retrieval           ranks and recalls of images and their texts
zero_shot           classes by their names
confusion           classes one by one, and which is taken for which
nearest_neighbors   classes by the nearest examples
linear_probe        classes by a logistic regression
mteb, clip_benchmark    a model as these packages take it, for figures beside others'
examples, arrays    what these share
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
