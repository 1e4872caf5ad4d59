"""Checks of the arguments that a Python program passes. Every error names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from llmc.runtime.errors import RequestError
from llmc.runtime.sampling import SamplingParams

Prompt = str | Sequence[int]  # a text, or token ids
_PROMPTS = "give a text, a list of token ids, or a list of these"


def as_prompts(prompts: str | Iterable[int] | Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts as a list. A text or a list of token ids is one prompt.

    Raises RequestError for anything else.
    """
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = _as_list(prompts, "prompts")
    if items and all(map(_is_token_id, items)):
        return [items]
    return [
        item if isinstance(item, str) else _as_list(item, f"prompts[{i}]") for i, item in enumerate(items)
    ]


def as_prompt(prompt: Any) -> Prompt:
    """Return one prompt: a text, or a list of token ids whose values are not checked."""
    return prompt if isinstance(prompt, str) else _as_list(prompt, "prompt")


def as_params(params: Any, count: int, default: SamplingParams) -> list[SamplingParams]:
    """Return sampling parameters for `count` prompts.

    params: None for `default`, one SamplingParams for all prompts, or a list with one for each.
    Raises RequestError for anything else.
    """
    if params is None:
        return [default] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Sequence):
        raise _wrong_params("params", params)
    for i, item in enumerate(params):
        if not isinstance(item, SamplingParams):
            raise _wrong_params(f"params[{i}]", item)
    if len(params) != count:
        message = f"{count} prompts but {len(params)} sampling parameters"
        raise RequestError(message, "give one for each prompt", "params")
    return list(params)


def check_count(name: str, value: Any, optional: bool = False) -> None:
    """Raise RequestError unless `value` is a whole number of at least 1, or None if it is optional."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        hint = f"{name} must be a whole number of at least 1" + (", or None" if optional else "")
        raise RequestError(f"{name} is {value!r}", hint, name)


def check_flag(name: str, value: Any) -> None:
    """Raise RequestError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}", f"{name} must be True or False", name)


def _as_list(value: Any, name: str) -> list[Any]:
    unordered = isinstance(value, str | bytes | bytearray | Mapping | Set)
    if unordered or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {_kind(value)}", _PROMPTS, name.partition("[")[0])
    return list(value)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _wrong_params(name: str, value: Any) -> RequestError:
    hint = "give SamplingParams(...), or a list with one for each prompt"
    return RequestError(f"{name} is {_kind(value)}", hint, "params")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
