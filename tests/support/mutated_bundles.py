"""Bundles with mutated files, and a server that runs each in a process of its own.

A mutated file is sealed again in most cases: size, hash and manifest fit it, as a hostile bundle's would.
So the mutation reaches the code that reads the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120  # of computing, for one run
_MEMORY = 24 << 30  # of addresses
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**64, 1.5, 1e308, float("nan")),
    *("", "x", "../x", "/etc/passwd", "\x00", "fp16", "9" * 400, [], {}, [[]], {"x": 1}, [-1], [2**40]),
)


def mutate(bundle: Path, seed: int) -> str:
    """Change one file of the bundle and return which, and how."""
    rng = random.Random(seed)
    files = sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())
    name = rng.choice(files)
    file = bundle / name
    data = file.read_bytes()
    if name.endswith(".json") and rng.random() < 0.8:
        how = "tree"
        file.write_bytes(
            json.dumps(mutate_tree(json.loads(data), rng), sort_keys=True, indent=1).encode() + b"\n"
        )
    elif name.endswith(".safetensors") and rng.random() < 0.7:
        how = "header"
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_tree(json.loads(data[8 : 8 + size]), rng)).encode()
        header += b" " * max(0, size - len(header))  # the tensors keep their place
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    else:
        how, changed = _mutate_bytes(data, rng)
        file.write_bytes(changed)
    if rng.random() < 0.9:
        seal(bundle, name)
        how += ", sealed"
    return f"{name}: {how}"


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Return a JSON value with one to three nodes replaced, removed, repeated or exchanged.

    Sometimes all nodes with the same number get another one, so that they still fit each other.
    """
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return rng.choice(_ODD)
        where, key = rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del where[key]
        elif action == 1 and isinstance(where, dict):
            where[f"{key}x"] = where[key]
        elif action == 1:
            where.append(where[key])
        elif action == 2 and type(where[key]) is int:
            where[key] += rng.choice((-1, 1, 2**16, 2**31))
        elif action == 3 and type(where[key]) is int:
            number, other = where[key], where[key] + rng.choice((-1, 1, 16, 32, 2**20))
            for one, place in places:
                if type(one[place]) is int and one[place] == number:
                    one[place] = other
        elif action == 4:
            same = [place for place in places if type(place[0][place[1]]) is type(where[key])]
            one, place = rng.choice(same)
            where[key], one[place] = copy_json(one[place]), copy_json(where[key])
        else:
            where[key] = rng.choice(_ODD)
    return tree


def copy_json(tree: Any) -> Any:
    """Return a copy of a JSON value: an exchange must not make a node a part of itself."""
    return json.loads(json.dumps(tree))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found, pending = [], [tree]
    while pending and len(found) < 2000:
        node = pending.pop(0)
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        found += [(node, key) for key in keys]
        pending += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def _mutate_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    changed = bytearray(data)
    kind = rng.choice(("flip", "cut", "insert", "zero", "swap"))
    at = rng.randrange(min(len(data), rng.choice((64, 4096, 1 << 30))) or 1)
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at : at + rng.choice((1, 100, len(data)))]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == "zero":
        changed[at : at + 16] = bytes(len(changed[at : at + 16]))
    else:
        changed[at : at + 8] = changed[:8]
    return kind, bytes(changed)


def seal(bundle: Path, name: str) -> None:
    """Make the manifest fit the file `name`, as far as it still is a manifest."""
    path = bundle / "manifest.json"
    try:
        tree = json.loads(path.read_bytes())
        tree.pop("manifest_sha256", None)
        if name != "manifest.json":
            data = (bundle / name).read_bytes()
            tree["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if name in tree["weights"]["files"]:
                tree["weights"]["bytes"] = sum(
                    tree["files"][one]["bytes"] for one in tree["weights"]["files"]
                )
    except (ValueError, LookupError, AttributeError, TypeError):
        return
    sealed = {**tree, "manifest_sha256": hashlib.sha256(_json(tree)).hexdigest()}
    path.write_bytes(_json(sealed))


def _json(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, indent=1).encode() + b"\n"


class Server:
    """A process that has imported the runtime and runs each command line in a fork of itself."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *arguments: str, writable: Path) -> dict[str, Any]:
        """Run `llmc ARGUMENTS`. Return `code` (negative: a signal), `err`, and `opened`: files to write."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([arguments, str(writable)]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    from llmc.cli import main, run  # noqa: F401  (imported once, before the forks)
    from llmc.runtime import load  # noqa: F401
    from llmc.runtime.backends import native  # noqa: F401
    from llmc.runtime.backends.openvino import backend  # noqa: F401

    for line in sys.stdin:
        arguments, writable = json.loads(line)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            _answer(arguments, writable, writer, main.main)
        os.close(writer)
        with open(reader, "rb") as pipe:
            answer = json.loads(pipe.read() or "{}")
        _, status = os.waitpid(pid, 0)
        answer["code"] = os.waitstatus_to_exitcode(status)
        print(json.dumps({"err": "", "opened": [], **answer}), flush=True)


def _answer(arguments: list[str], writable: str, writer: int, main: Callable[[list[str]], int]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from llmc.runtime import worker
    from llmc.runtime.parallel import followers

    # The processes of other ranks, and the one in which tokenizers with unknown patterns encode.
    own = [[sys.executable, "-I", "-c", start] for start in (worker._START, followers._START)]
    opened: list[str] = []

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(values[0], str | bytes) and isinstance(values[2], int):
            path = os.path.abspath(os.fsdecode(values[0]))
            if values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(
                (writable, "/dev/null")
            ):
                opened.append(path)
        elif event == "subprocess.Popen" and values[0] == sys.executable and list(values[1][:4]) in own:
            return
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            opened.append(event)

    sys.addaudithook(watch)
    err = io.StringIO()
    code = 70
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
    except BaseException:
        traceback.print_exc(file=err)
    with open(writer, "w") as pipe:
        json.dump({"err": err.getvalue(), "opened": opened}, pipe)
    os._exit(code)


def copy(bundle: Path, to: Path) -> Path:
    """Return a copy of the bundle in place of an earlier one."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(bundle, to))


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


if __name__ == "__main__":
    _serve()
