"""Where online batches come from: what is made when, told by a loader and models that record it."""

from types import SimpleNamespace

import jax
import numpy as np

from rlhf_jax.batch import Prompts
from rlhf_jax.data.records import PromptOnly
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
