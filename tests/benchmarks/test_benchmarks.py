"""The benchmark's own arithmetic and its handling of workers, with made-up tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.waiting import wait_until

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import driver  # noqa: E402
import llama_rope  # noqa: E402
import llmc_worker  # noqa: E402
import peers  # noqa: E402
import rounds  # noqa: E402
import workload  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are watched through /proc")

# Continues every prompt with its last token plus 1, 2, 3, ...; a token takes a millisecond.
FAKE = """
import sys, time
sys.path.insert(0, {protocol!r})
from protocol import Generation, main

print("noise on stdout while loading")

class Fake:
    def __init__(self, model, threads):
        self.describe = {{"threads": threads}}

    def generate(self, prompts, new_tokens):
        if new_tokens == 13:
            raise SystemExit("thirteen is not a number of tokens")
        print("noise on stdout while working")
        generation = Generation(len(prompts))
        for step in range(1, new_tokens + 1):
            time.sleep(0.001)
            for i, prompt in enumerate(prompts):
                generation.emit(i, prompt[-1] + step, generation.now())
        generation.extra = {{"step_seconds": 2.0, "backend_seconds": 1.5}}
        return generation

def convert(checkpoint, model):
    model.mkdir()

main(Fake, lambda model, threads, text: text[:4], convert)
"""


@pytest.fixture
def fake_worker(tmp_path: Path) -> Path:
    worker = tmp_path / "peers" / "fake_tool_worker.py"
    worker.parent.mkdir()
    worker.write_text(FAKE.format(protocol=str(BENCHMARKS / "peers")))
    return worker


@pytest.fixture
def peer(fake_worker: Path, tmp_path: Path) -> driver.Peer:
    return driver.Peer("fake-tool", Path(sys.executable), fake_worker, tmp_path, threads=1)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for_state(pid: int, state: str) -> None:
    wait_until(lambda: state_of(pid) == state)


def test_decode_leaves_the_prompt_out() -> None:
    phase = workload.Phase("decode", (64,), 5)
    assert workload.metrics(phase, [[3.0, 3.1, 3.2, 3.3, 3.4]]) == {"decode": pytest.approx(10.0)}


def test_prefill_counts_prompt_tokens() -> None:
    assert workload.metrics(workload.Phase("prefill", (512,), 1), [[2.0]]) == {"prefill": 256.0}
    assert workload.metrics(workload.Phase("long", (4096,), 3), [[9.0, 9.5, 10.0]]) == {"long_decode": 2.0}


def test_concurrent_decode_starts_when_every_request_has_a_token() -> None:
    phase = workload.Phase("concurrent", (10, 20), 3)
    found = workload.metrics(phase, [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert found == {"concurrent_decode": pytest.approx(3 / 2), "concurrent_whole": pytest.approx(6 / 4)}


def test_a_tool_that_stops_early_is_refused() -> None:
    with pytest.raises(ValueError, match="2 new tokens where 3 were asked for"):
        workload.metrics(workload.Phase("decode", (8,), 3), [[1.0, 2.0]])


def test_prompts_differ_by_round_and_keep_to_the_middle_of_the_vocabulary() -> None:
    phase = workload.phases(16)[1]
    first, again, other = (phase.prompts(1000, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(prompt) for prompt in first] == list(phase.prompt_lengths)
    assert all(250 <= token < 750 for prompt in first for token in prompt)


def test_common_prefix_counts_up_to_the_first_difference() -> None:
    assert workload.common_prefix([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]]) == 3


def test_ratios_pair_the_rounds_and_say_how_many_times_as_good() -> None:
    def samples(*values: float) -> list[dict[str, float]]:
        return [{"value": value} for value in values]

    found = workload.ratios(
        {
            "mine": {"decode": samples(20, 30, 90), "first_token": samples(1.0)},
            "theirs": {"decode": samples(10, 20, 30), "first_token": samples(4.0)},
        },
        ["theirs"],
    )
    assert found["mine"] == {"decode": 2.0, "first_token": 4.0}
    assert found["theirs"] == {"decode": 1.0, "first_token": 1.0}


def test_of_several_references_the_best_of_each_round_counts() -> None:
    def samples(*values: float) -> list[dict[str, float]]:
        return [{"value": value} for value in values]

    found = workload.ratios(
        {
            "mine": {"decode": samples(20, 20, 20), "first_token": samples(1.0)},
            "a": {"decode": samples(10, 40, 20), "first_token": samples(4.0)},
            "b": {"decode": samples(40, 10, 10), "first_token": samples(2.0)},
        },
        ["a", "b", "absent"],
    )
    assert found["mine"] == {"decode": 0.5, "first_token": 2.0}
    assert found["a"]["decode"] == 1.0


def test_a_variant_is_weights_and_switches() -> None:
    assert peers.variant("llmc") == ("llmc", "", [])
    assert peers.variant("llmc+int4-block128+fast") == ("llmc", "int4-block128", ["fast"])
    assert peers.variant("llmc+int4+native+fast") == ("llmc", "int4", ["native", "fast"])
    assert peers.variant("openvino-genai+int8+f32+kv32") == ("openvino-genai", "int8", ["f32", "kv32"])


NO_SUCH_VARIANTS = [
    "llmc+q4_0",
    "llama-cpp+fast",
    "llmc+int4+int8",
    "llmc+native+openvino",
    "transformers+int8",
    "openvino-genai+native",
]


@pytest.mark.parametrize("tool", NO_SUCH_VARIANTS)
def test_a_variant_that_a_tool_does_not_have(tool: str) -> None:
    with pytest.raises(driver.PeerError, match="no such variant"):
        peers.variant(tool)


def test_variants_share_a_bundle_if_they_are_built_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(command: list[str], environ: dict[str, str], log: Path) -> dict[str, float]:
        Path(command[-1]).mkdir()
        built.append({key: environ.get(key) for key in ("WEIGHT_FORMAT", "ENGINE", "KV_CACHE")})
        return {"seconds": 1.0}

    monkeypatch.setattr(peers, "run_to_end", build)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    options = SimpleNamespace(checkpoint=checkpoint, work=tmp_path, logs=tmp_path, threads=1, bundle=None)
    bundles = {
        "llmc": "llmc.llmc",
        "llmc+native": "llmc+native.llmc",
        "llmc+openvino": "llmc+openvino.llmc",
        "llmc+int4+native": "llmc+int4+native.llmc",
        "llmc+int4+fast+native": "llmc+int4+native.llmc",
        "llmc+native+kv8": "llmc+kv8+native.llmc",
        "llmc+kv8": "llmc+kv8.llmc",
    }
    assert {tool: peers.find_peer(tool, options).model.name for tool in bundles} == bundles
    assert built == [
        {"WEIGHT_FORMAT": weights, "ENGINE": engine, "KV_CACHE": cache}
        for weights, engine, cache in (
            (None, None, None),
            (None, "native", None),
            (None, "openvino", None),
            ("int4", "native", None),
            (None, "native", "int8"),
            (None, None, "int8"),
        )
    ]


def test_llmc_is_built_with_the_options_of_its_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(llmc_worker.subprocess, "run", run)
    for key, value in {"WEIGHT_FORMAT": "int4", "KV_CACHE": "int8", "ENGINE": "native"}.items():
        monkeypatch.setenv(key, value)
    llmc_worker.convert(tmp_path / "checkpoint", tmp_path / "model.llmc")
    options = ["--quant", "int4", "--kv-dtype", "int8", "--engine", "native"]
    assert commands[0][-len(options) :] == options
    with pytest.raises(SystemExit):  # the second build fails
        llmc_worker.convert(tmp_path / "checkpoint", tmp_path / "model.llmc")


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_llama_rope_is_that_of_transformers(rope_type: str) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type == "llama3":
        original = {"original_max_position_embeddings": 64}
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original}
    heads, dim, tokens = 3, 16, 40
    config = LlamaConfig(hidden_size=heads * dim, num_attention_heads=heads, rope_parameters=dict(rope))
    weight = np.random.default_rng(0).standard_normal((heads * dim, heads * dim), dtype=np.float32)
    inputs = np.random.default_rng(1).standard_normal((tokens, heads * dim), dtype=np.float32)

    rows = torch.from_numpy(inputs @ weight.T).reshape(1, tokens, heads, dim).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(rows, torch.arange(tokens)[None])
    expected = apply_rotary_pos_emb(rows, rows, cos, sin)[0][0].transpose(0, 1).numpy()

    # llama.cpp: consecutive pairs, with angles position * theta**(-2j / dim) / divisor[j].
    pairs = (inputs @ llama_rope.interleave_pairs(weight, heads).T).reshape(tokens, heads, dim // 2, 2)
    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    if rope_type == "llama3":
        angles = angles / llama_rope.frequency_divisors(llama_rope.rope_parameters(config.to_dict()), dim)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(turned.real, expected[..., : dim // 2], atol=1e-4)
    np.testing.assert_allclose(turned.imag, expected[..., dim // 2 :], atol=1e-4)


def test_both_forms_of_rope_in_a_config() -> None:
    expected = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    scaling = {"rope_type": "llama3", "factor": 8.0}
    assert llama_rope.rope_parameters({"rope_parameters": expected}) == expected
    assert llama_rope.rope_parameters({"rope_theta": 5e5, "rope_scaling": scaling}) == expected
    plain = {"rope_type": "default", "rope_theta": 5e5}
    assert llama_rope.rope_parameters({"rope_theta": 5e5, "rope_scaling": None}) == plain


def test_a_worker_is_stopped_except_while_it_answers(peer: driver.Peer, tmp_path: Path) -> None:
    with driver.Worker(peer, tmp_path / "log") as worker:
        assert worker.hello["describe"] == {"threads": 1}
        for _ in range(2):
            wait_for_state(worker.process.pid, "T")
            answer = worker.ask(op="generate", prompts=[[5], [7]], new_tokens=3)
            assert answer["tokens"] == [[6, 7, 8], [8, 9, 10]]
            assert all(sorted(times) == times for times in answer["times"])
            assert answer["memory"]["peak"] > 0
        wait_for_state(worker.process.pid, "T")
    assert worker.process.returncode is not None


def test_a_worker_that_dies_says_why(peer: driver.Peer, tmp_path: Path) -> None:
    with (
        driver.Worker(peer, tmp_path / "log") as worker,
        pytest.raises(driver.PeerError, match="status 1: thirteen is not a number"),
    ):
        worker.ask(op="generate", prompts=[[5]], new_tokens=13)


def test_a_silent_worker_is_given_up(peer: driver.Peer, tmp_path: Path) -> None:
    with driver.Worker(peer, tmp_path / "log") as worker:
        worker.timeout = 0.2
        with pytest.raises(driver.PeerError, match="no answer"):
            worker.ask(op="generate", prompts=[[5]], new_tokens=1_000_000)


def test_an_interrupted_run_keeps_what_it_has(
    fake_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure_start(commands: object, rules: object, record: rounds.Record, *_: object) -> None:
        record.add("fake-tool", "first_token", 1.5, {"foreign": 0.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setattr(peers, "measure_start", measure_start)
    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    assert peers.main([str(tmp_path), "--tools", "unheard-of"]) == 130
    printed = capsys.readouterr().out
    assert "interrupted" in printed
    assert "1.5" in printed


def test_a_whole_run(
    fake_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / ".venvs" / "fake-tool" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for name in ("broken", "forgotten"):
        fake_worker.with_name(f"{name}_worker.py").write_text("")
    (tmp_path / ".venvs" / "broken.failed").write_text("no wheel\nfor this machine\n")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"vocab_size": 1000}')
    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setitem(peers.WEIGHTS, "fake-tool", ("fp16",))

    tools = "fake-tool,fake-tool+fp16,broken,forgotten,unheard-of"
    record = tmp_path / "result.json"
    arguments = [
        str(checkpoint),
        "--tools",
        tools,
        "--reference",
        "fake-tool",
        "--rounds",
        "2",
        "--retries",
        "0",
    ]
    assert peers.main([*arguments, "--new-tokens", "4", "--json", str(record), "--threads", "1"]) == 0

    result = json.loads(record.read_text())
    assert list(result["tools"]) == ["fake-tool", "fake-tool+fp16"]
    assert result["absent"]["broken"] == "not installed: no wheel for this machine"
    assert "setup_peers.sh forgotten" in result["absent"]["forgotten"]
    assert "no such peer" in result["absent"]["unheard-of"]
    found = result["tools"]["fake-tool"]
    assert found["same_tokens"] == found["tokens"] == 2 * (4 + 8 * 4 + 1)
    assert found["overhead_outside_the_engine_call"] == 0.25
    assert found["conversion"]["seconds"] > 0
    samples = result["samples"]["fake-tool"]
    assert {metric: len(found) for metric, found in samples.items()} == {
        metric: 1 if metric in ("peak_rss", "idle_rss", "load_rss", "model_bytes") else 2
        for metric in workload.METRICS
        if metric != "long_decode"  # only on request
    }
    assert samples["load_rss"][0]["value"] >= 0
    printed = capsys.readouterr().out
    assert "broken: ABSENT: not installed: no wheel for this machine" in printed
    assert "outside the engine call" in printed
