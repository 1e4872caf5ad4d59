"""Strict JSON for the files of a bundle: conversion between plain JSON and frozen dataclasses, by type hints.

A dataclass declares a field once: its name, its type and, with `Annotated[type, check]`, its rule. A check
takes a value of the right type and returns what is wrong with it, or "". Every fault raises BundleError
with the path of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from llmc.runtime.errors import BundleError

MAX_TEXT = 4096  # characters in one string
MAX_DEPTH = 32  # nesting of the open fields (`quantization`, `verification.details`)
MAX_INT = 2**63 - 1
DAMAGED = "the bundle is damaged: copy it again, or rebuild it with `llmc build`"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class _InvalidField(Exception):
    """(path of the field, what is wrong with it)."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict. Raises ValueError for a repeated key. A hook for `json.loads`."""
    result = dict(pairs)
    if len(result) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(name)} appears twice in one object")
    return result


def no_constants(text: str) -> NoReturn:
    """Raise ValueError for NaN and infinities. A hook for `json.loads`."""
    raise ValueError(f"{text} is not a JSON number")


def shown(value: Any) -> str:
    """Return any `value` in at most about 60 printable characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return ascii(value[:48])
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "a huge integer"
    return ascii(value)[:60]


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def decode(kind: Any, value: Any, source: str) -> Any:
    """Return `value` (plain JSON) as `kind` (a type hint).

    source: what `value` was read from, for messages, such as "manifest.json".
    Raises BundleError for the first invalid field.
    """
    try:
        return _decode(kind, value, "")
    except _InvalidField as error:
        path, complaint = error.args
        raise BundleError(f"{source}: {path or 'the whole'}: {complaint}", DAMAGED) from error


def _bad(path: str, complaint: str) -> NoReturn:
    raise _InvalidField(path, complaint)


def _decode(kind: Any, value: Any, path: str, depth: int = 0) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _decode(arguments[0], value, path)
        if complaint := arguments[1](value):
            _bad(path, f"{complaint}, got {shown(value)}")
        return value
    if origin in (typing.Union, types.UnionType):  # the only unions are `X | None`
        return None if value is None else _decode(arguments[0], value, path)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            _bad(path, f"must be {' or '.join(map(repr, arguments))}, got {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            _bad(path, f"must be a list, got {shown(value)}")
        return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            _bad(path, f"must be an object, got {shown(value)}")
        inner = {name: f"{path}[{shown(name)}]" for name in value}
        return {
            _decode(arguments[0], name, inner[name]): _decode(arguments[1], item, inner[name])
            for name, item in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, path)
    if kind is Any:
        return _decode_open(value, path, depth)
    return _decode_scalar(kind, value, path)


def _decode_record(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        _bad(path, f"must be an object, got {shown(value)}")
    hints, prefix = _fields(kind), f"{path}." if path else ""
    for name in hints:
        if name not in value:
            _bad(prefix + name, "the field is missing")
    for name in value:
        if name not in hints:
            _bad(prefix + shown(name)[1:-1], "unknown field in this bundle format")
    return kind(**{name: _decode(hint, value[name], prefix + name) for name, hint in hints.items()})


def _decode_open(value: Any, path: str, depth: int) -> Any:
    """Return any JSON value within the limits, for fields whose contents the format leaves open."""
    if depth > MAX_DEPTH:
        _bad(path, f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for name in value:
            _decode_scalar(str, name, f"{path}[{shown(name)}]")
        return {name: _decode(Any, item, f"{path}[{shown(name)}]", depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(Any, item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    return _decode_scalar(type(value), value, path)


def _decode_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= MAX_INT:
        value = float(value)  # JSON does not distinguish integers from floats
    if kind not in (bool, int, float, str) or type(value) is not kind:
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        wanted = words.get(kind, "plain JSON")
        _bad(path, f"must be {wanted}, got {shown(value)}")
    if isinstance(value, int) and abs(value) > MAX_INT:
        _bad(path, "the integer does not fit 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        _bad(path, "must be finite")
    if isinstance(value, str) and (len(value) > MAX_TEXT or _UNPRINTABLE.search(value)):
        _bad(path, f"must be one printable line of at most {MAX_TEXT} characters")
    return value


def plain(value: Any) -> Any:
    """Convert dataclasses, tuples and mappings to the dicts and lists of JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
