"""Held-out metrics are over all records: the size of the batches that they came in changes nothing."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from rlhf_jax.config import RewardsConfig
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import Preference, PromptCompletion, PromptOnly
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.evaluation import evaluate_prompts, evaluate_records
from rlhf_jax.experience import Collector, text_metrics
from rlhf_jax.rewards.combine import Judge
from tests import tiny

FIELDS = dataclasses.fields(Examples)
NO_DEFAULT = dataclasses.MISSING
COUNTS = [  # no batch depends on them
    field.name for field in FIELDS if field.default is field.default_factory is NO_DEFAULT
]
RECORDS = {
    "prompt_completion": PromptCompletion("a", "b"),
    "preference": Preference("a", "b", "c"),
    "prompt_only": PromptOnly("a"),
}


def examples(kind, num_records=10):
    """Rows of very different lengths, so that a mean of means would differ."""
    rng = np.random.default_rng(2)
    made = []
    for number in range(num_records * (2 if kind == "preference" else 1)):
        prompt = int(rng.integers(1, 9))
        completion = 0 if kind == "prompt_only" else 1 + 7 * (number % 5 == 0)
        made.append(Row(rng.integers(2, 64, prompt + completion).tolist(), prompt))
    told = {
        "kind": kind,
        "records": [RECORDS[kind]] * num_records,
        "rows": token_rows(made),
        "pad_id": tiny.PAD,
    }
    told["length"] = 8 if kind == "prompt_only" else 16
    return Examples(**dict.fromkeys(COUNTS, 0) | told)


@pytest.mark.parametrize("algorithm, kind", [("sft", "prompt_completion"), ("reward_model", "preference")])
def test_metrics_of_records_do_not_depend_on_the_batch_size(algorithm, kind):
    mesh = tiny.mesh()
    programs = tiny.programs(tiny.stage(algorithm), mesh)
    params, _ = tiny.roles(algorithm, mesh)
    read = examples(kind)
    four, ten = (evaluate_records(programs, Loader(read, size, 0), mesh)(params, {}) for size in (4, 10))
    assert four.samples == []
    assert four.metrics == pytest.approx(ten.metrics, rel=1e-5, abs=1e-6)
    assert ten.metrics


def test_perplexity_is_of_the_mean_over_tokens():
    """By hand: the nll of every completion token, from the logits."""
    mesh = tiny.mesh()
    programs = tiny.programs(tiny.stage("sft"), mesh)
    params, _ = tiny.roles("sft", mesh)
    read = examples("prompt_completion")
    model, nll = tiny.model(), []
    for row in read.rows:
        tokens = np.asarray([row.ids + [0] * (16 - len(row.ids))], np.int32)
        logits = model.logits(params["policy"], model.hidden(params["policy"]["trunk"], tokens))[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        nll += [-logprobs[t - 1, row.ids[t]] for t in range(row.prompt_length, len(row.ids))]
    found = evaluate_records(programs, Loader(read, 4, 0), mesh)(params, {}).metrics
    assert found["eval/nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found["eval/perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


class Numbers:
    """In place of a tokenizer: a completion reads as its token ids."""

    def batch_decode(self, ids, **unused):
        return [" ".join(map(str, row)) for row in ids]

    def decode(self, ids, **unused):
        return " ".join(map(str, ids))


def length(records, completions):
    return np.array([len(text.split()) for text in completions], np.float64)


@pytest.fixture(scope="module")
def evaluated():
    """Evaluations of ten prompts in batches of 4, 10 and 16, by batch size."""
    return {size: evaluate_ppo("none", size) for size in (4, 10, 16)}


def evaluate_ppo(missing_eos, batch_size):
    mesh = tiny.mesh()
    programs = tiny.programs(tiny.stage("ppo", settings={"missing_eos": missing_eos}), mesh)
    trained, frozen = tiny.roles("ppo", mesh)
    judge = Judge(
        RewardsConfig(function="unused:here", function_weight=0.5), {"unused:here": length}, has_model=True
    )
    collector = Collector(programs, judge, Numbers(), mesh, leaves_out=missing_eos == "mask")
    loader = Loader(examples("prompt_only"), batch_size, 0)
    key = jax.random.key(3)
    return evaluate_prompts(collector, loader, mesh, key, num_samples=10, gold=length)(trained, frozen)


@pytest.mark.parametrize("size", [4, 16])
def test_metrics_of_prompts_do_not_depend_on_the_batch_size(evaluated, size):
    found, expected = evaluated[size], evaluated[10]
    assert [s["completion"] for s in found.samples] == [s["completion"] for s in expected.samples]
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-5 * max(1, abs(value))), name


def test_metrics_of_prompts_are_those_of_their_completions(evaluated):
    """Told from the samples, of which there is one for each prompt."""
    metrics, samples = evaluated[4]
    completions = [[int(token) for token in sample["completion"].split()] for sample in samples]
    assert len(completions) == 10
    lengths = np.array([len(completion) for completion in completions])
    assert lengths.std() > 0
    pairs = [pair for ids in completions for pair in itertools.pairwise(ids)]
    expected = {
        "eval/rollout/length": lengths.mean(),
        "eval/rollout/length_p95": np.percentile(lengths, 95),
        "eval/rollout/eos_rate": np.mean([ids[-1] == tiny.EOS for ids in completions]),
        "eval/rollout/distinct_2": len(set(pairs)) / len(pairs),
        "eval/score": np.mean([sample["score"] for sample in samples]),
        "eval/score_std": np.std([sample["score"] for sample in samples]),
        "eval/gold": lengths.mean(),
        "eval/gold_std": lengths.std(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6 * max(1, abs(value))), name


def test_completions_that_are_left_out_count_in_the_eos_rate_alone():
    metrics, samples = evaluate_ppo("mask", 4)
    completions = [[int(token) for token in sample["completion"].split()] for sample in samples]
    has_ended = [ids[-1] == tiny.EOS for ids in completions]
    assert 1 < sum(has_ended) < 9 and len(completions) == 10
    ended = [sample for sample, ends in zip(samples, has_ended, strict=True) if ends]
    lengths = [len(sample["completion"].split()) for sample in ended]
    expected = {
        "eval/rollout/length": np.mean(lengths),
        "eval/rollout/length_p95": np.percentile(lengths, 95),
        "eval/rollout/eos_rate": np.mean(has_ended),
        "eval/reward/function": np.mean(lengths),
        "eval/score": np.mean([sample["score"] for sample in ended]),
        "eval/gold": np.mean(lengths),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6 * max(1, abs(value))), name


def test_where_no_completion_counts_nothing_is_told():
    metrics = text_metrics([np.arange(4)], np.array([False]))
    assert all(math.isnan(value) for value in metrics.values()) and len(metrics) == 2


def test_ref_perplexity_is_the_references_of_the_policys_tokens(evaluated):
    """By hand: the nll of every sampled token, from the reference's logits."""
    metrics, samples = evaluated[4]
    _, frozen = tiny.roles("ppo", tiny.mesh())
    model, reference = tiny.model(), frozen["reference"]
    prompts = [row.ids for row in examples("prompt_only").rows]
    completions = [[int(token) for token in sample["completion"].split()] for sample in samples]
    tokens = np.zeros((10, 16), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : len(prompt) + len(completion)] = prompt + completion
    logits = model.logits(reference, model.hidden(reference["trunk"], tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    nll = [
        -logprobs[row, len(prompt) + place - 1, token]
        for row, prompt in enumerate(prompts)
        for place, token in enumerate(completions[row])
    ]
    assert metrics["eval/ref_perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert metrics["eval/policy/ref_nll"] - metrics["eval/policy/nll"] > 0.01  # the policy's is another
