"""Held-out evaluation: of losses on records, of completions on prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import watchdog
from rlhf_jax.batch import Metrics, Params, Prompts, RecordRows, Rows, reduce_metrics
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import AnyRecord, PromptOnly
from rlhf_jax.experience import Collector, text_metrics
from rlhf_jax.metrics import to_host
from rlhf_jax.programs import Programs
from rlhf_jax.rewards.once import Scores
from rlhf_jax.sharding import place_rows


class Evaluation(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    samples: list[dict]
    """Prompt, completion and score, if any, of some completions; empty where nothing is sampled."""


Evaluate = Callable[[Params, Params], Evaluation]


def evaluate_records(programs: Programs, loader: Loader[RecordRows, AnyRecord], mesh: Mesh) -> Evaluate:
    """Returns the evaluation of an offline stage: means over held-out records, eval/nll as perplexity too."""

    def evaluate(params: Params, frozen: Params) -> Evaluation:
        found = []
        for batch, _ in loader.eval_batches():
            found.append(programs.evaluate(params, frozen, place_rows(mesh, batch)))
            jax.block_until_ready(found[-2:-1])  # one is under way while the next is made
            watchdog.beat()
        metrics = _over_batches(found)
        if "eval/nll" in metrics:
            metrics["eval/perplexity"] = _perplexity(metrics["eval/nll"])
        return Evaluation(metrics, [])

    return evaluate


def evaluate_prompts(
    collector: Collector,
    loader: Loader[Prompts, PromptOnly],
    mesh: Mesh,
    key: Array,
    num_samples: int,
    gold: Scores | None,
    compare: Callable[[Params, Params, Rows], Metrics] | None = None,
) -> Evaluate:
    """Returns the evaluation of an online stage: held-out prompts, completed with the same key each time.

    The metrics are those of a rollout under eval/, with mean and deviation of the gold function's scores
    where there is one. eval/ref_perplexity is the completions' perplexity under the reference, if any.
    Completions that the missing-EOS rule leaves out count in none of them but eval/rollout/eos_rate. Of
    `compare`, what it says of the rows as they are sampled: names with eval/, and their sums.
    """

    def evaluate(params: Params, frozen: Params) -> Evaluation:
        metrics, compared, samples, ids, counted = [], [], [], [], []
        judged: dict[str, np.ndarray] = {}
        for prompts, records in loader.eval_batches():
            placed = place_rows(mesh, prompts)
            experience = collector.collect(params, frozen, placed, records, key, in_groups=False)
            metrics.append(experience.metrics)
            if compare is not None:
                compared.append(compare(params, frozen, experience.scored.rollout.rows))
            ids += experience.ids
            counted += experience.rows_counted.tolist()
            said = {
                "score": experience.scores,
                "gold": None if gold is None else gold(records, experience.completions),
            }
            judged = {name: scores for name, scores in said.items() if scores is not None}
            samples += [
                {"prompt": record.prompt, "completion": completion}
                | {name: float(scores[number]) for name, scores in judged.items()}
                for number, (record, completion) in enumerate(
                    zip(records, experience.completions, strict=True)
                )
            ]
        over_all = _over_batches(metrics) | text_metrics(ids, np.array(counted))
        found = {f"eval/{name}": x for name, x in over_all.items() if not name.startswith("perf/")}
        if "eval/policy/ref_nll" in found:
            found["eval/ref_perplexity"] = _perplexity(found["eval/policy/ref_nll"])
        found |= _over_batches(compared) if compared else {}
        of_counted = [sample for sample, counts in zip(samples, counted, strict=True) if counts]
        for name in judged:
            found |= _mean_and_deviation(f"eval/{name}", [sample[name] for sample in of_counted])
        return Evaluation(found, samples[:num_samples])

    return evaluate


def _over_batches(metrics: list[Metrics]) -> dict[str, float]:
    return to_host(reduce_metrics(jax.tree.map(lambda *xs: jnp.stack(xs), *metrics)))


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def _mean_and_deviation(name: str, values: list[float]) -> dict[str, float]:
    values = values or [math.nan]
    return {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
