"""Read the prompts of `llmc run`: one text, or the lines of a file as plain text or JSON objects (JSONL)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmc.runtime.errors import RequestError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_KINDS = ("prompt", "messages")


@dataclass(frozen=True)
class Prompt:
    """A prompt, or the error of a line that is not one."""

    #: The prompt, or a description of it in the output: the last message, or the list of token ids.
    text: str
    #: The file and line that it came from; "" for the command line.
    where: str = ""
    #: The token ids to continue; None: `text` or `messages` are encoded.
    token_ids: list[Any] | None = None
    #: The conversation to continue, in the chat template; None: there is none.
    messages: list[Any] | None = None
    #: The id that the line sets.
    id: str | int | None = None
    #: The sampling parameters that the line sets.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: The reason why the line is not a prompt.
    error: RequestError | None = None


def read_prompts(prompt: str | None, file: str | None) -> list[Prompt]:
    """Return the prompts that the command line selects. For a line that is not a prompt, `error` is set.

    prompt: the prompt argument; "-" for stdin
    file: the file of --prompts; "-" for stdin

    Raises RequestError if there is no prompt, or the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise RequestError("there is a prompt and --prompts", "leave one of them out", "prompts")
    if file is not None:
        name = "stdin" if file == "-" else file
        lines = _read(file, name, errors="surrogateescape").split("\n")
        read = _read_json if _is_jsonl(file, lines) else _read_text
        return [read(line, f"{name}:{number}") for number, line in enumerate(lines, 1)]
    if prompt is None:
        hint = 'give it after the bundle ("Once upon a time"), - for stdin, or --prompts FILE'
        raise RequestError("there is no prompt", f"{hint}; --chat alone is a conversation", "prompt")
    text = _read("-", "stdin") if prompt == "-" else prompt
    if not _is_utf8(text):  # bytes of the command line that Python could not decode
        raise RequestError("the prompt is not valid UTF-8", "give it in a file with --prompts", "prompt")
    if not text:
        argument = "" if prompt == "-" else "prompt"
        raise RequestError("the prompt is empty", "give at least one character", argument)
    return [Prompt(text)]


def _is_jsonl(file: str, lines: list[str]) -> bool:
    """Return whether lines are JSON objects: by the file's suffix, or if one is an object with a prompt."""
    if Path(file).suffix.lower() in JSONL_SUFFIXES:
        return True
    return lines[0].lstrip().startswith("{") and any(map(_is_object_with_prompt, lines))


def _is_object_with_prompt(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(kind in value for kind in _KINDS)


def _read_text(line: str, where: str) -> Prompt:
    if not _is_utf8(line):
        return _bad(where, "the line is not UTF-8 text", "convert the file")
    if not line.strip():
        return _bad(where, "the line is empty", "write one prompt on each line")
    return Prompt(line, where)


def _read_json(line: str, where: str) -> Prompt:
    """Read {"prompt": text or token ids, or "messages": [...], "id": ..., and sampling parameters}."""
    from llmc.runtime.sampling import SamplingParams

    hint = 'write one object on each line, such as {"prompt": "Once upon a time", "max_tokens": 40}'
    if not line.strip():
        return _bad(where, "the line is empty", hint)
    try:
        if not _is_utf8(line):
            raise ValueError("it is not UTF-8 text")
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return _bad(where, f"the line is not JSON: {reason}", hint)
    if not isinstance(record, dict):
        return _bad(where, f"the line is a {type(record).__name__}, not an object", hint)
    name = record.pop("id", None)
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        return _bad(where, f"id is {name!r}", "id must be a text or a whole number")
    kinds = [kind for kind in _KINDS if kind in record]
    if len(kinds) != 1:
        message = "the line has a prompt and messages" if kinds else "the line has no prompt and no messages"
        return _bad(where, message, "give one of them", name)
    value = record.pop(kinds[0])
    known = [parameter.name for parameter in fields(SamplingParams)]
    for key in record:
        if key not in known:
            return _bad(
                where, f"there is no field {key!r}", f"fields: id, {', '.join((*_KINDS, *known))}", name
            )
    try:
        SamplingParams(**record)
    except RequestError as error:
        return _bad(where, error.message, error.hint, name)
    if kinds == ["messages"]:
        if not isinstance(value, list):
            return _bad(where, "messages is no list", 'such as [{"role": "user", "content": "Hello"}]', name)
        return Prompt(_last_text(value), where, messages=value, id=name, options=record)
    if isinstance(value, list):
        return Prompt(json.dumps(value), where, token_ids=value, id=name, options=record)
    if not isinstance(value, str) or not value:
        return _bad(
            where, "the prompt is empty or no text", "prompt must be a text or a list of token ids", name
        )
    return Prompt(value, where, id=name, options=record)


def _bad(where: str, message: str, hint: str, name: str | int | None = None) -> Prompt:
    return Prompt("", where, id=name, error=RequestError(f"{where}: {message}", hint))


def _last_text(messages: list[Any]) -> str:
    content = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else messages
    return content if isinstance(content, str) else json.dumps(content)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(file: str, name: str, errors: str = "strict") -> str:
    """Return the text of a file, or of stdin for "-".

    name: the name of the file in messages
    errors: Python's error handler for bytes that are not UTF-8

    The byte order mark and the last newline are removed, and CRLF becomes LF.
    Raises RequestError if the file cannot be read or is not UTF-8.
    """
    if file == "-" and sys.stdin is None:
        raise RequestError("stdin is closed", "give the prompt as an argument, or --prompts FILE")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig", errors).replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise RequestError(
            f"cannot read the prompts in {name}: {error.strerror or error}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}", "convert it"
        ) from error
