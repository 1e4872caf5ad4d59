"""`llmc run`: plain text and JSONL in --prompts, sampling defaults of a bundle, conversations."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import main, prompts
from llmc.runtime.engine import Engine
from llmc.runtime.load import load_engine
from llmc.runtime.sampling import SamplingParams
from support.waiting import LONG

WITH_DEFAULTS = Path(__file__).parents[1] / "golden" / "format-3.llmc"  # greedy, repetition penalty 1.2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tiny(bundle: Callable[[str], Path]) -> Path:
    return bundle("llama-tiny")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny)


Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def llmc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process -> exit code, stdout, the lines of stderr."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code = main.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# Sampling defaults


def test_run_takes_the_bundle_s_defaults_unless_options_say_otherwise(llmc: Run) -> None:
    engine = load_engine(WITH_DEFAULTS)
    defaults = engine.default_params

    def expect(params: SamplingParams) -> list[int]:
        return list(engine.generate(["A hen"], replace(params, max_tokens=30))[0].token_ids)

    for options, params in (
        ([], defaults),
        (["--greedy"], SamplingParams()),
        (["--repetition-penalty", "1"], replace(defaults, repetition_penalty=1.0)),
        (["--temperature", "0.7", "--seed", "1"], replace(defaults, temperature=0.7, seed=1)),
        (["--greedy", "--repetition-penalty", "2"], SamplingParams(repetition_penalty=2.0)),
    ):
        code, out, _ = llmc("run", WITH_DEFAULTS, "A hen", "--max-tokens", 30, "--json", *options)
        assert (code, records(out)[0]["token_ids"]) == (0, expect(params)), options
    assert expect(defaults) != expect(SamplingParams())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--top-k", 5], "--top-k"),
        (["--top-p", 0.9, "--min-p", 0.1, "--temperature", 0], "--top-p, --min-p"),
        (["--top-k", 0, "--top-p", 1, "--min-p", 0], ""),  # turned off
        (["--top-k", 5, "--temperature", 0.5], ""),
        (["--repetition-penalty", 1.1], ""),
    ],
)
def test_filters_without_effect_are_noted(llmc: Run, options: list[object], named: str) -> None:
    code, _, err = llmc("run", WITH_DEFAULTS, "A hen", "--max-tokens", 1, *options)
    notes = [f"note: {named}: no effect, because decoding is greedy. Add --temperature, such as 0.7"]
    assert (code, err) == (0, notes if named else [])


def test_filters_of_lines_without_effect_are_noted(llmc: Run, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    common = {"prompt": "Once", "max_tokens": 1}
    sampled, filtered = {"temperature": 0.5}, {"top_k": 5, "min_p": 0.1}
    lines = [common, common | sampled | filtered, common | filtered, common | filtered]
    file.write_text("\n".join(map(json.dumps, lines)))
    noted = f"note: {file}:3: top_k, min_p: no effect, because decoding is greedy. Add a temperature"
    assert llmc("run", tiny, "--prompts", file)[2] == [f"{noted} (2 such lines)"]
    file.write_text(json.dumps(common | sampled))
    assert llmc("run", tiny, "--prompts", file, "--top-k", 5)[2] == []


def test_inspect_shows_the_defaults(llmc: Run, tiny: Path) -> None:
    facts = "greedy, repetition penalty 1.2 (generation_config.json; `llmc run --greedy` ignores it)"
    assert f"sampling   {facts}\n" in llmc("inspect", WITH_DEFAULTS)[1]
    assert "sampling   greedy\n" in llmc("inspect", tiny)[1]
    assert records(llmc("inspect", WITH_DEFAULTS, "--json")[1])[0]["manifest"]["sampling"]["top_k"] == 20


def test_sampling_defaults_in_words() -> None:
    from llmc.cli.inspect import describe_sampling
    from llmc.runtime.bundle.manifest import Sampling

    described = describe_sampling(Sampling(True, 0.6, 20, 0.95, 0.05, 1.05))
    assert described.startswith(
        "temperature 0.6, top-k 20, top-p 0.95, min-p 0.05, repetition penalty 1.05 ("
    )
    assert describe_sampling(Sampling(True, 1.0, 0, 1.0, 0.0, 1.0)).startswith("temperature 1 (")


# --prompts


LINES: list[dict[str, Any]] = [
    {"prompt": "Once", "id": "first", "max_tokens": 3},
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 1.0, "seed": 7},
    {"prompt": [65, 66], "id": 7},
    {"prompt": "A hen", "stop": ["e", "a"], "top_k": 5, "temperature": 0.8, "seed": 2},
]


def expected(engine: Engine) -> list[str]:
    chat = engine.tokenizer.encode_chat(LINES[1]["messages"])  # type: ignore[union-attr]
    asked: list[tuple[Any, dict[str, Any]]] = [
        ("Once", {"max_tokens": 3}),
        (chat, {"max_tokens": 4, "temperature": 1.0, "seed": 7}),
        ([65, 66], {}),
        ("A hen", {"stop": ("e", "a"), "top_k": 5, "temperature": 0.8, "seed": 2}),
    ]
    params = [SamplingParams(**{"max_tokens": 6, **options}) for _, options in asked]
    return [output.text for output in engine.generate([prompt for prompt, _ in asked], params)]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt", "-"])
def test_jsonl_has_prompts_messages_parameters_and_ids(
    llmc: Run, tiny: Path, engine: Engine, tmp_path: Path, name: str
) -> None:
    text = "".join(f"{json.dumps(line)}\n" for line in LINES)
    file = name if name == "-" else tmp_path / name
    if name != "-":
        (tmp_path / name).write_text(text)
    code, out, err = llmc("run", tiny, "--prompts", file, "--max-tokens", 6, "--json", stdin=text)
    assert (code, err) == (0, [])
    assert [one["text"] for one in records(out)] == expected(engine)
    assert [one.get("id") for one in records(out)] == ["first", None, 7, None]
    assert [one["prompt"] for one in records(out)] == ["Once", "Hello", "[65, 66]", "A hen"]
    assert llmc("run", tiny, "--prompts", file, "--max-tokens", 6, stdin=text)[1].startswith(
        "==> first: Once <==\n"
    )


BAD = {
    "no json": "the line is not JSON: Expecting value",
    "": "the line is empty",
    "[1]": "the line is a list, not an object",
    "{}": "the line has no prompt and no messages",
    '{"prompt": "x", "messages": []}': "the line has a prompt and messages",
    '{"prompt": ""}': "the prompt is empty or no text",
    '{"prompt": 5}': "the prompt is empty or no text",
    '{"prompt": []}': "the prompt is empty",
    '{"prompt": ["a"]}': "the prompt is not a list of token ids",
    '{"prompt": "\\ud800"}': "the prompt is not valid Unicode",
    '{"prompt": "x", "max_token": 3}': "there is no field 'max_token'",
    '{"prompt": "x", "max_tokens": 0}': "max_tokens is 0",
    '{"prompt": "x", "temperature": NaN}': "temperature is nan",
    '{"prompt": "x", "id": [1]}': "id is [1]",
    '{"messages": "x"}': "messages is no list",
    '{"messages": []}': "a conversation must be a non-empty list",
    '{"messages": [{"content": "x"}]}': "a conversation must be a non-empty list",
    f'{{"prompt": "{"word " * 300}"}}': "tokens, the context 256",
    "[" * 100_000: "the line is not JSON",
}


def test_bad_lines_are_reported_and_the_others_served(llmc: Run, tiny: Path, engine: Engine) -> None:
    good = '{"prompt": "Once", "id": "good"}'
    text = "\n".join([good, *BAD, good])
    code, out, err = llmc("run", tiny, "--prompts", "-", "--max-tokens", 3, stdin=text)
    assert code == main.ERROR
    [answer] = engine.generate("Once", SamplingParams(max_tokens=3))
    assert out == f"==> good: Once <==\n{answer.text}\n\n==> good: Once <==\n{answer.text}\n"
    assert all(line.startswith("hint: ") and len(line) > 8 for line in err[1::2])
    for number, (line, message) in enumerate(zip(err[::2], BAD.values(), strict=True), 2):
        assert line.startswith(f"error: stdin:{number}: {message}") or message in line


def test_bad_lines_have_a_record_too(llmc: Run, tiny: Path) -> None:
    text = '{"prompt": "Once"}\n{"id": 3, "prompt": "x", "top_p": 2}\n'
    code, out, _ = llmc("run", tiny, "--prompts", "-", "--max-tokens", 3, "--json", stdin=text)
    good, bad = records(out)
    assert (code, good["prompt"], bad["id"]) == (main.ERROR, "Once", 3)
    assert "top_p is 2" in json.dumps(bad)


def test_bad_lines_of_plain_text(llmc: Run, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"Once\n\n\xff\nA hen\n")
    code, out, err = llmc("run", tiny, "--prompts", file, "--max-tokens", 2)
    assert code == main.ERROR
    assert [line for line in out.splitlines() if line.startswith("==>")] == [
        "==> 1: Once <==",
        "==> 4: A hen <==",
    ]
    assert err[::2] == [f"error: {file}:2: the line is empty", f"error: {file}:3: the line is not UTF-8 text"]


def test_without_a_good_line_the_bundle_is_not_loaded(llmc: Run, tmp_path: Path) -> None:
    code, out, err = llmc("run", tmp_path / "nowhere.llmc", "--prompts", "-", stdin="\n\n")
    assert (code, out, len(err)) == (main.ERROR, "", 4)


@pytest.mark.parametrize(
    "line", ['{"a": 1}', "{", '{"prompt', '["prompt"]', 'Say: {"prompt": 3}', '"prompt"', "{prompt: x}"]
)
def test_plain_text_that_looks_like_json_stays_plain_text(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{line}\nOnce\n")
    assert [one.text for one in prompts.read_prompts(None, str(file))] == [line, "Once"]


def test_chat_wraps_prompts_and_puts_the_system_message_first(llmc: Run, tiny: Path, engine: Engine) -> None:
    own = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hi"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "Hi"},
        {"messages": own[1:]},
        {"messages": own},
        {"prompt": [65]},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    options = ("--chat", "--system", "Be brief.", "--max-tokens", 4, "--json")
    code, out, err = llmc("run", tiny, "--prompts", "-", *options, stdin=text)
    assert (code, err[0]) == (1, "error: stdin:4: token ids do not fit into the chat template")
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    brief = [{"role": "system", "content": "Be brief."}, *own[1:]]
    wanted = [
        engine.generate(tokenizer.encode_chat(each), SamplingParams(max_tokens=4))[0] for each in (brief, own)
    ]
    token_ids = [one.get("token_ids") for one in records(out)]
    assert token_ids == [list(wanted[index].token_ids) for index in (0, 0, 1)] + [None]


# A conversation


def talk(engine: Engine, *texts: str, system: str = "", **options: Any) -> list[str]:
    """The answers to messages, each with the conversation before it."""
    history: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for text in texts:
        history.append({"role": "user", "content": text})
        ids = engine.tokenizer.encode_chat(history)  # type: ignore[union-attr]
        answer = engine.generate(ids, SamplingParams(**options))[0].text
        history.append({"role": "assistant", "content": answer})
    return [message["content"] for message in history if message["role"] == "assistant"]


def test_a_conversation_has_a_history_and_a_system_message(llmc: Run, tiny: Path, engine: Engine) -> None:
    options = ("--chat", "--system", "Be brief.", "--max-tokens", 5)
    stdin = "Hello\r\n\nAnd you?\n/clear\nHello\n"
    code, out, err = llmc("run", tiny, *options, stdin=stdin)
    assert code == 0
    first, second = talk(engine, "Hello", "And you?", system="Be brief.", max_tokens=5)
    assert out == f"{first}\n{second}\n{first}\n"
    assert err == ["note: the answer was cut after 5 tokens"] * 3
    assert llmc("run", tiny, *options, "--no-stream", stdin=stdin)[1] == out
    assert [one["text"] for one in records(llmc("run", tiny, *options, "--json", stdin=stdin)[1])] == [
        first, second, first,
    ]  # fmt: skip


def test_a_full_context_is_an_error_and_the_conversation_goes_on(
    llmc: Run, tiny: Path, engine: Engine
) -> None:
    code, out, err = llmc("run", tiny, "--chat", "--max-tokens", 4, stdin="word " * 300 + "\nHello\n")
    assert code == main.ERROR
    assert out == talk(engine, "Hello", max_tokens=4)[0] + "\n"
    assert err[0].startswith("error: the prompt has ")
    code, out, err = llmc("run", tiny, "--chat", stdin="Hello\nHello\n")
    assert code == main.ERROR
    room = 256 - len(engine.tokenizer.encode_chat([{"role": "user", "content": "Hello"}]))  # type: ignore[union-attr]
    assert err[0] == f"note: the answer was cut after {room} tokens"
    assert "fill the context" in err[1]
    assert "/clear" in err[2]


def test_a_conversation_needs_messages(llmc: Run, tiny: Path) -> None:
    code, out, err = llmc("run", tiny, "--chat")
    assert (code, out, err[0]) == (main.ERROR, "", "error: there is no prompt")


def test_a_conversation_on_a_terminal_stops_an_answer_and_ends(tiny: Path) -> None:
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "llmc", "run", str(tiny), "--chat"]
    seen = b""

    def read(until: bytes) -> None:
        """Read what the program prints up to `until`."""
        nonlocal seen
        while until not in seen:
            assert select.select([terminal], [], [], LONG)[0], seen
            seen += os.read(terminal, 4096)
        seen = seen.partition(until)[2]

    environment = {**os.environ, "TERM": "dumb"}

    def heed_interrupts() -> None:
        """Undo what a shell does to programs in its background, and their children inherit."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        env=environment,
        preexec_fn=heed_interrupts,
    ) as child:
        os.close(inside)
        try:
            read(b"Ctrl-D ends")
            read(b"> ")
            os.write(terminal, b"Hello\n")
            read(b"cut after")  # the context is full: an answer came
            read(b"> ")
            for _ in range(5):  # at the prompt: a reminder, and no end
                os.kill(child.pid, signal.SIGINT)
                if select.select([terminal], [], [], 10)[0]:  # else it came just before the program read
                    break
            read(b"Ctrl-D ends")
            read(b"> ")
            os.write(terminal, b"\x04")
            child.wait(timeout=LONG)
        finally:
            child.kill()
    os.close(terminal)
    assert child.returncode == 0


class Interrupting:
    """A backend that interrupts its own process when it computes its n-th step."""

    def __init__(self, backend: Any, steps: int) -> None:
        self.backend, self.left = backend, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(self, batch: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.backend.forward(batch)


@pytest.fixture
def interrupted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = load_engine(tiny)
    engine.backend = Interrupting(engine.backend, 3)
    monkeypatch.setattr("llmc.runtime.load.load_engine", lambda *_, **__: engine)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' parent may ignore it
    yield engine
    left = signal.signal(signal.SIGINT, before)
    assert left is signal.default_int_handler, "the command must restore the handler"


def test_an_interrupt_stops_the_answer_and_keeps_the_conversation(
    llmc: Run, tiny: Path, engine: Engine, interrupted: Engine
) -> None:
    hello = "Hello " * 10  # more than a block of the cache
    code, out, err = llmc("run", tiny, "--chat", "--max-tokens", 8, stdin=f"{hello}\nGo on\n")
    assert code == 0
    [part] = talk(engine, hello, max_tokens=3)
    history = [
        {"role": "user", "content": hello},
        {"role": "assistant", "content": part},
        {"role": "user", "content": "Go on"},
    ]
    assert interrupted.tokenizer is not None
    ids = interrupted.tokenizer.encode_chat(history)
    assert out == f"{part}\n{engine.generate(ids, SamplingParams(max_tokens=8))[0].text}\n"
    assert err == ["note: the answer was stopped", "note: the answer was cut after 8 tokens"]
    assert not interrupted.has_unfinished
    assert interrupted.stats.cached_tokens > 0, "the interrupt discarded the cache"
