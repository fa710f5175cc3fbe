"""The canonical status codes, TensorFlow Serving's HTTP status for each, a request's failure."""

HTTP_STATUS = {
    "OK": 200,
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}


class RequestError(Exception):
    """A request fails with a status code.

    Attributes:
        code: a key of HTTP_STATUS.
        message: what the caller reads.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    @property
    def http_status(self) -> int:
        """The HTTP status that stands for the code."""
        return HTTP_STATUS[self.code]


class Overloaded(RequestError):
    """The server has too much to do: RESOURCE_EXHAUSTED over gRPC, 503 over HTTP."""

    http_status = HTTP_STATUS["UNAVAILABLE"]

    def __init__(self, message: str):
        super().__init__("RESOURCE_EXHAUSTED", message)


def invalid_argument(message: str) -> RequestError:
    """Returns the commonest of them."""
    return RequestError("INVALID_ARGUMENT", message)
