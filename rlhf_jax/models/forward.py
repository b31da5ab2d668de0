"""What algorithms see of the models: pure callables of parameters and rows. Role routing lives here alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.batch import Params, Rows
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.ops.divergence import Comparison, compare_logits
from rlhf_jax.ops.logprobs import (
    Columns,
    contiguous_columns,
    fisher_of_logits,
    gather_predictors,
    gather_targets,
    in_chunks,
    kl_of_logits,
    logprobs_of_logits,
    masked_columns,
    put_columns,
    token_logprobs,
)

ROLES = ("policy", "reference", "value", "reward")
RoleFunction = Callable[[Params, Params, Rows], Array]


class Said(NamedTuple):
    """What each role says of rows."""

    logprobs: Array  # f32[B, T], of the policy
    ref_logprobs: Array | None  # f32[B, T]; this one and the next: None where there is no such role
    values: Array | None  # f32[B, T]
    scores: Array | None  # f32[B]


class Forward(NamedTuple):
    """Forward passes by role; each takes the trained parameters, the frozen ones, and the rows.

    A role is looked up among the trained parameters first. What its tree lacks of a model is the frozen
    base's, or, of a value head alone, the policy's. Per-token results are [B, T], zero outside the
    completion.
    """

    logprobs: Callable[[Params, Params, Rows], tuple[Array, Array]]
    """Of the policy: log-probabilities f32[B, T] in nats, entropies f32[B, T] in nats."""
    ref_logprobs: RoleFunction
    """Of the reference, f32[B, T]."""
    values: RoleFunction
    """Of the value model, f32[B, T]; column t is the state before token t."""
    scores: RoleFunction
    """Of the reward model, at the last real token of each sequence: f32[B], packed f32[B * S]."""
    policy_and_value: Callable[[Params, Params, Rows], tuple[Array, Array, Array]]
    """Log-probabilities, entropies, values: in one pass where policy and values are on one trunk."""
    score_all: Callable[[Params, Params, Rows], Said]
    """Of all roles, in one pass of those that are on one trunk."""
    with_columns: Callable[[int], Forward] | None = None
    """The same forward passes for rows of at most so many completion tokens."""
    longest: int = 1
    """The most completion tokens of a sequence."""
    role_logprobs: Callable[[Sequence[str], Params, Params, Rows], tuple[Array, ...]] | None = None
    """Of each of these roles, policy or reference, f32[B, T], without entropies: in one pass of those on one
    trunk."""
    head_scores: RoleFunction | None = None
    """Of each head of the reward model, f32[H, B], packed f32[H, B * S]."""
    demonstration_logprobs: RoleFunction | None = None
    """Of the policy on demonstrations, which nothing has sampled: f32[B, T] at temperature 1."""
    policy_change: Callable[[Params, Params, Params, Rows], tuple[Array, Array, Array]] | None = None
    """policy_change(params, old_params, frozen, rows): log-probabilities by the policy and by the old one,
    and the exact KL(old || new) of each token's distribution over the vocabulary; all f32[B, T], in nats."""
    fisher: Callable[[Params, Params, Params, Rows], Array] | None = None
    """fisher(params, tangents, frozen, rows): f32[B, T], how far a change of the policy's parameters, a tree
    like these, moves the distribution of each token: the squared norm of the change of its logits, by forward
    mode, in the metric of `fisher_of_logits`. Half its gradient with respect to the tangents is their product
    with the Fisher matrix, by Gauss and Newton."""
    compare: Callable[[Params, Params, Rows, float], Comparison] | None = None
    """compare(params, frozen, rows, beta): policy and teacher, over the words that both have; None where
    there is no teacher."""


def make_forward(
    model: Model,
    num_completion: int,
    temperature: float = 1.0,
    logprob_chunk: int = 0,
    longest: int = 0,
    num_demonstrated: int = 0,
    teacher: Model | None = None,
) -> Forward:
    """Returns the forward passes of a model.

    Args:
        model: the transformer's pure functions.
        num_completion: C, the static maximum of completion tokens of a row; the LM head runs on C columns.
        temperature: divides the logits of policy, reference and teacher.
        logprob_chunk: tokens whose logits exist at once; 0: all.
        longest: the most completion tokens of a sequence, where rows hold several; 0: of a row.
        num_demonstrated: C of rows of demonstrations; 0: there are none.
        teacher: of the frozen role `teacher`, which is always a whole policy; with the model's tokenizer, but
            its embeddings may be padded to another number. A token that it lacks is to it its last one.
    """
    longest = longest or num_completion

    def inputs(rows: Rows) -> tuple[Array, ...]:
        return (rows.tokens, rows.positions, rows.segments) if rows.is_packed else (rows.tokens,)

    def states(roles: Sequence[str], params: Params, frozen: Params, rows: Rows) -> dict[str, Array]:
        """Returns the hidden states [B, T, D] of each role; those on one trunk go through it together."""
        trees, where = frozen | params, inputs(rows)
        passes: dict[str, dict[str, Params | None]] = {}  # whose trunk -> whose adapter
        place: dict[str, tuple[str, str]] = {}
        for role in roles:
            holder, adapter = _trunk_of(role, trees), trees.get(role, {}).get("adapter")
            place[role] = (holder, role if adapter else "none")  # one pass for all roles that have none
            passes.setdefault(holder, {})[place[role][1]] = adapter
        made: dict[tuple[str, str], Array] = {}
        for holder, adapters in passes.items():
            hidden = model.hidden_of_roles(trees[holder]["trunk"], tuple(adapters.values()), *where)
            made |= {(holder, name): of_role for name, of_role in zip(adapters, hidden, strict=True)}
        return {role: made[place[role]] for role in roles}

    def columns(rows: Rows) -> Columns:
        num_tokens = rows.tokens.shape[1]
        num_columns = min(num_completion, num_tokens)
        if rows.is_packed or rows.excluded is not None:
            return masked_columns(rows.completion_mask, num_columns)
        return contiguous_columns(rows.prompt_lengths, num_columns, num_tokens)

    def put(x_BC: Array, rows: Rows) -> Array:
        return jnp.where(rows.completion_mask, put_columns(x_BC, columns(rows)), 0.0)

    def logprobs_of(role: str, hidden: Array, trees: Params, rows: Rows, *, with_entropy: bool) -> Any:
        logprobs_BC, entropy_BC = token_logprobs(
            partial(model.logits, trees[_trunk_of(role, trees)]),
            gather_predictors(hidden, columns(rows)),
            gather_targets(rows.tokens, columns(rows)),
            temperature=temperature,
            chunk=logprob_chunk,
            with_entropy=with_entropy,
        )
        return put(logprobs_BC, rows), None if entropy_BC is None else put(entropy_BC, rows)

    def values_of(hidden: Array, trees: Params, rows: Rows) -> Array:
        before = gather_predictors(hidden, columns(rows))
        return put(heads.values(trees["value"]["score_head"], before), rows)

    def heads_of(hidden: Array, trees: Params, rows: Rows) -> Array:
        said = heads.scores(trees["reward"]["score_head"], hidden, rows.lengths)
        return said if said.ndim == 2 else said[None]

    def scores_of(hidden: Array, trees: Params, rows: Rows) -> Array:
        return heads.combined(heads_of(hidden, trees, rows), model.ensemble)

    def logprobs(params: Params, frozen: Params, rows: Rows) -> tuple[Array, Array]:
        hidden = states(["policy"], params, frozen, rows)["policy"]
        return logprobs_of("policy", hidden, frozen | params, rows, with_entropy=True)

    def ref_logprobs(params: Params, frozen: Params, rows: Rows) -> Array:
        hidden = states(["reference"], params, frozen, rows)["reference"]
        return logprobs_of("reference", hidden, frozen | params, rows, with_entropy=False)[0]

    def values(params: Params, frozen: Params, rows: Rows) -> Array:
        return values_of(states(["value"], params, frozen, rows)["value"], frozen | params, rows)

    def scores(params: Params, frozen: Params, rows: Rows) -> Array:
        return scores_of(states(["reward"], params, frozen, rows)["reward"], frozen | params, rows)

    def head_scores(params: Params, frozen: Params, rows: Rows) -> Array:
        return heads_of(states(["reward"], params, frozen, rows)["reward"], frozen | params, rows)

    def policy_and_value(params: Params, frozen: Params, rows: Rows) -> tuple[Array, Array, Array]:
        trees, hidden = frozen | params, states(["policy", "value"], params, frozen, rows)
        logprobs, entropy = logprobs_of("policy", hidden["policy"], trees, rows, with_entropy=True)
        return logprobs, entropy, values_of(hidden["value"], trees, rows)

    def role_logprobs(roles: Sequence[str], params: Params, frozen: Params, rows: Rows) -> tuple[Array, ...]:
        trees, hidden = frozen | params, states(roles, params, frozen, rows)
        return tuple(logprobs_of(role, hidden[role], trees, rows, with_entropy=False)[0] for role in roles)

    def demonstration_logprobs(params: Params, frozen: Params, rows: Rows) -> Array:
        of_data = make_forward(model, num_demonstrated, logprob_chunk=logprob_chunk)
        assert of_data.role_logprobs is not None
        return of_data.role_logprobs(("policy",), params, frozen, rows)[0]

    def score_all(params: Params, frozen: Params, rows: Rows) -> Said:
        trees = frozen | params
        is_there = trees.keys() | ({"reference"} if "base" in trees else set())  # whose reference it is
        hidden = states([role for role in ROLES if role in is_there], params, frozen, rows)
        return Said(
            logprobs=logprobs_of("policy", hidden["policy"], trees, rows, with_entropy=False)[0],
            ref_logprobs=(
                logprobs_of("reference", hidden["reference"], trees, rows, with_entropy=False)[0]
                if "reference" in hidden
                else None
            ),
            values=values_of(hidden["value"], trees, rows) if "value" in hidden else None,
            scores=scores_of(hidden["reward"], trees, rows) if "reward" in hidden else None,
        )

    def logits_of(trees: Params, hidden: Array) -> Array:
        return model.logits(trees[_trunk_of("policy", trees)], hidden) / temperature

    def predictors(params: Params, frozen: Params, rows: Rows) -> Array:
        return gather_predictors(states(["policy"], params, frozen, rows)["policy"], columns(rows))

    def policy_change(
        params: Params, old_params: Params, frozen: Params, rows: Rows
    ) -> tuple[Array, Array, Array]:
        def of_chunk(hidden: Array, old_hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
            new, old = logits_of(frozen | params, hidden), logits_of(frozen | old_params, old_hidden)
            new_logprobs, _ = logprobs_of_logits(new, targets, with_entropy=False)
            old_logprobs, _ = logprobs_of_logits(old, targets, with_entropy=False)
            return new_logprobs, old_logprobs, kl_of_logits(old, new)

        hidden = (predictors(trained, frozen, rows) for trained in (params, old_params))
        targets = gather_targets(rows.tokens, columns(rows))
        new, old, kl = (put(x_BC, rows) for x_BC in in_chunks(of_chunk, (*hidden, targets), logprob_chunk))
        return new, old, kl

    def fisher(params: Params, tangents: Params, frozen: Params, rows: Rows) -> Array:
        def of_policy(policy: Params) -> Array:
            return predictors(params | {"policy": policy}, frozen, rows)

        def of_chunk(hidden: Array, moves: Array) -> Array:
            def logits(policy: Params, hidden: Array) -> Array:
                return logits_of(frozen | params | {"policy": policy}, hidden)

            return fisher_of_logits(*jax.jvp(logits, (params["policy"], hidden), (tangents, moves)))

        of_states = jax.jvp(of_policy, (params["policy"],), (tangents,))
        return put(in_chunks(of_chunk, of_states, logprob_chunk), rows)

    def compare(params: Params, frozen: Params, rows: Rows, beta: float) -> Comparison:
        assert teacher is not None
        weights, teacher_logits = frozen["teacher"], teacher.logits
        of_teacher = teacher.architecture.vocab_size
        shared = min(of_teacher, model.architecture.vocab_size)

        def of_chunk(hidden: Array, teacher_hidden: Array) -> Comparison:
            logits = logits_of(frozen | params, hidden)[..., :shared]
            expected = teacher_logits(weights, teacher_hidden)[..., :shared] / temperature
            return compare_logits(logits, expected, beta)

        hidden = predictors(params, frozen, rows)
        known = rows._replace(tokens=jnp.minimum(rows.tokens, of_teacher - 1))
        teacher_hidden = gather_predictors(teacher.hidden(weights["trunk"], *inputs(known)), columns(rows))
        # Of what has no gradient the backward pass keeps nothing.
        found = in_chunks(of_chunk, (hidden, lax.stop_gradient(teacher_hidden)), logprob_chunk)
        return jax.tree.map(lambda x_BC: put(x_BC, rows), found)

    alike: dict[str, Any] = {
        "temperature": temperature,
        "logprob_chunk": logprob_chunk,
        "longest": longest,
        "num_demonstrated": num_demonstrated,
        "teacher": teacher,
    }
    return Forward(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        policy_and_value=policy_and_value,
        score_all=score_all,
        with_columns=partial(make_forward, model, **alike),
        longest=longest,
        role_logprobs=role_logprobs,
        head_scores=head_scores,
        demonstration_logprobs=demonstration_logprobs if num_demonstrated else None,
        policy_change=policy_change,
        fisher=fisher,
        compare=None if teacher is None else compare,
    )


def policy_parts(params: Params, frozen: Params) -> Params:
    """Returns all that the policy computes with: its own parts, and those of the base of its adapter."""
    return frozen.get("base", {}) | params["policy"]


def _trunk_of(role: str, trees: Params) -> str:
    """Returns whose tree holds the trunk of a role: its own, the base's, of a value head the policy's."""
    if "trunk" in trees.get(role, {}):
        return role
    if "base" in trees:
        return "base"
    assert role == "value", f"{role} has no trunk"
    return "policy"


def blank_forward() -> Forward:
    """Returns a forward of zeros: it gives a loss's weights, which depend on masks and data alone."""

    def per_token(params: Params, frozen: Params, rows: Rows) -> Array:
        return jnp.zeros(rows.tokens.shape, jnp.float32)

    def per_sequence(params: Params, frozen: Params, rows: Rows) -> Array:
        return jnp.zeros(rows.lengths.size, jnp.float32)

    def per_head(params: Params, frozen: Params, rows: Rows) -> Array:
        return per_sequence(params, frozen, rows)[None]

    def times(count: int) -> Callable[..., Any]:
        return lambda *args: (per_token(*args),) * count

    def said(*args: Any) -> Said:
        zeros = per_token(*args)
        return Said(zeros, zeros, zeros, per_sequence(*args))

    def of_roles(roles: Sequence[str], *args: Any) -> tuple[Array, ...]:
        return (per_token(*args),) * len(roles)

    return Forward(
        times(2),
        per_token,
        per_token,
        per_sequence,
        times(3),
        said,
        role_logprobs=of_roles,
        head_scores=per_head,
        demonstration_logprobs=per_token,
        compare=lambda params, frozen, rows, beta: Comparison(*times(4)(params, frozen, rows)),
    )
