"""Advantages without a critic, aggregation, and ratios of completions, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algos import grpo, ppo
from rlhf_jax.batch import Mean, PolicyBatch, Rollout, Rows, Scored
from rlhf_jax.metrics import to_host
from rlhf_jax.models.forward import Forward
from rlhf_jax.online_config import (
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    PPOConfig,
    ReinforceConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from rlhf_jax.ops.aggregation import aggregated
from tests import tiny

G, LONGEST, T = 3, 7, 10
OLD_KL_COEF = 0.6
CONFIGS = {
    "grpo": GRPOConfig(group_size=G),
    "dr_grpo": DrGRPOConfig(group_size=G, kl_coef=0.1),
    "dapo": DAPOConfig(group_size=G, kl_coef=0.1, kl_term="k2"),
    "gspo": GSPOConfig(group_size=G, clip_eps=0.05, clip_eps_high=0.07),
    "rloo": RLOOConfig(group_size=G),
    "rloo of tokens": RLOOConfig(group_size=G, credit="token", missing_eos="mask"),
    "reinforce": ReinforceConfig(),
    "reinforce_pp": ReinforcePPConfig(),
    "remax": ReMaxConfig(),
    "remax of groups": ReMaxConfig(group_size=G, normalize_scores=True, score_clip=0.8),
    "remax, overlong": ReMaxConfig(overlong_from=3, overlong_buffer=2, missing_eos="mask"),
    "remax, subtract": ReMaxConfig(missing_eos="subtract", missing_eos_value=0.7),
    "remax of groups, subtract": ReMaxConfig(group_size=G, missing_eos="subtract", score_clip=0.8),
    "remax of groups, scaled": ReMaxConfig(group_size=G, scale="group", kl_term="k3", credit="completion"),
    "kl": GRPOConfig(group_size=G, surrogate="kl", normalize_scores=True, score_clip=0.8),
    "dual clip": GRPOConfig(group_size=G, dual_clip=1.1, missing_eos="mask"),
    "overlong": GRPOConfig(group_size=G, overlong_from=3, overlong_buffer=2, overlong_penalty=0.5),
    "statistics without what is masked": GRPOConfig(group_size=G, normalize_scores=True, missing_eos="mask"),
}


def scored_rollout(seed):
    """Three groups of three: of the second all scores are equal; a row of the third is a filling."""
    rng = np.random.default_rng(seed)
    prompt_lengths = np.array([1, 1, 1, 3, 3, 3, 2, 2, 0])
    lengths = prompt_lengths + np.array([7, 1, 4, 2, 5, 7, 3, 6, 0])
    rows = Rows(jnp.asarray(rng.integers(0, 50, (9, T))), jnp.asarray(prompt_lengths), jnp.asarray(lengths))
    mask = np.asarray(rows.completion_mask)

    def noise():
        return jnp.float32(np.where(mask, rng.normal(-1, 0.5, (9, T)), 1e6))

    ended = jnp.asarray([True, True, False, True, True, True, True, True, False])
    scores = rng.normal(size=9)
    scores[3:6] = 0.7
    rollout = Rollout(rows, ended, sampler_logprobs=noise())
    return Scored(rollout, noise(), noise(), None, jnp.float32(scores))


def greedy_rollout(scored, group_size):
    """Greedy completions of the same prompts: those of row b are 1, 2, 3, 1, ... tokens more than 2; every
    second one has no EOS.
    """
    rows = jax.tree.map(lambda x: x[::group_size], scored.rollout.rows)
    count = len(rows.lengths)
    lengths = jnp.where(rows.sequence_mask, rows.prompt_lengths + 3 + jnp.arange(count) % 3, 0)
    scores = jnp.float32(np.random.default_rng(5).normal(size=count))
    ended = rows.sequence_mask & (jnp.arange(count) % 2 > 0)
    rollout = Rollout(rows._replace(lengths=lengths), ended, scored.old_logprobs[::group_size])
    return Scored(rollout, rollout.sampler_logprobs, None, None, scores)


def shaped(score, seen, length, ended, settings):
    """A score that becomes a reward; `seen` are those by which it is normalised."""
    if settings.normalize_scores:
        score = (score - np.mean(seen)) / np.sqrt(np.var(seen) + 1e-8)
    if settings.score_clip:
        score = np.clip(score, -settings.score_clip, settings.score_clip)
    if settings.missing_eos == "subtract" and not ended:
        score -= settings.missing_eos_value
    if settings.overlong_from:
        beyond = (length - settings.overlong_from) / settings.overlong_buffer
        score -= settings.overlong_penalty * min(max(beyond, 0), 1)
    return score


def in_python(scored, logprobs, settings, kl_coef):
    """The loss, one token at a time, from the papers' equations; and the advantages."""
    rows, n = jax.device_get(scored.rollout.rows), 9
    old, ref = (np.float64(x) for x in (scored.old_logprobs, scored.ref_logprobs))
    tokens = {b: range(rows.prompt_lengths[b], rows.lengths[b]) for b in range(n) if rows.lengths[b]}
    if settings.missing_eos == "mask":
        tokens = {b: of for b, of in tokens.items() if scored.rollout.ended[b]}
    reward, raw = {}, np.float64(scored.scores)
    seen = [1.0, -1.0, *raw[list(tokens)]]  # [1, -1] before, and these
    ended = scored.rollout.ended
    scores = {b: shaped(raw[b], seen, len(of), ended[b], settings) for b, of in tokens.items()}
    greedy = {}
    if scored.greedy is not None:
        of_greedy, raw = scored.greedy.rollout.rows, np.float64(scored.greedy.scores)
        ended = scored.greedy.rollout.ended
        for p, length in enumerate(np.asarray(of_greedy.lengths - of_greedy.prompt_lengths)):
            greedy[p] = shaped(raw[p], seen, length, ended[p], settings)
    for b, of in tokens.items():
        for t in of:
            penalty = kl_coef * (old[b, t] - ref[b, t]) if settings.kl_term == "reward" else 0.0
            reward[b, t] = -penalty + (scores[b] if t == of[-1] else 0.0)
    total = {b: sum(reward[b, t] for t in of) for b, of in tokens.items()}
    advantage = {}
    for b, of in tokens.items():
        group = [total[c] for c in tokens if c // settings.group_size == b // settings.group_size]
        others = [total[c] for c in tokens if c != b and c // settings.group_size == b // settings.group_size]
        baseline = {
            "group": np.mean(group),
            "others": np.mean(others) if others else total[b],
            "batch": np.mean(list(total.values())),
            "greedy": greedy.get(b // settings.group_size),
            "none": 0.0,
        }[settings.baseline]
        compares = settings.baseline in ("group", "others") and settings.credit == "completion"
        is_equal = max(group) - min(group) < 1e-9 and (compares or settings.scale == "group")
        for t in of:
            gain = total[b] if settings.credit == "completion" else sum(reward[b, k] for k in of if k >= t)
            scale = np.std(group, ddof=1) + 1e-4 if settings.scale == "group" else 1.0
            advantage[b, t] = 0.0 if is_equal else (gain - baseline) / scale
    if settings.scale == "batch":
        every = list(advantage.values())
        advantage = {at: (a - np.mean(every)) / np.sqrt(np.var(every) + 1e-8) for at, a in advantage.items()}
    low, high = settings.clip_eps, settings.clip_eps_high or settings.clip_eps
    sums, kls = {}, {}
    for b, of in tokens.items():
        change = [logprobs[b, t] - old[b, t] for t in of]
        ratios = {
            "token": np.exp(change),
            "sequence_mean": [np.exp(np.mean(change))] * len(of),
            "sequence": [np.exp(np.sum(change))] * len(of),
        }[settings.ratio]
        terms, kl = [], []
        for t, ratio in zip(of, ratios, strict=True):
            a = advantage[b, t]
            term = max(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
            if settings.surrogate == "kl":
                change = logprobs[b, t] - old[b, t]
                term = -a * ratio + OLD_KL_COEF * (np.exp(change) - 1 - change)
            terms.append(min(term, -settings.dual_clip * a) if settings.dual_clip and a < 0 else term)
            gap = ref[b, t] - logprobs[b, t]
            kl.append({"k2": 0.5 * gap**2, "k3": np.exp(gap) - 1 - gap, "reward": 0.0}[settings.kl_term])
        sums[b], kls[b] = terms, kl

    def mean(of):
        match settings.aggregation:
            case "token":
                return sum(map(sum, of.values())) / sum(map(len, of.values()))
            case "sequence":
                return np.mean([np.mean(terms) for terms in of.values()])
            case "constant":
                return np.mean([np.sum(terms) / LONGEST for terms in of.values()])

    return mean(sums) + kl_coef * mean(kls), advantage


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_advantages_are_those_of_the_papers(name, seed):
    settings = CONFIGS[name]
    scored = scored_rollout(seed)
    if settings.baseline == "greedy":
        scored = scored._replace(greedy=greedy_rollout(scored, settings.group_size))
    rng = np.random.default_rng(9)
    logprobs = np.asarray(scored.old_logprobs) + rng.normal(0, 0.3, (9, T))
    aux = {"kl_coef": 0.3, "old_kl_coef": OLD_KL_COEF, "score_count": 2, "score_mean": 0, "score_var": 1}
    aux = {name: jnp.float32(x) for name, x in aux.items()}
    batch, metrics = grpo.prepare(scored, aux, settings)
    expected, advantages = in_python(scored, logprobs, settings, 0.3)

    def value(logprobs):
        forward = Forward(lambda *_: (logprobs, logprobs), None, None, None, None, None, longest=LONGEST)
        terms, _ = grpo.loss(forward, {}, {}, batch, settings)
        return sum(term.coef * term.mean.value for term in terms.values())

    assert value(jnp.float32(logprobs)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert {tuple(at) for at in np.argwhere(batch.completion_mask)} == advantages.keys()
    for at, advantage in advantages.items():
        assert batch.advantages[at] == pytest.approx(advantage, rel=1e-5, abs=1e-5)
    slope = jax.grad(value)(jnp.float32(logprobs))
    assert np.all(np.isfinite(slope))
    assert not np.any(np.asarray(slope)[~np.asarray(batch.completion_mask)])
    at = next(at for at, a in advantages.items() if a)
    step = np.zeros_like(logprobs)
    step[at] = 1e-4
    ups, downs = (in_python(scored, logprobs + sign * step, settings, 0.3)[0] for sign in (1, -1))
    assert slope[at] == pytest.approx((ups - downs) / 2e-4, rel=1e-3, abs=1e-5)
    if settings.group_size == G:
        only_scores = settings.kl_term != "reward" and not settings.overlong_from
        assert to_host(metrics)["rollout/equal_groups"] == pytest.approx(1 / 3 if only_scores else 0)


@pytest.mark.parametrize("options", [{}, {"baseline": "batch"}, {"credit": "token"}])
def test_a_group_of_equal_scores_moves_nothing(options):
    """The mean of eight times 100.1 is not 100.1 in float32, and the gap would be divided by 1e-4."""
    settings = GRPOConfig(group_size=8, **options)
    mask, stays = jnp.ones((8, 2), bool), jnp.ones(8, bool)
    rewards = jnp.zeros((8, 2)).at[:, 1].set(100.1)
    np.testing.assert_array_equal(grpo.advantages(rewards, mask, stays, settings), 0)
    assert np.abs(grpo.advantages(rewards.at[0, 1].set(100.2), mask, stays, settings)).max() > 0.3


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_packed_rows_have_the_same_mean(how):
    rows = tiny.rows()
    x = jnp.asarray(np.random.default_rng(3).normal(size=rows.tokens.shape), jnp.float32)
    zeros = jnp.zeros(rows.tokens.shape)
    batch = PolicyBatch(rows, rows.completion_mask, x, zeros, zeros, zeros, zeros)
    packed = tiny.packed(batch, [[0, 1, 2, 3], [], [4, 5], [6, 7]], 60)
    one, other = (aggregated(of.old_logprobs, of.completion_mask, of.rows, how, 8) for of in (batch, packed))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_completion_as_one_action_has_the_ratio_of_all_its_tokens():
    """exp(0.1 + 0.2): clipped at 1.2, a good completion is pushed no further."""
    rows = Rows(jnp.zeros((1, 3), jnp.int32), jnp.array([1]), jnp.array([3]))
    old = jnp.array([[0.0, -1.0, -1.0]])
    ones = jnp.ones((1, 3))
    batch = PolicyBatch(rows, rows.completion_mask, old, None, None, ones, None)
    new = old + jnp.array([[5.0, 0.1, 0.2]])
    for ratio, loss in (
        ("token", -(np.exp(0.1) + 1.2) / 2),
        ("sequence", -1.2),
        ("sequence_mean", -np.exp(0.15)),
    ):
        found, _ = ppo.clipped_policy_loss(new, batch, PPOConfig(ratio=ratio))
        assert found.value == pytest.approx(loss, rel=1e-6), ratio


def test_weights_and_statistics_go_on():
    settings = GRPOConfig(group_size=G, surrogate="kl", old_kl_target=0.1, normalize_scores=True)
    scored = scored_rollout(0)
    aux = {name: jnp.float32(x) for name, x in ppo.init_aux(settings).items()}
    batch, _ = grpo.prepare(scored, aux, settings)
    for kl, factor in ((0.16, 2.0), (0.14, 1.0), (0.07, 1.0), (0.06, 0.5)):
        metrics = {"policy/approx_kl_last": Mean(jnp.float32(2 * kl), jnp.float32(2))}
        found = ppo.update_aux(aux, batch, metrics, settings)
        assert found["old_kl_coef"] == factor * settings.old_kl_coef, kl
    scores = np.asarray(scored.scores)[:8]
    for _ in range(2):  # the same scores again: more of them, the same mean and deviation
        aux = ppo.update_aux(aux, batch, metrics, settings)
        assert float(aux["score_mean"]) == pytest.approx(scores.mean(), rel=1e-5)
        assert float(aux["score_var"]) == pytest.approx(scores.var(), rel=1e-5)
    assert aux["score_count"] == 16


def test_completions_as_actions_weigh_alike_whatever_their_length():
    """Of two good completions, of 1 and of 3 tokens, all slopes of one sum up to those of the other."""
    rows = Rows(jnp.zeros((2, 4), jnp.int32), jnp.array([1, 1]), jnp.array([2, 4]))
    old = jnp.full((2, 4), -1.0)
    batch = PolicyBatch(rows, rows.completion_mask, old, None, None, jnp.ones((2, 4)), None)
    settings = PPOConfig(ratio="sequence", aggregation="sequence")
    slope = jax.grad(lambda x: ppo.clipped_policy_loss(x, batch, settings)[0].value)(old)
    np.testing.assert_allclose(slope, [[0, -0.5, 0, 0], [0, -0.5, -0.5, -0.5]], rtol=1e-6)


def test_the_weight_of_the_old_kl_stays_where_all_steps_were_skipped():
    settings = GRPOConfig(group_size=G, surrogate="kl", old_kl_target=0.1)
    aux = {"kl_coef": jnp.float32(0), "old_kl_coef": jnp.float32(1)}
    batch, _ = grpo.prepare(scored_rollout(0), aux, settings)
    metrics = {"policy/approx_kl_last": Mean(jnp.float32(0), jnp.float32(0))}
    assert ppo.update_aux(aux, batch, metrics, settings)["old_kl_coef"] == 1
