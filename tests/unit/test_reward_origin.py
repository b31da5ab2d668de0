"""Which reward models read the policy's tokens, and which are given the text in their own."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models.heads import Ensemble
from rlhf_jax.models.scorers import save_scorer
from rlhf_jax.models.transformer import make_model
from rlhf_jax.reward_origin import external_reward
from tests import tiny

TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}TAIL{% endfor %}"
TEMPLATE += "{{ 'a' if add_generation_prompt }}"


def tokenizer(template: str = ""):
    made = train_tokenizer(["text"] * 9, 260)
    made.chat_template = template or None
    return made


POLICY = tokenizer(TEMPLATE.replace("TAIL", ""))
ARCHITECTURE = dataclasses.replace(tiny.ARCHITECTURE, vocab_size=len(POLICY))


@pytest.fixture
def judge(tmp_path):
    """Returns a function that writes a reward model of the policy's architecture, as others or we do."""

    def judge(of, *, is_ours=False, pad=0):
        shapes = make_model(ARCHITECTURE).score_shapes
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        save_scorer(tmp_path / "judge", ARCHITECTURE, params, "reward", token_ids={"pad_token_id": pad})
        of.save_pretrained(tmp_path / "judge")
        if not is_ours:
            file = tmp_path / "judge" / "config.json"
            config = json.loads(file.read_text())
            del config["score_role"], config["score_normalizer"]
            file.write_text(json.dumps(config))
        return tmp_path / "judge"

    return judge


def external(path, *, has_conversations=True):
    stage = dataclasses.replace(tiny.stage("ppo"), reward_from=str(path))
    return external_reward(stage, path, ARCHITECTURE, POLICY, {}, has_conversations=has_conversations)


def test_a_twin_is_a_role(judge):
    assert external(judge(POLICY)) is None
    assert external(judge(POLICY), has_conversations=False) is None


def test_what_a_template_writes_behind_the_last_turn_is_part_of_the_text(judge):
    """Others read the score there; of ours the text ends with the turn."""
    tail = tokenizer(TEMPLATE.replace("TAIL", "{{ 'x' }}"))
    found = external(judge(tail))
    assert found is not None and found.reader.tokenizer is not None and found.reader.joins
    found = external(judge(tail, is_ours=True))
    assert found is not None and not found.reader.joins  # another template, but no tail
    assert external(judge(tail), has_conversations=False) is None


def test_another_template_is_rendered_again(judge):
    other = tokenizer("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    found = external(judge(other))
    assert found is not None and found.reader.tokenizer.chat_template == other.chat_template
    assert external(judge(other), has_conversations=False) is None


def test_conversations_need_a_template(judge):
    with pytest.raises(ValueError, match="tokenizer.chat_template: the records are conversations"):
        external(judge(tokenizer()))


def test_a_padding_token_that_ends_texts_moves_the_score(judge):
    """transformers reads it one token earlier, so it has a program of its own, on the policy's tokens."""
    found = external(judge(POLICY, pad=POLICY.eos_token_id))
    assert found is not None and found.reader.tokenizer is None
    assert found.reader.pad_id == POLICY.eos_token_id


def test_an_ensemble_s_least_score_has_a_program_of_its_own(judge):
    """The mean of linear heads is one head; what is not has no place among the roles."""
    path = judge(POLICY)
    stage = dataclasses.replace(tiny.stage("ppo", rewards={"ensemble": "minimum"}), reward_from=str(path))
    found = external_reward(stage, path, ARCHITECTURE, POLICY, {}, has_conversations=True, num_heads=3)
    assert found is not None and found.ensemble == Ensemble(3, "minimum") and found.reader.tokenizer is None
