"""The comparison of an engine that quantizes activations with the reference that does so, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmc.compiler.driver import compile_model
from llmc.compiler.request import BuildRequest
from llmc.compiler.texts import EVALUATION_TEXT
from llmc.compiler.verify import verify_build
from llmc.compiler.verify.compare import compare, least_top1_like
from llmc.compiler.verify.engine_weights import EngineWeight
from llmc.compiler.verify.job import Findings, Job
from support.families import write_random
from support.fast_builds import fast_builds

TALES = Path(__file__).parents[2] / "model_zoo" / "llama" / "tales"


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with fast_builds():
        yield


def test_an_engine_that_quantizes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rounding, and with scales that differ by 37 %."""
    jobs: list[Job] = []

    def collect(job: Job, *_: object) -> Findings:
        findings = compare(job)
        assert not verify_build.faults(findings, "fp32")
        rounding_left_out = compare(replace(job, quantizing_engine=job.engine))
        assert rounding_left_out.activation_effect is not None
        assert rounding_left_out.activation_effect < 0.01
        others = compare(replace(job, quantized={n: rescaled(w) for n, w in job.quantized.items()}))
        for wrong in (rounding_left_out, others):
            assert verify_build.faults(wrong, "fp32")
            assert wrong.activation_ratio is not None
            assert wrong.activation_bound is not None
            assert wrong.activation_ratio > wrong.activation_bound
        jobs.append(job)
        return findings

    monkeypatch.setattr(verify_build, "compare_in_child", collect)
    compile_model(BuildRequest(str(TALES), tmp_path / "x.llmc", quant="fp8"))
    assert jobs


def rescaled(weight: EngineWeight) -> EngineWeight:
    assert weight.input is not None
    return replace(weight, input=replace(weight.input, scale=1.37 * weight.input.scale))


def test_two_engines_of_one_quality_are_accepted_and_a_worse_one_is_refused() -> None:
    """Counts of positions that disagree, drawn with one chance for both; and with four times the chance."""
    rng = np.random.default_rng(0)
    for chance, positions in ((0.003, 356), (0.01, 356), (0.03, 5000)):
        transformers, engine = rng.binomial(positions, chance, (2, 1000))
        worse = rng.binomial(positions, 4 * chance + 0.02, 1000)
        least = np.array([least_top1_like(1 - missed / positions, positions) for missed in transformers])
        assert (1 - engine / positions >= least).mean() > 0.97
        assert (1 - worse / positions < least).mean() > 0.85


@pytest.mark.parametrize("effect", [0.5, 1.5, float("nan")])
def test_the_effect_has_bounds(effect: float) -> None:
    good = Findings(0.0, 1e-4, 1.0, 10, True, 5, None, {}, 0.1, 0.5, 1.0)
    assert not verify_build.faults(good, "fp32")
    assert verify_build.faults(replace(good, activation_effect=effect), "fp32")
    assert verify_build.faults(replace(good, activation_ratio=0.6), "fp32")
    assert not verify_build.faults(replace(good, activation_ratio=0.6, activation_bound=0.7), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("characters", [1000, 4000])
def test_a_short_calibration_text(characters: int, tmp_path: Path) -> None:
    """Values are often clipped, so that a change of the last bit of one has larger effects."""
    text = tmp_path / "text.txt"
    text.write_text(EVALUATION_TEXT.read_text("utf-8")[:characters])
    request = BuildRequest(str(TALES), tmp_path / "x.llmc", quant="fp8", calibration=text)
    assert compile_model(request).manifest.verification.status == "passed"


@pytest.mark.slow
def test_a_deep_model(tmp_path: Path) -> None:
    """In many layers, the errors of fp32 make some values of every position round to other codes."""
    checkpoint = write_random("qwen3", tmp_path, num_hidden_layers=24, hidden_size=128)
    built = compile_model(BuildRequest(str(checkpoint), tmp_path / "x.llmc", quant="fp8"))
    verification = built.manifest.verification
    assert verification.status == "passed"
    record = verification.details["activation_quantization"]
    disturbed = record["transformers_disturbed"]["rms_logit_error"]
    assert record["engine"]["rms_logit_error"] < disturbed < record["changes"]["rms_logit_error"]
