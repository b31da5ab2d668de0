"""What every algorithm keeps, whatever its mathematics: NUMERICS 3, 4, 7, 11, 27.

Gradients are read from Adam's first moment after one update: it is the compiled program that is tested. Of a
role that no optimiser steps, it is the step itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import JudgedRows, PolicyBatch, Rollout, Rows, num_rows
from rlhf_jax.config_types import RANKINGS, Kind
from rlhf_jax.metrics import to_host
from rlhf_jax.online_config import OnlineConfig, ShapedRewardConfig
from rlhf_jax.role_parts import role_parts
from tests import tiny

NAMES = sorted(ALGORITHMS)
VARIANTS = {
    "grpo:kl": {"surrogate": "kl"},
    "grpo:ptx": {"ptx_coef": 0.5, "ptx_from": "sft"},
    "reward_model:hinge": {"loss": "hinge", "margin": 1.0, "margin_from_data": True, "center_coef": 0.1},
    "reward_model:all_pairs": {"all_pairs": True, "label_smoothing": 0.1, "center_coef": 0.1},
    "reward_model:info_nce": {"loss": "info_nce", "center_coef": 0.1},
    "reward_model:plackett_luce": {"loss": "plackett_luce"},
    "reward_model:ensemble": {"num_heads": 3, "loss": "hinge", "margin": 1.0},
    "reward_model:regression": {"loss": "regression", "normalizer": "none"},
}
"""Settings under which an algorithm has another loss; elsewhere a colon stands before model.sharing."""
SHARED = [
    "dpo:lora",
    "ppo:trunk",
    "ppo:hydra",
    "trpo:hydra",
    "reward_model:lora",
    "sft:lora",
    "distill:hydra",
]
"""Algorithms whose roles share parameters, or are adapters; the fast tests of them are in test_sharing.py."""
IN_FULL = ("ppo", "reward_model", "sft")
"""These stand for the others, which are tested with everything changed at once."""
AT_ONCE = [*(name for name in NAMES if name not in IN_FULL), *VARIANTS, *SHARED]
FAST = ("dpo", "grpo", "kto")
"""Of AT_ONCE."""


def slow_but(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def section(name: str):
    return ALGORITHM_SECTIONS[name.partition(":")[0]]


def is_online(name: str) -> bool:
    return issubclass(section(name), OnlineConfig)


ONLINE = [name for name in NAMES if is_online(name)]
ROWS_PER_RECORD: dict[Kind, int] = {"rating": 1, **dict.fromkeys(RANKINGS, 4)}
"""Where the data decide it; rankings here are of four completions or three."""
GRADIENT = 1e-5  # of the leaf's norm
VALUE = 1e-5


def policy_batch(rows: Rows, seed: int = 0) -> PolicyBatch:
    """A batch as a rollout would give it, a row with a masked-out completion among them."""
    rng = np.random.default_rng(seed)

    def noise(scale):
        return jnp.asarray(scale * rng.normal(size=rows.tokens.shape), jnp.float32)

    mask = rows.completion_mask.at[1].set(False)
    more = noise(1), noise(1), noise(1), jnp.exp(noise(0.3))
    return PolicyBatch(rows, mask, noise(0.1) - 4.1, noise(0.1) - 4.1, *more)


def online_batch(name: str, rows: Rows) -> PolicyBatch:
    """A batch of an online algorithm: without a value model it has no values, but a KL in the loss.

    Of what was chosen of the samples, a part only fills up; pairs have the reference's log-probabilities.
    """
    if not issubclass(section(name), ShapedRewardConfig):
        is_there = jnp.arange(8) // 2 != 1
        prompt_lengths, lengths = (jnp.where(is_there, x, 0) for x in (rows.prompt_lengths, rows.lengths))
        ref_logprobs = jnp.linspace(-9, -40, 8) if name == "online_dpo" else None
        return Rows(rows.tokens, prompt_lengths, lengths, ref_logprobs=ref_logprobs)
    batch = policy_batch(rows)
    if settings_of(name).surrogate == "kl":
        batch = batch._replace(old_kl_weights=jnp.full(rows.tokens.shape, 0.5))
    if "ptx_coef" in VARIANTS.get(name, {}):
        batch = batch._replace(ptx=tiny.rows(8, 20, seed=3))
    if "value" in spec(name).trains:
        return batch
    batch = batch._replace(old_values=None, returns=None, kl_weights=jnp.full(rows.tokens.shape, 0.2))
    has_reference = "reference" in spec(name).reads(settings_of(name))
    return batch if has_reference else batch._replace(ref_logprobs=None, kl_weights=None)


def settings_of(name: str):
    return section(name)(**VARIANTS.get(name, {}))


def spec(name: str):
    algorithm = ALGORITHMS[name.partition(":")[0]]
    rows_per_record = ROWS_PER_RECORD.get(settings_of(name).records, algorithm.rows_per_record)
    return algorithm._replace(rows_per_record=rows_per_record)


def sharing_of(name: str) -> str:
    return "separate" if name in VARIANTS else name.partition(":")[2] or "separate"


def batch_of(name: str, rows: Rows | None = None):
    """A batch for an algorithm: eight rows, or four rankings, where none are given."""
    records = settings_of(name).records
    rows = rows or tiny.rows(16 if records in RANKINGS else 8)
    if is_online(name):
        return online_batch(name, rows)
    if records == "unpaired":
        return tiny.unpaired(rows)
    if records in ("preference_with_margin", "rating", *RANKINGS):
        return judged_rows(rows, spec(name).rows_per_record, is_pair=records == "preference_with_margin")
    return rows


def judged_rows(rows: Rows, per: int, *, is_pair: bool) -> JudgedRows:
    """Rows in records, with ratings that have ties; rankings but the first lack their last completion."""
    rng = np.random.default_rng(4)
    if per == 4:
        is_there = jnp.arange(len(rows.lengths)) % per < np.repeat([4, 3, 3, 3], 4)
        rows = rows._replace(
            lengths=jnp.where(is_there, rows.lengths, 0),
            prompt_lengths=jnp.where(is_there, rows.prompt_lengths, 0),
        )
    there = np.asarray(rows.lengths).reshape(-1, per) > 0
    ratings = np.where(there, rng.integers(1, 4, there.shape), 0).astype(np.float32)
    if is_pair:
        ratings[:, 1] = 0
    better = (ratings[:, :, None] > ratings[:, None, :]) & there[:, :, None] & there[:, None, :]
    return JudgedRows(rows, jnp.asarray(ratings.ravel()), jnp.asarray(better.reshape(-1, per)))


@functools.cache
def update_of(name, mesh, settings):
    """Returns the compiled update of an algorithm, with one optimiser step; shared by the tests."""
    settings = dict(settings)
    one_minibatch = {"num_epochs": 1, "num_minibatches": 1, "group_size": 1} if is_online(name) else {}
    if name.startswith("trpo"):
        # Conjugate gradients amplify rounding by the matrix's condition. Between two meshes, the steps of
        # adapters differ by 4e-5 after ten products with the default damping and by 2e-6 after five; with
        # this damping by 4e-6 after ten, no more than those of whole models.
        one_minibatch["damping"] = 1.0
    data = {"packing": settings.pop("packing")}
    num_completion = 32 if data["packing"] else 8
    settings = one_minibatch | VARIANTS.get(name, {}) | settings
    stage = tiny.stage(name.partition(":")[0], sharing_of(name), settings=settings, data=data)
    return tiny.programs(stage, mesh, num_completion, algorithm=spec(name))


def updated(name, batch, mesh=None, packing=False, **settings):
    """Returns the gradient (Adam's first moment, by role) and the metrics of one update."""
    mesh = mesh or tiny.mesh()
    units = num_rows(batch) if packing else batch_records(name, batch)
    settings = {"batch_size": units, "packing": packing} | settings
    programs = update_of(name, mesh, tuple(settings.items()))
    num_heads = getattr(settings_of(name), "num_heads", 1)
    trained, frozen = tiny.roles(name.partition(":")[0], mesh, sharing_of(name), num_heads)
    before = programs.init_state(trained)
    stepped = jax.device_get({role: before.params[role] for role in spec(name).without_optimizer})
    state, metrics = programs.update(before, frozen, batch, jax.random.key(0))
    moments = {role: state.opt_state[role][1][0].mu for role in trained if role not in stepped}
    moments |= {role: jax.tree.map(np.subtract, state.params[role], stepped[role]) for role in stepped}
    return jax.device_get(moments), to_host(metrics)


def batch_records(name, batch):
    return jax.tree.leaves(batch)[0].shape[0] // spec(name).rows_per_record


def as_one_leaf(step):
    """Returns a step as one array: as a difference of parameters it has their rounding, of which one digit is
    3e-4 of what norms move."""
    return np.concatenate([x.ravel() for x in jax.tree.leaves(step)])


def assert_same(found, expected):
    gradient, metrics = found
    expected_gradient, expected_metrics = expected
    for role, of_role in expected_gradient.items():
        pair = gradient[role], of_role
        if f"{role}/step_norm" in metrics:
            pair = map(as_one_leaf, pair)
        assert tiny.relative_difference(*pair) < GRADIENT, role
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=VALUE * max(1, abs(value))), name


@pytest.fixture(scope="module", params=IN_FULL)
def reference(request):
    """The name of an algorithm, a batch, and its update on one device."""
    batch = batch_of(request.param)
    return request.param, batch, updated(request.param, batch)


def smallest_norm(name, moments):
    """The least norm of a leaf of a role's gradient, but of a bias that comparisons of scores do not see."""
    norms = jax.tree.map(np.linalg.norm, moments)
    if name != "reward_model:regression":
        norms.get("score_head", {}).pop("bias", None)
    return min(jax.tree.leaves(norms))


def test_the_gradient_is_not_zero(reference):
    name, _, (gradient, metrics) = reference
    for role, moments in gradient.items():
        assert metrics[f"{role}/grad_norm"] > 1e-3
        assert smallest_norm(name, moments) > 0, role


def longer(batch):
    """The batch in rows of five tokens more, with garbage in them."""
    if isinstance(batch, JudgedRows):  # whose other arrays are of completions, not of tokens
        return batch._replace(rows=longer(batch.rows))

    def padded(x):
        garbage = False if x.dtype == bool else 7
        return jnp.pad(x, ((0, 0), (0, 5)), constant_values=garbage) if x.ndim == 2 else x

    return jax.tree.map(padded, batch)


def with_filling(batch):
    """The batch, and half as many rows that only fill up."""
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[: len(x) // 2])]), batch)


def test_padding_changes_nothing(reference):
    name, batch, expected = reference
    assert_same(updated(name, longer(batch)), expected)


def test_filling_rows_change_nothing(reference):
    name, batch, expected = reference
    assert_same(updated(name, with_filling(batch)), expected)


def in_another_order(name, batch):
    per = spec(name).rows_per_record
    order = np.random.default_rng(0).permutation(batch_records(name, batch))
    rows = (per * order[:, None] + np.arange(per)).ravel()
    return jax.tree.map(lambda x: x[rows], batch)


def test_order_of_records_changes_nothing(reference):
    name, batch, expected = reference
    assert_same(updated(name, in_another_order(name, batch)), expected)


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_change_nothing(reference, parts):
    name, batch, expected = reference
    assert_same(updated(name, batch, microbatch_size=batch_records(name, batch) // parts), expected)


@pytest.mark.parametrize("sizes", tiny.MESHES, ids=str)
def test_devices_change_nothing(reference, sizes):
    name, batch, expected = reference
    assert_same(updated(name, batch, tiny.mesh(**sizes)), expected)


def packed(batch, num_empty=0):
    """The batch in packed rows: half of it in one, none in the next; pairs and rankings stay together."""
    half, quarter = num_rows(batch) // 2, num_rows(batch) // 4
    ends = [half, half, half + quarter, 2 * half]
    groups = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    return tiny.packed(batch, [*groups, *[[]] * num_empty], 15 * half)


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"microbatch_size": 1}])
def test_packing_changes_nothing(reference, settings):
    """NUMERICS 3 and 4: several sequences in a row, poison behind them, also with microbatches."""
    name, batch, expected = reference
    assert_same(updated(name, packed(batch), packing=True, **settings), expected)


def test_packed_rows_on_eight_devices(reference):
    name, batch, expected = reference
    rows = packed(batch, num_empty=4)
    assert_same(updated(name, rows, tiny.mesh(data=4, fsdp=2), packing=True), expected)


@pytest.mark.parametrize("name", slow_but(FAST, AT_ONCE))
def test_nothing_changes_where_everything_is_changed_at_once(name):
    batch = batch_of(name)
    gradient, metrics = expected = updated(name, batch)
    assert all(smallest_norm(name, moments) > 0 for moments in gradient.values())
    assert metrics.get("policy/kl_estimate", 1) > 0.1  # else the statistics of the minibatch have no say
    changed = with_filling(longer(in_another_order(name, batch)))
    mesh = tiny.mesh(tensor=4, sequence=2) if name in SHARED else None
    assert_same(updated(name, changed, mesh, microbatch_size=2), expected)
    rows = packed(batch, num_empty=4)
    assert_same(updated(name, rows, tiny.mesh(data=4, fsdp=2), packing=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward_model:all_pairs", "reward_model:plackett_luce"])
def test_a_ranking_may_lie_on_two_devices(name):
    """Eight devices have two rows each, a ranking four."""
    batch = batch_of(name)
    assert_same(updated(name, batch, tiny.mesh(data=8)), updated(name, batch))


@pytest.mark.parametrize("name", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_reference_computed_beforehand_changes_nothing(name):
    """Its log-probabilities stand in the rows, packed ones too, and no role of the stage is the reference."""
    mesh = tiny.mesh()
    stage = tiny.stage(name, settings={"precompute_ref": True})
    assert role_parts(stage, spec(name)).keys() == {"policy"}
    _, frozen = tiny.roles(name, mesh)
    ref_logprobs = tiny.programs(stage, mesh, 32).ref_logprobs

    def known(batch):
        if not isinstance(batch, Rows):
            return batch._replace(rows=known(batch.rows), mismatched=known(batch.mismatched))
        of_sequences = ref_logprobs(frozen, batch).reshape(batch.lengths.shape)
        return batch._replace(ref_logprobs=of_sequences)

    batch = batch_of(name)
    expected = updated(name, batch)
    for packing in (False, True):
        rows = known(packed(batch) if packing else batch)
        assert_same(updated(name, rows, packing=packing, precompute_ref=True), expected)


@pytest.mark.parametrize(
    ("name", "poison"),
    [
        ("ppo", 1e6),
        ("ppo", np.nan),
        pytest.param("gspo", np.nan, marks=pytest.mark.slow),
        pytest.param("trpo", np.nan, marks=pytest.mark.slow),
    ],
)
def test_garbage_outside_the_completions_changes_nothing(name, poison):
    batch = batch_of(name)
    kept = batch.completion_mask
    fields = (
        "old_logprobs",
        "ref_logprobs",
        "old_values",
        "advantages",
        "returns",
        "importance",
        "kl_weights",
    )
    there = {field: x for field in fields if (x := getattr(batch, field)) is not None}
    poisoned = batch._replace(**{field: jnp.where(kept, x, poison) for field, x in there.items()})
    assert_same(updated(name, poisoned), updated(name, batch))


@pytest.mark.slow
def test_devices_stop_at_the_same_step():
    settings = {"batch_size": 8, "num_epochs": 4, "num_minibatches": 2, "early_stop_kl": 2e-3}
    stage = tiny.stage("ppo", settings=settings)

    def updated_on(mesh):
        trained, frozen = tiny.roles("ppo", mesh)
        programs, rows = tiny.programs(stage, mesh), tiny.rows()
        rollout = Rollout(rows, jnp.ones(8, bool), jnp.zeros(rows.tokens.shape))
        state = programs.init_state(trained)
        scored, _ = programs.score(state.params, frozen, rollout)
        batch, _ = programs.advantages(scored, state.aux)
        state, metrics = programs.update(state, frozen, batch, jax.random.key(0))
        return jax.device_get(state.params), to_host(metrics)

    params, metrics = updated_on(tiny.mesh())
    assert metrics["update/stopped"] in (2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8)
    others, found = updated_on(tiny.mesh(data=2, fsdp=2, tensor=2))
    assert found == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert tiny.relative_difference(others, params) < 1e-4  # after steps of Adam, which divides by deviations


HAVE_RATIOS = [name for name in ONLINE if issubclass(section(name), ShapedRewardConfig)]


@pytest.mark.parametrize("name", slow_but(("ppo",), HAVE_RATIOS))
def test_the_first_ratio_is_one(name):
    """Rollout, score, advantages, update have one temperature, so old equals new before the first step."""
    mesh = tiny.mesh()
    programs = tiny.programs(
        tiny.stage(
            name,
            settings={"num_epochs": 2, "num_minibatches": 4, "group_size": 2},
            rollout={"max_new_tokens": 8, "temperature": 0.7},
        ),
        mesh,
    )
    trained, frozen = tiny.roles(name, mesh)
    state = programs.init_state(trained)
    rollout = programs.rollout(state.params, frozen, tiny.prompts(), jax.random.key(1))
    scored, rollout_metrics = programs.score(state.params, frozen, rollout)
    if spec(name).reads_greedy(section(name)()):
        ways = [
            programs.greedy_rollout(state.params, frozen, tiny.prompts(), jax.random.key(k)) for k in (1, 2)
        ]
        np.testing.assert_array_equal(ways[0].rows.tokens, ways[1].rows.tokens)
        greedy, _ = programs.greedy_score(state.params, frozen, ways[0])
        in_full, _ = programs.score(state.params, frozen, ways[0])
        np.testing.assert_allclose(greedy.scores, in_full.scores, rtol=1e-5)
        assert np.ptp(greedy.scores) > 0.1
        scored = scored._replace(greedy=greedy)
    batch, _ = programs.advantages(scored, state.aux)
    _, metrics = programs.update(state, frozen, batch, jax.random.key(2))
    metrics = to_host(rollout_metrics | metrics)
    assert metrics["policy/ratio_gap_first"] < 1e-5
    assert metrics["policy/ratio_gap"] > 1e-4  # later minibatches have moved
    assert metrics["policy/sampler_gap_max"] < 1e-5
    if scored.ref_logprobs is not None:
        assert metrics["policy/kl"] > 0.01


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.slow), {"sequences_per_row": 2, "length_buckets": 2}],
    ids=str,
)
def test_sampled_pairs_are_compared_as_they_were_scored(layout):
    """Rollout, score, update have one temperature; pairs stay pairs through minibatches and packed rows."""
    mesh, beta = tiny.mesh(), 0.3
    sizes = {"batch_size": 8, "group_size": 2, "num_minibatches": 4, "beta": beta}
    rollout = {"max_new_tokens": 8, "temperature": 0.7}
    stage = tiny.stage("online_dpo", settings=sizes | layout, rollout=rollout, optimizer={"learning_rate": 0})
    programs = tiny.programs(stage, mesh)
    trained, frozen = tiny.roles("online_dpo", mesh)
    state = programs.init_state(trained)
    rollout = programs.rollout(state.params, frozen, tiny.prompts(), jax.random.key(1))
    scored, _ = programs.score(state.params, frozen, rollout)
    scores = jnp.arange(16.0) % 5 // 2
    batch, told = programs.advantages(scored._replace(scores=scores), state.aux)
    _, metrics = programs.update(state, frozen, batch, jax.random.key(2))
    log_ratios = jnp.sum(scored.old_logprobs - scored.ref_logprobs, axis=1).reshape(8, 2)
    first, second = scores.reshape(8, 2).T
    margins = jnp.sign(first - second) * (log_ratios[:, 0] - log_ratios[:, 1])
    found, is_pair = to_host(told | metrics), np.asarray(first != second)
    assert found["rollout/equal_groups"] == pytest.approx(1 - is_pair.mean())
    assert 0 < is_pair.mean() < 1
    assert found["reward/margin"] == pytest.approx(beta * float(margins[is_pair].mean()), rel=1e-5)
    losses = np.log1p(np.exp(-beta * np.float64(margins[is_pair])))
    assert found["loss/preference"] == pytest.approx(losses.mean(), rel=1e-5)
