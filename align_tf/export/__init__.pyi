from .litert import compare_litert as compare_litert, export_litert as export_litert
from .onnx import compare_onnx as compare_onnx, export_onnx as export_onnx
from .saved_model import export_saved_model as export_saved_model
