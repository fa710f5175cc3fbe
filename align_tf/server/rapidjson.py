"""JSON as TensorFlow Serving reads and writes it: rapidjson's grammar, errors and layout.

A value is made of dict, list, str, int, float, bool and None. Bytes that are not UTF-8 are kept in
a str as surrogate escapes, in both directions.
"""

import itertools
import json
import json.encoder
import math
import re
from typing import Any

import numpy as np

from align_tf.server.status_codes import RequestError, invalid_argument

INDENT = "    "
FLOAT_MAX = float(np.finfo(np.float32).max)


# --- reading -------------------------------------------------------------------------------

EMPTY = "JSON Parse error: The document is empty"
# Of a larger body a mistake is told in Python's words: rapidjson's take seconds a megabyte.
EXACT_UP_TO = 1 << 20
BYTES_A_VALUE = 80  # that a value in a list or an object takes at most, beside its characters

# What Python's reader takes and rapidjson may refuse: unpaired surrogates, numbers out of range.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HUGE = re.compile(rb"[eE]\+?\d{3}|\d{300}")
# The same where each digit is a 0 and E is e: these are found at a tenth of the time.
_SIGNS_OF_HUGE = (b"e000", b"e+000", b"0" * 300)
_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
# A string, or the start of one that the text's end cuts off: no attempt to match is in vain.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_SPACE = re.compile(rb"[ \t\n\r]*")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
_HEX4 = re.compile(rb"[0-9a-fA-F]{4}")
_DIGITS = re.compile(rb"\d*")
_ESCAPES = dict(zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(body: bytes) -> dict[str, Any]:
    """Reads the JSON object that a body begins with; text after it is ignored.

    Raises:
        RequestError: the body begins with no JSON object.
    """
    if not body:
        raise invalid_argument(EMPTY)
    try:
        document = _read_fast(body)
    except RecursionError:
        raise _invalid("The document is nested too deeply.") from None
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {stringify(document)} Is not object")
    return document


def memory(body: bytes) -> int:
    """Returns about how many bytes a body takes at most once it is read, beside itself."""
    values = sum(body.count(mark) for mark in (b",", b"[", b"{", b":"))
    width = 1 if body.isascii() else 4  # of a character, of the text and of the strings in it
    return 2 * width * len(body) + BYTES_A_VALUE * values


def _may_hold_huge(body: bytes) -> bool:
    zeros = body.translate(_ZEROS)
    signs = any(sign in zeros for sign in _SIGNS_OF_HUGE)
    return signs and bool(_HUGE.search(_STRING.sub(b"", body)))


def _unpaired(body: bytes) -> int | None:
    """Returns the place of the first surrogate that has no other half, if there is one."""
    if not _SURROGATE.search(body):
        return None
    text = body.replace(rb"\\", b"__")  # after which a u is a letter
    found = _SURROGATE.search(_PAIR.sub(b"_" * 12, text))
    return found and found.start()


def _read_fast(body: bytes) -> Any:
    unpaired, huge, exact = _unpaired(body), _may_hold_huge(body), len(body) <= EXACT_UP_TO
    if unpaired is not None and not exact:
        raise _invalid(f"The surrogate pair in string is invalid. at offset: {unpaired}")
    if exact and (unpaired is not None or huge):
        return _ExactReader(body).document()
    text = body.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
    text = text.lstrip(" \t\n\r")
    try:
        return (_CHECKING_DECODER if huge else _DECODER).raw_decode(text)[0]
    except json.JSONDecodeError as error:
        if exact:
            return _ExactReader(body).document()
        at = len(body) - len(text[error.pos :].encode("utf-8", "surrogateescape"))
        raise _invalid(f"{error.msg}. at offset: {at}") from None


def _invalid(message: str) -> RequestError:
    return invalid_argument(f"JSON Parse error: {message}")


def _checked_number(text: str) -> int | float:
    """Reads a number as the exact reader does: integers beyond 64 bits are doubles."""
    number = float(text)
    if math.isinf(number):
        raise _invalid("Number too big to be stored in double.")
    return int(text) if len(text) <= 20 and text.lstrip("-").isdecimal() else number


def _first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else dict(reversed(pairs))


# The first member of a name counts, as in rapidjson.
_DECODER = json.JSONDecoder(object_pairs_hook=_first_wins)
_CHECKING_DECODER = json.JSONDecoder(
    object_pairs_hook=_first_wins, parse_float=_checked_number, parse_int=_checked_number
)


class _ExactReader:
    """rapidjson's grammar (with NaN and Inf), its errors and their offsets."""

    def __init__(self, body: bytes):
        self.data = body + b"\0"  # rapidjson reads the end as a NUL
        self.at = len(_BYTE_ORDER_MARK) if body.startswith(_BYTE_ORDER_MARK) else 0

    def fail(self, message: str, at: int | None = None) -> RequestError:
        at = self.at if at is None else at
        return _invalid(f"{message} at offset: {at}")

    def take(self, pattern: re.Pattern) -> bytes:
        match = pattern.match(self.data, self.at)
        self.at = match.end() if match else self.at
        return match.group() if match else b""

    def consume(self, word: bytes) -> bool:
        """Takes as much of a word as is there; true if that is all of it."""
        for byte in word:
            if self.data[self.at] != byte:
                return False
            self.at += 1
        return True

    def document(self) -> Any:
        self.take(_SPACE)
        if self.data[self.at] == 0:
            raise self.fail("The document is empty.")
        return self.value()

    def value(self) -> Any:
        match chr(self.data[self.at]):
            case "{":
                return self.object()
            case "[":
                return self.array()
            case '"':
                return self.string()
            case "n":
                return self.constant(b"null", None)
            case "t":
                return self.constant(b"true", True)
            case "f":
                return self.constant(b"false", False)
        return self.number()

    def constant(self, word: bytes, value: Any) -> Any:
        if not self.consume(word):
            raise self.fail("Invalid value.")
        return value

    def object(self) -> dict[str, Any]:
        self.at += 1
        self.take(_SPACE)
        members: dict[str, Any] = {}
        if self.consume(b"}"):
            return members
        while True:
            if self.data[self.at] != ord('"'):
                raise self.fail("Missing a name for object member.")
            name = self.string()
            self.take(_SPACE)
            if not self.consume(b":"):
                raise self.fail("Missing a colon after a name of object member.")
            self.take(_SPACE)
            members.setdefault(name, self.value())
            self.take(_SPACE)
            if self.consume(b"}"):
                return members
            if not self.consume(b","):
                raise self.fail("Missing a comma or '}' after an object member.")
            self.take(_SPACE)

    def array(self) -> list[Any]:
        self.at += 1
        self.take(_SPACE)
        items: list[Any] = []
        if self.consume(b"]"):
            return items
        while True:
            items.append(self.value())
            self.take(_SPACE)
            if self.consume(b"]"):
                return items
            if not self.consume(b","):
                raise self.fail("Missing a comma or ']' after an array element.")
            self.take(_SPACE)

    def string(self) -> str:
        self.at += 1
        parts = []
        while True:
            parts.append(self.take(_PLAIN))
            byte = self.data[self.at]
            if byte == ord('"'):
                self.at += 1
                return b"".join(parts).decode("utf-8", "surrogateescape")
            if byte == 0:
                raise self.fail("Missing a closing quotation mark in string.")
            if byte != ord("\\"):
                raise self.fail("Invalid encoding in string.")
            parts.append(self.escape())

    def escape(self) -> bytes:
        start = self.at
        self.at += 2
        letter = self.data[start + 1]
        if letter in _ESCAPES:
            return bytes([_ESCAPES[letter]])
        if letter != ord("u"):
            raise self.fail("Invalid escape character in string.", start)
        code = self.hex4(start)
        if 0xD800 <= code <= 0xDFFF:
            low = 0
            if code <= 0xDBFF and self.consume(b"\\u"):
                low = self.hex4(start)
            if not 0xDC00 <= low <= 0xDFFF:
                raise self.fail("The surrogate pair in string is invalid.", start)
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        return chr(code).encode()

    def hex4(self, start: int) -> int:
        digits = self.take(_HEX4)
        if not digits:
            raise self.fail("Incorrect hex digit after \\u escape in string.", start)
        return int(digits, 16)

    def number(self) -> int | float:
        start = self.at
        sign = -1.0 if self.consume(b"-") else 1.0
        letter = self.data[self.at]
        if letter == ord("N"):
            return self.constant(b"NaN", math.nan)
        if letter == ord("I"):
            infinity = self.constant(b"Inf", sign * math.inf)
            return self.constant(b"inity", infinity) if self.data[self.at] == ord("i") else infinity
        if not self.consume(b"0") and not self.take(_DIGITS):
            raise self.fail("Invalid value.")
        whole = True
        if self.consume(b"."):
            whole = False
            if not self.take(_DIGITS):
                raise self.fail("Miss fraction part in number.")
        if self.data[self.at] in b"eE":
            whole = False
            self.at += 2 if self.data[self.at + 1] in b"+-" else 1
            if not self.take(_DIGITS):
                raise self.fail("Miss exponent in number.")
        text = self.data[start : self.at].decode()
        if math.isinf(float(text)):
            raise self.fail("Number too big to be stored in double.", start)
        return int(text) if whole and len(text) <= 20 else float(text)


# --- writing ------------------------------------------------------------------------------


def encode(text: str) -> bytes:
    """Encodes as UTF-8, surrogate escapes as the bytes they stand for."""
    return text.encode("utf-8", "surrogateescape")


def quote(text: str) -> str:
    """Writes a string's token."""
    return json.encoder.encode_basestring(text)


def decimals(values: np.ndarray) -> list[str]:
    """Writes float32 or float64 numbers: six digits where that reads back as the number.

    Args:
        values: (n); float32 falls back to nine digits, float64 to seventeen.

    Returns:
        n tokens; whole numbers end in ".0", and NaN and Infinity stand bare.
    """
    digits = 9 if values.dtype == np.float32 else 17
    tokens = _formatted(values, digits)
    places = np.flatnonzero(_may_be_short(values))
    short = _formatted(values[places], 6)
    with np.errstate(over="ignore"):
        equal = np.array(short, np.float64).astype(values.dtype) == values[places]
    for place, text in zip(places[equal].tolist(), itertools.compress(short, equal), strict=True):
        tokens[place] = text
    with np.errstate(invalid="ignore"):
        whole = (values == np.rint(values)) | ~np.isfinite(values)
    for place in np.flatnonzero(whole).tolist():
        number, text = values[place], tokens[place]
        if not math.isfinite(number):
            tokens[place] = "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"
        elif "." not in text and "e" not in text:
            tokens[place] += ".0"
    return tokens


def _formatted(values: np.ndarray, digits: int) -> list[str]:
    return (" ".join([f"%.{digits}g"] * len(values)) % tuple(values.tolist())).split()


def _may_be_short(values: np.ndarray) -> np.ndarray:
    """Tells which numbers six digits may be enough for: all of those, and few others."""
    with np.errstate(all="ignore"):
        size = np.abs(values.astype(np.float64))
        scale = 10.0 ** (5 - np.floor(np.log10(size)))
        away = np.abs(np.rint(size * scale) / scale - size)
        return ~(away > 4 * np.spacing(np.abs(values)).astype(np.float64))


def render(tree: Any, depth: int = 0, one_line: bool = False) -> str:
    """Lays a tree out as rapidjson's PrettyWriter does.

    Args:
        tree: dicts and lists of tokens.
        depth: how deep it lies in what surrounds it.
        one_line: an array's items share a line.
    """
    if isinstance(tree, str):
        return tree
    if not tree:
        return "{}" if isinstance(tree, dict) else "[]"
    newline, inner = "\n" + INDENT * depth, "\n" + INDENT * (depth + 1)
    if isinstance(tree, dict):
        members = [f"{quote(k)}: {render(v, depth + 1, one_line)}" for k, v in tree.items()]
        return f"{{{inner}{(',' + inner).join(members)}{newline}}}"
    tokens = set(map(type, tree)) == {str}
    items = tree if tokens else [render(item, depth + 1, one_line) for item in tree]
    if one_line:
        return f"[{', '.join(items)}]"
    return f"[{inner}{(',' + inner).join(items)}{newline}]"


def stringify(value: Any) -> str:
    """Writes a value as error messages quote it."""
    if isinstance(value, float):
        narrow = np.float32 if abs(value) <= FLOAT_MAX else np.float64
        return decimals(np.array([value], narrow))[0]
    return render(_value_tree(value), one_line=True)


def _value_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _value_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_value_tree(item) for item in value]
    if isinstance(value, str):
        return quote(value)
    return json.dumps(value)  # numbers, true, false, null, NaN and Infinity
