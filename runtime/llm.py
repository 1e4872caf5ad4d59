"""The Python API: `llmc.load(path)` returns an `LLM`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

from llmc.runtime.arguments import Prompt, as_params
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.engine import Engine, RequestOutput
from llmc.runtime.errors import RequestError
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from llmc.runtime.tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams, as keyword arguments. None is the same as leaving the argument out."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    kv_memory: int | None = None,
    max_batch_tokens: int = 2048,
    max_sequences: int = 64,
    threads: int | None = None,
    prefix_cache: bool = True,
    fast: bool = False,
) -> LLM:
    """Open and check a bundle, and load its engine. Close the result, or use it in a `with` statement.

    kv_memory: the bytes of the KV cache. The default is enough for `max_sequences` full contexts, within a
        quarter of the free memory and 4 GiB.
    max_batch_tokens: the maximum number of tokens in a step. Longer prompts are prefilled in chunks.
    max_sequences: the maximum number of sequences in a step. More requests wait for their turn.
    threads: the number of CPU threads. The default is one per physical core that the process may use.
    prefix_cache: reuse the KV blocks of equal prefixes.
    fast: quantize activations to int8 in layers with int8 or int4 weights. This changes the output.
    Raises BundleError, BackendError, RequestError.
    """
    return LLM(
        load_engine(
            bundle,
            kv_memory=kv_memory,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            threads=threads,
            prefix_cache=prefix_cache,
            fast=fast,
        )
    )


class LLM:
    """A loaded bundle.

    All methods may be called from any number of threads at the same time. Requests of all threads are
    computed together, in the same steps.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def default_params(self) -> SamplingParams:
        """The sampling parameters of requests that choose none: the bundle's, else greedy decoding."""
        return self.engine.default_params

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises RequestError if the bundle has none."""
        if self.engine.tokenizer is None:
            raise RequestError("the bundle has no tokenizer", "give prompts as token ids")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: str | Iterable[int] | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[RequestOutput]:
        """Generate an output for every prompt. Return the outputs in the order of the prompts.

        prompts: texts, or lists of token ids. A single one needs no list around it.
        params: sampling parameters for all prompts, or a list with one for each. The default is
            `default_params`.
        options: fields of SamplingParams that replace those in `params`.
        Raises RequestError, which names the argument.
        """
        return self.engine.generate(prompts, self._params(params, options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[RequestOutput]:
        """Yield the output after each of its tokens. `new_text` is the text that the token added.

        Closing the iterator ends the request. Errors are raised at the call, not at the first token.
        """
        (checked,) = as_params(self._params(params, options), 1, self.default_params)
        return self.engine.stream(prompt, checked)

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> RequestOutput:
        """Generate the next message of a conversation.

        messages: dicts with "role" and "content", the newest last. A text is one message of the user.
        system: a system message to put before them.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
        """
        prompt = self.chat_prompt(messages, system=system, chat_template_kwargs=chat_template_kwargs)
        (checked,) = as_params(self._params(params, options), 1, self.default_params)
        return self.engine.generate([prompt], checked)[0]

    def chat_prompt(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, for `generate` or `stream`. The arguments are `chat`'s."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if isinstance(messages, Mapping | bytes) or not isinstance(messages, Sequence):
            hint = 'give a text, or a list such as [{"role": "user", "content": "Hello"}]'
            raise RequestError(f"messages is of type {type(messages).__name__}", hint, "messages")
        if system is not None and not isinstance(system, str):
            raise RequestError(f"system is {system!r}", "system must be a text, or None", "system")
        variables = _template_variables(chat_template_kwargs)
        first = [] if system is None else [{"role": "system", "content": system}]
        return self.tokenizer.encode_chat([*first, *messages], **variables)

    def close(self) -> None:
        """End all requests and release the engine. Later requests raise RequestError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, options: Mapping[str, Any]
    ) -> SamplingParams | list[SamplingParams] | None:
        """Return `params` with the fields of `options` replaced."""
        names = [field.name for field in fields(SamplingParams)]
        for name in options:
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise RequestError(f"there is no argument {name}", hint, name)
        changes = {name: value for name, value in options.items() if value is not None}
        if params is None or isinstance(params, SamplingParams):
            return replace(params or self.default_params, **changes)
        count = len(params) if isinstance(params, Sequence) else 1
        return [replace(each, **changes) for each in as_params(params, count, self.default_params)]


def _template_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(variables, Mapping | None):
        message = f"chat_template_kwargs is of type {type(variables).__name__}"
        hint = 'give a dict, such as {"enable_thinking": False}'
        raise RequestError(message, hint, "chat_template_kwargs")
    for name in variables or ():
        if not isinstance(name, str) or name in ("self", "messages"):
            message, hint = (
                f"chat_template_kwargs has the key {name!r}",
                "it must be a variable of the template",
            )
            raise RequestError(message, hint, "chat_template_kwargs")
    return dict(variables or {})
