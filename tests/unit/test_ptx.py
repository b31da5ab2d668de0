"""The PTX mix: a policy's loss beside that of sft, on demonstrations that follow from the step."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.algos import sft
from rlhf_jax.algos.ppo import ptx_terms
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import PolicyBatch, Rows
from rlhf_jax.command_line import read_config
from rlhf_jax.data.loader import Loader
from rlhf_jax.lowering import stage_calls
from rlhf_jax.models.forward import blank_forward, make_forward
from rlhf_jax.offline_config import SFTConfig
from rlhf_jax.online import with_ptx
from rlhf_jax.online_config import PPOConfig
from rlhf_jax.plan import plan_stages, ptx_examples
from rlhf_jax.plan_notes import notes
from rlhf_jax.roofline import phase_works
from rlhf_jax.run_tokenizer import prepare_tokenizer
from rlhf_jax.shape_plan import shape_plans
from rlhf_jax.stage import _resumed_info
from rlhf_jax.trainer import NextBatch
from tests import tiny
from tests.conftest import ROOT
from tests.contract.test_algorithms import batch_of

SMOKE = ROOT / "configs" / "smoke" / "ppo.yaml"
COEF = 0.3


def bigrams(temperature):
    """A model that knows pairs of tokens: logits W[before], values v[before]; nothing predicts the first."""

    def logprobs(params, frozen, rows, temperature=temperature):
        words = jax.nn.log_softmax(params["policy"][rows.tokens[:, :-1]] / temperature)
        found = jnp.take_along_axis(words, rows.tokens[:, 1:, None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(words) * words, axis=-1)
        return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (found, entropy))

    def policy_and_value(params, frozen, rows):
        values = jnp.pad(params["value"][rows.tokens[:, :-1]], ((0, 0), (1, 0)))
        return *logprobs(params, frozen, rows), values

    return blank_forward()._replace(
        logprobs=logprobs,
        policy_and_value=policy_and_value,
        demonstration_logprobs=lambda *args: logprobs(*args, temperature=1.0)[0],
    )


def assert_the_sum(name, of_samples, of_data, params, frozen, settings):
    """The gradient of an algorithm with demonstrations is its own without them and, weighted, that of sft."""
    batch, demonstrations = batch_of(name), tiny.rows(5, 20, seed=3)

    def gradient(loss, forward, batch, settings):
        def objective(params):
            terms, _ = loss(forward, params, frozen, batch, settings)
            return sum(term.coef * term.mean.value for term in terms.values()), terms

        return jax.grad(objective, has_aux=True)(params)

    @jax.jit
    def gradients():
        loss = ALGORITHMS[name.partition(":")[0]].loss
        mixed = batch._replace(ptx=demonstrations)
        return (
            gradient(loss, of_samples, mixed, settings),
            gradient(loss, of_samples, batch, dataclasses.replace(settings, ptx_coef=0.0))[0],
            gradient(sft.loss, of_data, demonstrations, SFTConfig()),
        )

    (found, terms), of_policy, (of_sft, expected_terms) = gradients()
    expected_nll = float(expected_terms["nll"].mean.value)
    assert float(terms["ptx"].mean.value) == pytest.approx(expected_nll, rel=1e-5)
    expected = jax.tree.map(lambda a, b: a + COEF * b, of_policy, of_sft)
    assert tiny.relative_difference(found, expected) < 1e-5
    assert tiny.relative_difference(found["policy"], of_policy["policy"]) > 1e-2


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_gradient_is_the_sum_of_both_algorithms_gradients(name):
    rng = np.random.default_rng(0)
    params = {"policy": rng.normal(size=(64, 64)), "value": rng.normal(size=64)}
    params = jax.tree.map(jnp.float32, {role: params[role] for role in ALGORITHMS[name].trains})
    settings = ALGORITHM_SECTIONS[name](ptx_coef=COEF, ptx_from="sft")
    assert_the_sum(name, bigrams(0.7), bigrams(1.0), params, {}, settings)


@pytest.mark.slow
def test_the_loss_and_its_gradient_of_adapters_on_a_shared_base_are_those_of_sft():
    stage = tiny.stage("grpo", "hydra", settings={"ptx_coef": COEF, "ptx_from": "sft"})
    model, (trained, frozen) = tiny.model(stage), tiny.roles("grpo", tiny.mesh(), "hydra")
    demonstrations, of_samples = tiny.rows(5, 20, seed=3), make_forward(model, 8, 0.7, num_demonstrated=8)
    batch = batch_of("grpo")._replace(ptx=demonstrations)

    def mixed(params):
        return ptx_terms(of_samples, params, frozen, batch, stage.settings)["ptx"].mean.value

    def alone(params):
        terms, _ = sft.loss(make_forward(model, 8), params, frozen, demonstrations, SFTConfig())
        return terms["nll"].mean.value

    (found, gradient), (expected, of_sft) = jax.jit(
        lambda: [jax.value_and_grad(of)(trained) for of in (mixed, alone)]
    )()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert tiny.relative_difference(gradient, of_sft) < 1e-5


def test_the_temperature_of_sampling_divides_the_logits_of_samples_alone():
    """Nor has their number of completion tokens a say, or that of short rows."""
    rows, model = tiny.rows(4, 20, seed=3), tiny.model()
    params = {"policy": tiny.weights("policy", tiny.mesh())}
    forward = make_forward(model, 2, 0.7, num_demonstrated=8)
    assert forward.with_columns is not None

    @jax.jit
    def found():
        short = forward.with_columns(1)
        of_data = (of.demonstration_logprobs(params, {}, rows) for of in (forward, short))
        return *of_data, make_forward(model, 8).logprobs(params, {}, rows)[0]

    alone, of_short, expected = found()
    np.testing.assert_array_equal(alone, of_short)
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
    assert make_forward(model, 2).demonstration_logprobs is None


def test_the_loss_is_a_mean_over_the_tokens_of_completions():
    """Against a loop over tokens; elsewhere is poison. It is there where it has a weight."""
    rows = Rows(jnp.zeros((2, 5), jnp.int32), jnp.array([2, 1]), jnp.array([5, 3]))
    table = np.full((2, 5), 1e6, np.float32)
    table[0, 2:], table[1, 1:3] = [-1.0, -2.0, -4.0], [-0.5, -0.25]
    forward = blank_forward()._replace(demonstration_logprobs=lambda *_: jnp.asarray(table))
    none = PolicyBatch(rows, rows.completion_mask, *[jnp.zeros((2, 5))] * 5)
    terms = ptx_terms(forward, {}, {}, none._replace(ptx=rows), PPOConfig(ptx_coef=0.5, ptx_from="sft"))
    total = sum(-table[b, t] for b in range(2) for t in range(5) if table[b, t] < 0)
    assert (float(terms["ptx"].mean.total), float(terms["ptx"].mean.weight)) == (total, 5.0)
    assert terms["ptx"].coef == 0.5
    assert ptx_terms(forward, {}, {}, none, PPOConfig()) == {}
    for batch, coef in ((none, 0.5), (none._replace(ptx=rows), 0.0)):
        with pytest.raises(AssertionError, match="demonstrations go with ptx_coef"):
            ptx_terms(forward, {}, {}, batch, PPOConfig(ptx_coef=coef))


@pytest.fixture(scope="module")
def plans():
    config = read_config(["--config", str(SMOKE), "--run.dir", "unused"], runs=False)
    return {plan.stage.name: plan for plan in plan_stages(config, prepare_tokenizer(config))}


def test_demonstrations_follow_from_the_step_and_are_those_of_the_sft_stage(plans):
    """They are other ones at each step, in sft's order, and after a resume the same."""
    of_sft, mesh = plans["sft"].train, tiny.mesh()
    batch = PolicyBatch(*[jnp.zeros((8, 4))] * 7)

    def made_at(*steps):
        positions = []

        def source(state, position, key):
            positions.append(position)
            return NextBatch(batch, position + 7, {})

        mixed = with_ptx(source, plans["ppo"].ptx, 8, 0, mesh)
        states = [SimpleNamespace(step=jnp.int32(step)) for step in steps]
        found = [mixed(state, 3, jax.random.key(0)) for state in states]
        assert positions == [3] * len(steps) and {of.position for of in found} == {10}
        return [jax.device_get(of.batch.ptx) for of in found]

    at = made_at(0, 1, 2, 3)
    sft = Loader(of_sft, 8, 0)
    for step, rows in enumerate(at):
        jax.tree.map(np.testing.assert_array_equal, rows, sft.batch(8 * step)[0])
    assert len({row.tobytes() for rows in at for row in rows.tokens}) > 24
    resumed = made_at(2, 3)
    jax.tree.map(np.testing.assert_array_equal, resumed, at[2:])


def test_a_stage_plans_the_records_of_another(plans):
    of_sft, ppo = plans["sft"].train, plans["ppo"]
    assert ppo.ptx.fingerprint == of_sft.fingerprint and plans["sft"].ptx is None
    in_buckets = plans["sft"]._replace(train=dataclasses.replace(of_sft, shorter=(8,)))
    assert ptx_examples(ppo.stage, ppo.architecture, {"sft": in_buckets}).shorter == ()
    for changed, rows, passes in (
        ({}, 32, ", each learned 2 times"),
        ({"value_warmup": 1, "num_epochs": 1}, 16, ""),
    ):
        settings = dataclasses.replace(ppo.stage.settings, **changed)
        plan = ppo._replace(stage=dataclasses.replace(ppo.stage, settings=settings))
        (line,) = (line for line in notes(plan) if "ptx" in line)
        told = f"[ppo] ppo.ptx_from: sft: {len(of_sft)} records, {rows / len(of_sft):.3g} epochs{passes}"
        assert line == told
    short = dataclasses.replace(ppo.architecture, context_length=of_sft.length - 1)
    told = (
        rf"^ppo\.ptx_from: rows of {of_sft.length} tokens of stage sft do not fit .* {short.context_length};"
    )
    with pytest.raises(ValueError, match=told):
        ptx_examples(ppo.stage, short, plans)


def test_a_run_goes_on_with_the_demonstrations_that_it_began_with(plans):
    ppo = plans["ppo"]
    info = {"data": 1, "text": ppo.text, "ptx": ppo.ptx.fingerprint}
    assert _resumed_info(ppo, info, dict(info), 1) == info
    for other in (info | {"ptx": 0}, {"data": 1, "text": ppo.text}):
        with pytest.raises(ValueError, match=r"the training records of ppo\.ptx_from are not those that"):
            _resumed_info(ppo, info, other, 1)


def test_shapes_and_least_times_are_told_without_data():
    """An update has one more pass, over as many rows of another length; other programs have what they had."""

    def planned(*flags):
        config = read_config(["--config", str(SMOKE), "--run.dir", "unused", *flags], runs=False)
        return shape_plans(config)[1]

    mixed, alone = planned(), planned("--ppo.ptx_coef", "0")
    ptx = stage_calls(mixed, tiny.mesh()).calls["update"].own[0].ptx
    assert ptx.tokens.shape == (16, 96) and mixed.ptx is not None and mixed.ptx.most_loss_tokens == 95
    assert stage_calls(alone, tiny.mesh()).calls["update"].own[0].ptx is None
    sizes = dict(tiny.mesh().shape)
    works, before = phase_works(mixed, sizes, 0.0), phase_works(alone, sizes, 0.0)
    assert [name for name in works if works[name] != before[name]] == ["update"]
    width, mlp, words = 16, 32, 384
    layer = 4 * width * width + 3 * width * mlp
    num_layers = mixed.architecture.num_layers
    attention = 2 * 96 * width * num_layers
    of_row = 96 * (2 * layer * num_layers + attention) + 95 * 2 * width * words
    passes, epochs = 3, 2
    gap = works["update"].flops - before["update"].flops
    assert gap == pytest.approx(epochs * passes * 16 * of_row, rel=1e-6)
