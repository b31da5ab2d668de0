"""Divergences worked by hand, and a teacher of another architecture; against TRL in tests/parity."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Mean, Prompts, Rollout, Scored
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.evaluation import evaluate_prompts
from rlhf_jax.experience import Collector
from rlhf_jax.models.forward import make_forward
from rlhf_jax.models.transformer import make_model
from rlhf_jax.ops.divergence import compare_logits, generalized_jsd
from rlhf_jax.origins import Origins
from rlhf_jax.stage import _resumed_info
from tests import tiny

TEACHER, POLICY = np.log([0.5, 0.5]), np.log([0.25, 0.75])


@pytest.mark.parametrize(
    "beta, expected",
    [
        (0.0, 0.143841),  # ln 2 / 2 + ln(2/3) / 2
        (1.0, 0.130812),  # ln(1/2) / 4 + 3 ln(3/2) / 4
        (0.5, 0.033822),  # to the mixture 3/8, 5/8: half of 0.032269 and half of 0.035375
        (1e-4, 1e-4 * 0.143841),  # which the forward KL is the limit of
    ],
)
def test_divergences_worked_by_hand(beta, expected):
    found = generalized_jsd(jnp.float32(POLICY), jnp.float32(TEACHER), beta)
    assert found == pytest.approx(expected, rel=1e-3 if beta == 1e-4 else 2e-5)


def test_a_policy_like_its_teacher_has_nothing_to_learn():
    logits = jnp.float32([3.0, -2.0, 0.5])
    for beta in (0.0, 0.3, 1.0):
        value, slope = jax.value_and_grad(lambda x, beta=beta: compare_logits(x, logits, beta).divergence)(
            logits
        )
        assert abs(value) < 1e-6 and np.abs(slope).max() < 1e-6


def test_a_teacher_of_another_architecture():
    """Against the logits of all columns, of rows of several lengths, at a temperature."""
    mesh, rows, beta, temperature = tiny.mesh(), tiny.rows(4), 0.3, 0.7
    trained, frozen = tiny.roles("distill", mesh)
    models = {"policy": tiny.model(), "teacher": make_model(tiny.TEACHER)}
    forward = make_forward(models["policy"], 8, temperature, 8, teacher=models["teacher"])
    assert forward.compare is not None
    found = jax.jit(partial(forward.compare, beta=beta))(trained, frozen, rows)
    of_role = {}
    for role, model in models.items():
        params = (trained | frozen)[role]
        logits = jax.jit(lambda of, model=model: model.logits(of, model.hidden(of["trunk"], rows.tokens)))
        of_role[role] = np.float64(jax.nn.log_softmax(logits(params)[:, :-1] / temperature))
    policy, teacher = of_role["policy"], of_role["teacher"]
    mixture = np.log(beta * np.exp(teacher) + (1 - beta) * np.exp(policy))

    def kl(one, other):
        return np.sum(np.exp(one) * (one - other), axis=-1)

    expected = {
        "divergence": beta * kl(teacher, mixture) + (1 - beta) * kl(policy, mixture),
        "kl": kl(policy, teacher),
        "entropy": -np.sum(np.exp(policy) * policy, axis=-1),
        "teacher_entropy": -np.sum(np.exp(teacher) * teacher, axis=-1),
    }
    mask = np.asarray(rows.completion_mask)
    for name, of_token in expected.items():
        of_token = np.where(mask, np.pad(of_token, ((0, 0), (1, 0))), 0)
        assert np.abs(getattr(found, name) - of_token).max() < 1e-5 * max(1, of_token.max()), name
    assert expected["divergence"][mask[:, 1:]].min() > 1e-3


@pytest.mark.parametrize("padded", ["policy", pytest.param("teacher", marks=pytest.mark.slow)])
def test_embeddings_behind_the_tokenizer_s_are_not_compared(padded):
    """As if there were none, whatever stands in them; a sampled one is the teacher's last."""
    mesh, rows, few = tiny.mesh(), tiny.rows(4), tiny.ARCHITECTURE.vocab_size
    trained, frozen = tiny.roles("distill", mesh)
    params = {"policy": trained["policy"], "teacher": frozen["teacher"]}
    of_role = {"policy": tiny.ARCHITECTURE, "teacher": tiny.TEACHER}
    changed = rows._replace(tokens=rows.tokens.at[:, 5].set(few - 1))
    expected = compared(of_role, params, changed)

    def widened(x):
        return jnp.pad(x, [(0, 6 if size == few else 0) for size in x.shape], constant_values=9.0)

    of_role |= {padded: dataclasses.replace(of_role[padded], vocab_size=few + 6)}
    vocabulary = {"embed", "lm_head"}
    params |= {
        padded: jax.tree.map_with_path(
            lambda path, x: widened(x) if vocabulary & {key.key for key in path} else x, params[padded]
        )
    }
    if padded == "policy":  # which may sample it
        params["policy"] = jax.tree.map_with_path(
            lambda path, x: x.at[few + 3].set(x[few - 1]) if path[-1].key == "embedding" else x,
            params["policy"],
        )
        changed = rows._replace(tokens=rows.tokens.at[:, 5].set(few + 3))
    found = compared(of_role, params, changed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def compared(of_role, params, rows):
    models = {role: make_model(of) for role, of in of_role.items()}
    compare = make_forward(models["policy"], 8, 0.7, 8, teacher=models["teacher"]).compare
    assert compare is not None
    return jax.jit(partial(compare, beta=0.3))(
        {"policy": params["policy"]}, {"teacher": params["teacher"]}, rows
    )


def test_without_a_judge_no_score_is_told():
    """And the comparison of held-out completions is a mean over all of them."""
    mesh, key = tiny.mesh(), jax.random.key(0)
    rows = tiny.rows(4)
    rollout = Rollout(rows, jnp.ones(4, bool), jnp.zeros(rows.tokens.shape))
    scored = Scored(rollout, rollout.sampler_logprobs, None, None, jnp.zeros(4))
    programs = SimpleNamespace(
        rollout_of_one=lambda *_: rollout, score=lambda *_: (scored, {"rollout/eos_rate": jnp.float32(1)})
    )
    texts = SimpleNamespace(batch_decode=lambda ids, **_: ["a"] * len(ids))
    collector = Collector(cast(Any, programs), None, cast(Any, texts), mesh, leaves_out=False)
    prompts, records = tiny.prompts(4), [PromptOnly("p")] * 4
    batches = [(Prompts(*map(np.asarray, prompts)), records)] * 2
    weights = iter([1.0, 3.0])

    def compare(params, frozen, compared):
        assert compared is rows
        weight = next(weights)
        return {"eval/divergence": Mean(jnp.float32(weight * weight), jnp.float32(weight))}

    loader = SimpleNamespace(eval_batches=lambda: iter(batches))
    found = evaluate_prompts(collector, cast(Any, loader), mesh, key, 8, None, compare)({}, {})
    assert found.metrics["eval/divergence"] == pytest.approx((1 + 9) / 4)
    assert found.samples == [{"prompt": "p", "completion": "a"}] * 8
    assert not any("score" in name or "reward" in name for name in found.metrics)


def test_a_run_goes_on_with_the_teacher_that_it_began_with():
    stage = SimpleNamespace(name="pupil", algorithm="distill")
    plan = cast(Any, SimpleNamespace(stage=stage, text={}, origins=Origins(None, None, None, Path("large"))))
    info = {"data": 1, "text": {}, "teacher": 2}
    assert _resumed_info(plan, info, dict(info), 5) == info
    with pytest.raises(ValueError, match="pupil: large is not the model any more that was its teacher until"):
        _resumed_info(plan, info, info | {"teacher": 3}, 5)
