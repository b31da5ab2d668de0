"""Logits of a random and of a trained Llama against transformers, whole and decoded."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import kv_cache
from rlhf_jax.models.transformer import make_model
from tests import random_llama, tiny

GOLDEN = Path(__file__).parent / "golden" / "llama.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def logits(architecture, params, tokens):
    model = make_model(architecture)
    return jax.jit(lambda params, tokens: model.logits(params, model.hidden(params["trunk"], tokens)))(
        params, jnp.asarray(tokens)
    )


def test_random_llama_has_the_logits_of_transformers(tmp_path, golden, one_device_mesh):
    architecture, params = tiny.load_policy(random_llama.write(tmp_path / "llama"), one_device_mesh)
    ours = logits(architecture, params, golden["tokens"])
    np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=1e-5)


def test_trained_llama_has_the_logits_of_transformers(test_data, golden, one_device_mesh):
    architecture, params = tiny.load_policy(test_data / "tinystories656k", one_device_mesh)
    ours = np.asarray(logits(architecture, params, golden["story_tokens"]))[0]
    np.testing.assert_allclose(ours[:, golden["story_columns"]], golden["story_logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), golden["story_argmax"])


def test_trained_llama_decodes_the_logits_of_transformers(test_data, golden, one_device_mesh):
    architecture, params = tiny.load_policy(test_data / "tinystories656k", one_device_mesh)
    story, columns = golden["story_tokens"][0], golden["story_columns"]
    weights = kv_cache.unstack(params, architecture, "float32")
    prompt = jnp.asarray(story[None, :6])
    step, logits_of = jax.jit(kv_cache.decode_step), jax.jit(kv_cache.decode_logits)
    hidden, prompts = jax.jit(kv_cache.prefill)(weights, prompt, jnp.asarray([6]))
    cache = kv_cache.with_room(prompts, len(story) - 6)
    for number, token in enumerate(story[6:]):
        got = logits_of(weights, hidden)[0, columns]
        np.testing.assert_allclose(got, golden["story_logits"][5 + number], rtol=0, atol=1e-4)
        hidden, cache = step(weights, cache, jnp.asarray([token]), jnp.asarray([number + 1]))
