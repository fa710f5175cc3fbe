"""ALIGN for TensorFlow and Keras: load, fine-tune, export and serve.

The house, from the top down; imports point down:

    cli             the commands
    search          a collection: embedding it, its index, queries, pages
    training        the recipe and its run, optimizer, callbacks, resuming, devices
    export          SavedModel, LiteRT, ONNX, conversion
    evaluation      retrieval, zero-shot, nearest neighbors, linear probe
    models          the two towers and AlignModel
    data            files to records to batches
    checkpoints     tensors in files, and the names they go by
    preprocessing   images and texts to what the models take
    configuration   config.json, presets, the block table
    plots           pictures of similarities, embeddings and trainings
    cards           the card of a model on the Hugging Face hub
    hub             the name of a checkpoint to a folder
    files, fonts, progress, addresses, terminal, interrupts, extras, graph_errors, keras_names   the
        ground

    server, client  TensorFlow Serving's protocol, apart from the rest
"""

import lazy_loader

from align_tf import keras_names

__version__ = "0.1.0"

keras_names.announce()

# The public names stand in __init__.pyi; each is loaded when it is asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
