"""The Python API: `llmc.load`, its methods, and errors that name the argument."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime.load import load_engine
from support.waiting import LONG


@pytest.fixture(scope="module")
def path(bundle: Callable[[str], Path]) -> Path:
    return bundle("llama-tiny")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[llmc.LLM]:
    with llmc.load(path, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expect(path: Path) -> Callable[..., str]:
    """The text that an engine gives a prompt by itself."""
    engine = load_engine(path)
    return lambda prompt, **options: engine.generate([prompt], llmc.SamplingParams(**options))[0].text


def test_import_imports_nothing_heavy() -> None:
    code = (
        "import sys, json, llmc\n"
        "before = [name for name in sys.modules if name.partition('.')[0] != 'llmc']\n"
        "print(json.dumps([before, dir(llmc), llmc.__version__, str(llmc.SamplingParams(max_tokens=3))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=True
    )
    before, names, version, params = json.loads(done.stdout)
    assert not {"numpy", "openvino", "tokenizers", "jinja2", "dataclasses"} & set(before)
    assert set(llmc.__all__) <= set(names)
    assert version == llmc.__version__
    assert params.startswith("SamplingParams(max_tokens=3")


def test_every_public_name_exists_and_no_other() -> None:
    assert all(getattr(llmc, name) for name in llmc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = llmc.nonsense  # type: ignore[attr-defined]


def test_the_package_is_typed() -> None:
    assert (Path(llmc.__file__).resolve().parent / "py.typed").is_file()


def test_generate(llm: llmc.LLM, expect: Callable[..., str]) -> None:
    ids = llm.tokenizer.encode("Once")
    wanted = expect("Once", max_tokens=5)
    for prompt in ("Once", ["Once"], ids, [ids]):
        assert [output.text for output in llm.generate(prompt, max_tokens=5)] == [wanted]
    both = llm.generate(["Once", "A hen"], llmc.SamplingParams(max_tokens=5))
    assert [output.text for output in both] == [wanted, expect("A hen", max_tokens=5)]


def test_options_replace_fields_of_the_parameters(llm: llmc.LLM, expect: Callable[..., str]) -> None:
    params = llmc.SamplingParams(max_tokens=5, temperature=1.0)
    assert llm.generate("Once", params, seed=4, top_k=None)[0].text == expect(
        "Once", max_tokens=5, temperature=1.0, seed=4
    )
    two = llm.generate(["Once", "Once"], [params, llmc.SamplingParams(max_tokens=2)], temperature=0)
    assert [len(output.token_ids) for output in two] == [5, 2]
    stopped = llm.generate("Once", max_tokens=5, stop=expect("Once", max_tokens=5)[-1])[0]
    assert stopped.finish_reason == "stop"


def test_options_start_from_the_defaults_of_the_bundle() -> None:
    with llmc.load(Path(__file__).parents[1] / "golden" / "format-3.llmc") as llm:
        assert llm.default_params == llmc.SamplingParams(top_k=20, repetition_penalty=1.2)
        given = llm.default_params, llmc.SamplingParams(repetition_penalty=1.0)
        by_default, plain = (llm.generate([65, 32], params, max_tokens=30)[0] for params in given)
        assert llm.generate([65, 32], max_tokens=30)[0].token_ids == by_default.token_ids
        assert by_default.token_ids != plain.token_ids


def test_stream(llm: llmc.LLM, expect: Callable[..., str]) -> None:
    pieces = [output.new_text for output in llm.stream("Once", max_tokens=5)]
    assert len(pieces) == 5
    assert "".join(pieces) == expect("Once", max_tokens=5)
    with pytest.raises(llmc.RequestError, match="max_tokens is 0"):
        llm.stream("Once", max_tokens=0)


def test_chat(llm: llmc.LLM, expect: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    wanted = expect(llm.tokenizer.encode_chat(messages), max_tokens=4)
    assert llm.chat(messages, max_tokens=4).text == wanted
    assert llm.chat("Hello", system="Be brief.", max_tokens=4).text == wanted
    prompt = llm.chat_prompt("Hello", system="Be brief.")
    assert [output.new_text for output in llm.stream(prompt, max_tokens=4)][-1] in wanted
    plain = llm.chat_prompt("Hello", chat_template_kwargs={"add_generation_prompt": False})
    assert len(plain) < len(llm.chat_prompt("Hello"))


WRONG: list[tuple[str, Callable[[llmc.LLM], Any], str]] = [
    ("max_token", lambda it: it.generate("x", max_token=3), "did you mean max_tokens?"),  # type: ignore[call-arg]
    ("n", lambda it: it.generate("x", n=3), "there are max_tokens, "),  # type: ignore[call-arg]
    ("max_tokens", lambda it: it.generate("x", max_tokens="3"), "max_tokens must be"),  # type: ignore[arg-type]
    ("prompts", lambda it: it.generate({"prompt": "x"}), "give a text"),
    ("params", lambda it: it.generate("x", 3), "SamplingParams"),  # type: ignore[arg-type]
    ("prompt", lambda it: it.stream(3), "give a text"),  # type: ignore[arg-type]
    ("messages", lambda it: it.chat({"role": "user"}), "give a text, or a list"),  # type: ignore[arg-type]
    ("system", lambda it: it.chat("x", system=3), "must be a text"),  # type: ignore[arg-type]
    ("chat_template_kwargs", lambda it: it.chat("x", chat_template_kwargs=3), "give a dict"),  # type: ignore[arg-type]
    ("chat_template_kwargs", lambda it: it.chat("x", chat_template_kwargs={"self": 3}), "a variable of"),
]


@pytest.mark.parametrize(("argument", "call", "hint"), WRONG)
def test_an_error_names_the_argument(
    llm: llmc.LLM, argument: str, call: Callable[[llmc.LLM], Any], hint: str
) -> None:
    with pytest.raises(llmc.RequestError, match=rf"\b{argument}\b") as caught:
        call(llm)
    assert caught.value.argument == argument
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"threads": -1},
        {"threads": 1.5},
        {"max_sequences": 0},
        {"max_sequences": None},
        {"max_batch_tokens": "8"},
        {"kv_memory": "1G"},
        {"kv_memory": True},
        {"prefix_cache": 1},
        {"fast": "no"},
    ],
    ids=str,
)
def test_an_option_of_load_is_checked_before_the_bundle_is_opened(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(llmc.RequestError, match=f"{name} is ") as caught:
        llmc.load("never-opened.llmc", **options)
    assert caught.value.argument == name
    assert caught.value.hint.startswith(f"{name} must be ")


def test_a_bundle_is_a_path() -> None:
    with pytest.raises(llmc.RequestError, match="bundle is of type int"):
        llmc.load(3)  # type: ignore[arg-type]
    with pytest.raises(llmc.BundleError, match="does not exist"):
        llmc.load("nowhere.llmc")


def test_a_closed_model_says_so(path: Path) -> None:
    with llmc.load(path, threads=1) as llm:
        stream = llm.stream("Once", max_tokens=9)
        next(stream)
    assert [output.finish_reason for output in stream] == ["abort"]
    with pytest.raises(llmc.RequestError, match="closed"):
        llm.generate("Once")
    llm.close()


def test_many_threads_may_use_one_model(llm: llmc.LLM, expect: Callable[..., str]) -> None:
    prompts = [f"{number} hens" for number in range(6)]

    def ask(prompt: str) -> str:
        if int(prompt[0]) % 2:
            return llm.generate(prompt, max_tokens=6)[0].text
        return "".join(output.new_text for output in llm.stream(prompt, max_tokens=6))

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, prompts))
    assert answers == [expect(prompt, max_tokens=6) for prompt in prompts]
