"""What a reward model with a tokenizer of its own is given, and that its scores are those of just that."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import stage
from rlhf_jax.batch import Rows
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models import heads
from rlhf_jax.models.scorers import save_scorer
from rlhf_jax.programs import reward_program
from rlhf_jax.reward_origin import External
from rlhf_jax.rewards.external import ExternalReward, RewardReader, render
from tests import tiny

PAD, BOS, EOS = 0, 1, 2  # of a tokenizer that is trained on the spot
TOKENIZER = train_tokenizer(["abab"] * 9, 260)  # "ab" is a token


def ids(text):
    """Letter by letter, but for ab."""
    vocabulary = TOKENIZER.get_vocab()
    parts = text.replace("ab", "\n").replace("\n", " ab ").replace("  ", " ")
    return [vocabulary[p] for word in parts.split() for p in ([word] if word == "ab" else word)]


def reader(**changes):
    told = {"tokenizer": TOKENIZER, "joins": True, "bos_id": BOS, "pad_id": PAD, "context_length": 48}
    return RewardReader(**told | changes)


@pytest.mark.parametrize(
    "prompt, completion, ended, joins, expected",
    [
        ("xa", "by", True, True, [BOS, *ids("x"), *ids("ab"), *ids("y"), EOS]),
        ("xa", "by", False, True, [BOS, *ids("x"), *ids("ab"), *ids("y")]),
        ("xa", "by", True, False, [BOS, *ids("x"), *ids("a"), *ids("b"), *ids("y"), EOS]),
        ("x", "", False, True, [BOS, *ids("x")]),
        ("", "", True, True, [BOS, EOS]),
    ],
)
def test_rendered_text(prompt, completion, ended, joins, expected):
    assert render(TOKENIZER, PromptOnly(prompt), completion, ended, joins=joins) == expected


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("joins", [True, False])
def test_conversations_are_rendered_by_the_reward_model_s_template(ended, joins):
    """Others train on all that the template writes: behind the last turn stands an x."""
    chat = train_tokenizer(["abab"] * 9, 260)
    chat.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    chat.chat_template = "{% for m in messages %}{{ m.role[0] + m.content + '<|end|>x' }}{% endfor %}" + (
        "{{ 'a' if add_generation_prompt }}"
    )
    end = chat.convert_tokens_to_ids("<|end|>")
    record = PromptOnly([{"role": "user", "content": "xab"}])
    made = render(chat, record, "y<|end|>", ended, joins=joins)
    letters = [chat.get_vocab()[letter] for letter in "y<|end|>"]
    expected = [BOS, *ids("u"), *ids("x"), *ids("ab"), end, *ids("x"), *ids("a"), *letters]
    assert made == expected + ([end, *ids("x") * joins] if ended else [])
    messages = [*record.prompt, {"role": "assistant", "content": "y"}]
    whole = chat.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if joins:
        assert render(chat, record, "y", True, joins=True) == [BOS, *whole]


def test_a_control_token_s_name_in_a_text_is_letters():
    made = render(TOKENIZER, PromptOnly("x"), "<|eos|>", False, joins=True)
    assert EOS not in made and len(made) == 2 + len("<|eos|>")


def test_bos_only_where_the_tokenizer_puts_it():
    """Ours always has it; others say themselves, by what they do with a text."""
    plain = train_tokenizer(["abab"] * 9, 260)
    plain.backend_tokenizer.post_processor = None
    assert BOS not in render(plain, PromptOnly("x"), "y", False, joins=True)
    assert render(plain, PromptOnly("x"), "y", False, joins=False)[0] == BOS


def rollout_rows(*rows):
    tokens = np.zeros((4, 16), np.int32)
    for row, of in zip(tokens, rows, strict=False):
        row[: len(of)] = of
    lengths = np.array([*map(len, rows), *[0] * (4 - len(rows))])
    return Rows(tokens, np.minimum(lengths, 1), lengths)


@pytest.mark.parametrize("tokenizer", [None, TOKENIZER])
def test_a_long_text_loses_its_beginning_but_for_bos(tokenizer):
    text = "qwertyuiop"
    of_policy = rollout_rows([BOS, *ids(text), EOS], [BOS, *ids("q"), EOS])
    made = reader(tokenizer=tokenizer, context_length=6).rows(
        of_policy, [PromptOnly(text[:4]), PromptOnly("q")], [text[4:], ""], np.array([True] * 4)
    )
    rows, num_cut = made
    assert num_cut == 1
    assert rows.tokens[0].tolist() == [BOS, *ids("uiop"), EOS]
    assert rows.tokens[1, :3].tolist() == [BOS, *ids("q"), EOS]
    assert rows.lengths.tolist() == [6, 3, 0, 0]


def test_lengths_climb_a_ladder():
    """32, 64, 128 ..., at most the context: few programs are compiled."""
    for letters, length in ((3, 32), (31, 32), (32, 64), (64, 100), (200, 100)):
        rows, _ = reader(context_length=100).rows(
            rollout_rows([BOS]), [PromptOnly("")], ["x" * letters], np.array([False] * 4)
        )
        assert rows.tokens.shape == (4, length)


@pytest.mark.parametrize(("longest", "length"), [(5, 32), (1100, 2048), (2048, 2048), (2049, 3000)])
def test_the_length_of_rows_is_known_from_the_longest(longest: int, length: int):
    """As what is compiled beforehand needs it; never more than the context."""
    assert reader(context_length=3000).row_length(longest) == length


def test_the_score_is_read_before_trailing_pads_as_in_transformers():
    """Where EOS is the padding token, that is before the EOS."""
    of_policy = rollout_rows([BOS, 7, 8, EOS], [EOS, EOS])
    records, completions = [PromptOnly("")] * 2, [""] * 2
    rows, _ = reader(tokenizer=None, pad_id=EOS).rows(of_policy, records, completions, np.array([True] * 4))
    assert rows.lengths.tolist() == [3, 1, 0, 0]
    rows, _ = reader(tokenizer=None, pad_id=None).rows(of_policy, records, completions, np.array([True] * 4))
    assert rows.lengths.tolist() == [4, 2, 0, 0]


def test_it_is_stored_as_frozen_models_are(tmp_path):
    """model.frozen_dtype and model.frozen_memory: read in bfloat16 and kept by the host, it says the same."""
    mesh = tiny.mesh()
    save_scorer(tmp_path, tiny.ARCHITECTURE, tiny.weights("reward", mesh, seed=3), "reward")
    external = External(tmp_path, tiny.ARCHITECTURE, reader(tokenizer=None, pad_id=PAD))

    def made(**options):
        of = SimpleNamespace(external=external, stage=tiny.stage("ppo", model=options))
        return stage._external_reward(of, mesh)

    in_host = made(frozen_dtype="bfloat16", frozen_memory="host")
    frozen = in_host._frozen["reward"]
    kinds = {(leaf.dtype.name, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(frozen["trunk"])}
    assert kinds == {("bfloat16", "pinned_host")}
    assert frozen["score_head"]["kernel"].dtype == jnp.float32
    rows = rollout_rows([BOS, 7, 8, EOS], [BOS, 9, 10, 11, 12])
    given = rows, [PromptOnly("")] * 2, [""] * 2, np.array([True] * 4)
    found, rounded, whole = (of(*given)[0] for of in (in_host, made(frozen_dtype="bfloat16"), made()))
    np.testing.assert_array_equal(found, rounded)
    assert 1e-4 < np.max(np.abs(found - whole)) < 0.1


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2}])
def test_scores_of_the_policy_s_own_tokens(sizes):
    """Against the head at the last token of each row alone; filling rows do not disturb."""
    mesh = tiny.mesh(**sizes)
    weights = tiny.weights("reward", mesh, seed=3)
    external = ExternalReward(
        reader(tokenizer=None, pad_id=PAD), reward_program(tiny.model(), mesh), weights, mesh
    )
    texts = [[BOS, 7, 8, EOS], [BOS, 9, 10, 11, 12], [BOS, 30]]
    records = [PromptOnly("")] * 3
    found, metrics = external(rollout_rows(*texts), records, [""] * 3, np.array([True] * 4))
    host = jax.device_get(weights)
    for score, text in zip(np.asarray(found), texts, strict=False):
        hidden = tiny.model().hidden(host["trunk"], jnp.asarray([text]))
        expected = heads.values(host["score_head"], hidden)[0, -1]
        np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)
    assert float(metrics["reward/cut_rate"].value) == 0
