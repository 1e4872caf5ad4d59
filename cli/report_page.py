"""The sections of the page that `llmc report` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmc import __version__
from llmc.cli.build import describe_geometry, describe_kv_cache_loss, describe_layer, describe_target
from llmc.cli.html_elements import (
    Html,
    bars,
    element,
    fact_table,
    folded,
    grid,
    legend,
    page,
    paragraph,
    section,
    tiles,
)
from llmc.cli.inspect import describe_gpu, describe_sampling, describe_weights, total_bytes
from llmc.cli.ranks import describe_ranks
from llmc.cli.report_layers import layer_charts
from llmc.cli.text import size
from llmc.compiler.bundle_ranks import ranks_of

if TYPE_CHECKING:
    from llmc.cli.benchmark import Benchmark
    from llmc.runtime.bundle.manifest import Manifest
    from llmc.runtime.bundle.reader import Bundle

_SEQUENCES = (1, 4, 16, 64)  # columns of the table of KV cache memory
_CONTEXTS = 5  # rows of that table: the whole context, a half, a quarter, ...


def report_page(bundle: Bundle, benchmarks: Sequence[Benchmark]) -> str:
    """Return the whole page as HTML."""
    manifest = bundle.manifest
    sections = [
        _head(bundle),
        _inside(manifest),
        _hardware(bundle),
        _verification(manifest),
        *_quantization(bundle),
        _memory(manifest),
        *_speed(benchmarks),
        _files(bundle),
        element("footer", f"Written by llmc {__version__} from the manifest of the bundle."),
    ]
    return page(bundle.name, sections)


def _head(bundle: Bundle) -> Html:
    manifest = bundle.manifest
    verified = manifest.verification.status == "passed"
    facts = [
        ("verification", "passed" if verified else "skipped", "good" if verified else "bad"),
        ("engine", describe_target(manifest.target), ""),
        ("weights", str((manifest.quantization or {}).get("format", manifest.weights.dtype)), ""),
        ("tokens of context", f"{manifest.limits.max_seq_len:,}", ""),
        ("on disk", size(total_bytes(bundle)), ""),
    ]
    source = manifest.source
    about = paragraph(f"A bundle of {source.name}: {source.model_type}, {source.architecture}")
    return element("header", element("h1", bundle.name), about, tiles(facts))


def _inside(manifest: Manifest) -> Html:
    kinds = Counter(map(describe_layer, manifest.geometry.layers))
    ends = ", ".join(map(str, manifest.tokens.eos)) or "none"
    libraries = [f"{name} {version}" for name, version in manifest.producer.libraries.items()]
    facts = [
        ("checkpoint", f"{manifest.source.name}, {manifest.source.dtype}"),
        ("model", describe_geometry(manifest.geometry)),
        ("attention", ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
        ("weights", describe_weights(manifest)),
        ("precision", f"{manifest.precision.dtype}, KV cache {manifest.precision.kv_dtype}"),
        ("sampling", describe_sampling(manifest.sampling)),
        ("tokens", f"begin {manifest.tokens.bos}, end {ends}"),
        ("built by", ", ".join([f"llmc {manifest.producer.llmc}", *libraries])),
        ("bundle format", str(manifest.format_version)),
    ]
    return section("What is inside", fact_table(facts))


def _hardware(bundle: Bundle) -> Html:
    manifest, target = bundle.manifest, bundle.manifest.target
    ranks = []
    if manifest.parallel.world_size > 1:
        ranks = describe_ranks(ranks_of(bundle), manifest.parallel.tp, manifest.limits.max_seq_len)
    requires = ", ".join(f"{name} {version}" for name, version in target.requires.items())
    facts = [
        ("runs on", "a CPU" if manifest.gpu is None else "an NVIDIA GPU"),
        *describe_gpu(manifest),
        *ranks,
        ("engine", describe_target(target)),
        ("chosen because", target.reason),
        ("requires", requires or "nothing besides llmc"),
    ]
    return section("Hardware", fact_table(facts))


def _verification(manifest: Manifest) -> Html:
    record = manifest.verification
    if record.status == "skipped":
        return section("Verification", paragraph(f"The engine was not verified: {record.reason}."))
    assert record.max_logit_error is not None
    assert record.tolerance is not None
    text = f"The build compared the engine with {record.reference}."
    if compared := record.details.get("compared"):
        text += f" In place of the engine it compared {compared}."
    facts = [("tokens compared", f"{record.tokens_compared:,}")]
    if record.greedy_tokens_equal is not None:
        facts.append(("greedy text", "equal" if record.greedy_tokens_equal else "different"))
    errors = f"{record.max_logit_error:g} of {record.tolerance:g}"
    charts = [
        bars([("largest logit error, of the tolerance", [record.max_logit_error], errors)], record.tolerance)
    ]
    if record.top1_agreement is not None:
        charts.append(_share("top-1 agreement", record.top1_agreement))
    return section("Verification", paragraph(text), fact_table(facts), *charts)


def _quantization(bundle: Bundle) -> Iterator[Html]:
    """Yield the section about quantization loss; nothing if neither weights nor KV cache are quantized."""
    from llmc.compiler.verify.figures import recorded

    manifest = bundle.manifest
    figures, cache = recorded(manifest), describe_kv_cache_loss(manifest)
    facts, charts = [], []
    if manifest.quantization is not None:
        facts.append(("weights", describe_weights(manifest)))
        if figures.mean_kl is None or figures.top1_agreement is None:
            facts.append(("loss", "not measured"))
        else:
            facts.append(("mean KL", f"{figures.mean_kl:g} nats"))
            charts.append(_share("top-1 agreement with the checkpoint", figures.top1_agreement))
        before, after = figures.perplexity_unquantized, figures.perplexity
        if before is not None and after is not None:
            charts.append(
                bars(
                    [
                        ("perplexity, not quantized", [before], f"{before:g}"),
                        ("perplexity, quantized", [after], f"{after:g}"),
                    ],
                    max(before, after),
                )
            )
        if figures.positions is not None:
            against = f", against {figures.against}" if figures.against else ""
            facts.append(("measured on", f"{figures.positions:,} positions{against}"))
    if cache:
        facts.append(("KV cache", cache))
    if facts:
        yield section("Quantization loss", fact_table(facts), *charts, *layer_charts(bundle))


def _memory(manifest: Manifest) -> Html:
    """Return the section about the memory of the KV cache and of the weights."""
    from llmc.runtime.backends.kv_cache import block_bytes

    geometry, longest = manifest.geometry, manifest.limits.max_seq_len
    block = block_bytes(geometry, manifest.precision.kv_dtype)
    most = manifest.gpu.max_sequences if manifest.gpu else _SEQUENCES[-1]
    counts = sorted({*(count for count in _SEQUENCES if count < most), most})
    contexts = sorted({max(1, longest >> shift) for shift in range(_CONTEXTS)})

    def cache(tokens: int, sequences: int) -> int:
        return sequences * block * -(-tokens // geometry.block_size)

    header = ["context", *(f"{count:,} sequence{'s' * (count > 1)}" for count in counts)]
    rows = [[f"{tokens:,}", *(size(cache(tokens, count)) for count in counts)] for tokens in contexts]
    stored = {*manifest.weights.files, *(engine.file for engine in manifest.engines)}
    fixed = sum(manifest.files[name].bytes for name in stored)
    totals = [fixed + cache(longest, count) for count in counts]
    chart = [
        (name, [fixed, total - fixed], size(total)) for name, total in zip(header[1:], totals, strict=True)
    ]
    about = (
        f"The KV cache is {manifest.precision.kv_dtype}: {size(block // geometry.block_size)} a token, in "
        f"blocks of {geometry.block_size} tokens. A smaller cache serves fewer sequences at once. "
    )
    return section(
        "Memory of the KV cache",
        paragraph(about, element("code", "--kv-memory"), " sets its size."),
        grid(header, rows),
        element("h3", f"With the weights, {longest:,} tokens of context"),
        legend(f"weights and engine, {size(fixed)}", "KV cache"),
        bars(chart, totals[-1]),
        paragraph("Activations and libraries need memory too."),
    )


def _speed(benchmarks: Sequence[Benchmark]) -> Iterator[Html]:
    """Yield the section about speed, if there are measurements."""
    if not benchmarks:
        return
    header = ("workload", "first token", "prefill", "decode", "whole run")
    rows = [
        (
            benchmark.workload,
            f"{benchmark.first_token_seconds * 1e3:,.1f} ms",
            f"{benchmark.prefill_tokens_per_second:,.0f} tok/s",
            f"{benchmark.decode_tokens_per_second:,.1f} tok/s",
            f"{benchmark.seconds:,.3f} s",
        )
        for benchmark in benchmarks
    ]
    speeds = [benchmark.decode_tokens_per_second for benchmark in benchmarks]
    chart = [(row[0], [speed], row[3]) for row, speed in zip(rows, speeds, strict=True)]
    machines = ", ".join(dict.fromkeys(benchmark.machine for benchmark in benchmarks))
    yield section(
        "Speed",
        paragraph("Measured by ", element("code", "llmc bench"), f" on {machines}."),
        grid(header, rows),
        element("h3", "Decode"),
        bars(chart, max(speeds)),
    )


def _files(bundle: Bundle) -> Html:
    manifest = bundle.manifest
    files = [(name, f"{record.bytes:,}", record.sha256[:12]) for name, record in manifest.files.items()]
    passes = [(report.name, f"{report.matches:,}", f"{report.near_misses:,}") for report in manifest.passes]
    return section(
        "Files and passes",
        folded(f"{len(files)} files besides the manifest", grid(("file", "bytes", "sha256"), files)),
        folded(f"{len(passes)} passes", grid(("pass", "matches", "near misses"), passes)),
    )


def _share(name: str, share: float) -> Html:
    return bars([(name, [share], f"{share:.4f}")], 1)
