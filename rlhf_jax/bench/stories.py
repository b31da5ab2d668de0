"""Judges the stories of a finished `configs/stories.yaml` run by something that it never trained on.

    python -m rlhf_jax.bench.stories --run runs/stories --data DIRECTORY

A bag-of-words logistic regression is fitted on those rt_polarity sentences whose letters are in neither
sst2_train nor sst2_dev (the sets overlap). Its log-odds of "positive", on completions of the same prompts
before and after PPO, tell whether stories really became happier. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.sparse

MIN_COUNT = 2  # words that fewer training sentences have are left out
PENALTY = 1.0  # of the squared weights


def main() -> None:
    """Fits the judge, reads the run, prints the figures that the recipe promises."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory of configs/stories.yaml")
    parser.add_argument("--data", type=Path, required=True, help="directory that holds sentiment/")
    args = parser.parse_args()
    texts, labels = judge_rows(args.data / "sentiment")
    judge = BagOfWords(texts, labels)
    files = sorted((args.run / "samples").glob("ppo-*.jsonl"))
    before, after = (_completions(path) for path in (files[0], files[-1]))
    difference = judge.log_odds(after) - judge.log_odds(before)
    standard_error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    summary = json.loads((args.run / "summary.json").read_text("utf-8"))
    ppo, sft = summary["ppo"], summary["sft"]
    line = {
        "bench": "stories",
        "judge_rows": len(texts),
        "judge_accuracy_5_fold": round(cross_validated(texts, labels), 4),
        "stories": len(before),
        "judge_before": round(float(judge.log_odds(before).mean()), 4),
        "judge_after": round(float(judge.log_odds(after).mean()), 4),
        "standard_errors": round(float(difference.mean()) / standard_error, 2),
        "sft_perplexity": [round(sft["eval_perplexity_before"], 3), round(sft["eval_perplexity_after"], 3)],
        "reward_accuracy": round(summary["reward"]["eval_accuracy"], 4),
        "kl": round(ppo["kl"], 3),
        "perplexity_ratio": round(ppo["ref_perplexity_after"] / ppo["ref_perplexity_before"], 3),
        "distinct_2_ratio": round(ppo["distinct_2_after"] / ppo["distinct_2_before"], 3),
        "seconds": {stage: round(figures["seconds"]) for stage, figures in summary.items()},
    }
    print(json.dumps(line), flush=True)


def judge_rows(directory: Path) -> tuple[list[str], np.ndarray]:
    """Returns texts and 0/1 labels of rt_polarity without what SST-2's training and development sets have."""
    used = {letters(row["text"]) for name in ("sst2_train", "sst2_dev") for row in _rows(directory, name)}
    own = [row for row in _rows(directory, "rt_polarity") if letters(row["text"]) not in used]
    return [row["text"] for row in own], np.array([row["label"] for row in own], np.float64)


class BagOfWords:
    """Logistic regression on the presence of words."""

    def __init__(self, texts: Sequence[str], labels: np.ndarray) -> None:
        """Fits it."""
        counts = Counter(word for text in texts for word in words(text))
        self._columns = {word: i for i, word in enumerate(w for w, n in counts.items() if n >= MIN_COUNT)}
        features, signs = self._features(texts), 2 * labels - 1

        def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            weights, bias = parameters[:-1], parameters[-1]
            margins = signs * (features @ weights + bias)
            slopes = -signs / (1 + np.exp(margins))
            loss = np.logaddexp(0, -margins).sum() + 0.5 * PENALTY * weights @ weights
            return float(loss), np.append(features.T @ slopes + PENALTY * weights, slopes.sum())

        start = np.zeros(len(self._columns) + 1)
        self._parameters = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B").x

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """Returns f64[N], log P(positive) - log P(negative) of each text."""
        return self._features(texts) @ self._parameters[:-1] + self._parameters[-1]

    def _features(self, texts: Sequence[str]) -> scipy.sparse.csr_array:
        pairs = [
            (row, self._columns[w])
            for row, text in enumerate(texts)
            for w in words(text)
            if w in self._columns
        ]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        shape = (len(texts), len(self._columns))
        return scipy.sparse.csr_array((np.ones(len(pairs)), (rows, columns)), shape=shape)


def cross_validated(texts: Sequence[str], labels: np.ndarray, folds: int = 5) -> float:
    """Returns the judge's accuracy on sentences that it was not fitted on."""
    fold = np.random.default_rng(0).permutation(len(texts)) % folds
    right = 0
    for k in range(folds):
        judge = BagOfWords([t for t, f in zip(texts, fold, strict=True) if f != k], labels[fold != k])
        held_out = [t for t, f in zip(texts, fold, strict=True) if f == k]
        right += int(((judge.log_odds(held_out) > 0) == labels[fold == k]).sum())
    return right / len(texts)


def words(text: str) -> set[str]:
    """Returns the different words of a text, lower case."""
    return set(re.findall(r"[a-z']+", text.lower()))


def letters(text: str) -> str:
    """Returns a text's letters alone, by which sentences of the two sets are told to be the same."""
    return re.sub(r"[^a-z]", "", text.lower())


def _rows(directory: Path, name: str) -> list[dict]:
    with gzip.open(directory / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _completions(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["completion"] for line in file]


if __name__ == "__main__":
    main()
