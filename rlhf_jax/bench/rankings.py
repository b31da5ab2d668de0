"""Trains reward models on the same rankings by pairs and by lists: `python -m rlhf_jax.bench.rankings`.

Pairs one by one, all pairs of a ranking in one batch, Plackett-Luce and InfoNCE, several seeds each, on the
translations of wmt19_darr, from scratch. All learn from the same judged pairs, a partial order of each list;
what was not compared is no tie. A step has about as many completions whatever the loss is. Prints a JSON line
for each run: accuracy on the held-out pairs and its seconds; then for each loss the mean over the seeds and
its standard error, beside what knows no language: the longer one, more words of the prompt.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import strict_yaml

METHODS: dict[str, dict[str, Any]] = {
    "pairs": {"batch_size": 16},
    "all_pairs": {"batch_size": 4, "all_pairs": True},
    "plackett_luce": {"batch_size": 4, "loss": "plackett_luce"},
    "info_nce": {"batch_size": 4, "loss": "info_nce"},
}
"""Settings of section reward_model. A ranking has eight to nine completions on average."""


def main() -> None:
    """Trains and measures every method with every seed, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory that holds wmt19_darr/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    lists, pairs = (
        args.data / "wmt19_darr" / "lists_train.jsonl.gz",
        args.data / "wmt19_darr" / "pairs_test.jsonl.gz",
    )
    found: dict[str, list[float]] = {name: [] for name in args.methods}
    with tempfile.TemporaryDirectory() as made:
        for seed in args.seeds:
            for name in args.methods:
                start = time.perf_counter()
                run = Path(made) / f"{name}-{seed}"
                file = run.with_suffix(".yaml")
                tree = configuration(lists, name, seed, args.steps, args.learning_rate)
                file.write_text(strict_yaml.dump(tree | {"run": {"dir": str(run), "seed": seed}}))
                _call("train", "--config", str(file))
                told = _call(
                    "evaluate", "--model", str(run / "reward"), "--data", str(pairs), "--batch_size", "50"
                )
                found[name].append(told["accuracy"])
                line = {
                    "method": name,
                    "seed": seed,
                    "steps": args.steps,
                    "accuracy": round(told["accuracy"], 4),
                }
                print(json.dumps(line | {"seconds": round(time.perf_counter() - start)}), flush=True)
    for name, accuracies in found.items():
        error = np.std(accuracies, ddof=1) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan
        mean = round(float(np.mean(accuracies)), 4)
        print(json.dumps({"method": name, "accuracy": mean, "standard_error": round(float(error), 4)}))
    print(json.dumps({"base_rates": base_rates(pairs)}))


def configuration(
    lists: Path, method: str, seed: int, num_steps: int, learning_rate: float
) -> dict[str, Any]:
    """Returns the configuration of a reward model from scratch on rankings of translations."""
    return {
        "stages": [{"name": "reward", "algorithm": "reward_model"}],
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "mlp_size": 192,
            "context_length": 256,
        },
        "tokenizer": {"vocab_size": 2048},
        "data": {
            "train": str(lists),
            "eval": f"{lists}[:8]",  # what counts is measured afterwards
            "columns": {"completions": "candidates.text"},
            "max_prompt_length": 48,
            "max_length": 96,
            "max_eval_records": 8,
        },
        "optimizer": {
            "learning_rate": learning_rate,
            "schedule": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.1,
        },
        "reward_model": {"num_steps": num_steps, "eval_every": num_steps, "normalizer": "none"}
        | METHODS[method],
        "checkpoint": {"every": num_steps},
    }


def base_rates(pairs: Path) -> dict[str, float]:
    """Returns the accuracy of the longer completion, and of the one with more of the prompt's words."""
    with gzip.open(pairs, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]

    def share(judge: Any) -> float:
        gaps = [judge(of["prompt"], of["chosen"]) - judge(of["prompt"], of["rejected"]) for of in records]
        return round(float(np.mean([0.5 if gap == 0 else gap > 0 for gap in gaps])), 4)

    def overlap(prompt: str, completion: str) -> float:
        words = _words(completion)
        return len(words & _words(prompt)) / max(len(words), 1)

    return {"longer": share(lambda prompt, completion: len(completion)), "overlap": share(overlap)}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _call(entry: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"rlhf_jax.{entry}", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
