"""Mixtures: whatever the weights, every beginning holds the shares that they ask for."""

import random

import pytest

from rlhf_jax.data.mixture import mixture_counts, mixture_pick

RANDOM = random.Random(0)
WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (3.0, 1.0),
    (0.7, 0.2, 0.1),
    (1.0, 0.001),
    (0.001, 1.0, 1e-9),
    (1.0,) * 8,
    (0.9, *(0.01,) * 10),
    (8.0, 5.0, 3.0, 2.0, 1.0, 1.0),  # the worst shape: each level leaves the most of an error
    *[tuple(RANDOM.random() for _ in range(RANDOM.randint(2, 5))) for _ in range(10)],
    *[tuple(RANDOM.expovariate(1) ** 2 for _ in range(RANDOM.randint(6, 12))) for _ in range(5)],
]


def test_picks_worked_by_hand():
    # round(n 3/4) for n = 0, 1, ... is 0, 1, 2, 2, 3: the third position is the other source's
    assert [mixture_pick((3.0, 1.0), p) for p in range(5)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)]
    assert [mixture_pick((1.0, 3.0), p) for p in range(4)] == [(1, 0), (1, 1), (0, 0), (1, 2)]
    assert [mixture_pick((5.0,), p) for p in range(3)] == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_beginning_holds_the_shares(weights):
    counts = [0] * len(weights)
    total = sum(weights)
    for position in range(3000):
        source, number = mixture_pick(weights, position)
        assert number == counts[source]  # of each source the records come one after the other, none twice
        counts[source] += 1
        off = max(abs(counts[i] - (position + 1) * w / total) for i, w in enumerate(weights))
        assert off < (1.42 if len(weights) <= 5 else 1.69)
    assert mixture_counts(weights, 3000) == counts


def test_rare_source_comes_at_its_times():
    places = [p for p in range(5000) if mixture_pick((1.0, 0.001), p)[0] == 1]
    assert places == [500, 1501, 2502, 3503, 4504]  # the middle of every 1001


@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.7), (1.0, 1e-9), (2.0, 3.0, 5.0, 7.0, 11.0, 13.0)])
def test_far_positions_are_exact(weights):
    """2**60 positions on floating-point numbers could no longer tell neighbours apart."""
    start = 2**60
    counts = mixture_counts(weights, start)
    assert sum(counts) == start
    for position in range(start, start + 200):
        source, number = mixture_pick(weights, position)
        assert number == counts[source]
        counts[source] += 1


def test_scale_of_the_weights_is_nothing():
    assert [mixture_pick((0.25, 0.5), p) for p in range(50)] == [mixture_pick((1, 2), p) for p in range(50)]
