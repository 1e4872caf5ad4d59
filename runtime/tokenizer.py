"""A checkpoint's tokenizer and chat template, with the behaviour of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmc.runtime.detokenizer import Detokenizer, TokenBytes
from llmc.runtime.errors import BundleError, RequestError
from llmc.runtime.text_encoder import (
    TextEncoder,
    errors_as_values,
    quiet_decoder,
    quiet_stderr,
    read_tokenizer,
)
from llmc.runtime.worker import Worker, WorkerError

Message = dict[str, Any]

_TEMPLATES = Worker()
#: Kind of an error in a template -> message and hint. The kinds are those of `worker.py`.
_TEMPLATE_ERRORS = {
    "refused": (
        "the model's chat template refuses this conversation",
        "check the roles and their order (system, then user and assistant in turn)",
    ),
    "failed": (
        "the model's chat template fails on this conversation",
        "check the messages: most templates need a text in `content`",
    ),
    "invalid": ("the model's chat template is not valid", "send a plain prompt, which needs no template"),
    "limit": (
        "the model's chat template exceeds a limit on this conversation",
        "send a plain prompt, which needs no template, or fewer and shorter messages",
    ),
}


class Tokenizer:
    """Converts between text and token ids, and conversations to prompts.

    special_tokens: the values of `bos_token`, `eos_token`, ... in the chat template.
    chat_template: Jinja source, or None for a model without one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self._encoder = TextEncoder(backend)
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and the configuration files in its directory, if they exist.

        Raises BundleError if tokenizer.json is missing or a file cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{directory} has no tokenizer.json", "build the bundle again")
        try:
            backend = read_tokenizer(path)
        except ValueError as error:
            raise BundleError(f"{path} cannot be read: {error}", "build the bundle again") from error
        config = _read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # else a newer file, which includes special_tokens_map.json
            config |= _read_json(directory / "special_tokens_map.json")
        try:
            special_tokens = _special_tokens(config)
            with quiet_stderr(), errors_as_values():
                _add_missing_tokens(backend, config, special_tokens)
            chat_template = _find_chat_template(directory, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"the tokenizer's configuration in {directory} is malformed: {error!r}",
                "build the bundle again",
            ) from error
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        return cls(backend, special_tokens, chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id plus one. Ids can have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with BOS and other special tokens if the tokenizer adds them.

        Raises RequestError if the tokenizer cannot encode it.
        """
        return self._encoder.encode(text, add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids` without special tokens.

        Raises RequestError if the tokenizer cannot decode them.
        """
        try:
            with quiet_decoder(self.backend)(), errors_as_values():
                return self.backend.decode(list(token_ids), skip_special_tokens=True)
        except ValueError as error:
            raise RequestError(
                f"the tokenizer cannot decode these tokens: {error}", "are they this model's?"
            ) from error

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Return a detokenizer for the output that follows `prompt_ids`."""
        return Detokenizer(self._token_bytes, prompt_ids[-1] if prompt_ids else None)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.backend)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Render the conversation as one text that includes special tokens.

        messages: dicts with at least "role" and usually "content". All values are plain JSON.
        variables: other variables of the template, such as `tools` or `enable_thinking`.
        Raises RequestError if there is no template, if it does not accept the conversation, or if it takes
        more time or memory than a template may.
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
            # Through JSON and back, because the template is untrusted code and must see plain data only.
            untrusted = {"messages": [_plain(message) for message in messages], **variables}
            data = json.loads(json.dumps(untrusted))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are not plain JSON: {error}") from error
        values = {"tools": None, "documents": None, **self.special_tokens, **data}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return _TEMPLATES.call(template=self.chat_template, values=values)["text"]
        except WorkerError as error:
            message, hint = _TEMPLATE_ERRORS[error.kind]
            raise RequestError(f"{message}: {error}", hint) from error

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the token ids of the conversation. The template adds BOS, so the tokenizer does not."""
        return self.encode(self.apply_chat_template(messages, **variables), add_special_tokens=False)


def _plain(message: Message) -> Message:
    """Return a message without None values, which templates would print. Reasoning gets all known names."""
    message = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _content(value: Any) -> str | None:
    """Return the text of a special token, given as a string or as {"content": ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return name -> text of the special tokens: bos_token, eos_token, ..., and a model's extra names."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    return {name: text for name, value in named.items() if (text := _content(value))}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Add the tokens that the configuration has and tokenizer.json lacks, in the order of their ids."""
    listed: dict[str, Any] = config.get("added_tokens_decoder") or {}
    # All properties are compared, because the configuration may correct the properties of a token.
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
    """Return chat_template.jinja, or else the (default) template in the configuration, or None."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise TypeError(f"chat_template is a {type(template).__name__}")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no valid JSON: {error}", "build the bundle again") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds a {type(content).__name__}, not an object", "build the bundle again")
    return content
