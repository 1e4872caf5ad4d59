"""Commands that succeed: their stdout, their stderr, their imports and exit codes."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.cli import app, bench, doctor, errors, main, output, progress, run, text
from llmc.compiler.request import TARGETS
from llmc.passes.quantize.formats import FORMATS
from llmc.plugins.cpu import library
from llmc.runtime.sampling import SamplingParams
from support.waiting import LONG, wait_until

COMMANDS = ("build", "run", "inspect", "report", "verify", "check", "bench", "doctor", "zoo")
OPTIONS = {
    "build": "-o --output --target --dtype --quant --exclude --sm --max-seq-len --revision "
    "--no-verify --dry-run --force --json",
    "run": "--prompts --chat --max-tokens --temperature --top-k --top-p --min-p --repetition-penalty --seed "
    "--stop --stream --no-stream --threads --kv-memory --json --greedy --system",
    "inspect": "--verify --json",
    "report": "-o --output --bench --force --json",
    "verify": "--against --text --min-top1 --max-kl --max-perplexity-increase --json",
    "check": "--full --json",
    "bench": "--prompt-tokens --new-tokens --concurrency --threads --fast --json",
    "doctor": "--json",
    "zoo list": "--json",
    "zoo make": "--seed",
}
NEVER_TO_RUN = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "rich",
    "huggingface_hub",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def llmc(capsys):
    """Run a command line in this process -> stdout. It must succeed; only a build may print its phases."""

    def call(*arguments):
        capsys.readouterr()
        code = main.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0
        assert all(re.match(r"\[ *[\d.]+ s\] ", line) for line in err.splitlines()), err
        assert not err or arguments[0] == "build"
        return out

    return call


@pytest.fixture
def stdin(monkeypatch):
    """Set what the next command reads from stdin."""

    def give(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


@pytest.fixture(scope="module")
def tiny(bundle):
    return bundle("llama-tiny")


@pytest.fixture(scope="module")
def engine(tiny):
    from llmc.runtime.load import load_engine

    return load_engine(tiny)


def process(*arguments, **options):
    """Run `llmc` in a separate process."""
    command = [sys.executable, "-m", "llmc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, **options)


# Help


def test_help_lists_every_command_and_exit_code(llmc):
    out = llmc("--help")
    assert "\x1b" not in out
    for command in COMMANDS:
        assert re.search(rf"^│ {command} +[A-Z]", out, re.MULTILINE), command
    exit_codes = out.partition("Exit codes:")[2]
    assert [int(code) for code in re.findall(r"^ +(\d+) ", exit_codes, re.MULTILINE)] == [
        errors.OK,
        errors.ERROR,
        errors.USAGE,
        errors.MISSED,
        errors.INTERNAL,
        errors.INTERRUPTED,
        errors.OUTPUT_CLOSED,
    ]
    assert "LLMC_TRACEBACK=1" in out
    assert llmc() == out
    assert llmc("-h") == out
    assert llmc("help") == out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_lists_its_options(llmc, command):
    out = llmc(*command.split(), "--help")
    assert f"Usage: llmc {command} " in out
    words = set(re.findall(r"-[-\w]+", out))
    assert set(f"{OPTIONS[command]} --quiet -q --verbose -v --log-level".split()) <= words
    assert llmc("help", *command.split()) == out


def test_help_shows_choices_groups_and_examples(llmc):
    out = llmc("build", "--help")
    for choices in (
        "cpu|tensorrt-rtx|tensorrt",
        "auto|fp32|bf16|fp16",
        "max|percentile|mse",
        "auto|fp16|fp8|int8",
    ):
        assert choices in out
    words = " ".join(out.replace("│", " ").split())
    assert f"Quantize the linear layers: {', '.join(FORMATS)}." in words
    for title in ("Engine", "Quantization", "Output"):
        assert re.search(rf"^╭─ {title} ─+╮$", out, re.MULTILINE), title
    assert re.search(r"Examples:\s+llmc build model_zoo/llama/tales -o tales\.llmc *\n", out)


def test_help_states_the_defaults_of_sampling(llmc):
    out = " ".join(llmc("run", "--help").replace("│", " ").split())
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        default = f"{getattr(SamplingParams(), name):g}"
        option = "--" + name.replace("_", "-")
        assert re.search(rf"{option} [A-Z] [^(]*\(default: (the bundle's, else )?{default}\b", out), name


def test_version(llmc):
    assert re.fullmatch(r"llmc \d+\.\d+\.\d+\n", llmc("--version"))
    assert llmc("-V") == llmc("--version")


def test_python_m_llmc_is_the_command():
    command = [sys.executable, "-m", "llmc", "help", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stdout) == (errors.USAGE, "")
    assert done.stderr.startswith("error: no such command 'nonsense'\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llmc zo", {"zoo"}),
        ("llmc zoo ", {"list", "make"}),
        ("llmc build x --target ", set(TARGETS)),
        ("llmc build x --quant nv", {name for name in FORMATS if name.startswith("nv")}),
        ("llmc run x --log-level ", set(output.LEVELS)),
    ],
)
def test_completion_in_bash(line, expected):
    words = line.split(" ")
    variables = {"_LLMC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = process(env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == expected


# Start-up


def imported_by(*arguments):
    code = (
        "import json, sys\nfrom llmc.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print(json.dumps([code, *sys.modules]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=True)
    code, *modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    return set(modules)


def test_help_imports_nothing_heavy():
    heavy = (NEVER_TO_RUN - {"rich"}) | {"numpy", "openvino", "onnxruntime", "tokenizers"}
    assert not imported_by("--help") & heavy
    assert not imported_by("--version") & (heavy | {"rich"})


def test_run_does_not_import_what_only_a_build_needs(tiny):
    modules = imported_by("run", tiny, "Once", "--chat", "--max-tokens", "2")
    assert not modules & (NEVER_TO_RUN | {"openvino", "onnxruntime"})
    commands = modules & {f"llmc.cli.{name}" for name in app.COMMANDS}
    assert commands == {"llmc.cli.run"}


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_run_imports_the_library_of_its_engine_alone(bundle, name):
    modules = imported_by("run", bundle("llama-tiny", name), "Once", "--max-tokens", "2")
    assert modules & {"openvino", "onnxruntime"} == {name}
    assert not modules & NEVER_TO_RUN


# zoo


def test_zoo_list(llmc):
    from llmc.compiler.zoo import list_zoo

    header, first, *rest = llmc("zoo", "list").splitlines()
    assert header.split() == ["NAME", "FAMILY", "PARAMETERS", "WHAT", "IT", "HAS"]
    assert first.split(None, 3) == ["llama-tiny", "llama", "110,912", "llama3 rope scaling, tied embeddings"]
    assert [line.split()[0] for line in (first, *rest)] == [entry.name for entry in list_zoo()]
    models = json.loads(llmc("zoo", "list", "--json"))["models"]
    assert models[0]["name"] == "llama-tiny"
    assert models[0]["parameters"] == 110912


def test_zoo_make(llmc, tmp_path, checkpoint):
    out = llmc("zoo", "make", "llama-tiny", tmp_path / "new")
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'new'))}: \d+ KiB\n", out)
    made, expected = tmp_path / "new", checkpoint("llama-tiny")
    assert {f.name: f.read_bytes() for f in made.iterdir()} == {
        f.name: f.read_bytes() for f in expected.iterdir()
    }
    llmc("zoo", "make", "llama-tiny", tmp_path / "other", "--seed", 1)
    other = tmp_path / "other" / "model.safetensors"
    assert other.read_bytes() != (made / "model.safetensors").read_bytes()


# inspect


def test_inspect(llmc, tiny):
    out = llmc("inspect", tiny)
    facts, files = out.split("\n\n")
    lines = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert lines["name"] == "llama-tiny"
    assert lines["source"] == "llama-tiny (llama, LlamaForCausalLM, float32)"
    assert lines["engine"] == "native on cpu: it runs every layer of this model"
    assert lines["model"] == ("2 layers, hidden size 64, 4 heads, 2 KV heads of 16, vocabulary 384")
    assert lines["attention"] == "2 full"
    assert lines["context"].startswith("256 tokens")
    assert lines["fidelity"] == "not verified: switched off with --no-verify"
    assert "KV cache   512 bytes a token" in facts
    assert "--verify hashes every byte" in lines["integrity"]
    listed = sorted(str(file.relative_to(tiny)) for file in tiny.rglob("*") if file.is_file())
    listed.remove("manifest.json")
    assert [line.split()[0] for line in files.splitlines()] == ["FILE", *listed]


def test_inspect_as_json(llmc, tiny):
    record = json.loads(llmc("inspect", tiny, "--json", "--verify"))
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    assert record["manifest"] == manifest
    assert record["hashes_verified"] is True
    assert record["kv_bytes_per_token"] == 2 * 2 * (16 + 16) * 4  # layers, heads, K and V, fp32
    assert record["bytes"] == sum(file.stat().st_size for file in tiny.rglob("*") if file.is_file())


def test_inspect_names_windows(llmc, bundle):
    out = llmc("inspect", bundle("qwen2-tiny"))
    assert re.search(r"^attention +2 full, 2 sliding with a window of \d+$", out, re.MULTILINE)


# run


def test_run_prints_the_text_and_nothing_else(llmc, tiny, engine):
    [expected] = engine.generate(["Once"], SamplingParams(max_tokens=12))
    assert llmc("run", tiny, "Once", "--max-tokens", 12) == expected.text + "\n"
    assert llmc("run", tiny, "Once", "--max-tokens", 12, "--stream") == expected.text + "\n"


def test_run_as_json(llmc, tiny, engine):
    [expected] = engine.generate(["Once"], SamplingParams(max_tokens=12))
    record = json.loads(llmc("run", tiny, "Once", "--max-tokens", 12, "--json"))
    assert 0 < record.pop("first_token_seconds") < record.pop("seconds")
    assert record.pop("load_seconds") > 0
    assert record == {
        "schema_version": 1,
        "command": "run",
        "ok": True,
        "bundle": str(tiny),
        "seed": None,
        "prompt": "Once",
        "text": expected.text,
        "token_ids": list(expected.token_ids),
        "finish_reason": "length",
        "prompt_tokens": expected.prompt_tokens,
    }


def test_the_reported_seed_repeats_an_answer(llmc, tiny):
    options = ("run", tiny, "Ünce", "--max-tokens", 12, "--temperature", 5, "--json")
    out = llmc(*options)
    first = json.loads(out)
    assert '"prompt": "Ünce"' in out
    assert json.loads(llmc(*options, "--seed", first["seed"]))["token_ids"] == first["token_ids"]


def test_run_takes_every_sampling_option(llmc, tiny, engine):
    params = SamplingParams(9, 0.8, 40, 0.9, 0.01, 1.2, seed=5, stop=("zzz", "yyy"))
    [expected] = engine.generate(["Once"], params)
    options = "--max-tokens 9 --temperature 0.8 --top-k 40 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2"
    more = "--seed 5 --stop zzz --stop yyy --threads 1 --kv-memory 1M --json"
    record = json.loads(llmc("run", tiny, "Once", *options.split(), *more.split()))
    assert record["token_ids"] == list(expected.token_ids)


def test_run_stops_at_a_stop_string(llmc, tiny, engine):
    [whole] = engine.generate(["Once"], SamplingParams(max_tokens=12))
    stop = next(char for char in whole.text if char != "\ufffd")
    record = json.loads(llmc("run", tiny, "Once", "--max-tokens", 12, "--stop", stop, "--json"))
    assert record["finish_reason"] == "stop"
    assert record["text"] == whole.text.partition(stop)[0]


def test_run_reads_one_prompt_from_stdin(llmc, tiny, stdin):
    stdin("Once upon\na time\n")
    record = json.loads(llmc("run", tiny, "-", "--max-tokens", 3, "--json"))
    assert record["prompt"] == "Once upon\na time"


def test_run_serves_a_file_of_prompts_in_order(llmc, tiny, engine, tmp_path, stdin):
    prompts = ["one two three four five", "b", "the \u2028 end"]
    lines = "".join(f"{prompt}\n" for prompt in prompts)
    file = tmp_path / "prompts.txt"
    file.write_text(lines, encoding="utf-8")
    expected = [engine.generate([prompt], SamplingParams(max_tokens=8))[0] for prompt in prompts]
    out = llmc("run", tiny, "--prompts", file, "--max-tokens", 8)
    assert out == "\n".join(
        f"==> {number}: {prompt} <==\n{output.text}\n"
        for number, (prompt, output) in enumerate(zip(prompts, expected, strict=True), 1)
    )
    stdin(lines)
    records = llmc("run", tiny, "--prompts", "-", "--max-tokens", 8, "--json").splitlines()
    assert [json.loads(line)["prompt"] for line in records] == prompts
    assert [json.loads(line)["text"] for line in records] == [output.text for output in expected]


@pytest.mark.parametrize(
    "text", ["Once\nupon\n", "\ufeffOnce\r\nupon\r\n", "\ufeffOnce\nupon", "Once\r\nupon"]
)
def test_prompts_are_the_same_from_every_editor(text, tmp_path, stdin):
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode())
    stdin(text)
    assert [prompt.text for prompt in run.read_prompts("-", None)] == ["Once\nupon"]
    stdin(text)
    for source in (str(file), "-"):
        assert [prompt.text for prompt in run.read_prompts(None, source)] == ["Once", "upon"]


def test_run_chat(llmc, tiny, engine):
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    [expected] = engine.generate([ids], SamplingParams(max_tokens=4))
    record = json.loads(llmc("run", tiny, "Hello", "--chat", "--max-tokens", 4, "--json"))
    assert record["prompt"] == "Hello"
    assert record["prompt_tokens"] == len(ids)
    assert record["token_ids"] == list(expected.token_ids)


def test_serve_streams_and_keeps_the_order(engine):
    pieces = []
    prompts = [run.Prompt("a b c d e f"), run.Prompt("x")]
    answers = list(run.serve(engine, prompts, SamplingParams(max_tokens=5), on_text=pieces.append))
    assert [answer.prompt for answer in answers] == prompts
    assert sorted("".join(pieces)) == sorted("".join(answer.output.text for answer in answers))
    assert all(0 < answer.first_token_seconds <= answer.seconds for answer in answers)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("1.5gib", 3 << 29),
        ("4096", 4096),
        ("64kB", 64 << 10),
        ("1T", 1 << 40),
    ],
)
def test_sizes_of_memory(text, nbytes):
    assert run.parse_size(text) == nbytes


def test_run_on_a_terminal_streams_and_reports_statistics(tiny):
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "llmc", "run", str(tiny), "Once", "--max-tokens", "5"]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside) as child:
        os.close(inside)
        seen = b""
        while chunk := read_terminal(terminal):
            seen += chunk
    os.close(terminal)
    assert child.returncode == 0
    assert seen.startswith(f"loading {tiny} ...\r".encode())
    assert re.search(
        r"\r\n\d+ prompt tokens, 5 new ones in [\d.]+ s \([\d.]+ tok/s\), the first after \d+ ms; "
        r"loaded in [\d.]+ s\r\n$",
        seen.decode(),
    )


def read_terminal(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux: the other end is closed
        return b""


# bench


def test_bench(llmc, tiny):
    out = llmc("bench", tiny, "--prompt-tokens", 20, "--new-tokens", 4, "--concurrency", 3, "--threads", 1)
    assert re.search(r"^workload +3 x 20 prompt tokens, 4 new ones; median of 3 runs$", out, re.MULTILINE)
    for row in ("machine", "load", "first token", "prefill", "decode", "whole run"):
        assert re.search(rf"^{row}  ", out, re.MULTILINE), row


def test_bench_as_json(llmc, tiny):
    record = json.loads(llmc("bench", tiny, "--prompt-tokens", 20, "--new-tokens", 4, "--json"))
    assert (record["prompt_tokens"], record["new_tokens"], record["concurrency"]) == (20, 4, 1)
    assert len(record["runs"]) == bench.RUNS
    assert all(0 < one["first_token_seconds"] < one["seconds"] for one in record["runs"])
    assert record["median"]["decode_tokens_per_second"] > 0
    assert record["machine"]["cores"] >= 1
    assert record["preemptions"] == 0


# doctor


def test_doctor(llmc):
    out = llmc("doctor")
    assert re.search(r"^OpenVINO +its attention passed the test$", out, re.MULTILINE)
    assert re.search(r"^openvino +--engine openvino +==2026\.4\.\* +2026\.4\.\d+$", out, re.MULTILINE)
    assert re.search(r"^onnxruntime +--engine onnxruntime +>=[\d.]+ +[\d.]+$", out, re.MULTILINE)
    assert re.search(rf"^native engine +{library.choose()}$", out, re.MULTILINE)
    record = json.loads(llmc("doctor", "--json"))
    assert record["run"] is record["build"] is True
    gpu = {one["name"] for one in record["libraries"] if one["extra"] == "tensorrt"}
    assert gpu == {"tensorrt", "cuda-python"}
    missing = {one["name"] for one in record["libraries"] if not one["fits"]}
    assert record["tensorrt"] == (not missing & {"triton", *gpu})
    assert record["tensorrt-rtx"] == (not missing & {"triton", "tensorrt-rtx", "cuda-python"})
    assert record["openvino_attention"] == {"passed": True, "fault": None}
    assert record["native_engine"]["fault"] is None
    assert not {"openvino", "onnxruntime"} & {one["name"] for one in record["libraries"] if not one["extra"]}
    assert {"torch", "numpy"} <= {one["name"] for one in record["libraries"]}


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2026.4.1", "==2026.4.*", True),
        ("2026.5.0", "==2026.4.*", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("1.9", "<2,>=1.26", False),
        ("1.26", ">=1.26", True),
        ("10.0", ">=9.1", True),
        ("3.0", "", True),
    ],
)
def test_doctor_compares_versions(version, wanted, fits):
    assert doctor.satisfies(version, wanted) is fits


# build


def test_build_dry_run(llmc, checkpoint, tmp_path):
    output = tmp_path / "new.llmc"
    out = llmc("build", checkpoint("llama-tiny"), "-o", output, "--dry-run", "--max-seq-len", 64)
    assert list(tmp_path.iterdir()) == []
    facts, passes = out.split("\n\n")
    assert "family        llama: a family with a recipe\n" in facts
    assert "context       64 tokens\n" in facts
    assert "engine        native on cpu, fp32: it runs every layer of this model\n" in facts
    assert re.search(r"^weights +\d+ KiB to write \([\d,]+ bytes\)$", facts, re.MULTILINE)
    assert re.search(r"^verification +needs about \d+ MiB of memory, ", facts, re.MULTILINE)
    header, *rows = [line.split() for line in passes.splitlines()]
    assert header == ["pass", "matches", "expected", "near", "misses"]
    assert ["lower-rope", "4", "4", "0"] in rows
    assert ["fold-reshapes", "16", "-", "0"] in rows


def test_build_dry_run_as_json(llmc, checkpoint, tmp_path):
    output = tmp_path / "new.llmc"
    output.mkdir()
    out = llmc("build", checkpoint("llama-tiny"), "-o", output, "--dry-run", "--json")
    record = json.loads(out)
    assert (record["known_family"], record["output_exists"]) == (True, True)
    assert record["geometry"]["num_layers"] == 2
    assert record["bytes"]["weights"] > 400_000
    rope = next(one for one in record["passes"] if one["name"] == "lower-rope")
    assert (rope["matches"], rope["expected"], rope["near_misses"]) == (4, 4, [])
    assert list(output.iterdir()) == []


def test_build_names_the_bundle_after_the_checkpoint(llmc, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = llmc("build", checkpoint("llama-tiny"), "--no-verify")
    first, second = out.splitlines()
    assert re.fullmatch(
        r"llama-tiny.llmc: \d+ KiB, native on cpu, fp32, 256 tokens of context, built in [\d.]+ s", first
    )
    assert second == "not verified: switched off with --no-verify"
    assert os.listdir(tmp_path) == ["llama-tiny.llmc"]
    assert "llama-tiny" in llmc("inspect", "llama-tiny.llmc", "--verify")


@pytest.mark.slow
def test_build_verifies_and_prints_a_line_a_phase_when_piped(checkpoint, tmp_path):
    done = process("build", checkpoint("llama-tiny"), "-o", tmp_path / "new.llmc", "--json")
    assert done.returncode == 0
    assert all(re.match(r"note: |\[ *[\d.]+ s\] ", line) for line in done.stderr.splitlines())
    record = json.loads(done.stdout)
    assert record["path"] == str(tmp_path / "new.llmc")
    assert record["verification"]["status"] == "passed"
    assert record["verification"]["top1_agreement"] == 1
    assert set(record["seconds"]) >= {"trace", "write weights", "verify"}
    assert record["bytes"]["total"] > record["bytes"]["weights"] > 400_000
    assert record["geometry"]["vocab_size"] == 384
    assert {"name": "lower-rope", "matches": 4, "near_misses": 0} in record["passes"]


PHASES = "[ s] building\n[ s] trace\nnote: a [bold] note\n[ s] verify\n"


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("error", ""),
        ("warning", "note: a [bold] note\n"),
        ("info", PHASES),
        ("debug", PHASES.replace("[ s] verify\n", "[ s] trace: done\n[ s] verify\n[ s] verify: done\n")),
    ],
)
def test_progress_without_a_terminal(capsys, monkeypatch, level, expected):
    monkeypatch.setattr(output.state, "level", level)
    with progress.shown("building") as shown:
        shown.phase("trace")
        shown.bar(1, 2)
        shown.note("a [bold] note")
        shown.phase("verify")
    out, err = capsys.readouterr()
    assert (out, re.sub(r" in [\d.]+ s$", "", re.sub(r"\[ *[\d.]+ s", "[ s", err), flags=re.MULTILINE)) == (
        "",
        expected,
    )


def test_a_long_phase_says_how_far_it_is(capsys):
    seen = []

    def told():
        seen.append(capsys.readouterr().err)
        return re.search(r"calibrate: 25 %, about \d+ s left\n", "".join(seen))

    with progress.Lines(first=0.001, every=0.001) as lines:
        lines.phase("calibrate")
        lines.bar(1, 4)
        wait_until(told)


@pytest.mark.parametrize(
    ("done", "total", "seconds", "expected"),
    [
        (0, 4, 9.0, ""),
        (4, 4, 9.0, ""),
        (1, 4, 10.0, ", about 30 s left"),
        (10, 196, 60.0, ", about 19 min left"),
    ],
)
def test_the_estimate_of_a_phase(done, total, seconds, expected):
    assert progress.remaining(done, total, seconds) == expected


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    with contextlib.suppress(ValueError), progress.shown() as shown:
        for phase in ("read checkpoint", "trace", "verify"):
            shown.phase(phase)
            shown.bar(1, 2)
        shown.note("a [bold] note")
        raise ValueError
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b[1" not in err
    lines = [line.rstrip() for line in err.splitlines()]
    for expected in (r"  read checkpoint +0\.\d s", r"  trace +0\.\d s", r"  verify +0\.\d s  stopped"):
        assert any(re.fullmatch(expected, line) for line in lines), expected
    assert "note: a [bold] note" in lines


# Output


def test_a_closed_output_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llmc", "zoo", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=LONG)
    os.close(write)
    assert (done.returncode, done.stderr) == (errors.OUTPUT_CLOSED, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_output_is_an_error():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "llmc", "zoo", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=LONG)
    assert done.returncode == errors.ERROR
    assert done.stderr == (
        "error: cannot write: No space left on device\n"
        "hint: free some space, or write elsewhere; temporary files go to TMPDIR\n"
    )


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")],
)
def test_sizes_in_words(nbytes, shown):
    assert text.size(nbytes) == shown


_HEAVY = ("torch", "transformers", "onnx", "openvino", "onnxruntime", "tokenizers")
_STOP_AT_HEAVY = f"""import os, sys
def stop(event, values):
    if event == "import" and values[0] in {_HEAVY}:
        os.write(1, f"<{{values[0]}}>".encode())
        os._exit(0)
sys.addaudithook(stop)
from llmc.cli.main import main
main(sys.argv[1:])
"""


def test_a_build_says_what_it_does_before_it_imports_anything_heavy(checkpoint, tmp_path):
    """In a pipe too: CI has no terminal."""
    model, output = checkpoint("llama-tiny"), tmp_path / "x.llmc"
    command = [sys.executable, "-c", _STOP_AT_HEAVY, "build", str(model), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert re.fullmatch("<.*>", done.stdout)
    assert f"building {output} from {model}" in done.stderr.splitlines()[0]


def test_run_says_what_it_does_before_it_imports_anything_heavy(tiny):
    """On a terminal. Elsewhere there is nothing but the text of the model."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", _STOP_AT_HEAVY, "run", str(tiny), "Once"]
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, timeout=LONG, check=True)
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert re.fullmatch(rf"loading {re.escape(str(tiny))} \.\.\.\r<.*>", shown)
