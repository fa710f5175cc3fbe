from .limits import Limits as Limits
from .model_server import ModelServer as ModelServer
