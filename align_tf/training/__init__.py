"""Training by a recipe: what `align-tf train` does, and its parts for `fit`.

run             the run: model, data, steps, and going on where it was stopped
log             what it says: its header, its lines, `metrics.jsonl`
trackers        where figures go beside it: TensorBoard, Weights & Biases, MLflow
recipe, recipe_sources, recipe_file     the settings, and what reads them from YAML and flags
callbacks       evaluation, checkpoints and compilations counted, within `fit`
validation      what it is validated on; the best kept, an early end
resume          the state of a training, saved and restored
optimization    LAMB and AdamW with a rate a tower and depth, and the schedule
devices         the devices there are, and a batch spread over them
hosts           the processes of one training, on one host or many
tpu, tpu_program    the step compiled for TPUs that are not here, and what is read from it
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
