"""The forward pass and its cached twin: causality, padding, remat, types, decoding, initialisation."""

from __future__ import annotations

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelConfig
from rlhf_jax.models.architecture import Architecture, RopeScaling
from rlhf_jax.models.blocks import INIT_STD
from rlhf_jax.models.families import from_hf, to_hf
from rlhf_jax.models.kv_cache import decode_logits, decode_step, prefill, unstack, with_room
from rlhf_jax.models.rope import rotate, rotation
from rlhf_jax.models.transformer import MOST_UNROLLED, blocks_per_turn, make_model

ARCHITECTURE = Architecture(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=24,
    context_length=24,
    rope_theta=100.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
UNTIED = dataclasses.replace(ARCHITECTURE, tie_embeddings=False)
BEFORE_FAMILIES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"),
    *("context_length", "rope_theta", "norm_eps", "tie_embeddings"),
)


@cache
def make_params(architecture):
    """Returns parameters whose matrices are large enough for tokens and positions to matter."""
    params = jax.jit(make_model(architecture).init_policy)(jax.random.key(0))
    return jax.tree.map_with_path(lambda path, x: x if path[-1].key == "scale" else 8.0 * x, params)


# Not op by op, which is slow.


@partial(jax.jit, static_argnums=3)
def run_prefill(weights, tokens, lengths, num_steps):
    hidden, prompts = prefill(weights, tokens, lengths)
    return hidden, with_room(prompts, num_steps)


run_step = jax.jit(decode_step)
run_logits = jax.jit(decode_logits)


def make_tokens(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, ARCHITECTURE.vocab_size)


def forward(architecture, params, tokens, **options):
    model = make_model(architecture, **options)
    return jax.jit(lambda params, tokens: model.logits(params, model.hidden(params["trunk"], tokens)))(
        params, tokens
    )


# Rows


def test_sequences_that_share_a_row_do_not_see_each_other():
    params, model = make_params(ARCHITECTURE), make_model(ARCHITECTURE)
    first, second = make_tokens(1, 5), make_tokens(1, 7, seed=2)
    hidden = jax.jit(model.hidden)
    packed = hidden(
        params["trunk"],
        jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1),
        jnp.asarray([[*range(5), *range(7), 0, 1]]),
        jnp.asarray([[0] * 5 + [1] * 7 + [2] * 2]),
    )
    np.testing.assert_allclose(packed[:, :5], hidden(params["trunk"], first), rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:12], hidden(params["trunk"], second), rtol=0, atol=1e-5)


def test_no_column_sees_a_later_token():
    params = make_params(ARCHITECTURE)
    model = make_model(ARCHITECTURE)
    tokens = make_tokens(1, 8)
    column = 4

    def state(embedding):
        # One vector for each place, so that the gradient tells places apart.
        trunk = params["trunk"] | {"embed": {"embedding": embedding}}
        return jnp.vdot(model.hidden(trunk, jnp.arange(8)[None])[0, column], jnp.arange(16.0))

    gradient = jax.jit(jax.grad(state))(params["trunk"]["embed"]["embedding"][tokens[0]])
    reach = np.abs(gradient).max(axis=1)
    assert (reach[: column + 1] > 1e-3).all()
    assert (reach[column + 1 :] == 0).all()


def test_what_stands_in_the_padding_changes_nothing():
    params, tokens = make_params(ARCHITECTURE), make_tokens(2, 12)
    other = tokens.at[:, 7:].set(make_tokens(2, 5, seed=2))
    whole, changed = forward(ARCHITECTURE, params, tokens), forward(ARCHITECTURE, params, other)
    np.testing.assert_array_equal(whole[:, :7], changed[:, :7])
    np.testing.assert_allclose(forward(ARCHITECTURE, params, tokens[:, :7]), whole[:, :7], atol=1e-5)


def test_a_row_does_not_know_its_neighbours():
    params, tokens = make_params(ARCHITECTURE), make_tokens(3, 9)
    whole = forward(ARCHITECTURE, params, tokens)
    np.testing.assert_allclose(forward(ARCHITECTURE, params, tokens[::-1])[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(forward(ARCHITECTURE, params, tokens[1:2]), whole[1:2], atol=1e-5)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="rows of 25 tokens do not fit the model's context length of 24"):
        forward(ARCHITECTURE, make_params(ARCHITECTURE), make_tokens(1, 25))


# Positions


def test_rotation_turns_pairs_by_position_times_frequency():
    # head_dim 4, theta 100: frequencies 1 and 1/10; the pairs are (0, 2) and (1, 3).
    turn = rotation(dataclasses.replace(ARCHITECTURE, head_dim=4), jnp.asarray([0, 3]))
    x = jnp.asarray([[1.0, 0.0, 0.0, 2.0]])
    turned = rotate(jnp.stack([x, x])[None], turn)[0, :, 0]
    np.testing.assert_allclose(turned[0], [1.0, 0.0, 0.0, 2.0])
    expected = [np.cos(3.0), -2.0 * np.sin(0.3), np.sin(3.0), 2.0 * np.cos(0.3)]
    np.testing.assert_allclose(turned[1], expected, rtol=1e-6)


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "offload"},
        {"unroll": 1},
        {"unroll": 2, "remat": "full"},
    ],
    ids=str,
)
def test_remat_and_unrolling_change_no_gradient(options):
    params, tokens = make_params(ARCHITECTURE), make_tokens(2, 8)

    def gradient(options):
        model = make_model(ARCHITECTURE, **options)
        return jax.jit(jax.grad(lambda trunk: jnp.sum(model.hidden(trunk, tokens)[..., 0] ** 2)))(
            params["trunk"]
        )

    for ours, plain in zip(jax.tree.leaves(gradient(options)), jax.tree.leaves(gradient({})), strict=True):
        assert np.linalg.norm(ours - plain) <= 1e-5 * np.linalg.norm(plain)
        assert np.linalg.norm(plain) > 0


@pytest.mark.parametrize(("unroll", "barriers"), [(1, False), (2, True)])
def test_recomputed_blocks_are_kept_apart_where_no_loop_does(unroll, barriers):
    params, tokens = make_params(ARCHITECTURE), make_tokens(2, 8)
    model = make_model(ARCHITECTURE, remat="full", unroll=unroll)
    gradient = jax.jit(jax.grad(lambda trunk: jnp.sum(model.hidden(trunk, tokens)[..., 0] ** 2)))
    assert ARCHITECTURE.num_layers == 2
    assert ("optimization_barrier" in gradient.lower(params["trunk"]).as_text()) == barriers


def test_blocks_are_unrolled_on_a_cpu_unless_many_or_recomputed():
    assert blocks_per_turn(MOST_UNROLLED, "none") == MOST_UNROLLED
    assert blocks_per_turn(MOST_UNROLLED + 1, "none") == blocks_per_turn(2, "full") == 1


def test_bfloat16_activations_give_float32_logits():
    params, tokens = make_params(UNTIED), make_tokens(2, 8)
    model = make_model(UNTIED, dtype="bfloat16")
    assert jax.eval_shape(model.hidden, params["trunk"], tokens).dtype == jnp.bfloat16
    logits = forward(UNTIED, params, tokens, dtype="bfloat16")
    assert logits.dtype == jnp.float32
    plain = forward(UNTIED, params, tokens)
    assert np.abs(logits - plain).max() < 0.05 * np.abs(plain).max()


# Decoding


@pytest.mark.parametrize("architecture", [ARCHITECTURE, UNTIED], ids=["tied", "untied"])
def test_cached_decoding_equals_the_full_forward(architecture):
    prompt_size, num_steps = 8, 6
    lengths = jnp.asarray([1, 3, 8, 5])
    tokens = make_tokens(4, prompt_size + num_steps)
    params = make_params(architecture)
    expected = forward(architecture, params, tokens)
    rows = jnp.arange(4)

    weights = unstack(params, architecture, "float32")
    # Behind the prompt stands the completion itself: the cache must not see it there.
    hidden, cache = run_prefill(weights, tokens[:, :prompt_size], lengths, num_steps)
    for number in range(num_steps + 1):
        got = run_logits(weights, hidden)
        np.testing.assert_allclose(got, expected[rows, lengths - 1 + number], rtol=0, atol=1e-5)
        if number < num_steps:
            hidden, cache = run_step(weights, cache, tokens[rows, lengths + number], jnp.full(4, number + 1))


def test_a_filling_row_decodes_finite_numbers():
    weights = unstack(make_params(ARCHITECTURE), ARCHITECTURE, "float32")
    hidden, cache = run_prefill(weights, make_tokens(2, 4), jnp.asarray([0, 4]), 3)
    assert np.isfinite(hidden).all()
    hidden, _ = run_step(weights, cache, jnp.asarray([5, 5]), jnp.ones(2, jnp.int32))
    assert np.isfinite(run_logits(weights, hidden)).all()


def test_decoding_in_bfloat16_keeps_its_cache_in_bfloat16():
    weights = unstack(make_params(ARCHITECTURE), ARCHITECTURE, "bfloat16")
    hidden, cache = run_prefill(weights, make_tokens(2, 4), jnp.asarray([2, 4]), 3)
    again, later = run_step(weights, cache, jnp.asarray([5, 5]), jnp.ones(2, jnp.int32))
    assert {array.dtype for array in (hidden, again, *later.prompt.k, *later.k, *later.v)} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert jax.tree.map(jnp.shape, later) == jax.tree.map(jnp.shape, cache)
    assert decode_logits(weights, again).dtype == jnp.float32


def test_unstacking_leaves_the_parameters_as_they_are():
    params = make_params(ARCHITECTURE)
    unstack(params, ARCHITECTURE, "float32")
    assert "layers" in params["trunk"]


# Parameters


def test_parameters_are_a_pure_dict_of_the_agreed_form():
    params = jax.jit(make_model(UNTIED).init_policy)(jax.random.key(0))
    assert params["trunk"].keys() == {"embed", "layers", "final_norm"}
    assert params["lm_head"]["kernel"].shape == (16, 32)
    assert params["trunk"]["embed"]["embedding"].shape == (32, 16)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["trunk"]["layers"])} == {2}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert "lm_head" not in make_model(ARCHITECTURE).policy_shapes


@pytest.mark.parametrize("architecture", [ARCHITECTURE, UNTIED], ids=["tied", "untied"])
def test_axes_and_shapes_describe_the_parameters(architecture):
    model = make_model(architecture)
    params = make_params(architecture)
    ranks = jax.tree.map(len, model.policy_axes, is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(jnp.ndim, params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), model.policy_shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )


def test_fresh_parameters_depend_on_the_key_alone_and_differ_from_each_other():
    model = make_model(dataclasses.replace(UNTIED, hidden_size=64, vocab_size=64, num_layers=8))
    init = jax.jit(model.init_policy)
    params, again, other = init(jax.random.key(3)), init(jax.random.key(3)), init(jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["lm_head"]["kernel"], other["lm_head"]["kernel"])
    layers = params["trunk"]["layers"]
    assert not np.array_equal(layers["attention"]["q"][0], layers["attention"]["q"][1])
    assert not np.array_equal(layers["mlp"]["gate"], layers["mlp"]["up"])
    np.testing.assert_allclose(np.std(layers["attention"]["q"]), INIT_STD, rtol=0.05)
    np.testing.assert_allclose(np.std(layers["mlp"]["down"]), INIT_STD / 4, rtol=0.05)  # 1 / sqrt(2 * 8)


# Architecture


def test_an_architecture_survives_json():
    scaling = RopeScaling(kind="longrope", original_context=8, short_factors=(1.0, 2.0, 3.0))
    for architecture in (UNTIED, dataclasses.replace(UNTIED, windows=(4, 0), rope_scaling=scaling)):
        assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_an_architecture_written_before_there_were_families_is_a_llama():
    facts = {name: UNTIED.to_dict()[name] for name in BEFORE_FAMILIES}
    assert Architecture.from_dict(facts) == UNTIED


def test_a_dictionary_that_is_no_architecture_is_refused():
    facts = UNTIED.to_dict() | {"num_towers": 4}
    del facts["head_dim"]
    with pytest.raises(ValueError, match=r"missing \['head_dim'\], unknown \['num_towers'\]"):
        Architecture.from_dict(facts)


def test_a_model_section_makes_an_architecture():
    section = ModelConfig(hidden_size=48, num_heads=4, num_kv_heads=2)
    architecture = Architecture.from_config(section, vocab_size=300)
    assert (architecture.head_dim, architecture.vocab_size, architecture.num_kv_heads) == (12, 300, 2)
    with pytest.raises(ValueError, match=r"model\.num_heads 5 does not divide model\.hidden_size 48"):
        Architecture.from_config(dataclasses.replace(section, num_heads=5), vocab_size=300)
    with pytest.raises(ValueError, match="num_kv_heads 3 does not divide num_heads 4"):
        Architecture.from_config(dataclasses.replace(section, num_kv_heads=3), vocab_size=300)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm": "batch"}, "norm is 'batch'; it must be one of rms, layer"),
        ({"windows": (4,)}, r"windows are \(4,\); they must be 2 numbers, 0 or more"),
        ({"windows": ("4", 0)}, "it must be of type tuple"),
        ({"unrotated_layers": (2,)}, r"unrotated_layers \(2,\) are not all among the layers"),
        ({"rotary_fraction": 0.5}, "makes 3 of the 6 dimensions of a head turn; it must be an even number"),
        ({"num_experts": 4}, "experts_per_token is 0; it must be from 1 to 4"),
        ({"attention_softcap": -1.0}, "attention_softcap is -1.0; it must be zero or positive"),
        ({"rope_scaling": RopeScaling(kind="yarn", factor=2.0)}, "a positive factor and original_context"),
        (
            {"rope_scaling": RopeScaling(kind="longrope", original_context=8, short_factors=(1.0,))},
            "has 1 short factors; it must have one for each of the 3 frequencies",
        ),
    ],
)
def test_facts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UNTIED, **change)


def test_all_impossible_numbers_are_named():
    with pytest.raises(ValueError, match="num_layers is 0; it must be positive; norm_eps is nan; it must be"):
        dataclasses.replace(UNTIED, num_layers=0, norm_eps=float("nan"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a positive integer"),
        ({"num_attention_heads": "2"}, "num_attention_heads is '2'; it must be a positive integer"),
        ({"hidden_size": True}, "hidden_size is True; it must be a positive integer"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be a mapping"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'; it must be a number"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]; it must be a number"),
    ],
)
def test_a_config_json_of_other_types_is_refused(change, message):
    config = to_hf(UNTIED)
    del config["rope_parameters"]
    with pytest.raises(ValueError, match=message):
        from_hf(config | change)


def test_a_rope_theta_that_is_null_is_the_default():
    assert from_hf(to_hf(UNTIED) | {"rope_parameters": None, "rope_theta": None}).rope_theta == 1e4
