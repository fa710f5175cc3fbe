from .litert import compare_litert as compare_litert, export_litert as export_litert
from .saved_model import export_saved_model as export_saved_model
