"""Bad input of every kind: one `error:` line, one `hint:` line, the right exit code, no partial files."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.cli import errors, main
from llmc.cli.build import LIBRARIES
from llmc.runtime.bundle.manifest import FileRecord, Manifest
from llmc.runtime.installation import install_hint, upgrade_hint
from support.mutated_bundles import seal
from support.waiting import LONG, wait_until


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def fails(capsys):
    """Run a command line in this process, which must fail with exactly two lines -> (error, hint)."""

    def call(*arguments, code=errors.ERROR):
        capsys.readouterr()
        got = main.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert got == code
        if "--json" not in arguments:
            assert out == ""
        error, hint = without_phases(err)
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert len(hint) > len("hint: ")
        return error.removeprefix("error: "), hint.removeprefix("hint: ")

    return call


def without_phases(err):
    """The lines of stderr without those that a build prints for its phases."""
    return [line for line in err.splitlines() if not re.match(r"\[ *[\d.]+ s\] ", line)]


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy of llama-tiny's checkpoint, to be damaged."""
    return shutil.copytree(checkpoint("llama-tiny"), tmp_path / "in" / "model")


@pytest.fixture
def build_fails(fails, tmp_path):
    """Run `llmc build`, which must fail and leave nothing behind -> (error, hint)."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()  # as the command does where it is the first to import it
    (tmp_path / "out").mkdir()

    def call(checkpoint, *options, code=errors.ERROR):
        bundle = tmp_path / "out" / "new.llmc"
        failure = fails("build", checkpoint, "-o", bundle, "--no-verify", *options, code=code)
        assert os.listdir(tmp_path / "out") == []
        return failure

    return call


@pytest.fixture
def tiny(bundle, tmp_path):
    """A copy of llama-tiny's bundle, to be damaged."""
    return shutil.copytree(bundle("llama-tiny"), tmp_path / "tiny.llmc")


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensors(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def odd_checkpoint(directory, **config):
    """Write a checkpoint of another architecture, with one tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensor = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    write_tensors(directory / "model.safetensors", tensor, bytes(4))
    return directory


# build: the checkpoint's files


def test_missing_directory(build_fails, tmp_path):
    error, hint = build_fails(tmp_path / "nowhere")
    assert error == f"there is no directory {tmp_path / 'nowhere'}"
    assert "check the path" in hint


def test_no_config(build_fails, model):
    (model / "config.json").unlink()
    assert build_fails(model)[0] == f"{model} has no config.json"


def test_lfs_pointer(build_fails, model):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model.safetensors").write_text(pointer)
    error, hint = build_fails(model)
    assert error == f"{model / 'model.safetensors'} is a git-LFS pointer, not the file itself"
    assert "git lfs pull" in hint


def test_truncated_weights(build_fails, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    error, hint = build_fails(model)
    assert "truncated" in error
    assert "download" in hint


def test_overlapping_tensors(build_fails, model):
    header, data = header_of(model / "model.safetensors")
    second = sorted((e["data_offsets"], name) for name, e in header.items() if name != "__metadata__")[1][1]
    header[second]["data_offsets"] = [offset - 4 for offset in header[second]["data_offsets"]]
    write_tensors(model / "model.safetensors", header, data)
    assert f"tensor {second!r} overlaps the tensor before it" in build_fails(model)[0]


def test_tensor_of_the_wrong_size(build_fails, model):
    header, data = header_of(model / "model.safetensors")
    header["model.norm.weight"]["shape"] = [63]
    write_tensors(model / "model.safetensors", header, data)
    assert "'model.norm.weight' has 256 bytes, F32 [63] needs 252" in build_fails(model)[0]


def test_missing_and_extra_tensors(build_fails, model):
    header, data = header_of(model / "model.safetensors")
    for layer in (0, 1):
        entry = header.pop(f"model.layers.{layer}.mlp.up_proj.weight")
        header[f"model.layers.{layer}.mlp.upp_proj.weight"] = entry
    header["model.stray"] = header.pop("model.norm.weight")
    write_tensors(model / "model.safetensors", header, data)
    error, hint = build_fails(model)
    assert error == (
        "the checkpoint does not fit its config.json: no model.layers.{0-1}.mlp.up_proj.weight "
        "(it has model.layers.{0-1}.mlp.upp_proj.weight); no model.norm.weight; unexpected model.stray"
    )
    assert "config.json" in hint


def test_pickled_weights(build_fails, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error, hint = build_fails(model)
    assert "only pickled weights (pytorch_model.bin), which llmc never loads" in error
    assert "save_pretrained" in hint


# build: the architecture


def test_architecture_that_transformers_does_not_know(build_fails, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nosuchmodel\x1b[31m"}))
    error, hint = build_fails(model)
    assert "does not know the architecture 'nosuchmodel" in error
    assert "\x1b" not in error
    assert "llama" in hint


def test_encoder(build_fails, tmp_path):
    config = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    error, _ = build_fails(
        odd_checkpoint(tmp_path / "bert", model_type="bert", vocab_size=99, **config), "--max-seq-len", 32
    )
    assert error == "BertSelfAttention (layer 0) uses attention that is not causal"


def test_encoder_and_decoder(build_fails, tmp_path):
    config = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
    error, hint = build_fails(odd_checkpoint(tmp_path / "t5", model_type="t5", **config), "--max-seq-len", 32)
    assert error == "transformers has no causal language model for model_type 't5'"
    assert "causal" in hint


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_state_space_model(build_fails, tmp_path, family):
    config = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 99, "state_size": 8}
    if family == "mamba2":
        config |= {"num_heads": 8, "head_dim": 16, "n_groups": 1}
    error, hint = build_fails(
        odd_checkpoint(tmp_path / family, model_type=family, **config), "--max-seq-len", 32
    )
    assert f"module backbone.layers.0.mixer ({family.capitalize()}Mixer) is a recurrent layer" in error
    assert "recurrent" in hint


# build: the output and the request


def test_output_exists(fails, model, tiny):
    before = sorted(os.listdir(tiny.parent))
    error, hint = fails("build", model, "-o", tiny)
    assert error == f"{tiny} exists"
    assert "--force" in hint
    assert sorted(os.listdir(tiny.parent)) == before


def test_force_replaces_a_bundle(capsys, model, tiny):
    (tiny / "rank0.program.json").write_bytes(b"damaged")
    assert main.main(["build", str(model), "-o", str(tiny), "--no-verify", "--force"]) == 0
    assert main.main(["inspect", str(tiny), "--verify"]) == 0
    assert without_phases(capsys.readouterr().err) == []
    assert sorted(os.listdir(tiny.parent)) == ["in", "tiny.llmc"]


def test_force_replaces_nothing_but_a_bundle(fails, model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    error, hint = fails("build", model, "-o", tmp_path / "home", "--force")
    assert "it has no readable manifest.json, so it is not a bundle" in error
    assert "remove it yourself" in hint
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "abacus"], "there is no target 'abacus'"),
        (["--dtype", "int3"], "there is no dtype 'int3'"),
        (["--max-seq-len", "0"], "--max-seq-len is 0"),
        (["--max-seq-len", "257"], "--max-seq-len 257 is more than the model's context of 256 tokens"),
        (["--revision", "main"], "is a local directory and has no revision 'main'"),
    ],
)
def test_impossible_request(build_fails, model, options, message):
    assert message in build_fails(model, *options, code=errors.USAGE)[0]


@contextlib.contextmanager
def largest_file(nbytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_in_a_build(build_fails, model, tmp_path):
    with largest_file(200_000):
        error, hint = build_fails(model)
    assert error == f"no space for {tmp_path / 'out' / 'new.llmc'}: File too large"
    assert "needs at least" in hint


def test_disk_full_in_zoo_make(fails, tmp_path):
    with largest_file(200_000):
        error, _ = fails("zoo", "make", "llama-tiny", tmp_path / "new")
    assert error == "cannot write: File too large"
    assert os.listdir(tmp_path) == []


def test_zoo_make_of_an_unknown_name(fails, tmp_path):
    error, hint = fails("zoo", "make", "gpt-9", tmp_path / "new", code=errors.USAGE)
    assert "gpt-9" in error
    assert "llama-tiny" in hint


def test_missing_build_libraries_stop_builds_only(tiny, model, tmp_path_factory):
    code = (
        "import sys\n"
        f"for name in {(*LIBRARIES, 'cuda')}: sys.modules[name] = None\n"
        "from llmc.cli.main import main\n"
        "print([main(command.split('|')) for command in sys.argv[1:]])"
    )
    commands = [
        f"build|{model}|-o|{model.parent / 'new.llmc'}",
        f"zoo|make|llama-tiny|{model.parent / 'new'}",
        f"run|{tiny}|Once|--max-tokens|2",
        f"inspect|{tiny}",
        f"report|{tiny}|--output|{tmp_path_factory.mktemp('report') / 'page.html'}",
        "zoo|list",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *commands], capture_output=True, text=True, timeout=LONG
    )
    lines = without_phases(done.stderr)
    missing = ["error: this command needs torch, which is not installed", f"hint: {install_hint('build')}"]
    assert lines == missing * 2
    assert done.stdout.splitlines()[-1] == "[1, 1, 0, 0, 0, 0]"
    assert os.listdir(model.parent) == ["model"]


def test_inspect_of_a_program_with_other_layers(fails, tiny):
    path = tiny / "rank0.program.json"
    program = json.loads(path.read_bytes())
    program["caches"] *= 2
    path.write_text(json.dumps(program))
    seal(tiny, path.name)
    assert "layers" in fails("inspect", tiny)[0]


@pytest.mark.slow
def test_interrupted_build_leaves_nothing(model, tmp_path):
    (tmp_path / "out").mkdir()
    command = [
        sys.executable,
        "-m",
        "llmc",
        "build",
        str(model),
        "-o",
        str(tmp_path / "out" / "new.llmc"),
    ]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with child:
        program = ".new.llmc.tmp-*/rank0.program.json"  # written: the child is hashing or verifying now
        wait_until(lambda: list((tmp_path / "out").glob(program)) or child.poll() is not None)
        assert child.poll() is None, child.stderr.read()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=LONG)
    assert (child.returncode, out) == (errors.INTERRUPTED, "")
    lines = [line for line in without_phases(err) if not line.startswith("note: ")]
    assert lines == ["error: interrupted", "hint: nothing was left half-written"]
    assert os.listdir(tmp_path / "out") == []


def test_an_interrupt_inside_an_import_is_an_exit_code_too(tmp_path):
    """CPython would end `python -m` by the signal here, although the interrupt was caught."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom llmc.cli import app, main\n"
        "app.invoke = lambda argv: exec('raise KeyboardInterrupt')\nsys.exit(main.main([]))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == errors.INTERRUPTED
    assert done.stderr.splitlines() == ["error: interrupted", "hint: nothing was left half-written"]


# run: the bundle


def test_not_a_bundle(fails, model, tmp_path):
    error, hint = fails("run", tmp_path / "nowhere.llmc", "Once")
    assert error == f"not a bundle: {tmp_path / 'nowhere.llmc'} does not exist"
    assert "llmc build" in hint
    file = tmp_path / "file.llmc"
    file.write_text("no bundle")
    assert fails("run", file, "Once")[0] == f"not a bundle: {file} is not a directory"
    error, hint = fails("run", model, "Once")
    assert error == f"not a bundle: {model} has no manifest.json"
    assert f"llmc build {model}" in hint


@pytest.mark.parametrize("command", [["run", "Once"], ["inspect", "--verify"], ["verify"], ["bench"]])
def test_changed_byte(fails, tiny, command):
    with open(tiny / "weights" / "packed.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    error, hint = fails(command[0], tiny, *command[1:])
    assert "'weights/packed.safetensors' is damaged" in error
    assert "copy the bundle again" in hint


def test_changed_byte_of_the_manifest(fails, tiny):
    data = (tiny / "manifest.json").read_bytes()
    (tiny / "manifest.json").write_bytes(data.replace(b'"max_seq_len": 256', b'"max_seq_len": 512'))
    assert "the manifest was edited or damaged" in fails("inspect", tiny)[0]


def test_newer_format(fails, tiny):
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    manifest["format_version"] = 8
    manifest["producer"]["llmc"] = "9.1"
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    error, hint = fails("run", tiny, "Once")
    assert error == "bundle format 8 needs llmc >= 9.1; this llmc reads formats 1 to 7"
    assert hint == upgrade_hint("9.1")


def edit_bundle(path, **contents):
    """Replace files of a bundle by `contents` (None: remove them) and list them in its manifest."""
    manifest = Manifest.from_json((path / "manifest.json").read_bytes())
    files = dict(manifest.files)
    for name, data in contents.items():
        del files[name]
        (path / name).unlink()
        if data is not None:
            (path / name).write_bytes(data)
            files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    (path / "manifest.json").write_bytes(replace(manifest, files=files).to_json())


def test_chat_without_a_template(fails, tiny):
    name = "tokenizer/tokenizer_config.json"
    config = json.loads((tiny / name).read_bytes())
    config.pop("chat_template", None)
    templates = {f"tokenizer/{file.name}": None for file in tiny.glob("tokenizer/chat_template.*")}
    edit_bundle(tiny, **{name: json.dumps(config).encode()}, **templates)
    error, hint = fails("run", tiny, "Once", "--chat")
    assert error == "this model has no chat template"
    assert "plain prompt" in hint


def test_bundle_without_a_tokenizer(fails, tiny):
    names = Manifest.from_json((tiny / "manifest.json").read_bytes()).files
    edit_bundle(tiny, **{name: None for name in names if name.startswith("tokenizer/")})
    (tiny / "tokenizer").rmdir()
    error, hint = fails("run", tiny, "Once")
    assert error == f"{tiny} has no tokenizer"
    assert "tokenizer.json" in hint


# run: the request


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "-0.1"),
        ("--top-p", "2"),
        ("--top-p", "nan"),
        ("--top-k", "-1"),
        ("--min-p", "1.5"),
        ("--repetition-penalty", "0"),
        ("--max-tokens", "0"),
        ("--seed", "-1"),
        ("--stop", ""),
    ],
)
def test_impossible_sampling(fails, tmp_path, option, value):
    error, hint = fails("run", tmp_path / "never-opened.llmc", "Once", option, value, code=errors.USAGE)
    assert error.startswith(f"{option} is ")
    assert hint.startswith(f"{option} must be ")


def test_missing_prompt(fails, tiny):
    error, hint = fails("run", tiny, code=errors.USAGE)
    assert error == "there is no prompt"
    assert "--prompts FILE" in hint


def test_empty_prompt(fails, tiny):
    assert fails("run", tiny, "", code=errors.USAGE)[0] == "the prompt is empty"


def test_prompt_that_is_not_text(fails, tiny):
    prompt = os.fsdecode(b"\xff\xfe")
    assert fails("run", tiny, prompt, code=errors.USAGE)[0] == "the prompt is not valid UTF-8"


def test_prompt_longer_than_the_context(fails, tiny, tmp_path):
    error, hint = fails("run", tiny, "word " * 300)
    assert "tokens, the context 256" in error
    assert hint == "shorten the prompt to at most 255 tokens"
    file = tmp_path / "prompts.txt"
    file.write_text("word " * 300)
    assert fails("run", tiny, "--prompts", file)[0].startswith(f"{file}:1: the prompt has ")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", ":1: the line is empty"),
        (b"\xff\xfe", ":1: the line is not UTF-8 text"),
        (None, "cannot read the prompts in "),
    ],
)
def test_prompts_that_cannot_be_read(fails, tiny, tmp_path, contents, message):
    file = tmp_path / "prompts.txt"
    if contents is not None:
        file.write_bytes(contents)
    assert message in fails("run", tiny, "--prompts", file)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Once", "--prompts", "file"], "there is a prompt and --prompts"),
        (["Once", "--stream", "--json"], "--stream cannot be combined with --json"),
        (["--stream", "--prompts", "file"], "--stream cannot be combined with --prompts"),
        (["Once", "--greedy", "--temperature", "1"], "--greedy cannot be combined with --temperature"),
        (["Once", "--greedy", "--top-k", "5"], "--greedy cannot be combined with --top-k"),
        (["Once", "--system", "Be brief."], "--system needs --chat"),
    ],
)
def test_options_that_exclude_each_other(fails, tiny, options, message):
    assert fails("run", tiny, *options, code=errors.USAGE)[0] == message


def test_too_little_kv_memory(fails, tiny):
    error, hint = fails("run", tiny, "Once", "--kv-memory", "1", code=errors.USAGE)
    assert "1 bytes of KV cache hold no block" in error
    assert "--kv-memory" in hint


def test_bench_beyond_the_context(fails, tiny):
    error, hint = fails("bench", tiny, "--prompt-tokens", 250, "--new-tokens", 7, code=errors.USAGE)
    assert error == "250 prompt tokens and 7 new ones exceed the context of 256"
    assert "--new-tokens" in hint


def test_bench_layers_beyond_the_context(fails, tiny):
    command = ("bench", tiny, "--layers", "--prompt-tokens", 237)
    error, hint = fails(*command, code=errors.USAGE)
    assert error == "237 prompt tokens and the 20 decode steps of --layers exceed the context of 256"
    assert "236" in hint
    error, hint = fails(*command, "--new-tokens", 2, code=errors.USAGE)
    assert error == "--new-tokens has no effect with --layers"


def test_doctor_fails_when_run_cannot_work(capsys, monkeypatch):
    from llmc.cli import doctor

    library = doctor.Library("openvino", "", "==2026.4.*", None)
    monkeypatch.setattr(doctor, "libraries", lambda: [library])
    assert main.main(["doctor"]) == errors.ERROR
    out, err = capsys.readouterr()
    assert "openvino  llmc run  ==2026.4.*  -          missing: pip install" in out
    assert err.splitlines()[0].startswith("error: `llmc run` cannot work here: openvino is missing")


# Usage


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["nonsense"], "no such command 'nonsense'", "see `llmc --help`"),
        (["zoo"], "missing command", "see `llmc zoo --help`"),
        (["--nonsense"], "no such option", "see `llmc --help`"),
        (["build"], "missing argument 'CHECKPOINT'", "see `llmc build --help`"),
        (["run", "x", "--max-tokens", "many"], "invalid value for '--max-tokens'", "see `llmc run --help`"),
        (["run", "x", "y", "--threads", "0"], "invalid value for '--threads'", "see `llmc run --help`"),
        (
            ["run", "x", "y", "--kv-memory", "2X"],
            "invalid value for --kv-memory",
            "see `llmc run --help`",
        ),
        (
            ["run", "x", "y", "--kv-memory", "-1"],
            "invalid value for --kv-memory",
            "see `llmc run --help`",
        ),
        (
            ["run", "x", "y", "--log-level", "loud"],
            "invalid value for '--log-level'",
            "see `llmc run --help`",
        ),
        (
            ["zoo", "list", "-q", "-v"],
            "invalid value: --quiet and --verbose exclude each other",
            "zoo list --help",
        ),
        (["help", "nonsense"], "no such command 'nonsense'", "see `llmc --help`"),
        (["run", "x", "Once", "upon"], "got unexpected extra argument", "with spaces needs quotes"),
    ],
)
def test_wrong_usage(fails, arguments, error, hint):
    got = fails(*arguments, code=errors.USAGE)
    assert got[0].startswith(error)
    assert hint in got[1]


# Unexpected errors


@pytest.fixture
def broken(monkeypatch):
    """Make `llmc zoo list` raise what a test gives."""

    def breaks(error):
        from llmc.compiler import zoo

        def raises():
            raise error

        monkeypatch.setattr(zoo, "list_zoo", raises)

    return breaks


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("odd\nthing"), errors.INTERNAL, "internal error: RuntimeError: odd thing"),
        (AssertionError(), errors.INTERNAL, "internal error: AssertionError: no message"),
        (BrokenPipeError(), errors.INTERNAL, "internal error: BrokenPipeError: no message"),
        (ModuleNotFoundError("x", name="nosuch"), errors.INTERNAL, "internal error: ModuleNotFoundError: x"),
        (
            ModuleNotFoundError("x", name="tokenizers.y"),
            errors.ERROR,
            "llmc needs tokenizers, which is not installed",
        ),
        (KeyboardInterrupt(), errors.INTERRUPTED, "interrupted"),
        (MemoryError(), errors.ERROR, "out of memory"),
        (OSError(12, "Cannot allocate memory"), errors.ERROR, "out of memory"),
        (RuntimeError("Exception from src/dev/plugin.cpp:54:\ncan't alloc"), errors.ERROR, "out of memory"),
        (
            RuntimeError("Check 'ptr' failed at x.cpp: Failed to allocate 99 bytes"),
            errors.ERROR,
            "out of memory",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            errors.ERROR,
            "out of memory",
        ),
        (ImportError("libx.so: failed to map segment from shared object"), errors.ERROR, "out of memory"),
        (PermissionError(13, "Permission denied", "/etc/x"), errors.ERROR, "/etc/x: Permission denied"),
    ],
)
def test_unexpected_errors(fails, broken, error, code, message):
    broken(error)
    assert fails("zoo", "list", code=code)[0] == message


@pytest.mark.parametrize(("setting", "shown"), [("1", True), ("0", False), ("", False)])
def test_tracebacks_on_demand(capsys, broken, monkeypatch, setting, shown):
    monkeypatch.setenv(main.TRACEBACK, setting)
    broken(RuntimeError("odd"))
    assert main.main(["zoo", "list"]) == errors.INTERNAL
    lines = capsys.readouterr().err.splitlines()
    assert ("Traceback (most recent call last):" in lines) is shown
    assert [line.partition(":")[0] for line in lines[-2:]] == ["error", "hint"]


def test_a_rank_without_a_program_is_refused(capsys):
    golden = Path(__file__).parents[1] / "golden" / "format-4.llmc"
    assert main.main(["inspect", str(golden), "--rank", "1"]) == 2
    assert "hint: add --program" in capsys.readouterr().err
    assert main.main(["inspect", str(golden), "--rank", "1", "--program"]) == 0
    assert "all_reduce" in capsys.readouterr().out
