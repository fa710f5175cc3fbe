from .callbacks import (
    CompilationCount as CompilationCount,
    ResumableCheckpoint as ResumableCheckpoint,
    RetrievalEvaluation as RetrievalEvaluation,
    ZeroShotEvaluation as ZeroShotEvaluation,
)
from .devices import data_parallel as data_parallel, describe_devices as describe_devices
from .hosts import gathered as gathered
from .optimization import make_optimizer as make_optimizer
from .recipe import Recipe as Recipe
from .recipe_file import read_recipe as read_recipe
from .run import train as train
