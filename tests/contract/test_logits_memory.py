"""No compiled program has the logits of all tokens at once, nor sends the vocabulary: NUMERICS 32.

Sizes are primes, times the mesh's axes, so that an array's number of elements says what it is made of, also
flattened: what holds logits has a multiple of V elements, and so many tokens as the rest of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.batch import PolicyBatch, Prompts, Rollout, Rows
from rlhf_jax.lowering import rollout_calls
from rlhf_jax.models.transformer import make_model
from rlhf_jax.online_config import OnlineConfig, ShapedRewardConfig
from rlhf_jax.programs import TokenIds, build_programs
from rlhf_jax.role_parts import role_shardings
from rlhf_jax.sharding import batch_sharding
from tests import hlo, tiny

B, T, C, V, D = 7, 23, 13, 241, 11
CHUNK = 2 * B  # more than D, so that weights have fewer rows of V than this
FLOATS = ("f32", "bf16", "f16", "f64")
PROGRAMS = [
    ("sft", "update"),
    pytest.param("reward_model", "update", marks=pytest.mark.slow),
    pytest.param("ppo", "score", marks=pytest.mark.slow),
    ("ppo", "update"),
    pytest.param("trpo", "update", marks=pytest.mark.slow),
    pytest.param("distill", "update", marks=pytest.mark.slow),
]


def compiled(name: str, program: str, chunk: int, layout: dict[str, int] | None = None, **over: int):
    """Returns a program of an algorithm, compiled for a mesh on whose devices the sizes are those above.

    The layout is settings of ppo.
    """
    tensor, sequence, fsdp = (over.get(axis, 1) for axis in ("tensor", "sequence", "fsdp"))
    num_rows, length = B * over.get("data", 1) * fsdp, T * sequence
    architecture = dataclasses.replace(
        tiny.ARCHITECTURE,
        vocab_size=V * tensor,
        hidden_size=D * fsdp,
        num_layers=1,
        num_heads=2 * tensor,
        num_kv_heads=2 * tensor,
        mlp_size=5 * tensor,
        context_length=2 * length,
        tie_embeddings=False,
    )
    model, mesh = make_model(architecture), tiny.mesh(**over)
    algorithm = ALGORITHMS[name]
    records = num_rows // algorithm.rows_per_record if num_rows % 2 == 0 else num_rows
    num_rows = records * algorithm.rows_per_record
    settings = (
        {"batch_size": records}
        | ({"num_minibatches": 1} if issubclass(ALGORITHM_SECTIONS[name], OnlineConfig) else {})
        | (layout or {})
    )
    stage = tiny.stage(name, settings=settings, model={"logprob_chunk": chunk * over.get("data", 1) * fsdp})
    teacher = model if name == "distill" else None
    ids = TokenIds(1, 1)
    programs = build_programs(stage, algorithm, model, mesh, C * sequence, ids, teacher=teacher)

    def placed(tree: Any, at: Any) -> Any:
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, at)

    def rows_of(tree: Any) -> Any:
        return placed(tree, jax.tree.map(lambda _: batch_sharding(mesh), tree))

    def roles(names: tuple[str, ...]) -> Any:
        shapes = {r: model.score_shapes if r in ("value", "reward") else model.policy_shapes for r in names}
        return placed(shapes, {role: role_shardings(model, mesh, role) for role in names})

    integers, numbers = jnp.zeros((num_rows,), jnp.int32), jnp.zeros((num_rows, length), jnp.float32)
    rows = Rows(jnp.zeros((num_rows, length), jnp.int32), integers, integers)
    read = ("teacher",) if teacher else algorithm.reads(stage.settings)
    trained, frozen = roles(algorithm.trains), roles(read)
    key = jax.random.key(0)
    if program == "rollout":
        prompts = Prompts(jnp.zeros((num_rows, 5), jnp.int32), integers, integers)
        calls, _ = rollout_calls(programs, model, mesh, trained, frozen, rows_of(prompts))
        return calls["rollout"].lower().compile()
    if program == "score":
        rollout = Rollout(rows, jnp.zeros((num_rows,), bool), numbers)
        return programs.score.lower(trained, frozen, rows_of(rollout)).compile()
    state = cast(Any, programs.init_state).eval_shape(trained)
    has_advantages = issubclass(ALGORITHM_SECTIONS[name], ShapedRewardConfig)
    batch = PolicyBatch(rows, rows.completion_mask, *[numbers] * 5) if has_advantages else rows
    return programs.update.lower(state, frozen, rows_of(batch), key).compile()


def logits_of(program, limit: int = CHUNK) -> set[hlo.Made]:
    """Returns the arrays that hold logits of more tokens than that."""
    floats = {made for made in hlo.arrays(program) if made.dtype in FLOATS}
    assert any(made.size % V == 0 for made in floats)  # shapes are read at all
    return {made for made in floats if made.size % V == 0 and made.size // V > limit}


@pytest.mark.parametrize(("name", "program"), PROGRAMS)
def test_logits_exist_in_chunks(name, program):
    chunked = compiled(name, program, CHUNK)
    assert logits_of(chunked) == set()
    assert max(made.size for made in hlo.arrays(chunked)) < B * C * V


def test_without_chunks_all_logits_are_found():
    """The test above could not fail if they were not."""
    found = logits_of(compiled("sft", "update", 0))
    assert any(made.size == B * C * V for made in found)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["score", "update"])
def test_the_head_of_packed_rows_sees_completions_alone(program):
    packed = compiled("ppo", program, 0, {"sequences_per_row": B, "length_buckets": 2})
    assert logits_of(packed, B * C) == set()
    assert logits_of(packed, B * C - 1)  # of the widest rows


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 4, "sequence": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize(("name", "program"), [("sft", "update"), ("ppo", "score"), ("ppo", "update")])
def test_on_a_mesh_nothing_has_the_whole_vocabulary(name, program, sizes):
    chunked = compiled(name, program, CHUNK, **sizes)
    assert logits_of(chunked, max(CHUNK, D * sizes.get("fsdp", 1))) == set()  # weights are gathered over fsdp
    assert all(V * sizes["tensor"] not in made.shape for made in hlo.arrays(chunked))


@pytest.mark.slow
def test_decoding_gathers_no_weights():
    """The logits of a step's B tokens are, in whole blocks: the sampler reads them at random."""
    rollout = compiled("ppo", "rollout", CHUNK, tensor=4)
    sent = max(made.size for made in hlo.communicated(rollout))
    assert sent <= B * 1024 < D * V * 4
