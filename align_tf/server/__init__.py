"""The embedded server: TensorFlow Serving's gRPC and REST, for any SavedModel.

model_server            the server: its ports, start and stop
grpc_services           the gRPC half, over grpc_calls and message_memory
rest_api                the REST half, over rest_json, rapidjson and http_protocol
servables, servable     what is served, and one version of it
batching                requests of different callers run as one
model_config, protos    TensorFlow Serving's settings files
prometheus              metrics under TensorFlow Serving's names
limits, status_codes
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
