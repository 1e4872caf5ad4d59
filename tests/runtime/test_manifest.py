"""The manifest: one spelling, strict reading, and BundleError for everything else."""

import copy
import dataclasses
import hashlib
import json
import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.runtime.bundle.manifest import (
    MAX_MANIFEST_BYTES,
    Engine,
    ExchangeRecord,
    FileRecord,
    Geometry,
    Gpu,
    KernelFile,
    Layer,
    Limits,
    Manifest,
    Operator,
    Parallel,
    PassRecord,
    Precision,
    Producer,
    RankRecord,
    Sampling,
    Source,
    Target,
    Tokens,
    Verification,
    Weights,
    path_fault,
)
from llmc.runtime.errors import BundleError
from llmc.runtime.installation import upgrade_hint

ZERO, ONE = "0" * 64, "1" * 64

EXAMPLE = Manifest(
    producer=Producer("0.1.0", {"onnx-ir": "1.1.0", "openvino": "2026.4.1"}),
    source=Source("tiny", "llama", "LlamaForCausalLM", ZERO, "bf16", {"model.safetensors": ONE}),
    geometry=Geometry(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        v_head_dim=16,
        hidden_size=64,
        vocab_size=256,
        layers=(Layer("full", 0, 2, 16, 16), Layer("sliding", 128, 1, 32, 16)),
    ),
    limits=Limits(2048),
    precision=Precision("fp32", "fp32"),
    quantization={"scheme": "int8", "excluded": ["lm_head"]},
    target=Target("cpu", "openvino", "", {"openvino": "2026.4"}),
    operators=(Operator("llmc.PagedAttention", 1, 2),),
    tokens=Tokens(1, (2, 3)),
    passes=(PassRecord("FuseSwiglu", 2, 0),),
    verification=Verification(
        status="passed",
        reference="transformers 5.23.0",
        max_logit_error=1.5e-5,
        tolerance=1e-3,
        top1_agreement=1.0,
        greedy_tokens_equal=True,
        tokens_compared=64,
        details={"kl": 0.25},
    ),
    engines=(Engine(0, "rank0.onnx"),),
    weights=Weights(("weights/model-00001.safetensors",), 640, "fp32"),
    files={"rank0.onnx": FileRecord(10, ZERO), "weights/model-00001.safetensors": FileRecord(640, ONE)},
)

# Format 1 as it was first written: every later llmc must read it, and read it as EXAMPLE.
FROZEN_SHA256 = "f6a7e48fafe9a7e168266c5326670d9d33a2ae4085769bcc7d3ab7bff87f1ac7"


def sealed(tree):
    """The bytes of `tree` as FORMAT.md spells them: an implementation that shares no code."""
    tree = {key: value for key, value in tree.items() if key != "manifest_sha256"}

    def text(value):
        return json.dumps(value, sort_keys=True, indent=1) + "\n"

    return text({**tree, "manifest_sha256": hashlib.sha256(text(tree).encode()).hexdigest()}).encode()


def example_tree():
    return json.loads(EXAMPLE.to_json())


def places(value, path=()):
    """Every (path, value) inside a JSON tree, the outermost first."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(tree, path, value):
    tree = copy.deepcopy(tree)
    if not path:
        return value
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and not isinstance(path[-1], str):
        raise LookupError(path)  # a place in a list, where an earlier change has put a dict
    inner[path[-1]] = value
    return tree


def fault(data):
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_round_trip():
    data = EXAMPLE.to_json()
    assert Manifest.from_json(data) == EXAMPLE
    assert Manifest.from_json(data).to_json() == data
    assert sealed(example_tree()) == data


def test_the_first_format_1_is_frozen():
    assert hashlib.sha256(EXAMPLE.to_json()).hexdigest() == FROZEN_SHA256


def gpu_example() -> Manifest:
    kernel = "kernels/sm89/decode.cubin"
    return dataclasses.replace(
        EXAMPLE,
        format_version=2,
        target=Target("tensorrt-rtx", "tensorrt-rtx", "no GPU at hand", {"tensorrt-rtx": "1.7.1"}),
        gpu=Gpu(
            (89,), 8192, 256, 1024,
            (KernelFile("decode-bf16-h2x2d64", 89, "cubin", kernel, "decode", 4096, 4, 128),),
        ),
        files={**EXAMPLE.files, kernel: FileRecord(10, "0" * 64)},
    )  # fmt: skip


def test_format_2_adds_what_a_gpu_engine_was_built_for():
    data = gpu_example().to_json()
    assert Manifest.from_json(data) == gpu_example()
    assert b'"format_version": 2' in data
    assert b'"gpu"' not in EXAMPLE.to_json()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpu": None}, "gpu: missing for the target tensorrt-rtx"),
        ({"format_version": 1}, "format_version: 1 does not fit"),
        ({"target": EXAMPLE.target}, "gpu: given for the target cpu"),
        ({"files": EXAMPLE.files}, "'kernels/sm89/decode.cubin' is not listed"),
    ],
)
def test_a_gpu_engine_is_described_fully_or_not_at_all(changes, expected):
    with pytest.raises(BundleError, match=re.escape(expected)):
        dataclasses.replace(gpu_example(), **changes).to_json()


@pytest.mark.parametrize("field", ["gpu", "sampling", "ranks"])
def test_format_1_has_no_later_field(field):
    tree = {**example_tree(), field: None}
    assert f"{field}: unknown field" in fault(sealed(tree))


SAMPLING = Sampling(True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.0, repetition_penalty=1.05)


@pytest.mark.parametrize("base", [EXAMPLE, gpu_example()], ids=["cpu", "gpu"])
def test_format_3_adds_sampling_defaults(base):
    example = dataclasses.replace(base, format_version=3, sampling=SAMPLING)
    data = example.to_json()
    assert Manifest.from_json(data) == example
    tree = json.loads(data)
    assert (tree["format_version"], tree["sampling"]["temperature"]) == (3, 0.6)
    assert (tree["gpu"] is None) == (base.gpu is None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 1}, "format_version: 1 does not fit: the fields in use need 3"),
        ({"sampling": None}, "format_version: 3 does not fit: the fields in use need 1"),
        ({"sampling": dataclasses.replace(SAMPLING, top_p=1.5)}, "sampling.top_p: must be between 0 and 1"),
        ({"sampling": dataclasses.replace(SAMPLING, top_k=-1)}, "sampling.top_k: must be at least 0"),
        ({"sampling": dataclasses.replace(SAMPLING, temperature=-1.0)}, "sampling.temperature: must be at"),
        (
            {"sampling": dataclasses.replace(SAMPLING, repetition_penalty=0.0)},
            "sampling.repetition_penalty: must be above 0",
        ),
        ({"sampling": dataclasses.replace(SAMPLING, do_sample=1)}, "sampling.do_sample: must be true or"),
    ],
)
def test_sampling_defaults_that_are_refused(changes, expected):
    example = dataclasses.replace(EXAMPLE, format_version=3, sampling=SAMPLING)
    with pytest.raises(BundleError, match=re.escape(expected)):
        dataclasses.replace(example, **changes).to_json()


def ranks_example() -> Manifest:
    programs = ("rank0.program.json", "rank1.program.json")
    weights = ("weights/packed.rank0.safetensors", "weights/packed.rank1.safetensors")
    return dataclasses.replace(
        EXAMPLE,
        format_version=4,
        target=Target("cpu", "native", "", {}),
        parallel=Parallel(tp=2, world_size=2),
        operators=(Operator("llmc.AllGather", 1, 1), Operator("llmc.AllReduce", 1, 5)),
        engines=tuple(Engine(rank, file) for rank, file in enumerate(programs)),
        weights=Weights(weights, 1280, "fp32"),
        files={name: FileRecord(640, ZERO) for name in (*programs, *weights)},
    )


@pytest.mark.parametrize("sampling", [None, SAMPLING])
def test_format_4_adds_ranks(sampling):
    example = dataclasses.replace(ranks_example(), sampling=sampling)
    data = example.to_json()
    assert Manifest.from_json(data) == example
    tree = json.loads(data)
    assert tree["format_version"] == 4
    assert tree["parallel"] == {"tp": 2, "pp": 1, "ep": 1, "world_size": 2}
    assert tree["gpu"] is None
    assert (tree["sampling"] is None) == (sampling is None)


def test_stages_are_ranks():
    """Two stages of one rank have the engines that two ranks of one stage have."""
    example = dataclasses.replace(ranks_example(), parallel=Parallel(pp=2, world_size=2))
    assert Manifest.from_json(example.to_json()) == example
    assert json.loads(example.to_json())["parallel"] == {"tp": 1, "pp": 2, "ep": 1, "world_size": 2}


def test_ranks_may_be_on_gpus():
    example, on_a_gpu = ranks_example(), gpu_example()
    kernels = {kernel.file: on_a_gpu.files[kernel.file] for kernel in on_a_gpu.gpu.kernels}
    changed = dataclasses.replace(
        example, target=on_a_gpu.target, gpu=on_a_gpu.gpu, files={**example.files, **kernels}
    )
    data = changed.to_json()
    assert Manifest.from_json(data) == changed


RANK0, RANK1 = ranks_example().engines


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 3}, "format_version: 3 does not fit: the fields in use need 4"),
        ({"format_version": 1}, "format_version: 1 does not fit: the fields in use need 4"),
        ({"parallel": Parallel()}, "format_version: 4 does not fit: the fields in use need 1"),
        (
            {"parallel": Parallel(), "sampling": SAMPLING},
            "format_version: 4 does not fit: the fields in use need 3",
        ),
        ({"parallel": Parallel(tp=2, world_size=3)}, "parallel.world_size: is not the product"),
        ({"parallel": Parallel(tp=1, world_size=2)}, "parallel.world_size: is not the product"),
        ({"parallel": Parallel(tp=2, pp=2, world_size=2)}, "parallel.world_size: is not the product"),
        ({"parallel": Parallel(tp=2, pp=2, world_size=4)}, "engines: must list ranks 0 to 3 in order"),
        ({"parallel": Parallel(tp=2, world_size=0)}, "parallel.world_size: must be at least 1"),
        ({"parallel": Parallel(tp=3, world_size=3)}, "engines: must list ranks 0 to 2 in order"),
        ({"parallel": Parallel(tp=2**62, world_size=2**62)}, "engines: must list ranks 0 to 46116860184"),
        ({"engines": (RANK0,)}, "engines: must list ranks 0 to 1 in order"),
        (
            {"engines": (RANK0, dataclasses.replace(RANK1, file=RANK0.file))},
            "engines: two ranks have one file",
        ),
        ({"engines": (RANK1, RANK0)}, "engines: must list ranks 0 to 1 in order"),
        ({"engines": (RANK0, dataclasses.replace(RANK1, rank=0))}, "engines: must list ranks 0 to 1 in"),
        ({"engines": (RANK0, RANK1, Engine(2, RANK1.file))}, "engines: must list ranks 0 to 1 in order"),
        ({"engines": (RANK0, Engine(1, "rank1.onnx"))}, "files: 'rank1.onnx' is not listed"),
        ({"target": EXAMPLE.target}, "parallel: openvino runs one rank only"),
        (
            {"target": Target("cpu", "onnxruntime", "", {})},
            "parallel: onnxruntime runs one rank only",
        ),
    ],
)
def test_ranks_that_are_refused(changes, expected):
    changed = dataclasses.replace(ranks_example(), **changes)
    with pytest.raises(BundleError, match=re.escape(expected)):
        changed.to_json()
    tree = dataclasses.asdict(changed)
    del tree["ranks"]
    if changed.format_version < 3:
        del tree["sampling"]
    if changed.format_version < 2:
        del tree["gpu"]
    assert expected in fault(sealed(tree))


def records_example():
    """Two stages of two ranks with TensorRT engines."""
    on_a_gpu = gpu_example()
    plans = [f"engines/rank{rank}.plan" for rank in range(4)]
    kernels = {kernel.file: on_a_gpu.files[kernel.file] for kernel in on_a_gpu.gpu.kernels}
    ranks = [
        RankRecord(0, 1, (ExchangeRecord("AllReduce", 3, 96, 0), ExchangeRecord("Send", 1, 32, 0))),
        RankRecord(1, 2, (ExchangeRecord("AllReduce", 2, 64, 0), ExchangeRecord("Send", 1, 0, 1024))),
    ]
    return dataclasses.replace(
        on_a_gpu,
        format_version=5,
        parallel=Parallel(tp=2, pp=2, world_size=4),
        engines=tuple(Engine(rank, file) for rank, file in enumerate(plans)),
        weights=Weights((), 0, "bf16"),
        ranks=(ranks[0], ranks[0], ranks[1], ranks[1]),
        files={**kernels, **{plan: FileRecord(640, ZERO) for plan in plans}},
    )


def test_format_5_adds_what_the_ranks_of_tensorrt_have():
    example = records_example()
    data = example.to_json()
    assert Manifest.from_json(data) == example
    assert json.loads(data)["ranks"][3]["exchanges"][1] == {
        "operation": "Send",
        "count": 1,
        "token_bytes": 0,
        "logits_bytes": 1024,
    }


STAGES = records_example().ranks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ranks": None, "format_version": 4}, "ranks: missing for the pipeline stages of tensorrt-rtx"),
        ({"format_version": 4}, "format_version: 4 does not fit: the fields in use need 5"),
        ({"ranks": STAGES[:3]}, "ranks: has 3 ranks, parallel.world_size is 4"),
        ({"ranks": STAGES[:2] * 2}, "ranks[2]: has the layers 0 to 1, not those of its stage"),
        ({"ranks": STAGES[::2] * 2}, "ranks[1]: has the layers 1 to 2, not those of its stage"),
        (
            {"ranks": (*STAGES[:2], *[dataclasses.replace(STAGES[2], stop=3)] * 2)},
            "ranks: have 3 layers, num_layers is 2",
        ),
        (
            {"ranks": (*STAGES[:3], dataclasses.replace(STAGES[3], exchanges=STAGES[3].exchanges * 2))},
            "ranks[3].exchanges: an operation is listed twice",
        ),
        (
            {"parallel": Parallel(), "engines": records_example().engines[:1], "ranks": STAGES[:1]},
            "ranks: given for a bundle that is not one of several ranks",
        ),
    ],
)
def test_ranks_of_tensorrt_that_are_refused(changes, expected):
    changed = dataclasses.replace(records_example(), **changes)
    with pytest.raises(BundleError, match=re.escape(expected)):
        changed.to_json()


def test_order_of_construction_does_not_show():
    shuffled = dataclasses.replace(EXAMPLE, files=dict(reversed(EXAMPLE.files.items())))
    assert shuffled.to_json() == EXAMPLE.to_json()


def test_an_integer_where_a_number_belongs_is_written_as_a_number():
    whole = dataclasses.replace(EXAMPLE.verification, max_logit_error=0)
    data = dataclasses.replace(EXAMPLE, verification=whole).to_json()
    assert b'"max_logit_error": 0.0' in data
    assert Manifest.from_json(data).to_json() == data


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("format_version",), 0, "format_version: must be 1 or 2 or 3 or 4 or 5 or 6 or 7, got 0"),
        (("format_version",), True, "format_version: must be 1 or 2 or 3 or 4 or 5 or 6 or 7, got True"),
        (("producer",), [], "producer: must be an object, got a list"),
        (("source", "config_sha256"), "ABC", "source.config_sha256: must be 64 lowercase hexadecimal digits"),
        (
            ("source", "name"),
            "/home/me/model",
            "source.name: must be a name: not empty, not an absolute path",
        ),
        (("source", "files"), {"C:\\m": ZERO}, r"source.files['C:\\m']: must be a name"),
        (("geometry", "num_heads"), 0, "geometry.num_heads: must be at least 1, got 0"),
        (("geometry", "num_heads"), 4.0, "geometry.num_heads: must be an integer, got 4.0"),
        (("geometry", "num_heads"), True, "geometry.num_heads: must be an integer, got True"),
        (("geometry", "vocab_size"), 2**63, "geometry.vocab_size: the integer does not fit 64 bits"),
        (("geometry", "num_layers"), 3, "geometry.layers: has 2 layers, num_layers is 3"),
        (("geometry", "layers", 1, "kind"), "round", "geometry.layers[1].kind: must be 'full' or 'sliding'"),
        (("geometry", "layers", 1, "window"), 0, "geometry.layers[1].window: 0 does not fit a sliding layer"),
        (("geometry", "layers", 0, "window"), 9, "geometry.layers[0].window: 9 does not fit a full layer"),
        (("parallel", "tp"), 0, "parallel.tp: must be at least 1, got 0"),
        (("parallel", "tp"), 2, "parallel.world_size: is not the product of tp, pp and ep"),
        (("parallel", "pp"), 2, "parallel.world_size: is not the product of tp, pp and ep"),
        (("parallel", "pp"), 0, "parallel.pp: must be at least 1, got 0"),
        (("parallel", "ep"), 2, "parallel.ep: must be 1, got 2"),
        (("target", "engine"), "Open VINO", "target.engine: must be lower-case letters, digits and hyphens"),
        (("target", "name"), "../cpu", "target.name: must be lower-case letters, digits and hyphens"),
        (("target", "reason"), "a\x1b[31m", "target.reason: must be one printable line"),
        (("target", "reason"), "x" * 4097, "target.reason: must be one printable line"),
        (("tokens", "eos"), 2, "tokens.eos: must be a list, got 2"),
        (("tokens", "eos"), [2, -1], "tokens.eos[1]: must be at least 0, got -1"),
        (("passes", 0, "matches"), None, "passes[0].matches: must be an integer, got None"),
        (("verification", "status"), "failed", "verification.status: must be 'passed' or 'skipped'"),
        (("verification", "status"), "skipped", "verification.reason: a skipped verification must say why"),
        (("verification", "tolerance"), None, "verification.tolerance: a passed verification must state it"),
        (("verification", "tolerance"), 1e-6, "verification: passed, but max_logit_error is above"),
        (("verification", "top1_agreement"), 1.5, "verification.top1_agreement: must be between 0 and 1"),
        (("verification", "greedy_tokens_equal"), 1, "greedy_tokens_equal: must be true or false, got 1"),
        (("verification", "details"), {"a": 10**30}, "verification.details['a']: the integer does not fit"),
        (("quantization", "scheme"), "\ud800", "quantization['scheme']: must be one printable line"),
        (("operators",), [{"name": "a", "abi": 1, "count": 1}] * 2, "operators: an operator is listed twice"),
        (("engines",), [], "engines: must list ranks 0 to 0 in order"),
        (("engines", 0, "rank"), 1, "engines: must list ranks 0 to 0 in order"),
        (("engines", 0, "file"), "rank1.onnx", "files: 'rank1.onnx' is not listed"),
        (("engines", 0, "file"), "../rank0.onnx", "engines[0].file: must be a relative path"),
        (("weights", "bytes"), 641, "weights.bytes: is not the sum"),
        (
            ("weights", "files"),
            ["weights/model-00001.safetensors"] * 2,
            "weights.files: a file is listed twice",
        ),
        (("files", "RANK0.onnx"), {"bytes": 1, "sha256": ZERO}, "are one file on some systems"),
        (("files", "Manifest.json"), {"bytes": 1, "sha256": ZERO}, "are one file on some systems"),
        (("files", "/etc/passwd"), {"bytes": 1, "sha256": ZERO}, "files['/etc/passwd']: must be a relative"),
        (("surprise",), 1, "surprise: unknown field in this bundle format"),
        (("limits", "surprise"), 1, "limits.surprise: unknown field in this bundle format"),
        ((), None, "the whole: must be an object, got None"),
        ((), [], "the whole: must be an object, got a list"),
    ],
)
def test_a_fault_is_named(path, value, expected):
    tree = replaced(example_tree(), path, value)
    assert expected in fault(sealed(tree) if isinstance(tree, dict) else json.dumps(tree).encode())


def test_every_field_is_required():
    tree, open_inside = example_tree(), {"libraries", "requires", "quantization", "details", "files"}
    for path, _ in places(tree):
        if not path or isinstance(path[-1], int) or open_inside & set(path[:-1]):
            continue
        smaller = copy.deepcopy(tree)
        inner = smaller
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        data = json.dumps(smaller).encode() if path == ("manifest_sha256",) else sealed(smaller)
        assert str(path[-1]) in fault(data)


def test_no_changed_byte_goes_unseen():
    data = EXAMPLE.to_json()
    for position in range(len(data)):
        for flip in (0x01, 0x20):
            changed = data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :]
            with pytest.raises(BundleError):
                Manifest.from_json(changed)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "more than 16777216 bytes"),
    ],
)
def test_what_is_not_a_manifest(data, expected):
    assert expected in fault(data)


def test_open_fields_have_a_depth():
    deep = 1
    for _ in range(40):
        deep = [deep]
    assert "nested more than 32 deep" in fault(sealed(replaced(example_tree(), ("quantization", "q"), deep)))


@pytest.mark.parametrize("spelling", [lambda d: d + b"\n", lambda d: d.replace(b'"rank": 0', b'"rank":  0')])
def test_another_spelling_is_refused(spelling):
    assert "manifest_sha256: does not fit the rest" in fault(spelling(EXAMPLE.to_json()))


def test_a_newer_format_names_the_llmc_it_needs():
    newer = {"format_version": 8, "producer": {"llmc": "9.1.0", "new": 1}, "anything": [1]}
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(newer).encode())
    assert caught.value.message == "bundle format 8 needs llmc >= 9.1.0; this llmc reads formats 1 to 7"
    assert caught.value.hint == upgrade_hint("9.1.0")


@pytest.mark.parametrize("producer", [None, {}, {"llmc": 3}, {"llmc": "1; rm -rf /"}])
def test_a_newer_format_with_an_odd_producer(producer):
    message = fault(json.dumps({"format_version": 8, "producer": producer}).encode())
    assert message.startswith("bundle format 8 needs a newer llmc")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            ".",
            "..",
            "a/../b",
            "/a",
            "a/",
            "a//b",
            "a\\b",
            "C:a",
            ".hidden",
            "a/.b",
            "a.",
            "a b",
            "é",
            "a\n",
        ),
        *("a" * 129, "/".join(["a" * 100] * 6)),
    ],
)
def test_unsafe_paths(path):
    assert path_fault(path)


@pytest.mark.parametrize("path", ["a", "rank0.onnx", "weights/model-00001-of-00002.safetensors", "a" * 128])
def test_plain_paths(path):
    assert not path_fault(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limits": Limits(0)}, "limits.max_seq_len"),
        ({"limits": Limits("2048")}, "limits.max_seq_len"),
        ({"quantization": {"scale": math.nan}}, "quantization['scale']: must be finite"),
        ({"quantization": {"scale": object()}}, "quantization['scale']: must be plain JSON"),
        ({"quantization": {1: 2}}, "must be a string, got 1"),
        ({"files": {}}, "files: 'rank0.onnx' is not listed"),
        ({"producer": None}, "producer: must be an object"),
    ],
)
def test_nothing_unreadable_is_written(change, expected):
    with pytest.raises(BundleError) as caught:
        dataclasses.replace(EXAMPLE, **change).to_json()
    assert expected in caught.value.message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, "full"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def reads_or_complains(data):
    try:
        manifest = Manifest.from_json(data)
    except BundleError as error:
        return error.message.isprintable()
    return manifest.to_json() == data or Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_fuzz_bytes(data):
    assert reads_or_complains(data)


@settings(max_examples=150)
@given(JSON)
def test_fuzz_json(value):
    assert reads_or_complains(json.dumps(value).encode())


PLACES = [path for path, _ in places(example_tree()) if path]


@settings(max_examples=400)
@example([(("operators",), {}), (("operators", 0), 1), (("operators", "a"), 1)], True)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3), st.booleans())
def test_fuzz_mutated_manifests(changes, seal):
    tree = example_tree()
    for path, value in changes:
        try:
            tree = replaced(tree, path, value)
        except (LookupError, TypeError):  # an earlier change took this place away
            continue
    assert reads_or_complains(sealed(tree) if seal else json.dumps(tree).encode())
