"""Read the checkpoint's tokenizer with transformers, and write it to the bundle.

transformers rebuilds some tokenizers from their class and overrides parts of tokenizer.json. So the bundle
gets the files that transformers saves, not a copy of the checkpoint's. The runtime then needs only
tokenizer.json. If the class encodes text differently from the checkpoint's tokenizer.json or SentencePiece
model, the bundle follows the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmc.compiler.bundle_writer import BundleWriter
from llmc.compiler.checkpoint.checkpoint import CONFIG, Checkpoint, read_json
from llmc.compiler.child_process import Child
from llmc.compiler.progress import Silent
from llmc.compiler.texts import EVALUATION_TEXT, read_text
from llmc.runtime.errors import BuildError, CheckpointError, LlmcError, RequestError
from llmc.runtime.text_encoder import TextEncoder, errors_as_values, quiet_stderr, read_tokenizer
from llmc.runtime.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer/tokenizer.json"  # in a bundle
#: Files that hold a SentencePiece model or, as some `tokenizer.model` do, a vocabulary of tiktoken.
MODELS = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tiktoken.model")
#: Files that hold a vocabulary. A checkpoint without any of them has no tokenizer.
VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt"),
    *MODELS,
)
_BUNDLED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SETTINGS = "tokenizer_config.json"
#: Texts that different tokenizers encode differently: spaces, case, accents, scripts, digits, contractions.
_PROBES = (
    "the hello",
    "  Two spaces,\n\n\ttabs \r\n and a line  ",
    "I'm sure they'LL say DON'T, it's 1234567 or 3.14",
    "na\u00efve e\u0301 \ufb01 \uff21 \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f642",
    "def f(x):\n    return x**2  # <tag> {key: [1]}",
)
_LEFT_OUT = ("auto_map", "quantization_config")  # settings that would load code or a quantization package
_MOST_OUTSIDE = 0.01  # the largest share of a text's tokens that may have no embedding
_LARGEST_ID = 1 << 24  # the largest vocabularies have 2**18 tokens
_MAX_FAILURES = 2  # texts that a tokenizer may fail to encode; after more, no more texts are compared
_PACKAGES = ("sentencepiece", "tiktoken", "protobuf", "mistral-common")
_CONVERSION = Child(
    "llmc.compiler.checkpoint.convert_sentencepiece",
    "tokenizer conversion",
    "its file may be damaged; download it again",
    "the file may be damaged; download it again, or remove it to build without a tokenizer",
)


@dataclass(frozen=True)
class BundleTokenizer:
    """The tokenizer of a bundle."""

    #: Name of a file in the bundle's directory `tokenizer` -> its content.
    files: dict[str, bytes]
    #: Notes for the user.
    notes: tuple[str, ...]
    #: The id of the tokenizer's end-of-sequence token; None if it has none.
    eos_token_id: int | None

    def write(self, writer: BundleWriter) -> None:
        """Write the files to the bundle."""
        for name, content in self.files.items():
            writer.path(f"tokenizer/{name}").write_bytes(content)


def read_bundle_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> BundleTokenizer | None:
    """Read the tokenizer of a checkpoint; None if it has no vocabulary file.

    vocab_size: the number of rows of the embedding

    Raises CheckpointError if transformers cannot read the tokenizer, if it needs the checkpoint's code, which
    is never run, or if it is not the tokenizer of this model.
    """
    names = {file.name for file in checkpoint.tokenizer_files}
    if not names & set(VOCABULARIES):
        _refuse_tiktoken(checkpoint)
        return None
    settings = read_json(checkpoint.path / _SETTINGS) if _SETTINGS in names else {}
    _check_class(checkpoint, settings)
    with _staged(checkpoint, settings) as stage, TemporaryDirectory() as name:
        directory = Path(name)
        if "tokenizer.json" in names:
            tokenizer, notes = _follow_file(checkpoint, stage, directory)
        elif model := _model_file(names):
            notes = _convert_model(checkpoint, stage, directory, model, settings)
            tokenizer = _open(checkpoint, directory)
        else:
            _convert(checkpoint, stage, directory)
            tokenizer, notes = _open(checkpoint, directory), []
        notes += _check_vocabulary(checkpoint, tokenizer, vocab_size)
        saved = sorted(directory.iterdir())
        files = {path.name: path.read_bytes() for path in saved if path.name in _BUNDLED}
    eos = tokenizer.special_tokens.get("eos_token")
    return BundleTokenizer(files, tuple(notes), tokenizer.backend.token_to_id(eos) if eos else None)


def end_of_sequence(
    checkpoint: Checkpoint, tokenizer: BundleTokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return all token ids that end a generation according to the checkpoint's files, and notes.

    vocab_size: the number of rows of the embedding; larger ids are left out

    Raises CheckpointError for a value that is not a token id.
    """
    named = checkpoint.eos_by_file
    if tokenizer is None:
        notes = ["the checkpoint has no tokenizer: prompts of the bundle are token ids"]
    else:
        notes = list(tokenizer.notes)
        if tokenizer.eos_token_id is not None:
            named |= {"the tokenizer": (tokenizer.eos_token_id,)}
    union = tuple(dict.fromkeys(token for ids in named.values() for token in ids))
    if outside := [token for token in union if token >= vocab_size]:
        shown = ", ".join(map(str, outside))
        notes.append(f"end-of-sequence tokens outside the vocabulary of {vocab_size} are left out: {shown}")
        union = tuple(token for token in union if token < vocab_size)
    if not union:
        notes.append("no file of the checkpoint names an end-of-sequence token: generation ends by length")
    elif not set(union) <= set(next(iter(named.values()))):
        sources = "; ".join(f"{', '.join(map(str, ids))} by {file}" for file, ids in named.items())
        notes.append(f"end-of-sequence tokens differ ({sources}): each of them ends a generation")
    return union, tuple(notes)


def _refuse_tiktoken(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a vocabulary that only the checkpoint's own code reads, as Qwen 1 has."""
    if found := sorted(checkpoint.path.glob("*.tiktoken")):
        raise CheckpointError(
            f"only code that comes with the checkpoint reads {found[0]}, which llmc never runs",
            "add a tokenizer.json, if its authors offer one, or remove the file to build without a tokenizer",
        )


def _check_class(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Raise CheckpointError for a tokenizer class that is invalid or defined in the checkpoint's code."""
    name = settings.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(
            f"{checkpoint.path}: tokenizer_class is {name!r}, not the name of a class",
            "compare tokenizer_config.json with that of the original model",
        )
    cls = _known_class(name) if name else None
    if cls is not None and not _reads_tokenizers(cls):
        raise CheckpointError(
            f"{checkpoint.path}: tokenizer_class {name!r} is no tokenizer of transformers",
            "compare tokenizer_config.json with that of the original model",
        )
    code = _code_of(settings) or _code_of(checkpoint.config)
    if cls is None and code:
        file = (checkpoint.path / "tokenizer.json").is_file()
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} needs code that comes with it (auto_map: {code}), "
            "which llmc never runs",
            f"to use its tokenizer.json alone, remove auto_map and tokenizer_class from {_SETTINGS}"
            if file
            else "convert it to a tokenizer.json, if its authors offer one",
        )


def _code_of(settings: dict[str, Any]) -> str:
    """Return the class in the checkpoint's own code that `auto_map` names for its tokenizer, or ""."""
    named = settings.get("auto_map")
    if isinstance(named, dict):
        named = named.get("AutoTokenizer")
    classes = named if isinstance(named, list | tuple) else [named]
    return next((candidate for candidate in classes if isinstance(candidate, str) and candidate), "")


def _known_class(name: str) -> Any:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name)


def _reads_tokenizers(cls: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    stand_in = hasattr(cls, "_backends")  # transformers' placeholder for a class with a missing package
    return stand_in or (isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerBase))


@contextmanager
def _staged(checkpoint: Checkpoint, settings: dict[str, Any]) -> Iterator[Path]:
    """Yield a directory with the tokenizer's files, without code and without settings that refer to code."""
    with TemporaryDirectory() as name:
        stage = Path(name)
        for file in checkpoint.tokenizer_files:
            if file.name not in (CONFIG, _SETTINGS):
                (stage / file.name).symlink_to(file.resolve())
        plain = {CONFIG: checkpoint.config} | ({_SETTINGS: settings} if settings else {})
        for file_name, values in plain.items():
            kept = {key: value for key, value in values.items() if key not in _LEFT_OUT}
            (stage / file_name).write_text(json.dumps(kept))
        yield stage


def _follow_file(checkpoint: Checkpoint, stage: Path, directory: Path) -> tuple[Tokenizer, list[str]]:
    """Convert the tokenizer so that it encodes text as tokenizer.json does, and return it with notes."""
    file = TextEncoder(_read_file(checkpoint.path / "tokenizer.json"))
    notes = []
    try:
        chosen = _convert(checkpoint, stage, directory)
        tokenizer = _open(checkpoint, directory)
        text = _difference(tokenizer, file)
    except CheckpointError as error:
        chosen, text = error.message, ""
        tokenizer = None
    if tokenizer is None or text:
        _convert(checkpoint, stage, directory, generic=True)
        tokenizer = _open(checkpoint, directory)
        notes.append(_explain(chosen, text, _difference(tokenizer, file)))
    return tokenizer, notes + _compare_special(tokenizer, file)


def _convert(checkpoint: Checkpoint, stage: Path, directory: Path, generic: bool = False) -> str:
    """Save the tokenizer with transformers to `directory`, and return the name of the class that it chose.

    stage: the directory of `_staged`
    directory: a directory whose files are replaced
    generic: use tokenizer.json unchanged and ignore the class that the checkpoint names

    Raises CheckpointError if transformers cannot read the tokenizer.
    """
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    read = TokenizersBackend if generic else AutoTokenizer
    options = {} if generic else {"trust_remote_code": False}
    for old in directory.iterdir():
        old.unlink()
    try:
        with quiet_stderr(), errors_as_values():
            tokenizer = read.from_pretrained(stage, local_files_only=True, **options)
            tokenizer.save_pretrained(directory)
    except ValueError as error:
        raise _unreadable(checkpoint, str(error).replace(str(stage), str(checkpoint.path))) from error
    return type(tokenizer).__name__


def _model_file(names: set[str]) -> str | None:
    """Return the file of MODELS that transformers reads; none if there is a tekken.json."""
    return None if "tekken.json" in names else next((name for name in MODELS if name in names), None)


def _convert_model(
    checkpoint: Checkpoint, stage: Path, directory: Path, model: str, settings: dict[str, Any]
) -> list[str]:
    """Save the tokenizer of a file of MODELS to `directory`, and return notes.

    The bundle encodes text as SentencePiece does. Raises CheckpointError if the file cannot be converted.
    """
    task = {"stage": str(stage), "directory": str(directory), "model": model, "settings": settings}
    try:
        done = _CONVERSION.run(task | {"texts": [*_PROBES, read_text(EVALUATION_TEXT)]}, Silent())
    except BuildError as error:  # the process died
        raise CheckpointError(f"{checkpoint.path / model}: {error.message}", error.hint) from error
    except CheckpointError as error:
        message = error.message.replace(str(stage), str(checkpoint.path))
        if error.hint:
            raise CheckpointError(f"{checkpoint.path / model}: {message}", error.hint) from error
        raise _unreadable(checkpoint, message) from error
    if not done["text"]:
        return []
    note = _explain(done["chosen"], done["text"], "", model)
    return [f"{note}, but not for {_short(done['left'])}" if done["left"] else note]


def _unreadable(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    package = next((name for name in _PACKAGES if name in reason.lower()), None)
    return CheckpointError(
        f"transformers cannot read the tokenizer in {checkpoint.path}: {reason}",
        f"pip install {package}, or remove the tokenizer's files to build without a tokenizer"
        if package
        else "download the tokenizer's files again, or remove them to build without a tokenizer",
    )


def _open(checkpoint: Checkpoint, directory: Path) -> Tokenizer:
    """Open the converted tokenizer as the runtime does."""
    try:
        return Tokenizer.load(directory)
    except LlmcError as error:
        message = error.message.replace(str(directory), str(checkpoint.path))
        raise CheckpointError(message, "download the tokenizer's files again") from error


def _read_file(file: Path) -> Any:
    try:
        backend = read_tokenizer(file)
    except ValueError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}", "the file is damaged; download it again"
        ) from error
    last_id = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    if last_id > _LARGEST_ID:  # transformers would make a table of this size
        raise CheckpointError(f"{file} has the token id {last_id}", "the file is damaged; download it again")
    return backend


def _difference(tokenizer: Tokenizer, file: TextEncoder) -> str:
    """Return the first text that the two encode or decode differently; "" if there is none."""
    ours = TextEncoder(tokenizer.backend)
    file.backend.encode_special_tokens = ours.backend.encode_special_tokens
    named = [token.content for token in file.backend.get_added_tokens_decoder().values()]
    failures = 0
    for text in (*_PROBES, "a ".join(named[:100]), read_text(EVALUATION_TEXT)):
        result = _round_trip(ours, text)
        if result != _round_trip(file, text):
            return text
        failures += result is None
        if failures > _MAX_FAILURES:  # each may take until the time limit
            break
    return ""


def _round_trip(encoder: TextEncoder, text: str) -> tuple[list[int], str] | None:
    """Return the tokens of a text and the text of the tokens; None if the tokenizer fails on them."""
    try:
        ids = encoder.encode(text, add_special_tokens=False).ids
        with quiet_stderr(), errors_as_values():
            return ids, encoder.backend.decode(ids, skip_special_tokens=True)
    except (RequestError, ValueError):
        return None


def _explain(chosen: str, text: str, left: str, file: str = "tokenizer.json") -> str:
    """Return the note that the bundle follows a file, not the class of transformers.

    chosen: the class of transformers, or the reason why it fails
    text: the text that the class encodes differently; "" if it fails
    left: a text that the bundle still encodes differently; "" if there is none
    file: the file with the vocabulary
    """
    note = f"the class {chosen} of transformers and {file} encode {_short(text)} in different ways"
    note = f"{note if text else chosen}: the bundle follows {file}"
    return f"{note}, and {_SETTINGS} for {_short(left)}" if left else note


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _compare_special(tokenizer: Tokenizer, file: TextEncoder) -> list[str]:
    """Return a note if the two add different special tokens, such as BOS, to a text."""
    try:
        ours, theirs = tokenizer.encode("a"), file.encode("a").ids
    except RequestError:
        return []
    if ours == theirs:
        return []
    names = tokenizer.backend.id_to_token
    texts = [" ".join(str(names(token)) for token in ids) for ids in (ours, theirs)]
    return [
        f"transformers encodes 'a' as {texts[0]!r}, tokenizer.json as {texts[1]!r}: "
        "the bundle follows transformers"
    ]


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return a note if some tokens have no embedding.

    Raises CheckpointError if ordinary text has many such tokens, or cannot be encoded.
    """
    try:
        ids = tokenizer.encode(read_text(EVALUATION_TEXT), add_special_tokens=False)
    except RequestError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error.message}", "download the tokenizer's files again"
        ) from error
    outside = sum(token >= vocab_size for token in ids)
    if outside > _MOST_OUTSIDE * len(ids):
        raise CheckpointError(
            f"{outside} of the {len(ids)} tokens of an English text are outside the model's vocabulary of "
            f"{vocab_size}",
            f"is the tokenizer in {checkpoint.path} the one of this model?",
        )
    last_id = tokenizer.vocab_size - 1
    if last_id < vocab_size:
        return []
    if last_id == vocab_size:
        return [
            f"token {last_id} of the tokenizer has no embedding ({vocab_size} rows): prompts cannot use it"
        ]
    return [
        f"tokens {vocab_size} to {last_id} of the tokenizer have no embedding ({vocab_size} rows): "
        "prompts cannot use them"
    ]
