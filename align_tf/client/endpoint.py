"""Where a server is, how it is reached, and how often it is asked again."""

import dataclasses
import ipaddress
import os
import random
import re
import time
import urllib.parse

FIRST_PAUSE = 0.1  # seconds before the first retry; each further one waits twice as long
LONGEST_PAUSE = 5.0

# protocol: (default port, scheme in the clear, scheme over TLS)
PROTOCOLS = {"rest": (8501, "http", "https"), "grpc": (8500, "grpc", "grpcs")}
_PLACE = re.compile(r"(?:\[[0-9a-fA-F:.%\w]+\]|[^\s@:\[\]]+)(?::\d*)?")  # host or host:port


class AlignServerError(RuntimeError):
    """The server refused a request.

    Attributes:
        status: the HTTP status; for gRPC, the one TensorFlow Serving's REST gives for the code.
        row: the place in the caller's list of what it refused, None where it did not say.
    """

    def __init__(self, message: str, status: int, row: int | None = None):
        super().__init__(message)
        self.status, self.row = status, row


class ServerUnavailable(ConnectionError):
    """The server is not there, is busy, or broke a connection off: it may be asked again."""


@dataclasses.dataclass(frozen=True)
class Tls:
    """How a connection is encrypted and who is trusted; each file is PEM.

    Attributes:
        root_certificates: file of the authorities that may have signed the server's certificate;
            the system's if None.
        certificate: file of the certificate by which the client proves who it is.
        private_key: file of its key.
        server_name: the name the server's certificate has to have, where it is not the address.
    """

    root_certificates: str | os.PathLike | None = None
    certificate: str | os.PathLike | None = None
    private_key: str | os.PathLike | None = None
    server_name: str | None = None

    def __post_init__(self):
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("expected certificate and private_key, both or none")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model is and what every request to it carries.

    Attributes:
        host, port: the server's.
        tls: None sends in the clear.
        token: sent as `authorization: Bearer TOKEN`.
        model_name: the name under which the server has the model.
        version_label: the label of the version to ask; None leaves the choice to the server.
    """

    host: str
    port: int
    tls: Tls | None
    token: str | None
    model_name: str
    version_label: str | None

    def __post_init__(self):
        for name, value in (
            ("model_name", self.model_name),
            ("version_label", "none" if self.version_label is None else self.version_label),
        ):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r}: expected a name")
        if not isinstance(self.tls, Tls | None):
            raise ValueError(f"tls={self.tls!r}: expected a Tls, such as Tls()")
        token = "" if self.token is None else self.token
        if not isinstance(token, str) or not (token.isascii() and token.isprintable()):
            raise ValueError("token: expected printable ASCII, as a header takes no other")

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def on_this_machine(self) -> bool:
        """Whether the host is a loopback address, which no proxy can reach."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def split_address(address: str, protocol: str, tls: Tls | None) -> tuple[str, int, Tls | None]:
    """Returns an address's host and port, and how it is encrypted.

    Raises:
        ValueError: it is none, its scheme is the other protocol's, or in the clear and `tls` is
            given.
    """
    default_port, plain, encrypted = PROTOCOLS[protocol]
    url = address if "://" in address else f"{encrypted if tls else plain}://{address}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        whole = _PLACE.fullmatch(parts.netloc) and not (parts.query or parts.fragment)
    except ValueError:
        host = None
    known = [scheme for _, *schemes in PROTOCOLS.values() for scheme in schemes]
    if not host or not whole or parts.scheme not in known or parts.path not in ("", "/"):
        raise ValueError(f'address={address!r}: expected "host:port", as in "localhost:8501"')
    if parts.scheme not in (plain, encrypted):
        raise ValueError(
            f'address={address!r}: expected {plain}:// or {encrypted}:// with protocol="{protocol}"'
        )
    if tls and parts.scheme == plain:
        raise ValueError(f"address={address!r}: expected {encrypted}:// with tls")
    if parts.scheme == encrypted:
        tls = tls or Tls()
    return host, port or default_port, tls


class Attempts:
    """The attempts at one request: how long each may take, and whether there is another.

    A request is repeated where the server was too busy or not there. It changes nothing at the
    server, so one that was cut off may be repeated too.
    """

    def __init__(self, timeout: float, retries: int):
        self.deadline, self.retries, self.made = time.monotonic() + timeout, retries, 0

    @property
    def timeout(self) -> float:
        """Seconds that are left."""
        return max(self.deadline - time.monotonic(), 0.001)

    def pause(self, error: Exception) -> float:
        """Returns the seconds to wait before the next attempt; raises the error if it is final."""
        longest = min(FIRST_PAUSE * 2**self.made, LONGEST_PAUSE)
        pause = longest * random.uniform(0.5, 1)  # so that callers do not come back all at once
        self.made += 1
        if not _transient(error) or self.made > self.retries or pause >= self.timeout:
            raise error
        return pause


def _transient(error: Exception) -> bool:
    if isinstance(error, AlignServerError):
        too_large = "larger than" in str(error)  # gRPC's RESOURCE_EXHAUSTED, which stays
        return error.status in (429, 503) and not too_large
    return isinstance(error, ServerUnavailable)
