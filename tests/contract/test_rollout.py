"""Completions by the compiled rollout depend on the prompt, its index and the key alone (NUMERICS 7, 9)."""

import functools
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import keys
from rlhf_jax.batch import Prompts
from rlhf_jax.command_line import ConfigError, read_command_line
from rlhf_jax.models.kv_cache import unstack
from rlhf_jax.rollout.generate import assemble, generate, make_queue
from rlhf_jax.rollout.sampling import Sampling, row_keys
from rlhf_jax.rollout.slots import Engine
from rlhf_jax.rollout.stops import StopStrings
from rlhf_jax.sharding import axis_rules, place_rows, traced_on
from tests import completions, tiny
from tests.completions import completion
from tests.smoke.test_quickstart import SHORT

KEY = jax.random.key(19)


@functools.cache
def programs_of(mesh, slots):
    return tiny.programs(tiny.stage("ppo", rollout={"slots": slots, "steps_per_call": 3}), mesh)


def rollout(prompts, mesh=None, key=KEY, slots=0):
    mesh = mesh or tiny.mesh()
    policy = tiny.weights("policy", mesh)
    program = programs_of(mesh, slots).rollout
    return jax.device_get(program({"policy": policy}, {}, place_rows(mesh, prompts), key))


def assert_same(found, expected, prompts, order=None):
    logits = completions.next_token_logits(tiny.model(), tiny.weights("policy", tiny.mesh()), temperature=1.0)
    completions.assert_same_completions(found, expected, prompts, KEY, logits, order)


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts()


@pytest.fixture(scope="module")
def alone(prompts):
    """The completions on one device."""
    found = rollout(prompts)
    assert 0 < found.ended.sum() < 8  # some end, some do not
    assert len({tuple(completion(found, row)) for row in range(8)}) == 8
    return found


@pytest.mark.parametrize("sizes", tiny.MESHES, ids=str)
def test_any_mesh_samples_the_same_tokens(prompts, alone, sizes):
    assert_same(rollout(prompts, tiny.mesh(**sizes)), alone, prompts)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "sequence": 2}], ids=str
)
def test_slots_on_any_mesh_sample_the_same_tokens(prompts, alone, sizes):
    """Four parts of a slot and two prompts each; and four slots on devices that all have all rows."""
    lengths = alone.rows.lengths - alone.rows.prompt_lengths
    assert len(set(lengths[::2])) > 1  # slots become free at different times
    mesh = tiny.mesh(**sizes)
    assert_same(rollout(prompts, mesh, slots=4), alone, prompts)
    assert programs_of(mesh, 4).rollout.run._cache_size() == 1  # one compilation for all calls


def test_a_slot_that_goes_on_keeps_its_prompt_while_other_devices_refill(prompts):
    """Two devices with a slot each: one has a short completion, the other is in the midst of its own."""
    policy, model = tiny.weights("policy", tiny.mesh()), tiny.model()
    sampling = Sampling(1.0, stop_ids=jnp.asarray([-1]))
    limits = jnp.asarray([1, 3, 8, 2, 8, 1, 8, 8])

    def complete(mesh, **slots):
        made = partial(generate, model, max_new_tokens=8, pad_id=tiny.PAD, **slots)
        program = jax.jit(traced_on(mesh, lambda *args: made(*args, sampling, limits=limits)))
        return jax.device_get(program(tiny.weights("policy", mesh), place_rows(mesh, prompts), KEY))

    logits = completions.next_token_logits(model, policy, temperature=1.0)
    expected = complete(tiny.mesh())
    for slots in ({"num_slots": 2}, {"num_slots": 4, "refill_size": 2}):
        found = complete(tiny.mesh(data=2), **slots)
        completions.assert_same_completions(found, expected, prompts, KEY, logits)


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"data": 4, "tensor": 2}, {}),
        ({"data": 2, "expert": 2, "tensor": 2}, {}),
        ({"data": 2, "fsdp": 4}, {"batch": ["data"], "vocab": "none"}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_groups_in_slots_on_any_mesh_are_the_same(prompts, sizes, axes):
    """Of each prompt three completions, which end at different times, on half as many slots as prompts."""
    model, sampling = tiny.model(), Sampling(1.0, stop_ids=jnp.asarray([tiny.EOS, 7, 11, 20]))

    def complete(mesh, num_slots):
        made = partial(generate, model, max_new_tokens=8, pad_id=tiny.PAD, num_slots=num_slots, group_size=3)
        program = jax.jit(traced_on(mesh, lambda *args: made(*args, KEY, sampling)))
        return jax.device_get(program(tiny.weights("policy", mesh), place_rows(mesh, prompts)))

    expected = complete(tiny.mesh(), 0)
    assert 4 < expected.ended.sum() < 24
    with axis_rules(axes):
        found = complete(tiny.mesh(**sizes), 4)
    np.testing.assert_array_equal(found.rows.tokens, expected.rows.tokens)
    np.testing.assert_array_equal(found.ended, expected.ended)
    np.testing.assert_allclose(found.sampler_logprobs, expected.sampler_logprobs, rtol=1e-5, atol=1e-5)


@functools.cache
def counted_rollout(num_slots, **sizes):
    """Returns a function of prompts, limits, steps of a call -> (slots at the end, rollout), on the host."""
    policy, model, mesh = tiny.weights("policy", tiny.mesh(**sizes)), tiny.model(), tiny.mesh(**sizes)
    engine, sampling = Engine(8, tiny.PAD, num_slots, refill_size=1), Sampling(1.0, jnp.asarray([-1]))
    weights = jax.jit(traced_on(mesh, lambda policy: unstack(policy, model.architecture, model.dtype)))(
        policy
    )

    def run(prompts, limits, at_once, slots):
        queue = make_queue(prompts, 8, limits)
        slots = engine.run(weights, queue, sampling, KEY, slots, at_once)
        return slots, assemble(prompts, engine.in_order(queue, slots.done), tiny.PAD)

    start, run = (jax.jit(traced_on(mesh, made)) for made in (partial(engine.start, weights), run))

    def complete(prompts, limits, at_once=1000):
        prompts = place_rows(mesh, prompts)
        slots, taken = start(prompts), 0
        while slots.going:
            slots, found = run(prompts, limits, at_once, slots)
            assert slots.steps + slots.refills - taken <= at_once  # refills are work too
            taken = slots.steps + slots.refills
        return slots, jax.device_get(found)

    return complete


@pytest.mark.slow
@pytest.mark.parametrize("by", ["limits", "lengths"])
def test_devices_have_even_shares_of_a_queue(prompts, by):
    """The long ones stand at its beginning. They are dealt in turn; results stand where their prompts do."""
    limits = jnp.asarray([8, 8, 7, 7, 2, 2, 1, 1] if by == "limits" else [8] * 8)
    if by == "lengths":
        prompts = prompts._replace(lengths=jnp.asarray([8, 8, 7, 6, 3, 2, 1, 0]))
    complete = counted_rollout(2, data=2)
    slots, found = complete(prompts, limits)
    _, expected = counted_rollout(0)(prompts, limits)
    logits = completions.next_token_logits(tiny.model(), tiny.weights("policy", tiny.mesh()), temperature=1.0)
    completions.assert_same_completions(found, expected, prompts, KEY, logits)
    own = slots.done.lengths.reshape(2, 4).sum(axis=1)  # by device
    assert own.tolist() == (
        [18, 18] if by == "limits" else [24, 32]
    )  # to and fro: the filling is the first's
    if by == "limits":
        assert slots.steps == 18  # with contiguous parts one device alone would take 30
    _, again = complete(prompts, limits, at_once=3)
    np.testing.assert_array_equal(again.rows.tokens, found.rows.tokens)


def test_words_that_are_left_out_by_configuration(prompts):
    """With the likeliest word alone all keys give the same; what it is worth is told of all words."""
    program = tiny.programs(tiny.stage("ppo", rollout={"top_k": 1}), tiny.mesh()).rollout
    policy = {"policy": tiny.weights("policy", tiny.mesh())}
    one, two = (jax.device_get(program(policy, {}, prompts, jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(one.rows.tokens, two.rows.tokens)
    assert (one.sampler_logprobs[one.rows.completion_mask] < -1e-3).all()


def test_stop_strings_cut_rows_as_if_they_had_ended_there(prompts, alone):
    """A text of tokens as words `<7>`; on four devices, whichever of them has the row."""
    lengths = alone.rows.lengths - alone.rows.prompt_lengths
    words = [f"<{completion(alone, row)[2]}>" for row in range(8) if lengths[row] > 3]
    stops = StopStrings((words[0], words[-1]), cast(Any, Words()))
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    program = programs_of(mesh, 4).rollout._replace(stops=stops)
    policy = {"policy": tiny.weights("policy", mesh)}
    found = jax.device_get(program(policy, {}, place_rows(mesh, prompts), KEY))
    num_cut = 0
    for row in range(8):
        whole, cut = completion(alone, row), completion(found, row)
        ends = [place + 1 for place, id_ in enumerate(whole) if f"<{id_}>" in stops.strings]
        assert cut == whole[: min(ends, default=None)]
        assert found.ended[row] == (bool(ends) or alone.ended[row])
        num_cut += len(cut) < len(whole)
    assert num_cut >= 2
    behind = ~found.rows.completion_mask & ~found.rows.prompt_mask
    assert (found.rows.tokens[behind] == tiny.PAD).all()
    assert not found.sampler_logprobs[~found.rows.completion_mask].any()


class Words:
    """In place of a tokenizer."""

    def decode(self, ids, **unused):
        return "".join(f"<{id_}>" for id_ in ids)


def test_order_and_neighbours_do_not_matter(prompts, alone):
    order = np.random.default_rng(0).permutation(8)
    shuffled = jax.tree.map(lambda x: x[np.argsort(order)], prompts)
    assert_same(rollout(shuffled), alone, prompts, order)
    others = tiny.prompts(seed=5)
    first_half = np.arange(8) < 4
    mixed = Prompts(
        jnp.where(first_half[:, None], prompts.tokens, others.tokens),
        jnp.where(first_half, prompts.lengths, others.lengths),
        jnp.where(first_half, prompts.index, 100 + others.index),
    )
    found = rollout(mixed)
    assert [completion(found, row) for row in range(4)] == [completion(alone, row) for row in range(4)]


def test_the_batch_size_does_not_matter(prompts, alone):
    """Twice as many rows, of which every second one only fills up."""
    wider = jax.tree.map(
        lambda x: jnp.stack([x, jnp.zeros_like(x)], axis=1).reshape(16, *x.shape[1:]), prompts
    )
    found = rollout(wider)
    assert_same(found, alone, prompts, order=range(0, 16, 2))
    np.testing.assert_array_equal(found.rows.lengths[1::2], np.zeros(8))
    assert not found.ended[1::2].any()


def test_prompt_index_and_key_do_matter(prompts, alone):
    """The tests above could not fail if they did not."""
    elsewhere = rollout(prompts._replace(index=prompts.index + 8))
    other_key = rollout(prompts, key=jax.random.key(12))
    for found in (elsewhere, other_key):
        assert sum(completion(found, row) != completion(alone, row) for row in range(8)) >= 6


def test_the_same_prompt_twice_in_the_data_order_is_completed_anew(prompts):
    twice = prompts._replace(
        tokens=jnp.broadcast_to(prompts.tokens[:1], prompts.tokens.shape),
        lengths=jnp.broadcast_to(prompts.lengths[:1], (8,)),
    )
    found = rollout(twice)
    assert len({tuple(completion(found, row)) for row in range(8)}) == 8


def test_no_key_is_used_twice():
    """Stage, iteration, use, prompt, sample and position each change the key; parents are no one's child."""
    grid = jnp.meshgrid(jnp.arange(4), jnp.arange(2), indexing="ij")
    prompt_index, sample_index = (x.ravel() for x in grid)
    collected = []

    def collect(found):
        collected.extend(map(tuple, np.asarray(jax.random.key_data(found)).reshape(-1, 2).tolist()))

    def collect_rollout(key):
        of_rows = row_keys(key, prompt_index, sample_index)
        collect(key)
        collect(of_rows)
        for position in range(5):
            collect(jax.vmap(jax.random.fold_in, in_axes=(0, None))(of_rows, position))

    for stage in range(2):
        root = keys.stage_root(0, stage)
        collect(root)
        collect(jnp.stack([keys.named(root, use) for use in ("init", "head")]))
        collect_rollout(keys.named(root, "evaluate"))
        for iteration in range(3):
            key = keys.at_iteration(root, iteration)
            collect(key)
            collect_rollout(keys.named(key, "rollout"))
            collect(keys.named(key, "update"))
            collect(jax.random.split(keys.named(key, "update"), 4))  # one for each epoch
    assert len(collected) == 2 * (1 + 2 + 49 + 3 * (1 + 49 + 1 + 4))
    assert len(set(collected)) == len(collected)


def test_a_use_without_a_name_has_no_key():
    with pytest.raises(KeyError):
        keys.named(KEY, "rollouts")


@pytest.mark.parametrize("temperature", ["0", "0.0", "-1"])
def test_temperature_zero_is_refused(tmp_path, temperature):
    """NUMERICS 7: greedy sampling has no log-probabilities to learn from."""
    config = tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"rollout\.temperature.*> 0"):
        read_command_line(["--config", str(config), "--rollout.temperature", temperature])
