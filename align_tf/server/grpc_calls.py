"""How the gRPC half takes a call: its message when there is room for it, and in its time."""

import contextlib
import functools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from align_tf.server.limits import LEAST_BYTES_PER_SECOND, Limits
from align_tf.server.status_codes import Overloaded, RequestError

SMALL_BYTES = 2**16  # of a message that asks for no prediction
SMALL_CALLS = 4  # of those at work at once
MAX_MESSAGE_LENGTH = 1024  # characters of a gRPC error


def aborting(answer: Callable) -> Callable:
    """Turns the errors of what answers a call into the call's status."""

    @functools.wraps(answer)
    def wrapped(messages, context):
        try:
            return answer(messages, context)
        except grpc.RpcError:  # the call has ended
            raise
        except RequestError as error:
            context.abort(grpc.StatusCode[error.code], _shortened(error.message))
        except MemoryError:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Out of memory")
        except Exception as error:
            traceback.print_exc()
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    return wrapped


def _shortened(message: str) -> str:
    """Keeps a message within what fits into a call's trailers, as TensorFlow Serving does."""
    if len(message) <= MAX_MESSAGE_LENGTH:
        return message
    return message[:MAX_MESSAGE_LENGTH] + "...TRUNCATED"


def parsed(data: bytes, request: type[Message]) -> Any:
    """Parses a message.

    Raises:
        RequestError: it is not one of that class.
    """
    try:
        return request.FromString(data)
    except DecodeError as error:
        name = request.DESCRIPTOR.name
        raise RequestError("INTERNAL", f"The message is not a {name}: {error}") from None


class Calls:
    """Takes the messages of calls, each of a size that is known only once it has come.

    gRPC would receive them all at once, before any of this project's code runs. A message is not
    received before it is asked for where its method is declared to take several: so are all here,
    and each takes the first.
    """

    def __init__(self, limits: Limits):
        """Makes one whose watch over slow clients begins with `start`.

        Args:
            limits: what may come at once, and in which time.
        """
        self.seconds = limits.client_timeout
        self.rooms = threading.Semaphore(limits.messages_at_once)
        # Those calls have threads of their own: predictions that wait for room take no other's.
        self.small = futures.ThreadPoolExecutor(SMALL_CALLS, "grpc-small")
        self._until: dict[grpc.ServicerContext, float] = {}
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begins to end the calls whose clients do not go on."""
        threading.Thread(target=self._end_late_ones, name="grpc-late", daemon=True).start()

    def stop(self) -> None:
        """Ends the watch, and the threads once they have nothing to do."""
        self._stopped.set()
        self.small.shutdown(wait=False)

    @contextlib.contextmanager
    def message(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Receives a message; what this surrounds has the room that it came in.

        Raises:
            Overloaded: there was no room in time.
            RequestError: there is no message.
            grpc.RpcError: the call has ended.
        """
        left = context.time_remaining()
        seconds = self.seconds if left is None else max(0, min(left, self.seconds))
        if not self.rooms.acquire(timeout=seconds):
            raise Overloaded("Too many messages come at once: try again later")
        try:
            yield self._next(messages, context)
        finally:
            self.rooms.release()

    def _next(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self.wait_for_client(context)
        try:
            data = next(messages, None)
        finally:
            self._until.pop(context, None)
        if data is None:
            raise RequestError("UNIMPLEMENTED", "The call has no message")
        return data

    def wait_for_client(self, context: grpc.ServicerContext, size: int = 0) -> None:
        """Has a call end unless its client sends, or takes so many bytes, in its time."""
        self._until[context] = time.monotonic() + self.seconds + size / LEAST_BYTES_PER_SECOND

    def keep_until_taken(
        self, context: grpc.ServicerContext, size: int, release: Callable[[], None]
    ) -> None:
        """Calls something once a client has taken an answer of so many bytes, or has gone."""

        def done():
            self._until.pop(context, None)
            release()

        self.wait_for_client(context, size)
        if not context.add_callback(done):  # it has gone already
            done()

    def small_call(self, method: Callable, request: type[Message]) -> grpc.RpcMethodHandler:
        """Returns the handler of a method whose messages are small.

        Args:
            method: takes a request and the call's context.
            request: its class.
        """

        def answer(messages, context):
            message = self.small_message(messages, context, request)
            return method(message, context).SerializeToString()

        answer = aborting(answer)
        answer.experimental_thread_pool = self.small  # gRPC's own way of other threads
        return grpc.stream_unary_rpc_method_handler(answer)

    def small_message(
        self, messages: Iterator[bytes], context: grpc.ServicerContext, request: type[Message]
    ) -> Any:
        """Receives the message of such a call, in one of the threads for them."""
        data = self._next(messages, context)
        if len(data) > SMALL_BYTES:
            raise RequestError(
                "RESOURCE_EXHAUSTED", f"The message is larger than {SMALL_BYTES} bytes"
            )
        return parsed(data, request)

    def _end_late_ones(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            now = time.monotonic()
            for context, until in list(self._until.items()):
                if now > until:
                    context.cancel()
