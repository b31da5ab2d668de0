"""What is said of the plans of a run before it begins: its data, records that are lost, reward models."""

from __future__ import annotations

import numpy as np

from rlhf_jax.config_types import RANKINGS
from rlhf_jax.data.mixture import mixture_counts
from rlhf_jax.data.tokenize import prompt_limit
from rlhf_jax.data.tokenizer import template_date
from rlhf_jax.plan import Plan


def notes(plan: Plan) -> list[str]:
    """Returns the lines that are printed of a stage."""
    return [*mixture(plan), *losses(plan), *ptx_notes(plan), *reward_notes(plan)]


def mixture(plan: Plan) -> list[str]:
    """Returns a line for each source of a mixture: its records, and how often the stage goes through."""
    settings, sources = plan.stage.settings, plan.stage.data.sources
    if len(sources) == 1:
        return []
    taken = mixture_counts(plan.train.weights, settings.num_updates * settings.batch_size)
    return [
        f"[{plan.stage.name}] data.train: {source}: {count} records, {draws / units:.3g} epochs"
        for source, count, units, draws in zip(
            sources, plan.train.counts, plan.train.num_units, taken, strict=True
        )
    ]


def losses(plan: Plan) -> list[str]:
    """Returns a line for each split of which records are left out, dropped, cut, packed or in buckets."""
    data, lines = plan.stage.data, []
    if plan.number == 0 and plan.train.has_conversations and (date := template_date(plan.tokenizer)):
        lines.append(f"the chat template prints today's date: it is always {date} (tokenizer.template_date)")
    for name, of in (("train", plan.train), ("eval", plan.held_out)):
        total = len(of) + of.num_dropped
        parts = [f"{count} left out ({why})" for why, count in of.left_out.items()]
        lost = of.losses
        if long_prompts := lost.long_prompts:
            why = f"prompt longer than {prompt_limit(data, of.kind)} tokens"
            if data.prompt_tokens:
                why += f", or text too short for one of {data.prompt_tokens}"
            parts.append(f"{long_prompts} of {total} records dropped ({why})")
        if lost.long_rows:
            parts.append(
                f"{lost.long_rows} of {total} records dropped (longer than {data.max_length} tokens)"
            )
        if lost.without_turns:
            parts.append(f"{lost.without_turns} of {total} records dropped (no assistant turn to learn)")
        if lost.uneven_starts:
            parts.append(
                f"{lost.uneven_starts} of {total} records dropped (the template rewrites turns: their "
                "completions do not follow the same prompt)"
            )
        if lost.unlearned_turns:
            parts.append(f"{lost.unlearned_turns} assistant turns without loss (the template rewrites them)")
        if lost.cut_prompts:
            limit, side = prompt_limit(data, of.kind), data.prompt_truncation
            parts.append(f"{lost.cut_prompts} of {total} prompts cut on the {side} at {limit} tokens")
        num_rows = np.count_nonzero(of.rows.lengths)  # without those that fill up rankings
        if lost.apart:
            parts.append(f"{lost.apart} of {num_rows} completions encoded apart")
        if of.num_cut:
            parts.append(f"{of.num_cut} of {num_rows} rows cut at {data.max_length} tokens")
        if of.kind in RANKINGS:
            share = num_rows / len(of.rows)
            parts.append(f"{of.rows_per_record} rows a record, as the longest has, {share:.1%} filled")
        if of.packings:
            num_packed = sum(of.num_units) * of.rows_per_record // of.rows_together
            parts.append(
                f"{len(of)} records packed into {num_packed} rows of {of.length} tokens, "
                f"{of.lengths.sum() / (num_packed * of.length):.1%} filled (one record each: "
                f"{of.lengths.mean() / of.longest_row:.1%})"
            )
        if of.shorter:
            steps = ", ".join(map(str, of.shorter))
            parts.append(f"batches of {steps} or {of.length} tokens")
        if parts:
            warning = "WARNING: more than half is lost: " if 2 * of.num_dropped > total else ""
            lines.append(f"[{plan.stage.name}] {warning}data.{name}: {', '.join(parts)}")
    return lines


def ptx_notes(plan: Plan) -> list[str]:
    """Returns a line where demonstrations are learned beside samples: how often the stage goes through.

    Those of iterations in which the value model learns alone teach nobody.
    """
    if plan.ptx is None:
        return []
    settings = plan.stage.settings
    learning = settings.num_updates - getattr(settings, "value_warmup", 0)
    epochs = learning * settings.rows_per_update / sum(plan.ptx.num_units)
    passes = f", each learned {settings.num_epochs} times" if settings.num_epochs > 1 else ""
    where = f"{plan.stage.algorithm}.ptx_from: {getattr(settings, 'ptx_from', '')}"
    return [f"[{plan.stage.name}] {where}: {len(plan.ptx)} records, {epochs:.3g} epochs{passes}"]


def reward_notes(plan: Plan) -> list[str]:
    """Returns a line where the reward model is given other tokens than those that the policy wrote."""
    if plan.external is None or plan.external.reader.tokenizer is None:
        return []
    return [
        f"[{plan.stage.name}] the reward model {plan.external.path} reads text otherwise than the "
        "policy: it is given prompt and completion as text, in its own tokens"
    ]
