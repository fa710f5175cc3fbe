"""A client of an exported model, for any TensorFlow Serving endpoint.

align_client, async_client  the two clients, over base
rest, grpc_transport        how a request travels; http_connection: rest's, with a deadline
batches                     images and texts, and what a request asks of them
signatures                  what a server tells of its model
endpoint                    where a server is, and how often it is asked again
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
