"""An exported policy is the same model in transformers: its greedy text there is ours here."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from rlhf_jax.config import TokenizerConfig
from rlhf_jax.data.collate import collate_prompts
from rlhf_jax.data.tokenizer import encode_prompts, load_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.sharding import param_shardings
from tests.parity.make_export_golden import GOLDEN, NEW_TOKENS, PROMPTS, digest, export


def test_greedy_text_of_the_export_equals_transformers(test_data, one_device_mesh, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_TEST_DATA", str(test_data))
    export(tmp_path)
    golden = np.load(GOLDEN)
    assert digest(load_file(tmp_path / "model.safetensors")) == str(golden["digest"])

    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    architecture = hf.read_architecture(tmp_path)
    model = make_model(architecture)
    shardings = param_shardings(one_device_mesh, model.policy_axes, model.policy_shapes)
    policy = hf.load_policy(tmp_path, architecture, shardings)
    ids = encode_prompts(tokenizer, list(PROMPTS))
    prompts = collate_prompts(ids, range(len(ids)), max(map(len, ids)), tokenizer.pad_token_id, len(ids))
    rollout = generate(
        model,
        policy,
        prompts,
        jax.random.key(0),
        Sampling(1.0, stop_ids=jnp.asarray([tokenizer.eos_token_id])),
        max_new_tokens=NEW_TOKENS,
        greedy=True,
        pad_id=tokenizer.pad_token_id,
    )
    rows = jax.device_get(rollout.rows)
    for row, expected in enumerate(golden["completions"]):
        found = rows.tokens[row, rows.prompt_lengths[row] : rows.lengths[row]]
        np.testing.assert_array_equal(found, expected[expected >= 0])
