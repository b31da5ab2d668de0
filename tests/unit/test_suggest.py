"""What is learned of a way to run a configuration that does not fit."""

from __future__ import annotations

import pytest

from rlhf_jax.suggest import Candidate, Needs


def candidate(remat: str, rows: int = 4, sharing: str = "") -> Candidate:
    return Candidate({"data": 2, "fsdp": 2}, rows, remat, sharing)


def test_what_a_program_was_found_to_take_corrects_the_estimates_of_its_like():
    factors: dict[tuple[str, ...], float] = {}
    needs = Needs(update=10.0, rollout=8.0)
    needs.correct(candidate("dots"), "update", 25, factors)
    assert needs.corrected(candidate("dots", rows=2), factors) == 25
    assert Needs(4.0, 8.0).corrected(candidate("dots"), factors) == 10  # 2.5 times its own estimate
    for other in (candidate("full"), candidate("dots", sharing="hydra")):
        assert needs.corrected(other, factors) == 10
    needs.correct(candidate("dots"), "rollout_start", 24, factors)
    assert needs.corrected(candidate("full"), factors) == 24  # nothing is recomputed in a rollout
    needs.correct(candidate("dots"), "update", 15, factors)
    assert needs.corrected(candidate("dots"), factors) == 25  # the most that was seen


@pytest.mark.parametrize("program", ["update", "rollout"])
def test_a_program_that_takes_less_than_estimated_corrects_nothing(program: str):
    factors: dict[tuple[str, ...], float] = {}
    Needs(10.0, 8.0).correct(candidate("full"), program, 5, factors)
    assert Needs(10.0, 8.0).corrected(candidate("full"), factors) == 10
