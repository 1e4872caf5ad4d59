"""Sampling: the same filters in the same order as transformers, draws from that distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmc.runtime.errors import BackendError, RequestError
from llmc.runtime.sampling import SamplingParams, candidates, penalize_repetition, sample

VOCAB = 300


def random_logits(seed: int, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def distribution(logits: np.ndarray, params: SamplingParams, token_ids: list[int]) -> np.ndarray:
    """The probabilities [V] that `sample` draws from."""
    ids, weights = candidates(penalize_repetition(logits, params.repetition_penalty, token_ids), params)
    result = np.zeros(len(logits))
    result[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return result


PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.99},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 50, "min_p": 0.2},
    {"temperature": 0.5, "top_p": 0.7, "min_p": 0.3},
]


@pytest.mark.parametrize("options", PARAMS, ids=str)
def test_distribution_equals_that_of_transformers_logits_processors(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    params = SamplingParams(**{"temperature": 1.0, **options})
    processors = hf.LogitsProcessorList()  # in the order of generate, which a test below checks
    if params.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    processors.append(hf.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    for seed in range(20):
        logits = random_logits(seed, 3000)
        token_ids = np.random.default_rng(seed).integers(0, 3000, 400).tolist()
        scores = processors(torch.tensor([token_ids]), torch.tensor(logits)[None].double())
        expected = scores[0].softmax(-1).numpy()
        np.testing.assert_allclose(distribution(logits, params, token_ids), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "repetition_penalty": 1.8},
        {"temperature": 0.0, "repetition_penalty": 0.5},
        *PARAMS[-4:],
    ],
    ids=str,
)
def test_distribution_equals_the_scores_of_generate_on_a_model(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, initializer_range=1.0, **size)
    model = LlamaForCausalLM(config).eval()
    prompt = [5, 9, 200, 9]
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        do_sample=options["temperature"] > 0,
        **{"top_k": 0, **{name: value for name, value in options.items() if value}},
    )
    params, token_ids = SamplingParams(**options), list(prompt)
    for logits, scores, chosen in zip(
        result.logits, result.scores, result.sequences[0, 4:].tolist(), strict=True
    ):
        row = logits[0].numpy()
        if params.temperature:
            expected = scores[0].softmax(-1).numpy()
            np.testing.assert_allclose(distribution(row, params, token_ids), expected, rtol=1e-4, atol=1e-7)
        else:
            assert sample(row, params, token_ids, np.random.default_rng()) == chosen
        token_ids.append(chosen)


@pytest.mark.parametrize("options", [PARAMS[0], PARAMS[4], PARAMS[6], PARAMS[9], PARAMS[13]], ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **options})
    logits, token_ids, rng, draws = random_logits(1, 30), [3, 4], np.random.default_rng(0), 20_000
    expected = distribution(logits, params, token_ids) * draws
    counts = np.bincount([sample(logits, params, token_ids, rng) for _ in range(draws)], minlength=30)
    assert not counts[expected == 0].any()
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()


def test_a_draw_falls_where_the_cumulative_probabilities_say() -> None:
    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    logits = random_logits(3, 2000)
    cumulative = np.exp(logits - logits.max(), dtype=np.float64).cumsum()
    for uniform in [*np.linspace(0, 0.999, 500), 1 - 2**-53]:
        rng: Any = Fixed(uniform)
        expected = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
        assert sample(logits, SamplingParams(temperature=1.0), [], rng) == min(expected, 1999)


def test_greedy_takes_the_maximum_and_no_random_number() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    for seed in range(20):
        assert sample(random_logits(seed), SamplingParams(), [], rng) == random_logits(seed).argmax()
    assert rng.bit_generator.state == before


def test_a_seed_gives_the_same_draws_one_number_each() -> None:
    options = {"temperature": 1.0, "seed": 3}
    for params in (SamplingParams(**options), SamplingParams(top_k=5, top_p=0.9, **options)):
        draws = []
        for _ in range(2):
            rng = np.random.default_rng(params.seed)
            draws.append([sample(random_logits(i), params, [], rng) for i in range(10)])
            other = np.random.default_rng(params.seed)
            other.random(10)
            assert rng.random() == other.random()
        assert draws[0] == draws[1]


def test_the_logits_are_left_as_they_are() -> None:
    logits = random_logits(0)
    params = SamplingParams(temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.3)
    sample(logits, params, [1, 2], np.random.default_rng(0))
    np.testing.assert_array_equal(logits, random_logits(0))


def test_tokens_that_tie_with_the_last_of_top_k_all_stay() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    ids, _ = candidates(logits, SamplingParams(temperature=1.0, top_k=2))
    assert ids is not None
    assert ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "options", [{"top_k": k} for k in (1, 5, 60, 900)] + [{"top_p": p} for p in (0.1, 0.6, 0.95)]
)
def test_among_many_equal_logits_as_many_stay_as_transformers_keeps(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).integers(-3, 4, 5000).astype(np.float32)
    warper = TopKLogitsWarper(**options) if "top_k" in options else TopPLogitsWarper(**options)
    expected = warper(torch.zeros(1, 0), torch.tensor(logits)[None].double())[0].numpy()
    ids, _ = candidates(logits, SamplingParams(temperature=1.0, **options))
    assert ids is not None
    assert sorted(logits[ids]) == sorted(expected[np.isfinite(expected)])
    assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3])
def test_top_p_always_leaves_a_token_when_all_are_equal(top_p: float) -> None:
    _, weights = candidates(np.zeros(10, np.float32), SamplingParams(temperature=1.0, top_p=top_p))
    assert len(weights) == max(1, round(top_p * 10))


def test_seen_tokens_without_a_logit_do_no_harm() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert sample(np.array([4, 3], np.float32), params, [0, 5], np.random.default_rng()) == 1


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    for temperature in (1e-4, 1e-30, 5e-324):
        params = SamplingParams(temperature=temperature)
        assert sample(random_logits(2), params, [], np.random.default_rng(0)) == random_logits(2).argmax()


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[4] = 1
    assert sample(logits, SamplingParams(temperature=1.0), [], np.random.default_rng(0)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [17, VOCAB - 1])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_logits_without_a_finite_maximum_are_reported(
    bad: float, place: int, options: dict[str, Any]
) -> None:
    logits = random_logits(0)
    logits[place] = bad
    with pytest.raises(BackendError, match="logits whose maximum is"):
        sample(logits, SamplingParams(**options), [], np.random.default_rng(0))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.5},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": 1e-46},
        {"temperature": 10**400},
        {"seed": -1},
        {"seed": 1.0},
        {"stop": ""},
        {"stop": ["x", ""]},
        {"stop": {"x"}},
        {"stop": ("",)},
        {"stop": (3,)},
        {"ignore_eos": 1},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_its_name_and_a_hint(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(RequestError, match=f"{name} is ") as caught:
        SamplingParams(**options)
    assert caught.value.hint.startswith(f"{name} must be ")


def test_a_stop_string_needs_no_list_and_a_list_no_tuple() -> None:
    given: list[Any] = ["x", ["x"], ("x",)]
    assert {SamplingParams(stop=one) for one in given} == {SamplingParams(stop=("x",))}


def test_numbers_of_numpy_are_numbers() -> None:
    values: dict[str, Any] = {
        "max_tokens": np.int64(3),
        "temperature": np.float64(0.5),
        "top_p": np.float32(0.5),
    }
    params = SamplingParams(**values)
    assert params == SamplingParams(max_tokens=3, temperature=0.5, top_p=0.5)
    assert {type(getattr(params, name)) for name in values} == {int, float}
