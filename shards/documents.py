"""JSON documents from disk: decoded strictly into frozen dataclasses before anything uses them."""

import json
from typing import Annotated, Any, TypeVar

import msgspec

from shards.sample import DataError

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
"""A name for people: not empty, without control characters."""


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object (RFC 8259: no NaN, no infinity, valid UTF-8).

    Raises ValueError for anything else.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_names(data: bytes) -> dict[str, Any]:
    """Parse a JSON object that holds names of files, which may not be UTF-8, as surrogates.

    Raises ValueError for anything else.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        plain = json.loads(data, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return msgspec.convert(plain, dict[str, Any], strict=True)


def convert(plain: Any, kind: type[T]) -> T:
    """Build a dataclass from parsed JSON, without coercing any value to another type.

    Raises ValueError, naming the path of the field, for a missing or unknown field, a wrong type
    and a value outside its range.
    """
    value = msgspec.convert(plain, kind, strict=True)
    unknown = find_unknown(plain, msgspec.to_builtins(value), "$")
    if unknown is not None:
        raise ValueError(f"Unknown field - at `{unknown}`")
    return value


def find_unknown(plain: Any, known: Any, path: str) -> str | None:
    """Return the path of the first key of a JSON value that was not converted."""
    if isinstance(plain, dict) and isinstance(known, dict):
        for key, value in plain.items():
            if key not in known:
                return f"{path}.{key}"
            if found := find_unknown(value, known[key], f"{path}.{key}"):
                return found
    elif isinstance(plain, list | tuple) and isinstance(known, list | tuple):
        for row, (value, other) in enumerate(zip(plain, known, strict=False)):
            if found := find_unknown(value, other, f"{path}[{row}]"):
                return found
    return None


def decode(data: bytes, kind: type[T], where: object, remedy: str) -> T:
    """Decode a JSON document into a dataclass.

    Raises DataError `where is damaged (problem); remedy` if it is not valid.
    """
    try:
        return convert(parse_json(data), kind)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); {remedy}") from error
