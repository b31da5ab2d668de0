"""The two real checkpoints have the perplexities that those who converted them measured with transformers."""

import json

import pytest

from rlhf_jax import evaluate


@pytest.mark.parametrize(
    ("model", "stories", "nll", "perplexity"),
    [
        ("tinystories656k", "stories_cased", 3.0505, 21.13),
        pytest.param("tinystories656k", "stories_valid", 3.1484, 23.30, marks=pytest.mark.slow),
        pytest.param("stories260k", "stories_cased", 1.4830, 4.406, marks=pytest.mark.slow),
        pytest.param("stories260k", "stories_valid", 1.5555, 4.738, marks=pytest.mark.slow),
    ],
)
def test_perplexity_of_stories(test_data, capsys, model, stories, nll, perplexity):
    """BOS, the story, the end token, cut at 512 tokens."""
    data = test_data / "tinystories_text" / f"{stories}.jsonl"
    assert evaluate.main(["--model", str(test_data / model), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nll"] == pytest.approx(nll, abs=1e-4)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-3)
