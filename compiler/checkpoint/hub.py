"""Resolve a local path or a Hugging Face hub id to a checkpoint directory.

A hub id is downloaded into the cache of huggingface_hub (HF_HOME), which transformers and vLLM share.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llmc.runtime.errors import CheckpointError

# Pickle (.bin, .pt), ONNX, GGUF and code are never downloaded, nor anything in a subdirectory.
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model")
NOT_DOWNLOADED = ("*/*", "consolidated*.safetensors", "adapter_*")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?", re.ASCII)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_IN_A_REPOSITORY = ("tree", "blob", "resolve", "commit")  # parts of an address that precede a revision


@dataclass(frozen=True)
class HubRepository:
    """A repository on the Hugging Face hub."""

    #: `org/name`; `name` for the oldest repositories.
    id: str
    #: A branch, tag or commit; None for the default branch.
    revision: str | None = None

    @property
    def name(self) -> str:
        """The id without the organization."""
        return self.id.rpartition("/")[2]


def parse(text: str) -> HubRepository | None:
    """Return the repository that `text` names, or None if it can only be a path.

    text: `org/name` or `name`, optionally with `hf://` before it and `@revision` after it, or the address of
        the repository's page

    Raises CheckpointError for an address that is not the page of a model on the hub.
    """
    scheme, separator, name = text.partition("://")
    if separator and scheme in ("http", "https"):
        return _parse_address(text)
    if separator and scheme != "hf":
        raise CheckpointError(f"llmc cannot download from {text}", hint="give a hub id or a directory")
    if not separator and text.partition("/")[0] in _HOSTS:
        return _parse_address(f"https://{text}")
    match = _HUB_ID.fullmatch(name if separator else text)
    if match is None:
        if separator:
            raise CheckpointError(
                f"{text} does not name a model on the hub", hint="it looks like hf://org/name@revision"
            )
        return None
    return HubRepository(match["id"], match["revision"])


def _parse_address(text: str) -> HubRepository:
    from huggingface_hub import constants

    address = urlsplit(text)
    if address.netloc not in (*_HOSTS, urlsplit(constants.ENDPOINT).netloc):
        raise CheckpointError(
            f"llmc downloads from {constants.ENDPOINT} only, not from {text}",
            hint="give a hub id, or download the checkpoint and give its directory",
        )
    parts = [unquote(part) for part in address.path.split("/") if part]
    at = next(
        (place for place in (1, 2) if parts[place : place + 1] and parts[place] in _IN_A_REPOSITORY), None
    )
    revision = parts[at + 1] if at is not None and len(parts) > at + 1 else None
    match = _HUB_ID.fullmatch("/".join(parts[:at]))
    if match is None or parts[0] in ("datasets", "spaces"):
        raise CheckpointError(
            f"{text} is not the address of a model on the hub",
            hint=f"it looks like {constants.ENDPOINT}/org/name",
        )
    return HubRepository(match["id"], revision or match["revision"])


def resolve(checkpoint: str | Path, revision: str | None = None) -> Path:
    """Return the directory of `checkpoint`: the path if it exists, else the downloaded hub repository.

    checkpoint: a path, or what `parse` takes
    revision: a branch, tag or commit of the hub repository

    Raises CheckpointError when there is no such directory or repository, when access is denied, and when
    the hub cannot be reached.
    """
    name = str(checkpoint)
    local = Path(checkpoint).expanduser()
    if name and local.exists():
        if revision is not None:
            raise CheckpointError(
                f"{local} is a local directory and has no revision {revision!r}",
                hint="drop the revision, or run from elsewhere if you mean the hub repository of that name",
                argument="revision",
            )
        return local
    repository = parse(name)
    if repository is None:
        raise CheckpointError(
            f"there is no directory {name}",
            hint="check the path; a checkpoint is a directory with config.json and safetensors files",
        )
    if revision is not None and repository.revision not in (None, revision):
        raise CheckpointError(
            f"{name} names another revision than --revision {revision}", hint="give the revision once"
        )
    return _download(repository.id, revision or repository.revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        directory = snapshot_download(
            name, revision=revision, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)
        )
    # hf_xet raises RuntimeError.
    except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        raise CheckpointError(*_explain(name, revision, error)) from error
    if not any(Path(directory).glob("*.safetensors")):
        if constants.is_offline_mode():
            raise CheckpointError(
                f"{name} has no safetensors weights in the download cache", hint="unset HF_HUB_OFFLINE"
            )
        raise CheckpointError(
            f"{name} has no safetensors weights",
            hint="choose a repository that has them; llmc never loads pickled weights",
        )
    return Path(directory)


def _explain(name: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """Return the message and the hint for an error of `snapshot_download`."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    where = f"{name} at revision {revision}" if revision else name
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"access to the hub repository {name} is gated", f"ask for access at {page}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub repository {name} has no revision {revision!r}", f"see {page}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{name} is neither a directory nor a public hub repository",
            f"check the spelling; if the repository is private, {log_in}",
        )
    if isinstance(error, errors.HFValidationError):
        return f"there is no directory {name}, and it is not a valid hub id", "hub ids look like org/name"
    if isinstance(error, errors.LocalEntryNotFoundError):
        fact = f"{where} is neither a directory nor complete in the download cache, and "
        if constants.is_offline_mode():
            return f"{fact}HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or give a checkpoint directory"
        cause = error.__cause__
        answer = f"answers {cause.response.status_code}" if isinstance(cause, errors.HfHubHTTPError) else ""
        return (
            f"{fact}the hub ({constants.ENDPOINT}) {answer or 'cannot be reached'}",
            "check the connection, or give a checkpoint directory",
        )
    reason = next(iter(str(error).split("\n")), "") or type(error).__name__
    return f"downloading {where} failed: {reason}", "run it again: a download resumes where it stopped"
