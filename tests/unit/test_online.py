"""Where online batches come from: what is made when, told by a loader and models that record it."""

from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import experience
from rlhf_jax.batch import Prompts, Rollout, Rows, Scored
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.experience import Collector, Experience
from rlhf_jax.online import OnPolicy, PromptBatches
from tests import tiny


class Recorded:
    """A loader of batches of two prompts, a collector and a program; says what they are asked for."""

    def __init__(self):
        self.events = []

    def batch(self, position):
        self.events.append(f"prompts {position}")
        index = np.arange(2, dtype=np.int32) + position
        return Prompts(np.full((2, 3), position, np.int32), np.full(2, 3, np.int32), index), position + 2

    def records(self, position):
        return [PromptOnly(f"prompt {position + i}") for i in range(2)]

    def collect(self, params, frozen, prompts, records, key):
        self.events.append(f"rollout {prompts.index[0]} {records[0].prompt!r}")
        return SimpleNamespace(scored="scored", metrics={"a": 1})

    def advantages(self, scored, aux):
        return "batch", {"b": 2}


def test_the_next_prompts_are_on_the_mesh_before_the_policy_is():
    made = Recorded()
    source = OnPolicy(made, {}, made, PromptBatches(made, tiny.mesh()))
    state = SimpleNamespace(params={}, aux={})
    first = source(state, 4, jax.random.key(0))
    assert (first.batch, first.position, first.metrics) == ("batch", 6, {"a": 1, "b": 2})
    first.meanwhile()
    second = source(state, 6, jax.random.key(1))
    assert made.events == ["prompts 4", "rollout 4 'prompt 4'", "prompts 6", "rollout 6 'prompt 6'"]
    second.meanwhile()
    source(state, 4, jax.random.key(0))  # as after a resume: a batch is a function of its position
    assert made.events[-3:] == ["prompts 8", "prompts 4", "rollout 4 'prompt 4'"]


class Greedy(Recorded):
    """Completes each prompt once."""

    def collect(self, params, frozen, prompts, records, key):
        self.events.append(f"greedy {prompts.index[0]} {[record.prompt for record in records]}")
        return SimpleNamespace(scored="greedy", metrics=METRICS)


def test_a_baselines_completions_are_of_each_prompt_once_and_count():
    made, greedy = Judged(), Greedy()
    batches = PromptBatches(made, tiny.mesh(), group_size=2)
    found = OnPolicy(made, {}, made, batches, greedy=greedy)(
        SimpleNamespace(params={}, aux={}), 4, jax.random.key(0)
    )
    assert greedy.events == ["greedy 4 ['prompt 4', 'prompt 5']"]
    assert found.batch.greedy == "greedy"
    np.testing.assert_array_equal(found.batch.scores, Judged.SCORES[0])
    assert [found.metrics[name] for name in METRICS] == [20, 12, 8, 1, 4, 2]


METRICS = {"perf/tokens": jnp.float32(10), "perf/prompt_tokens": 6.0, "perf/sequences": 4.0, "a": 1.0}
METRICS |= {"perf/rollout_seconds": 2.0, "perf/score_seconds": 1.0}


class Judged(Recorded):
    """Scores groups of two: the n-th rollout's are SCORES[n]."""

    SCORES = ([1, 2, 5, 5], [3, 3, 4, 4], [6, 7, 8, 9], [0, 1, 0, 1])

    def collect(self, params, frozen, prompts, records, key):
        scores = np.float32(self.SCORES[sum("rollout" in event for event in self.events)])
        super().collect(params, frozen, prompts, records, key)
        column = jnp.asarray(scores, jnp.int32)
        rows = Rows(column[:, None], column, column)
        scored = Scored(
            Rollout(rows, column > 0, column[:, None] * 1.0), column, None, None, jnp.asarray(scores)
        )
        counted = np.ones(4, bool)
        return Experience(scored, scores, METRICS, [], [], counted)

    def informative_groups(self, scored, aux):
        groups = scored.scores.reshape(-1, 2)
        return groups[:, 0] != groups[:, 1]

    def merge(self, one, other, rows):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], one, other)

    def advantages(self, scored, aux):
        return scored, {"reward/score": jnp.mean(scored.scores), "value/mean": jnp.mean(scored.scores)}


@pytest.mark.parametrize(
    "max_rollouts, scores, position, rollouts",
    [
        (1, [1, 2, 5, 5], 2, None),
        (2, [1, 2, 5, 5], 4, 2),  # none of the second batch teaches: what is there stays
        (3, [1, 2, 6, 7], 6, 3),  # the first that does takes the place
        (4, [1, 2, 6, 7], 6, 3),  # and then all groups do
    ],
)
def test_groups_of_equal_scores_are_replaced(max_rollouts, scores, position, rollouts):
    made = Judged()
    source = OnPolicy(made, {}, made, PromptBatches(made, tiny.mesh(), group_size=2), max_rollouts)
    found = source(SimpleNamespace(params={}, aux={}), 0, jax.random.key(0))
    for leaf in (
        found.batch.scores,
        found.batch.rollout.rows.lengths,
        found.batch.rollout.sampler_logprobs[:, 0],
    ):
        np.testing.assert_array_equal(leaf, scores)
    assert found.position == position
    assert found.metrics.get("rollout/rollouts") == rollouts
    assert float(found.metrics["perf/tokens"]) == 10 * (rollouts or 1)
    assert found.metrics["perf/sequences"] == 4 * (rollouts or 1)
    assert found.metrics["perf/rollout_seconds"] == 2 * (rollouts or 1)
    assert found.metrics["reward/score"] == 13 / 4  # of what was sampled first, before a selection
    assert found.metrics["value/mean"] == np.mean(scores)


def test_scores_are_awaited_only_where_no_other_devices_wait(monkeypatch):
    """What is told of the texts comes while the models score: before the judge, who reads the scores."""
    events = []

    def tell(event, value=None):
        events.append(event)
        return value

    rows = Rows(np.ones((2, 4), np.int32), np.full(2, 2, np.int32), np.full(2, 4, np.int32))
    rollout = Rollout(rows, np.ones(2, bool), np.zeros((2, 2), np.float32))
    scored = Scored(rollout, jnp.zeros(2), None, None, jnp.zeros(2))
    programs = SimpleNamespace(rollout=lambda *args: rollout, score=lambda *args: tell("score", (scored, {})))
    verdict = SimpleNamespace(scores=np.zeros(2, np.float32), metrics={})
    collector = Collector(
        cast(Any, programs),
        cast(Any, lambda *args: tell("judge", verdict)),
        cast(Any, SimpleNamespace(batch_decode=lambda ids, **options: ["a", "b"])),
        tiny.mesh(),
        leaves_out=False,
    )
    text_metrics = experience.text_metrics
    monkeypatch.setattr(experience, "text_metrics", lambda *args: tell("texts", text_metrics(*args)))
    monkeypatch.setattr(jax, "block_until_ready", lambda scored: tell("wait"))
    records = [PromptOnly("a"), PromptOnly("b")]
    collector.judge({}, {}, rollout, records, 0.0)
    assert events == ["score", "texts", "judge"]
    found = collector.collect({}, {}, cast(Any, None), records, jax.random.key(0))
    assert events[3:] == ["score", "texts", "judge", "wait"]
    assert found.metrics["perf/score_seconds"] > 0 and found.metrics["perf/sequences"] == 2
