"""Small real parts that tests share: a stage's configuration, a mesh, parameters of every role, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import algo_config, config, online_config
from rlhf_jax.algos.algorithm import Algorithm
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import JudgedRows, Params, Prompts, Rows, UnpairedRows
from rlhf_jax.models import hf
from rlhf_jax.models.architecture import Architecture
from rlhf_jax.models.heads import Ensemble, init_score_head
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.origins import adapters_of
from rlhf_jax.programs import Programs, TokenIds, build_programs
from rlhf_jax.role_parts import part_shardings, role_parts, role_shardings
from rlhf_jax.sharding import make_mesh, param_shardings

ARCHITECTURE = Architecture(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,  # divides over four devices
    head_dim=4,
    mlp_size=48,
    context_length=48,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
TEACHER = dataclasses.replace(
    ARCHITECTURE, hidden_size=48, num_layers=1, num_heads=4, head_dim=8, mlp_size=64, tie_embeddings=False
)
"""Of distill: another model than the policy."""
MESHES = [
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"tensor": 4, "sequence": 2}, marks=pytest.mark.slow),
]
"""The meshes on which everything is as on one device."""
EOS, PAD = 1, 1  # the same: no mask may come from ids


def stage(algorithm: str, sharing: str = "separate", **sections: dict[str, Any]) -> config.StageConfig:
    """Returns a stage with small defaults; `settings` and other sections take overrides.

    `sharing` is model.sharing of an online stage; or `lora`: adapters of an sft or reward_model stage.
    """
    if sharing in ("hydra", "lora"):
        sections["lora"] = {"rank": 3, "alpha": 6.0} | sections.pop("lora", {})
    if issubclass(algo_config.ALGORITHM_SECTIONS[algorithm], online_config.OnlineConfig):
        sections["model"] = {"sharing": sharing} | sections.pop("model", {})
    settings = {"batch_size": 8} | sections.pop("settings", {})
    fixed = {"rollout": {"max_new_tokens": 8}, "optimizer": {"learning_rate": 1e-3}, "mesh": {"data": 1}}
    classes = {field.name: field.type for field in dataclasses.fields(config.StageConfig)}
    made = {}
    for name in classes.keys() - {"name", "algorithm", *config.SOURCES.values(), "settings", "run"}:
        cls = getattr(config, classes[name])
        made[name] = cls(**(fixed.get(name, {}) | sections.pop(name, {})))
    assert not sections, sections
    return config.StageConfig(
        name=algorithm,
        algorithm=algorithm,
        start_from="",
        reward_from="",
        settings=algo_config.ALGORITHM_SECTIONS[algorithm](**settings),
        run=config.RunConfig(dir="unused"),
        **made,
    )


def mesh(**sizes: int) -> Mesh:
    """Returns a mesh of the first devices; one by default."""
    sizes = {"data": 1} | sizes
    return make_mesh(config.MeshConfig(**sizes), devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def model(of: config.StageConfig | None = None) -> Model:
    """Returns the tiny transformer, with the adapters and score heads of a stage."""
    if of is None:
        return make_model(ARCHITECTURE)
    ensemble = Ensemble(getattr(of.settings, "num_heads", 1))
    return make_model(ARCHITECTURE, lora=adapters_of(of, ARCHITECTURE), ensemble=ensemble)


def adapter(of: config.StageConfig, on: Mesh, seed: int = 0) -> Params:
    """Returns an adapter as after some training: b is not zero."""
    made = model(of)
    shapes, structure = jax.tree.flatten(made.shapes["adapter"])
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    leaves = [0.05 * jax.random.normal(key, shape.shape) for key, shape in zip(keys, shapes, strict=True)]
    return jax.device_put(
        jax.tree.unflatten(structure, leaves), part_shardings(made, on, ["adapter"])["adapter"]
    )


def weights(role: str, on: Mesh, seed: int = 0, num_heads: int = 1) -> Params:
    """Returns fresh parameters of a role, the same on any mesh; heads are not zero, so that values differ."""
    params = model().init_policy(jax.random.key(seed))
    # Far enough from uniform to tell tokens apart.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    if role in ("value", "reward"):
        head = init_score_head(jax.random.key(seed + 9), 32, num_heads)
        params = {"trunk": params["trunk"], "score_head": head}
    of = make_model(ARCHITECTURE, ensemble=Ensemble(num_heads))
    return jax.device_put(params, role_shardings(of, on, role))


def load_policy(directory: Path, on: Mesh) -> tuple[Architecture, Params]:
    """Returns the policy of a Hugging Face directory."""
    architecture = hf.read_architecture(directory)
    model = make_model(architecture)
    shardings = param_shardings(on, model.policy_axes, model.policy_shapes)
    return architecture, hf.load_policy(directory, architecture, shardings)


def roles(algorithm: str, on: Mesh, sharing: str = "separate", num_heads: int = 1) -> tuple[Params, Params]:
    """Returns (trained, frozen) of an algorithm; the reference differs from the policy, as after a while."""
    seeds = {"policy": 0, "reference": 1, "value": 2, "reward": 3, "base": 4}
    spec, of = ALGORITHMS[algorithm], stage(algorithm, sharing)

    def tree(role: str, parts: tuple[str, ...]) -> Params:
        whole = weights(role, on, seeds[role], num_heads)
        if "adapter" in parts:
            whole["adapter"] = adapter(of, on, seeds[role])
        return {part: whole[part] for part in parts if part in whole}

    every = {role: tree(role, parts) for role, parts in role_parts(of, spec).items()}
    trained = {role: every.pop(role) for role in spec.trains}
    if taught(of):
        params = jax.tree.map(lambda x: 3 * x, make_model(TEACHER).init_policy(jax.random.key(5)))
        every["teacher"] = jax.device_put(params, role_shardings(make_model(TEACHER), on, "policy"))
    return trained, every


def taught(of: config.StageConfig) -> Model | None:
    """Returns the teacher of a stage; None where it has none."""
    return make_model(TEACHER) if isinstance(of.settings, online_config.DistillConfig) else None


def programs(
    of: config.StageConfig,
    on: Mesh,
    num_completion: int = 8,
    prompt_length: int = 8,
    algorithm: Algorithm | None = None,
) -> Programs:
    """Returns the stage's programs."""
    ids, algorithm = TokenIds(EOS, PAD), algorithm or ALGORITHMS[of.algorithm]
    return build_programs(
        of,
        algorithm,
        model(of),
        on,
        num_completion,
        ids,
        prompt_length,
        num_demonstrated=num_completion,
        teacher=taught(of),
    )


def rows(num_rows: int = 8, length: int = 16, seed: int = 0) -> Rows:
    """Returns rows with prompts of 1 to 8 tokens and completions of 1 to 8; padding is random tokens."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, 9, num_rows)
    lengths = prompt_lengths + rng.integers(1, 9, num_rows)
    tokens = rng.integers(2, 64, (num_rows, length))
    return Rows(jnp.asarray(tokens, jnp.int32), jnp.asarray(prompt_lengths), jnp.asarray(lengths))


def unpaired(of: Rows) -> UnpairedRows:
    """Returns completions, most of them good, and others beside them whose mean log ratio is above 0."""
    other = rows(*of.tokens.shape, seed=1)
    return UnpairedRows(of, other, jnp.arange(len(of.lengths)) % 3 > 0)


def packed(batch: Any, groups: Sequence[Sequence[int]], length: int) -> Any:
    """Returns a batch of one-sequence rows with those of a group behind each other in one row.

    What no sequence covers is poison: large tokens, large numbers, true masks.

    Args:
        batch: Rows, or what has `rows` and further arrays: of JudgedRows and UnpairedRows per sequence, of
            others per token.
        groups: for each new row the rows that it holds; none makes an empty row.
        length: of the new rows.
    """
    rows = batch if isinstance(batch, Rows) else batch.rows
    old_lengths = np.asarray(rows.lengths)

    def of_sequence(x: Array) -> Array:
        made = np.zeros((len(groups), max(map(len, groups)), *x.shape[1:]), x.dtype)
        for new, group in enumerate(groups):
            made[new, : len(group)] = np.asarray(x)[list(group)]
        return jnp.asarray(made)

    def of_token(x: Array) -> Array:
        poison = {"b": True, "i": 63, "f": 1e6}[np.asarray(x).dtype.kind]
        made = np.full((len(groups), length), poison, x.dtype)
        for new, group in enumerate(groups):
            parts = [np.asarray(x)[old, : old_lengths[old]] for old in group]
            together = np.concatenate([*parts, np.zeros(0, x.dtype)])
            made[new, : len(together)] = together
        return jnp.asarray(made)

    if isinstance(batch, UnpairedRows):
        of_groups = (packed(of, groups, length) for of in (batch.rows, batch.mismatched))
        return UnpairedRows(*of_groups, of_sequence(batch.is_desirable) == 1)
    made = Rows(
        of_token(rows.tokens),
        of_sequence(rows.prompt_lengths),
        of_sequence(rows.lengths),
        None if rows.excluded is None else of_token(rows.excluded),
        None if rows.ref_logprobs is None else of_sequence(rows.ref_logprobs),
    )
    if isinstance(batch, Rows):
        return made
    others = {name: getattr(batch, name) for name in batch._fields if name != "rows"}
    of_one = of_sequence if isinstance(batch, JudgedRows) else of_token
    others = {
        name: packed(x, groups, length) if isinstance(x, Rows) else of_one(x)
        for name, x in others.items()
        if x is not None
    }
    if "completion_mask" in others:
        others["completion_mask"] &= made.completion_mask  # a batch is made with a mask that fits its rows
    return batch._replace(rows=made, **others)


def prompts(num_rows: int = 8, length: int = 8, seed: int = 0) -> Prompts:
    """Returns prompts of 1 to `length` tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 64, (num_rows, length))
    lengths = rng.integers(1, length + 1, num_rows)
    return Prompts(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths), jnp.arange(num_rows, dtype=jnp.int32)
    )


def relative_difference(a: Any, b: Any) -> float:
    """Returns the largest ||a - b|| / ||b|| over the leaves of two trees."""
    leaves = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return max(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)) for x, y in leaves)
