"""The best of a group, and how far from the policy it can be."""

import numpy as np
import pytest

from rlhf_jax.best_of import BATCH, batch_size, best_of, kl_bound
from rlhf_jax.sampler import Completion


def completion(prompt, sample):
    return Completion("p", "c", [1], [-1.0], True, prompt, sample)


def test_the_first_of_the_highest_score_is_taken_of_each_group():
    asked = []

    def score(some):
        asked.append(len(some))
        return np.array([-(of.sample_index % 2) + 10 * of.prompt_index for of in some], np.float32)

    groups = BATCH // 3 + 2
    found = list(best_of((completion(i, k) for i in range(groups) for k in range(3)), 3, score))
    assert [(of.completion.prompt_index, of.completion.sample_index) for of in found] == [
        (i, 0) for i in range(groups)
    ]
    assert (found[1].score, found[1].mean_score) == pytest.approx((10, 10 - 1 / 3))
    assert asked == [batch_size(3), 3 * groups - batch_size(3)]


@pytest.mark.parametrize("n", [2, 8, 50])
def test_the_bound_is_the_kl_where_no_two_completions_are_alike(n):
    """Of M completions, equally likely, the one of rank r is the best of n with (r^n - (r - 1)^n) / M^n."""

    def kl(count):
        below = np.arange(count + 1, dtype=np.float64) / count
        best = below[1:] ** n - below[:-1] ** n
        best = best[best > 0]
        return np.sum(best * np.log(best * count))

    assert kl(10) < kl_bound(n)
    assert kl(100_000) == pytest.approx(kl_bound(n), rel=1e-3)
