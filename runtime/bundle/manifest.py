"""The manifest of a bundle, formats 1 to 7: frozen dataclasses, a strict reader and a deterministic writer.

The dataclasses are the schema: `strict_json.decode` reads their type hints, so each field is declared once.
FORMAT.md documents each field. Every rule holds in both directions: `to_json` does not write a manifest that
`from_json` would refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NoReturn

from llmc.plugins.paged_attention.spec import BLOCK_SIZE, QUANTIZED_CACHES
from llmc.runtime.bundle.strict_json import DAMAGED, decode, no_constants, plain, shown, unique_keys
from llmc.runtime.errors import BundleError
from llmc.runtime.installation import upgrade_hint

FormatVersion = Literal[1, 2, 3, 4, 5, 6, 7]
FORMAT_VERSION: Final = 7
_ADDED_IN: Final = {"gpu": 2, "sampling": 3, "ranks": 5}  # field -> the first format that has it
_RANKS_IN: Final = 4  # the first format of bundles with several ranks
_LATENT_IN: Final = 6  # the first format of bundles whose layers cache keys alone
_CHUNKS_IN: Final = 7  # the first format of bundles with attention in chunks
MANIFEST_NAME = "manifest.json"
SEAL = "manifest_sha256"  # the one field that is not in the dataclasses
MAX_MANIFEST_BYTES = 16 * 2**20


_CPU_CACHES = {"int8": "native", "u8": "openvino"}  # quantized KV cache -> the engine that has it
_ONE_RANK = ("openvino", "onnxruntime")  # engines without collectives
_KV_CACHES = ("fp32", "fp16", "bf16", *_CPU_CACHES, *QUANTIZED_CACHES)
_PART = r"[A-Za-z0-9_+@=-](?:[A-Za-z0-9_.+@=-]{0,126}[A-Za-z0-9_+@=-])?"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")


# A check takes a value of the right type and returns what is wrong with it, or "".
def _at_least(minimum: int) -> Callable[[Any], str]:
    return lambda value: "" if value >= minimum else f"must be at least {minimum}"


def _matches(pattern: str, meaning: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern)
    return lambda value: "" if compiled.fullmatch(value) else f"must be {meaning}"


def path_fault(path: str) -> str:
    """Return why `path` cannot be the name of a file in a bundle, or "".

    A path is relative. Its `/`-separated parts consist of ASCII letters, digits and `_.+@=-`, and none starts
    or ends with a dot. This one rule excludes `..`, absolute paths, drives, backslashes, hidden files and
    spellings that differ between file systems.
    """
    plain = len(path) <= 512 and _PATH.fullmatch(path)
    return "" if plain else "must be a relative path of plain names inside the bundle"


Count = Annotated[int, _at_least(0)]
Positive = Annotated[int, _at_least(1)]
Magnitude = Annotated[float, _at_least(0)]
Fraction = Annotated[float, lambda value: "" if 0 <= value <= 1 else "must be between 0 and 1"]
Name = Annotated[str, _matches(r"\S(?:.*\S)?", "a name without blanks around it")]
# The name of a target, an engine or a KV cache. The set of names may differ between versions of llmc.
Slug = Annotated[str, _matches(r"[a-z][a-z0-9-]{0,63}", "lower-case letters, digits and hyphens")]
Sha256 = Annotated[str, _matches(r"[0-9a-f]{64}", "64 lowercase hexadecimal digits")]
FilePath = Annotated[str, path_fault]
SourceName = Annotated[
    str, _matches(r"(?![/~\\])(?![A-Za-z]:)\S(?:.*\S)?", "a name: not empty, not an absolute path")
]


@dataclass(frozen=True)
class Producer:
    """The software that built the bundle. It holds only versions, because builds are reproducible."""

    #: The version of llmc.
    llmc: Name
    #: Library -> version.
    libraries: Mapping[Name, Name]


@dataclass(frozen=True)
class Source:
    """The checkpoint."""

    #: The name of its directory or repository.
    name: SourceName
    #: `model_type` of config.json.
    model_type: Name
    #: The class of the model in transformers.
    architecture: Name
    config_sha256: Sha256
    #: The element type of the weights.
    dtype: Name
    #: Each file that was read -> its sha256.
    files: Mapping[SourceName, Sha256]


@dataclass(frozen=True)
class Layer:
    """One attention layer."""

    kind: Literal["full", "sliding", "chunked"]
    #: The size of the sliding window or of a chunk in tokens; 0 for a full layer.
    window: Count
    num_kv_heads: Positive
    #: The width of a query or key head.
    head_dim: Positive
    #: The width of a value head. 0: values are numbers of the keys, which alone are cached.
    v_head_dim: Count


@dataclass(frozen=True)
class Geometry:
    """The shape of the model, for the sizes of buffers."""

    num_layers: Positive
    #: The largest number of query heads of a layer.
    num_heads: Positive
    #: The largest `num_kv_heads` of a layer. The same holds for the widths of heads.
    num_kv_heads: Positive
    head_dim: Positive
    v_head_dim: Count
    hidden_size: Positive
    #: The number of logits of a row.
    vocab_size: Positive
    layers: tuple[Layer, ...]
    #: Tokens of a KV block.
    block_size: Positive = BLOCK_SIZE


@dataclass(frozen=True)
class Limits:
    """Build-time limits."""

    #: Maximum number of tokens of prompt and output together.
    max_seq_len: Positive


@dataclass(frozen=True)
class Precision:
    """The element types of arithmetic and of the KV cache."""

    dtype: Literal["fp32", "fp16", "bf16"]
    #: A dtype, "int8" (native), "u8" (OpenVINO), or a quantized cache of `paged_attention/spec.py` (GPUs).
    kv_dtype: Slug


@dataclass(frozen=True)
class Parallel:
    """The number of ranks, which is always one in formats 1 to 3."""

    #: Ranks that each compute a part of every layer.
    tp: Positive = 1
    #: Groups of `tp` ranks that each have some of the layers, one after the other.
    pp: Positive = 1
    ep: Literal[1] = 1
    #: All ranks.
    world_size: Positive = 1


@dataclass(frozen=True)
class Target:
    """The target and the engine."""

    name: Slug
    engine: Slug
    #: Why this engine was chosen.
    reason: str
    #: Library -> the version that the engine needs.
    requires: Mapping[Name, Name]


@dataclass(frozen=True)
class KernelFile:
    """A kernel of llmc, compiled ahead of time."""

    #: The name of the computation.
    variant: Name
    #: The compute capability that the kernel and its tiles were compiled for. A cubin runs on exactly that
    #: one, PTX also on newer ones (FORMAT.md has the exception).
    sm: Positive
    kind: Literal["cubin", "ptx"]
    #: The file in the bundle.
    file: FilePath
    #: The name of the kernel in the file.
    entry: Name
    #: Dynamic shared memory in bytes.
    shared_memory: Count
    #: Warps per thread block.
    num_warps: Positive
    #: Registers per thread.
    registers: Count


@dataclass(frozen=True)
class Gpu:
    """The GPUs and limits of a TensorRT engine."""

    #: Empty: the engine is portable and runs on Ampere (SM80) and newer.
    compute_capabilities: tuple[Positive, ...]
    #: Maximum T of a step, as in the graph's inputs.
    max_tokens: Positive
    #: Maximum S of a step.
    max_sequences: Positive
    #: Maximum N of a step.
    max_logits: Positive
    kernels: tuple[KernelFile, ...]


@dataclass(frozen=True)
class Operator:
    """An `llmc` operator in the engine. The runtime must provide this name with this ABI."""

    #: Such as "llmc.PagedAttention".
    name: Name
    #: The version of the operator's inputs, outputs and attributes.
    abi: Positive
    #: The number of nodes.
    count: Positive


@dataclass(frozen=True)
class Tokens:
    """The special tokens of generation."""

    #: The token id that begins a prompt; None if there is none.
    bos: Count | None
    #: The token ids that end an output.
    eos: tuple[Count, ...]


@dataclass(frozen=True)
class Sampling:
    """The sampling defaults of the checkpoint (generation_config.json), as transformers applies them."""

    #: False: greedy decoding, which applies the repetition penalty and no other value.
    do_sample: bool
    #: Divides the logits.
    temperature: Magnitude
    #: 0: off.
    top_k: Count
    #: 1: off.
    top_p: Fraction
    #: 0: off.
    min_p: Fraction
    #: 1: off.
    repetition_penalty: Annotated[float, lambda value: "" if value > 0 else "must be above 0"]


@dataclass(frozen=True)
class PassRecord:
    """The matches and near misses of one pass."""

    name: Name
    matches: Count
    near_misses: Count


@dataclass(frozen=True)
class Verification:
    """The comparison with the checkpoint. None: the value was not measured."""

    status: Literal["passed", "skipped"]
    #: Why the verification was skipped.
    reason: Name | None = None
    #: The implementation that the engine was compared with.
    reference: Name | None = None
    #: The largest absolute difference of a logit.
    max_logit_error: Magnitude | None = None
    #: The bound on `max_logit_error`.
    tolerance: Magnitude | None = None
    #: The share of positions with the same most likely token.
    top1_agreement: Fraction | None = None
    #: Whether greedy decoding gave the same tokens.
    greedy_tokens_equal: bool | None = None
    #: The number of positions compared.
    tokens_compared: Count | None = None
    #: Informative only.
    details: Mapping[Name, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """The engine file of one rank."""

    rank: Count
    file: FilePath


@dataclass(frozen=True)
class ExchangeRecord:
    """What a rank gives to one kind of collective, or sends to other ranks, in a step."""

    operation: Literal["AllReduce", "AllGather", "Send"]
    #: How many of them a step has.
    count: Positive
    #: The bytes for each token of the step, all together.
    token_bytes: Count
    #: The bytes for each row of logits, all together.
    logits_bytes: Count


@dataclass(frozen=True)
class RankRecord:
    """What one of several ranks has and exchanges."""

    #: Its layers: first .. stop - 1.
    first: Count
    stop: Positive
    exchanges: tuple[ExchangeRecord, ...]


@dataclass(frozen=True)
class Weights:
    """The weight files."""

    files: tuple[FilePath, ...]
    #: The sum of the sizes of `files`.
    bytes: Count
    #: The element type that most bytes have.
    dtype: Name
    note: str = ""


@dataclass(frozen=True)
class FileRecord:
    """The size and the checksum of a file of the bundle."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """The manifest. FORMAT.md documents each field."""

    producer: Producer
    source: Source
    geometry: Geometry
    limits: Limits
    precision: Precision
    target: Target
    operators: tuple[Operator, ...]
    tokens: Tokens
    passes: tuple[PassRecord, ...]
    verification: Verification
    engines: tuple[Engine, ...]
    weights: Weights
    quantization: Mapping[Name, Any] | None = None
    parallel: Parallel = Parallel()
    #: Every file of the bundle except the manifest.
    files: Mapping[FilePath, FileRecord] = field(default_factory=dict)
    #: TensorRT engines only.
    gpu: Gpu | None = None
    #: None: the checkpoint has no sampling defaults.
    sampling: Sampling | None = None
    #: Several ranks of TensorRT only, which bundles of format 4 lack. Programs say it for the native engine.
    ranks: tuple[RankRecord, ...] | None = None
    #: The oldest format that has all the fields in use.
    format_version: FormatVersion = 1

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Read a manifest. Raises BundleError, naming the field, if it is not valid."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST_NAME}: more than {MAX_MANIFEST_BYTES} bytes", DAMAGED)
        try:
            tree = json.loads(
                data.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=no_constants
            )
        except ValueError as error:  # also bad UTF-8 and integers beyond Python's digit limit
            raise BundleError(f"{MANIFEST_NAME}: not JSON: {ascii(str(error))[1:-1]}", DAMAGED) from error
        except RecursionError as error:
            raise BundleError(f"{MANIFEST_NAME}: nested too deeply", DAMAGED) from error
        _refuse_newer(tree)
        seal = tree.pop(SEAL, None) if isinstance(tree, dict) else None
        manifest = typing.cast("Manifest", decode(Manifest, _with_later_fields(tree), MANIFEST_NAME))
        _check_consistent(manifest)
        if seal is None or _sealed(tree) != data:
            _bad(SEAL, "does not fit the rest: the manifest was edited or damaged")
        return manifest

    def to_json(self) -> bytes:
        """Return the canonical JSON of the manifest: sorted keys, indent 1, ASCII, a newline at the end."""
        manifest = typing.cast("Manifest", decode(Manifest, plain(self), MANIFEST_NAME))
        _check_consistent(manifest)
        tree = plain(manifest)
        for name in _later_fields(manifest.format_version):
            del tree[name]
        data = _sealed(tree)
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST_NAME}: more than {MAX_MANIFEST_BYTES} bytes")
        return data


def _bad(path: str, complaint: str) -> NoReturn:
    """Raise BundleError for the field at `path`."""
    raise BundleError(f"{MANIFEST_NAME}: {path}: {complaint}", DAMAGED)


def _sealed(tree: dict[str, Any]) -> bytes:
    """Return the JSON of `tree` with the sha256 of that JSON, so that a change of any byte is detected."""
    seal = hashlib.sha256(_json(tree)).hexdigest()
    return _json({**tree, SEAL: seal})


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def oldest_format(parallel: Parallel, layers: Sequence[Layer], **fields: Any) -> FormatVersion:
    """Return the oldest format that has the ranks, the layers and the `fields` that are not None."""
    used = [_ADDED_IN.get(name, 1) for name, value in fields.items() if value is not None]
    used += [_RANKS_IN] if parallel.world_size > 1 else []
    used += [_LATENT_IN] if any(layer.v_head_dim == 0 for layer in layers) else []
    used += [_CHUNKS_IN] if any(layer.kind == "chunked" for layer in layers) else []
    return typing.cast(FormatVersion, max([1, *used]))


def _later_fields(version: int) -> list[str]:
    """Return the fields that formats later than `version` added."""
    return [name for name, first in _ADDED_IN.items() if version < first]


def _with_later_fields(tree: Any) -> Any:
    """Return a tree of an older format with empty values for the fields that were added later."""
    if not isinstance(tree, dict):
        return tree  # `decode` reports this, and an invalid version
    version = tree.get("format_version")
    later = _later_fields(version if type(version) is int else 1)
    for name in later:
        if name in tree:
            _bad(name, "unknown field in this bundle format")
    return {**tree, **dict.fromkeys(later)}


def _refuse_newer(tree: Any) -> None:
    """Refuse newer formats. Every format has `format_version` and `producer.llmc` in the same places."""
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version <= FORMAT_VERSION:
        return  # `decode` reports these
    producer = tree.get("producer")
    needed = producer.get("llmc") if isinstance(producer, dict) else None
    if isinstance(needed, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,64}", needed):
        message, hint = f"needs llmc >= {needed}", upgrade_hint(needed)
    else:
        message, hint = "needs a newer llmc", upgrade_hint()
    known = f"this llmc reads formats 1 to {FORMAT_VERSION}"
    raise BundleError(f"bundle format {shown(version)} {message}; {known}", hint)


def _check_ranks(manifest: Manifest) -> None:
    """Check the layers of the ranks of TensorRT engines."""
    records, parallel = manifest.ranks, manifest.parallel
    if records is None:
        if parallel.pp > 1 and manifest.gpu is not None:
            _bad("ranks", f"missing for the pipeline stages of {manifest.target.engine}")
        return
    if manifest.gpu is None or parallel.world_size == 1:
        _bad("ranks", "given for a bundle that is not one of several ranks with TensorRT engines")
    if len(records) != parallel.world_size:
        _bad("ranks", f"has {len(records)} ranks, parallel.world_size is {parallel.world_size}")
    begin = stop = 0
    for rank, record in enumerate(records):
        if rank % parallel.tp == 0:
            begin, stop = stop, record.stop
        if (record.first, record.stop) != (begin, stop) or begin >= stop:
            _bad(f"ranks[{rank}]", f"has the layers {record.first} to {record.stop}, not those of its stage")
        if len({exchange.operation for exchange in record.exchanges}) != len(record.exchanges):
            _bad(f"ranks[{rank}].exchanges", "an operation is listed twice")
    if stop != manifest.geometry.num_layers:
        _bad("ranks", f"have {stop} layers, num_layers is {manifest.geometry.num_layers}")


def _check_consistent(manifest: Manifest) -> None:
    """Check the rules that involve more than one field."""
    geometry, verification, weights = manifest.geometry, manifest.verification, manifest.weights
    if len(geometry.layers) != geometry.num_layers:
        _bad("geometry.layers", f"has {len(geometry.layers)} layers, num_layers is {geometry.num_layers}")
    for i, layer in enumerate(geometry.layers):
        if (layer.kind == "full") != (layer.window == 0):
            _bad(f"geometry.layers[{i}].window", f"{layer.window} does not fit a {layer.kind} layer")
    needs_gpu = {"cpu": False, "tensorrt": True, "tensorrt-rtx": True}.get(manifest.target.name)
    if needs_gpu is not None and needs_gpu != (manifest.gpu is not None):
        _bad("gpu", f"{'missing' if manifest.gpu is None else 'given'} for the target {manifest.target.name}")
    added = {name: getattr(manifest, name) for name in _ADDED_IN}
    oldest = oldest_format(manifest.parallel, geometry.layers, **added)
    if manifest.format_version != oldest:
        _bad("format_version", f"{manifest.format_version} does not fit: the fields in use need {oldest}")
    kv_dtype, engine = manifest.precision.kv_dtype, manifest.target.engine
    if kv_dtype not in _KV_CACHES:
        raise BundleError(f"the bundle has a KV cache of {kv_dtype}, which this llmc lacks", upgrade_hint())
    if (kv_dtype in QUANTIZED_CACHES and manifest.gpu is None) or (
        _CPU_CACHES.get(kv_dtype, engine) != engine
        or (kv_dtype == "fp16" and manifest.gpu is None and engine != "native")
    ):
        _bad("precision.kv_dtype", f"{kv_dtype} is no KV cache of {engine}")
    if len({operator.name for operator in manifest.operators}) != len(manifest.operators):
        _bad("operators", "an operator is listed twice")
    if manifest.parallel.world_size != manifest.parallel.tp * manifest.parallel.pp:
        _bad("parallel.world_size", "is not the product of tp, pp and ep")
    if manifest.parallel.world_size > 1 and manifest.target.engine in _ONE_RANK:
        _bad("parallel", f"{manifest.target.engine} runs one rank only")
    _check_ranks(manifest)
    ranks = [engine.rank for engine in manifest.engines]
    if len(ranks) != manifest.parallel.world_size or ranks != list(range(len(ranks))):
        _bad("engines", f"must list ranks 0 to {manifest.parallel.world_size - 1} in order")
    if len({engine.file for engine in manifest.engines}) != len(manifest.engines):
        _bad("engines", "two ranks have one file")
    if verification.status == "skipped" and not verification.reason:
        _bad("verification.reason", "a skipped verification must say why")
    for name in ("reference", "max_logit_error", "tolerance", "tokens_compared"):
        if verification.status == "passed" and getattr(verification, name) is None:
            _bad(f"verification.{name}", "a passed verification must state it")
    if verification.status == "passed" and verification.max_logit_error > verification.tolerance:  # type: ignore[operator]
        _bad("verification", "passed, but max_logit_error is above the tolerance")
    kernels = manifest.gpu.kernels if manifest.gpu else ()
    referenced = [engine.file for engine in manifest.engines] + [kernel.file for kernel in kernels]
    for path in [*referenced, *weights.files]:
        if path not in manifest.files:
            _bad("files", f"{path!r} is not listed")
    if len(set(weights.files)) != len(weights.files):
        _bad("weights.files", "a file is listed twice")
    if sum(manifest.files[path].bytes for path in weights.files) != weights.bytes:
        _bad("weights.bytes", "is not the sum of the sizes of weights.files")
    seen = {MANIFEST_NAME: MANIFEST_NAME}
    for path in manifest.files:
        key = path.lower()  # paths are ASCII
        if key in seen:
            _bad("files", f"{seen[key]!r} and {path!r} are one file on some systems")
        seen[key] = path
