"""Random keys by name: root -> iteration -> use -> prompt index -> sample index -> token position.

No key is stored or used twice; a key is a function of what it is used for, so that a completion depends
neither on the batch size, nor on the mesh, nor on a resume. The last three foldings are in
`rollout/sampling.py`.
"""

from __future__ import annotations

import jax
from jax import Array

_USES = {
    "init": 0,
    "iteration": 1,
    "rollout": 2,
    "update": 3,
    "evaluate": 4,
    "head": 5,
    "adapter": 6,
    "rounding": 7,
}


def named(key: Array, use: str) -> Array:
    """Returns the key for one use; KeyError where the use is not in the list."""
    return jax.random.fold_in(key, _USES[use])


def at_iteration(root: Array, iteration: int) -> Array:
    """Returns the key of one iteration of a stage."""
    return jax.random.fold_in(named(root, "iteration"), iteration)


def stage_root(seed: int, stage_number: int) -> Array:
    """Returns the root key of a stage, by its place in the chain."""
    return jax.random.fold_in(jax.random.key(seed), stage_number)
