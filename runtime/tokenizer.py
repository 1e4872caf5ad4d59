"""A checkpoint's tokenizer and chat template, read from its files as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmc.runtime.detokenizer import Detokenizer, TokenBytes
from llmc.runtime.errors import BundleError, RequestError

Message = dict[str, Any]


class Tokenizer:
    """Text to token ids and back, and conversations to prompts.

    special_tokens: what the chat template sees under `bos_token`, `eos_token`, ...
    chat_template: Jinja source, or None for a model without one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads tokenizer.json and, where they exist, the configuration files beside it.

        Raises BundleError if tokenizer.json is missing or a file cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{directory} has no tokenizer.json", "build the bundle again")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise BundleError(f"{path} cannot be read: {error}", "build the bundle again") from error
        config = _read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # since it exists, it says all that the older file said
            config |= _read_json(directory / "special_tokens_map.json")
        try:
            special_tokens = _special_tokens(config)
            _add_missing_tokens(backend, config, special_tokens)
            chat_template = _find_chat_template(directory, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"the tokenizer's configuration in {directory} is malformed: {error!r}",
                "build the bundle again",
            ) from error
        # Truncation and padding are leftovers of training; transformers does not apply them either.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return cls(backend, special_tokens, chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; ids may have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS and the like where the model's tokenizer adds them."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens left out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Turns the output that follows `prompt_ids` into text, token by token."""
        return Detokenizer(self._token_bytes, prompt_ids[-1] if prompt_ids else None)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.backend)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as one text, special tokens written out.

        messages: dicts with at least "role" (and usually "content"), plain JSON values throughout.
        variables: whatever else the template knows, such as `tools` or `enable_thinking`.
        Raises RequestError if there is no template, or it does not accept the conversation.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template", "send a plain prompt, or use the model's instruct version"
            )
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise RequestError(
                "a conversation must be a non-empty list of messages with a role",
                '[{"role": "user", "content": "Hello"}]',
            )
        try:
            # Through JSON and back: the template, code from a stranger, gets to see plain data only.
            given = {"messages": [_plain(message) for message in messages], **variables}
            data = json.loads(json.dumps(given))
        except (TypeError, ValueError) as error:
            raise RequestError(f"the messages are not plain JSON: {error}") from error
        values: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **data}
        try:
            return self._template.render(**values, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program; whatever it raises is about this request
            raise RequestError(
                f"the model's chat template refuses this conversation: {error}",
                "check the roles and their order (system, then user and assistant in turn)",
            ) from error

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of the conversation; the template wrote BOS and the like, so none are added."""
        return self.encode(self.apply_chat_template(messages, **variables), add_special_tokens=False)

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda fmt: datetime.now().strftime(fmt),
            namespace=_PublicNamespace,
        )
        return environment.from_string(self.chat_template or "")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _PublicNamespace(Namespace):
    """Jinja's namespace() without underscore names, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; models were trained on plain JSON.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(message: Message) -> Message:
    """Without None values, which templates would write out; reasoning under the names they read."""
    message = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _content(value: Any) -> str | None:
    """The text of a special token, written as a string or as {"content": ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The tokens that have a name: bos_token, eos_token, ..., and those a model adds."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    return {name: text for name, value in named.items() if (text := _content(value))}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Adds the tokens that the configuration names and tokenizer.json lacks, in order of their ids."""
    listed: dict[str, Any] = config.get("added_tokens_decoder") or {}
    # By all their properties, since the configuration may correct the properties of a token.
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    for _, properties in sorted(listed.items(), key=lambda item: int(item[0])):
        token = tokenizers.AddedToken(**properties)
        if repr(token) not in known:
            backend.add_tokens([token])
    texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    unnamed = [] if isinstance(extra, dict) else filter(None, map(_content, extra))
    for text in (*special_tokens.values(), *unnamed):
        if text not in texts:
            texts.add(text)
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _find_chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or else the template (of several, the default one) in the configuration."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is no valid JSON: {error}", "build the bundle again") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds a {type(content).__name__}, not an object", "build the bundle again")
    return content
