"""Resolving names with a stub of the hub on 127.0.0.1, in child processes: HF_* is read at import.

The stub answers the requests of huggingface_hub 2.4: `/api/models/ID/revision/REV` for the commit,
`/api/models/ID/tree/COMMIT?recursive=true` for the files, HEAD and GET of `/ID/resolve/COMMIT/FILE`.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmc.compiler.checkpoint.hub import HubRepository, parse, resolve
from llmc.runtime.errors import CheckpointError
from support.waiting import LONG

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\2\0\0\0\0\0\0\0{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"code",
    "onnx/config.json": b"{}",
    "original/consolidated.00.safetensors": b"x",
    "README.md": b"#",
}
PICKLED = ("config.json", "pytorch_model.bin")
CHILD = """
import json, socket, sys
connect = socket.socket.connect
def local_only(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "127.0.0.1":
        raise AssertionError(f"connection to {address}")
    return connect(self, address)
socket.socket.connect = local_only
from llmc.compiler.checkpoint.hub import resolve
from llmc.runtime.errors import CheckpointError
for name, revision in json.loads(sys.argv[1]):
    try:
        path = resolve(name, revision)
        print(json.dumps(sorted(str(f.relative_to(path)) for f in path.rglob("*"))))
    except CheckpointError as error:
        print(json.dumps([error.message, error.hint]))
"""


class StubHub(BaseHTTPRequestHandler):
    log: list[str]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        self.log.append(self.path)
        if parts[:2] == ["api", "models"]:
            name = parts[2:3] if parts[2] == "gpt2" else parts[2:4]
            self._api("/".join(name), parts[2 + len(name) :])
        elif parts[:3] == ["gpt2", "resolve", COMMIT]:
            self._file(parts[3:])
        elif parts[2:4] == ["resolve", COMMIT] and parts[0] == "gated":
            self._reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif parts[2:4] == ["resolve", COMMIT] and parts[0] == "broken" and self.command == "GET":
            self._reply(400, b"", {})
        elif parts[2:4] == ["resolve", COMMIT]:
            self._file(parts[4:])
        else:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _file(self, parts: list[str]) -> None:
        content = FILES["/".join(parts)]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._reply(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _api(self, name: str, rest: list[str]) -> None:
        if name == "org/down":
            self._reply(500, b"", {})
        elif name.split("/")[0] not in ("org", "gated", "pickled", "broken", "gpt2"):
            self._reply(401, b'{"error": "Invalid username or password."}', {})
        elif rest[0] == "revision" and rest[1] not in ("main", "v1"):
            self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            self._reply(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), {})
        else:
            files = PICKLED if name.startswith("pickled") else FILES
            tree = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(FILES[file]),
                    "oid": hashlib.sha1(FILES[file]).hexdigest(),
                }
                for file in files
            ]
            self._reply(200, json.dumps(tree).encode(), {})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    StubHub.log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(cache: Path, endpoint: str, *names: tuple[str, str | None], offline: bool = False) -> list[list[str]]:
    """Return the results of `resolve` in a child: file names, or [message, hint]."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": str(int(offline))}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(names)],
        env=env,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def test_downloads_only_the_files_of_a_build(tmp_path: Path, hub: str) -> None:
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert ask(tmp_path, hub, ("org/name", None), ("org/name", COMMIT)) == [wanted, wanted]
    fetched = {path.split("/")[-1] for path in StubHub.log if "/resolve/" in path}
    assert fetched == set(wanted)
    # What is in the cache needs no hub.
    requests = len(StubHub.log)
    assert ask(tmp_path, hub, ("org/name", None), offline=True) == [wanted]
    assert len(StubHub.log) == requests


def test_every_spelling_of_a_repository_is_downloaded(tmp_path: Path, hub: str) -> None:
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    names = ("gpt2", "org/name@v1", "hf://org/name", f"{hub}/org/name", f"{hub}/org/name/tree/v1")
    assert ask(tmp_path, hub, *((name, None) for name in names)) == [wanted] * len(names)
    asked = [path for path in StubHub.log if "/revision/" in path]
    assert asked == [
        "/api/models/gpt2/revision/main",
        "/api/models/org/name/revision/v1",
        *["/api/models/org/name/revision/main"] * 2,
        "/api/models/org/name/revision/v1",
    ]
    [(message, hint), _] = ask(tmp_path, hub, ("org/name@v1", "v2"), ("org/name@v1", "v1"))
    assert message == "org/name@v1 names another revision than --revision v2"
    assert hint


@pytest.mark.parametrize(
    ("text", "id", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/name", "org/name", None),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("hf://org/name@abc", "org/name", "abc"),
        ("https://huggingface.co/org/name", "org/name", None),
        ("https://huggingface.co/org/name/", "org/name", None),
        ("http://hf.co/gpt2/tree/main", "gpt2", "main"),
        ("huggingface.co/org/name/blob/v1/config.json", "org/name", "v1"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1?x=1", "org/name", "refs/pr/1"),
    ],
)
def test_spellings(text: str, id: str, revision: str | None) -> None:
    assert parse(text) == HubRepository(id, revision)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("https://example.com/org/name", "not from https://example.com/org/name"),
        ("https://huggingface.co/datasets/org/name", "is not the address of a model on the hub"),
        ("https://huggingface.co/", "is not the address of a model on the hub"),
        ("hf://", "does not name a model on the hub"),
        ("s3://bucket/name", "cannot download from s3://bucket/name"),
    ],
)
def test_other_addresses_are_refused(text: str, fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact) as caught:
        resolve(text)
    assert caught.value.hint


def test_hub_errors(tmp_path: Path, hub: str) -> None:
    answers = ask(
        tmp_path,
        hub,
        ("nobody/name", None),
        ("gated/name", None),
        ("org/name", "v9"),
        ("pickled/name", None),
        ("broken/name", None),
        ("org/down", None),
        ("org/na..me", None),
    )
    facts = [
        ("nobody/name is neither a directory nor a public hub repository", "hf auth login"),
        ("access to the hub repository gated/name is gated", f"{hub}/gated/name"),
        ("the hub repository org/name has no revision 'v9'", "tree/main"),
        ("pickled/name has no safetensors weights", "pickled"),
        ("downloading broken/name failed: ", "resumes"),
        (
            "org/down is neither a directory nor complete in the download cache, "
            f"and the hub ({hub}) answers 500",
            "",
        ),
        ("there is no directory org/na..me, and it is not a valid hub id", "org/name"),
    ]
    assert answers[5][0].endswith(f"the hub ({hub}) answers 500")
    for (message, hint), (fact, way_out) in zip(answers, facts, strict=True):
        assert message.startswith(fact)
        assert way_out in hint
        assert "\n" not in message


def test_offline_and_unreachable(tmp_path: Path, hub: str) -> None:
    [(message, hint)] = ask(tmp_path, hub, ("org/name", None), offline=True)
    assert message.endswith("nor complete in the download cache, and HF_HUB_OFFLINE is set")
    assert "HF_HUB_OFFLINE" in hint
    assert StubHub.log == []
    [(message, hint)] = ask(tmp_path, "http://127.0.0.1:9", ("org/name", "main"))
    assert message.startswith("org/name at revision main is neither a directory nor complete in")
    assert message.endswith("and the hub (http://127.0.0.1:9) cannot be reached")
    assert "connection" in hint


def test_local_directory_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="has no revision 'main'"):
        resolve("org/name", "main")


@pytest.mark.parametrize("path", ["./org/name", "/org/name", "a/b/c", "../name", "org/name/", ""])
def test_malformed_hub_id_is_treated_as_a_path(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"there is no directory {path}$") as caught:
        resolve(path)
    assert "hub" not in caught.value.message + caught.value.hint
