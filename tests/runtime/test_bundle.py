"""Bundles on disk: what opening refuses, and that writing is all or nothing, whatever kills it."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.compiler.bundle_writer import BundleWriter
from llmc.runtime.bundle import manifest as schema
from llmc.runtime.bundle import reader
from llmc.runtime.bundle.manifest import Manifest
from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BuildError, BundleError
from support.waiting import LONG

WEIGHTS = "weights/model-00001.safetensors"
CONTENTS = {"rank0.onnx": b"graph", WEIGHTS: bytes(range(256)) * 64, "tokenizer/tokenizer.json": b"{}"}
LISTED = sorted([*CONTENTS, "manifest.json"])


def manifest(name="tiny"):
    return Manifest(
        producer=schema.Producer("0.1.0", {}),
        source=schema.Source(name, "llama", "LlamaForCausalLM", "0" * 64, "bf16", {}),
        geometry=schema.Geometry(1, 1, 1, 16, 16, 16, 32, (schema.Layer("full", 0, 1, 16, 16),)),
        limits=schema.Limits(64),
        precision=schema.Precision("fp32", "fp32"),
        target=schema.Target("cpu", "openvino", "", {}),
        operators=(),
        tokens=schema.Tokens(None, ()),
        passes=(),
        verification=schema.Verification("skipped", "--no-verify"),
        engines=(schema.Engine(0, "rank0.onnx"),),
        weights=schema.Weights((WEIGHTS,), 0, "fp32"),
    )


def build(output, force=False, name="tiny", contents=CONTENTS):
    with BundleWriter(output, force) as writer:
        for relative, data in contents.items():
            writer.path(relative).write_bytes(data)
        return writer.finish(manifest(name))


def files_in(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def neighbours(output):
    return sorted(path.name for path in output.parent.iterdir())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "tiny.llmc"


@pytest.fixture
def bundle(output):
    return build(output)


@pytest.fixture
def settled(bundle, monkeypatch):
    """A bundle that was opened once, and whose files are old enough to be remembered."""
    monkeypatch.setattr(reader, "_TICK_NS", 0)
    time.sleep(0.05)
    Bundle.open(bundle)
    return bundle


def refused(path, **options):
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    assert caught.value.hint
    return caught.value


# --- a bundle that is whole


def test_a_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.name == "tiny"
    assert opened.engine_path(0).read_bytes() == b"graph"
    assert opened.tokenizer_dir == bundle / "tokenizer"
    assert opened.manifest.weights.bytes == len(CONTENTS[WEIGHTS])
    assert files_in(bundle) == LISTED
    with pytest.raises(BundleError, match="no engine for rank 1"):
        opened.engine_path(1)


def test_a_tokenizer_is_optional(output):
    small = {name: data for name, data in CONTENTS.items() if "tokenizer" not in name}
    assert Bundle.open(build(output, contents=small)).tokenizer_dir is None


def test_two_builds_are_identical(tmp_path):
    one, two = build(tmp_path / "a" / "x.llmc"), build(tmp_path / "b" / "y.llmc")
    assert files_in(one) == files_in(two)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files_in(one))


def test_the_bundle_itself_may_be_a_link_and_its_path_is_absolute(bundle, tmp_path, monkeypatch):
    (tmp_path / "link.llmc").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    assert Bundle.open("link.llmc").path == bundle.resolve()


# --- what is refused


def test_nothing_there(tmp_path):
    error = refused(tmp_path / "tiny.llmc")
    assert error.message == f"not a bundle: {tmp_path / 'tiny.llmc'} does not exist"
    assert "llmc build" in error.hint


def test_a_file(tmp_path):
    (tmp_path / "tiny.llmc").write_text("")
    assert "is not a directory" in refused(tmp_path / "tiny.llmc").message


def test_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    error = refused(tmp_path)
    assert "has no manifest.json" in error.message
    assert f"llmc build {tmp_path}" in error.hint


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("rank0.onnx", path)])
def test_an_odd_manifest(bundle, make):
    (bundle / "manifest.json").unlink()
    make(bundle / "manifest.json")
    assert "manifest.json" in refused(bundle).message


def test_a_newer_format(bundle):
    newer = {"format_version": schema.FORMAT_VERSION + 1, "producer": {"llmc": "3.0"}}
    (bundle / "manifest.json").write_text(json.dumps(newer))
    assert "needs llmc >= 3.0" in refused(bundle).message


def test_a_huge_manifest(bundle):
    os.truncate(bundle / "manifest.json", 2**34)  # sparse: reading it whole would take the memory
    assert "more than 16777216 bytes" in refused(bundle).message


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_missing_file(bundle, name, verify):
    (bundle / name).unlink()
    assert f"'{name}' is missing" in refused(bundle, verify_hashes=verify).message


@pytest.mark.parametrize("name", ["extra.txt", "weights/.hidden", "weights/MODEL.safetensors"])
def test_an_extra_file(bundle, name):
    (bundle / name).write_text("")
    assert f"'{name}' is not in the manifest" in refused(bundle, verify_hashes=False).message


def test_an_extra_directory(bundle):
    (bundle / "kernels").mkdir()
    assert "'kernels' is not in the manifest" in refused(bundle).message


def test_a_file_name_that_is_not_text(bundle):
    Path(os.fsdecode(os.fsencode(bundle) + b"/\xff")).write_text("")
    assert r"'\udcff' is not in the manifest" in refused(bundle).message


@pytest.mark.parametrize("nbytes", [0, 1, 99_999])
def test_another_size(bundle, nbytes):
    os.truncate(bundle / WEIGHTS, nbytes)
    message = refused(bundle, verify_hashes=False).message
    assert f"{nbytes} bytes, the manifest says 16384" in message


@pytest.mark.parametrize("target", ["/etc/hostname", "../../elsewhere", "../rank0.onnx"])
def test_a_link_in_place_of_a_file(bundle, target):
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to(target)
    error = refused(bundle, verify_hashes=False)
    assert f"'{WEIGHTS}' is a symbolic link" in error.message
    assert "cp -rL" in error.hint


LITTER = (".DS_Store", "weights/._model", ".cache/huggingface/download/x.lock", "Thumbs.db", "weights/.nfs01")


@pytest.mark.parametrize("name", LITTER)
def test_what_other_programs_leave_in_directories_is_ignored(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    Bundle.open(bundle)
    build(bundle, force=True, name="other")
    assert not (bundle / name).exists()


@pytest.mark.parametrize("name", [".gitattributes", "README.md", "LICENSE", ".git/config"])
def test_the_files_of_a_repository_are_ignored_and_never_deleted(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")
    Bundle.open(bundle)
    with pytest.raises(BuildError, match="is not replaced"):
        build(bundle, force=True)
    assert (bundle / name).read_text() == "x"


@pytest.mark.parametrize("name", ["weights/README.md", "tokenizer/.gitignore", ".env", ".DS_Store.txt"])
def test_other_files_are_not_ignored(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")
    assert "is not in the manifest" in refused(bundle).message


def test_a_listed_file_is_never_ignored(output):
    bundle = build(output, contents={**CONTENTS, "README.md": b"one"})
    (bundle / "README.md").write_bytes(b"two")
    assert "'README.md' is damaged" in refused(bundle).message
    (bundle / "README.md").unlink()
    assert "'README.md' is missing" in refused(bundle).message


def linked(bundle, snapshot):
    """The files of `bundle`, as huggingface_hub's `snapshot_download` stores them."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(files_in(bundle)):
        (blobs / str(number)).write_bytes((bundle / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("models--org--tiny/snapshots/abc", "`hf download org/tiny --revision abc --local-dir tiny.llmc`"),
        ("hub/snapshots/abc", "`hf download ORG/NAME --local-dir NAME.llmc`"),
        ("else/where/tiny.llmc", "`cp -rL "),
    ],
)
@pytest.mark.parametrize("first", ["manifest.json", "rank0.onnx"])
def test_a_download_cache_is_refused_with_the_command_that_downloads_files(
    bundle, tmp_path, place, command, first
):
    linked(bundle, tmp_path / place)
    if first != "manifest.json":  # a link only to the others
        data = (bundle / "manifest.json").read_bytes()
        (tmp_path / place / "manifest.json").unlink()
        (tmp_path / place / "manifest.json").write_bytes(data)
    error = refused(tmp_path / place)
    assert "is a symbolic link, and the engines read regular files only" in error.message
    assert command in error.hint


def test_the_command_of_the_hint_makes_a_bundle(bundle, tmp_path):
    linked(bundle, tmp_path / "hub" / "snapshots" / "it's mine")
    hint = refused(tmp_path / "hub" / "snapshots" / "it's mine").hint
    command = hint.split("`")[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    Bundle.open(tmp_path / "it's mine-copy.llmc")


def test_a_link_in_place_of_a_directory(bundle):
    (bundle / "weights").rename(bundle.parent / "elsewhere")
    (bundle / "weights").symlink_to(bundle.parent / "elsewhere")
    assert "'weights' is a symbolic link" in refused(bundle).message


def test_a_pipe_in_place_of_a_file(bundle):
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    assert "is not a regular file" in refused(bundle).message


def test_unsafe_paths_in_the_manifest(bundle):
    """Sealed correctly, so that only the paths are at fault. test_manifest.py has the full list."""
    for path in ("/etc/passwd", "../x", "a\\b", "RANK0.onnx"):
        tree = json.loads((bundle / "manifest.json").read_bytes())
        del tree["manifest_sha256"]
        tree["files"][path] = tree["files"]["rank0.onnx"]
        text = json.dumps(tree, sort_keys=True, indent=1) + "\n"
        tree["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        copy = bundle.parent / "copy.llmc"
        copy.mkdir(exist_ok=True)
        (copy / "manifest.json").write_text(json.dumps(tree, sort_keys=True, indent=1) + "\n")
        assert "files" in refused(copy).message


# --- changed bytes


def flip(path, position=-1):
    """Changes one byte in place: same size, same inode."""
    with open(path, "r+b") as file:
        file.seek(position % path.stat().st_size)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", LISTED)
def test_a_changed_byte_in_any_file(bundle, name):
    flip(bundle / name)
    assert name in refused(bundle).message


@pytest.mark.parametrize("name", LISTED)
def test_a_changed_byte_in_a_file_that_was_remembered(settled, name):
    flip(settled / name)
    assert name in refused(settled).message


def test_putting_the_mtime_back_does_not_hide_a_change(settled):
    before = os.stat(settled / WEIGHTS)
    flip(settled / WEIGHTS)
    os.utime(settled / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(settled / WEIGHTS).st_mtime_ns == before.st_mtime_ns
    assert "is damaged" in refused(settled).message


def test_a_replaced_file(settled):
    shutil.copy2(settled / WEIGHTS, settled.parent / "copy")
    flip(settled.parent / "copy")
    os.replace(settled.parent / "copy", settled / WEIGHTS)
    assert "is damaged" in refused(settled).message


def test_a_warm_open_reads_nothing_but_the_manifest(settled, monkeypatch):
    monkeypatch.setattr(reader, "sha256_of_file", lambda *_: pytest.fail("a file was hashed"))
    Bundle.open(settled)


def test_only_what_changed_is_hashed_again(settled, monkeypatch):
    os.utime(settled / WEIGHTS)
    hashed, real = [], reader.sha256_of_file
    monkeypatch.setattr(
        reader, "sha256_of_file", lambda path, *rest: hashed.append(path) or real(path, *rest)
    )
    Bundle.open(settled)
    assert hashed == [settled / WEIGHTS]


def test_a_fresh_file_is_not_remembered(bundle, monkeypatch):
    """A change in the clock tick in which it was hashed would leave no trace."""
    Bundle.open(bundle)
    hashed, real = [], reader.sha256_of_file
    monkeypatch.setattr(
        reader, "sha256_of_file", lambda path, *rest: hashed.append(path) or real(path, *rest)
    )
    Bundle.open(bundle)
    assert len(hashed) == len(CONTENTS)


def test_verify_reads_everything(settled, monkeypatch):
    opened = Bundle.open(settled)
    hashed, real = [], reader.sha256_of_file
    monkeypatch.setattr(
        reader, "sha256_of_file", lambda path, *rest: hashed.append(path) or real(path, *rest)
    )
    opened.verify()
    assert len(hashed) == len(CONTENTS)
    flip(settled / WEIGHTS)
    with pytest.raises(BundleError, match="is damaged"):
        opened.verify()


def test_without_verify_hashes_no_byte_is_read(bundle):
    flip(bundle / WEIGHTS)
    Bundle.open(bundle, verify_hashes=False)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"rank0.onnx": 3}', "[" * 99_999, "\udcff"])
def test_a_damaged_record_means_hashing(settled, cache, text):
    (record,) = (cache / "llmc" / "verified").iterdir()
    record.write_text(text, errors="surrogateescape")
    Bundle.open(settled)
    flip(settled / WEIGHTS)
    refused(settled)


def test_a_cache_that_cannot_be_written(bundle, cache):
    cache.write_text("a file where a directory should be")
    Bundle.open(bundle)


def test_no_home(bundle, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    Bundle.open(bundle)


def test_a_file_that_changes_while_it_is_hashed(bundle, monkeypatch):
    real = os.fstat

    def touch_and_stat(descriptor):
        os.utime(bundle / "rank0.onnx", ns=(0, 0))
        return real(descriptor)

    monkeypatch.setattr(reader.os, "fstat", touch_and_stat)
    assert "changed while it was read" in refused(bundle).message


def test_a_file_that_cannot_be_read(bundle, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reader, "sha256_of_file", fail)
    assert "cannot read" in refused(bundle).message


# --- writing


def test_an_existing_output_is_kept(bundle):
    with pytest.raises(BuildError, match="exists") as caught:
        build(bundle, name="other")
    assert "--force" in caught.value.hint
    assert Bundle.open(bundle).manifest.source.name == "tiny"


def test_force_replaces(bundle):
    build(bundle, force=True, name="other")
    assert Bundle.open(bundle).manifest.source.name == "other"
    assert neighbours(bundle) == ["tiny.llmc"]


def test_force_replaces_a_damaged_bundle(bundle):
    (bundle / WEIGHTS).unlink()
    flip(bundle / "rank0.onnx")
    build(bundle, force=True)
    Bundle.open(bundle)


def make_tree(path, *names):
    path.mkdir(parents=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: make_tree(path, "thesis.tex"),
        lambda path: make_tree(path, "manifest.json"),  # of something else
        lambda path: make_tree(path),
        lambda path: (path.parent.mkdir(), path.write_text("a file")),
        lambda path: (build(path), (path / "notes.txt").write_text("mine")),
        lambda path: (build(path), (path / "weights" / "link").symlink_to("/")),
        lambda path: (build(path.parent / "real"), path.symlink_to("real")),
    ],
)
def test_force_spares_what_is_not_a_bundle(output, spoil):
    spoil(output)
    before = files_in(output.parent)
    with pytest.raises(BuildError, match="is not replaced") as caught:
        build(output, force=True)
    assert caught.value.hint
    assert files_in(output.parent) == before


def test_a_failed_build_leaves_nothing(output):
    with pytest.raises(ZeroDivisionError), BundleWriter(output) as writer:
        _ = writer.path(WEIGHTS).write_bytes(b"half") / 0
    assert neighbours(output) == []


def test_leaving_without_finish_leaves_nothing(output):
    with BundleWriter(output) as writer:
        writer.path(WEIGHTS).write_bytes(b"half")
    assert neighbours(output) == []


def test_a_manifest_that_breaks_a_rule_leaves_nothing(output):
    with pytest.raises(BundleError, match="is not listed"):
        build(output, contents={"rank0.onnx": b""})
    assert neighbours(output) == []


def test_a_rename_that_fails_puts_the_old_one_back(bundle, monkeypatch):
    real = os.rename

    def fail(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(BuildError, match=r"cannot write .*tiny\.llmc: Input/output error"):
        build(bundle, force=True, name="other")
    assert neighbours(bundle) == ["tiny.llmc"]
    assert Bundle.open(bundle).manifest.source.name == "tiny"


def test_hashes_from_the_writer_are_taken(output, monkeypatch):
    monkeypatch.setattr("llmc.compiler.bundle_writer.sha256_of_file", lambda path: pytest.fail("read again"))
    with BundleWriter(output) as writer:
        for name, data in CONTENTS.items():
            writer.path(name).write_bytes(data)
            writer.add_hash(name, hashlib.sha256(data).hexdigest(), len(data))
        writer.finish(manifest())
    Bundle.open(output)


@pytest.mark.parametrize(
    ("name", "nbytes", "expected"),
    [
        ("rank0.onnx", 4, "4 bytes were hashed, 5 are on disk"),
        ("lost", 1, "'lost' was hashed and is not on disk"),
    ],
)
def test_hashes_that_do_not_fit(output, name, nbytes, expected):
    with BundleWriter(output) as writer:
        writer.path("rank0.onnx").write_bytes(b"graph")
        writer.add_hash(name, "0" * 64, nbytes)
        with pytest.raises(BuildError, match=expected):
            writer.finish(manifest())


@pytest.mark.parametrize("name", ["../x", "/x", "manifest.json", "a b", ""])
def test_paths_that_are_not_written(output, name):
    with BundleWriter(output) as writer, pytest.raises(BuildError, match="bundle file"):
        writer.path(name)


def test_a_link_is_not_packed(output):
    with BundleWriter(output) as writer:
        writer.path("rank0.onnx").symlink_to("/etc/hostname")
        with pytest.raises(BuildError, match="not a regular file"):
            writer.finish(manifest())


def test_an_output_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot write"):
        build(tmp_path / "file" / "tiny.llmc")


def test_two_builds_of_one_output_in_one_process(output):
    with BundleWriter(output) as first:
        with pytest.raises(BuildError, match="File exists"), BundleWriter(output):
            pass
        first.path("rank0.onnx").write_bytes(b"still there")


# --- no space


def test_too_little_space_is_said_up_front(output):
    with pytest.raises(BuildError, match="no space") as caught, BundleWriter(output) as writer:
        writer.check_disk_space(2**60)
    assert "it needs at least 1,152,921,504,606,846,976 bytes; " in caught.value.hint
    assert neighbours(output) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(bundle):
    def fill(writer):
        writer.check_disk_space(12_345)
        writer.path(WEIGHTS).symlink_to("/dev/full")
        writer.path(WEIGHTS).write_bytes(b"x")

    with (
        pytest.raises(BuildError, match="No space left on device") as caught,
        BundleWriter(bundle, True) as writer,
    ):
        fill(writer)
    assert "12,345 bytes" in caught.value.hint
    assert neighbours(bundle) == ["tiny.llmc"]
    Bundle.open(bundle)


# --- killed


CHILD = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from llmc.compiler.bundle_writer import BundleWriter
from llmc.runtime.bundle.manifest import Manifest
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
output, weights = Path(sys.argv[1]), "weights/model-00001.safetensors"
"""

HALF_WAY = """
with BundleWriter(output, force=True) as writer:
    writer.path(weights).write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(3600)
"""

KILLED_AT_CALL = """
calls, deadly = 0, int(sys.argv[2])
def counted(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
os.fsync, os.rename, os.rmdir = counted(os.fsync), counted(os.rename), counted(os.rmdir)
manifest = Manifest.from_json((output / "manifest.json").read_bytes())
with BundleWriter(output, force=True) as writer:
    for name in manifest.files:
        writer.path(name).write_bytes((output / name).read_bytes())
    writer.finish(replace(manifest, source=replace(manifest.source, name="other")))
print(calls)
"""


def child(code, *arguments, **options):
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_cleans_up(bundle, sent):
    with child(HALF_WAY, bundle) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(neighbours(bundle)) == 2
        process.send_signal(sent)
        assert process.wait(LONG) in (-signal.SIGINT, 128 + sent)
    assert neighbours(bundle) == ["tiny.llmc"]
    assert Bundle.open(bundle).manifest.source.name == "tiny"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_makes_an_error_of_its_own_still_ends_the_build(output, sent):
    """torch does so, where C++ calls Python."""

    def trace():
        try:
            signal.raise_signal(sent)
        except BaseException:
            raise RuntimeError("expected a message argument") from None

    with pytest.raises(KeyboardInterrupt if sent == signal.SIGINT else SystemExit), BundleWriter(output):
        trace()
    assert not output.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_build_is_cleared_away_by_the_next_one(bundle):
    with child(HALF_WAY, bundle) as process:
        process.stdout.readline()
        with BundleWriter(bundle, force=True):
            assert len(neighbours(bundle)) == 3  # a live build is left alone
        process.kill()
    assert len(neighbours(bundle)) == 2
    assert Bundle.open(bundle).manifest.source.name == "tiny"
    build(bundle, force=True, name="other")
    assert neighbours(bundle) == ["tiny.llmc"]


def test_a_live_build_without_locks_is_left_alone(output):
    """On a file system without `flock`, a live pid is what protects a build."""
    other = output.parent / f".{output.name}.tmp-{os.getppid()}"
    other.mkdir(parents=True)
    build(output)
    assert other.exists()


def test_killed_at_every_step_of_replacing(bundle):
    """SIGKILL at each fsync, rename and rmdir in turn: the name carries a whole bundle or none."""
    names, deadly = [], 0
    while True:
        deadly += 1
        with child(KILLED_AT_CALL, bundle, deadly) as process:
            survived, complaint = process.communicate()
        if survived:
            assert int(survived) == deadly - 1
            break
        assert process.returncode == -signal.SIGKILL, complaint
        if bundle.exists():
            opened = Bundle.open(bundle)
            opened.verify()
            names.append(opened.manifest.source.name)
        else:
            (aside,) = bundle.parent.glob(".tiny.llmc.old-*")
            assert f"mv {aside} {bundle}" in refused(bundle).hint
            assert Bundle.open(aside).manifest.source.name == "tiny"
            names.append("aside")
        build(bundle, force=True, name="tiny")
        assert neighbours(bundle) == ["tiny.llmc"]
    assert names == sorted(names, key=["tiny", "aside", "other"].index)
    assert set(names) == {"tiny", "aside", "other"}


def test_the_old_one_comes_back_without_force(bundle):
    aside = bundle.parent / ".tiny.llmc.old-999999999"
    bundle.rename(aside)
    with pytest.raises(BuildError, match="exists"):
        build(bundle, name="other")
    assert Bundle.open(bundle).manifest.source.name == "tiny"


def test_a_file_over_the_size_limit(bundle):
    """A real limit, in a child: the same way out as for a full disk."""
    code = "with BundleWriter(output, force=True) as writer: writer.path(weights).write_bytes(bytes(100_000))"
    limit = (50_000, 50_000)
    with child(code, bundle, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as process:
        assert "BuildError: no space for" in process.communicate()[1]
    assert neighbours(bundle) == ["tiny.llmc"]
    Bundle.open(bundle)
