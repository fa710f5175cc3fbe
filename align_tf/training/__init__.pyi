from .callbacks import (
    CompilationCount as CompilationCount,
)
from .callbacks import (
    ResumableCheckpoint as ResumableCheckpoint,
)
from .callbacks import (
    RetrievalEvaluation as RetrievalEvaluation,
)
from .callbacks import (
    ZeroShotEvaluation as ZeroShotEvaluation,
)
from .devices import data_parallel as data_parallel
from .optimization import make_optimizer as make_optimizer
from .recipe import Recipe as Recipe
from .recipe import read_recipe as read_recipe
from .run import train as train
