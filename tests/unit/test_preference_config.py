"""Which options the preference algorithms read, and what makes no sense of them."""

import pytest

STAGES = """
run: {{dir: RUN}}
stages:
  - {{name: sft, algorithm: sft, lora: {{rank: 0}}}}
  - {{name: it, algorithm: {name}, from: sft, {options}}}
"""


def told(problems, name, options=""):
    return problems(STAGES.format(name=name, options=options))


@pytest.mark.parametrize(
    "name, options, line",
    [
        (
            "ipo",
            "ipo: {label_smoothing: 0.1}",
            "stages.it.ipo.label_smoothing: would be ignored: ipo.loss is",
        ),
        (
            "dpo",
            "dpo: {loss: hinge, label_smoothing: 0.1}",
            "stages.it.dpo.label_smoothing: would be ignored",
        ),
        ("dpo", "dpo: {label_smoothing: 0.5}", "stages.it.dpo.label_smoothing: must be >= 0 and < 0.5, got"),
        (
            "kto",
            "kto: {desirable_weight: 0, undesirable_weight: 0}",
            "stages.it.kto.desirable_weight: must be > 0 where kto.undesirable_weight is 0, as nothing would",
        ),
        ("cdpo", "cdpo: {label_smoothing: 0}", "stages.it.cdpo.label_smoothing: must be > 0, as cdpo is dpo"),
        ("dpo", "dpo: {beta: 0}", "stages.it.dpo.beta: must be > 0, got 0"),
        ("dpo", "dpo: {loss: kto}", "stages.it.dpo.loss: must be one of 'sigmoid', 'robust', 'ipo', 'hinge'"),
        ("simpo", "simpo: {precompute_ref: true}", "stages.it.simpo.precompute_ref: no such option"),
        ("orpo", "orpo: {odds_ratio_coef: -1}", "stages.it.orpo.odds_ratio_coef: must be >= 0, got -1"),
        ("kto", "rewards: {gold: 'rlhf_jax.data.synthetic:gold_reward'}", "stages.it.rewards"),
        ("kto", "data: {train: a.jsonl, eval: a.jsonl, format: text}", "stages.it.data.format: a stage that"),
        ("simpo", "model: {frozen_dtype: bfloat16}", "stages.it.model.frozen_dtype: would be ignored"),
        (
            "dpo",
            "dpo: {precompute_ref: true}, model: {frozen_dtype: bfloat16}",
            "stages.it.model.frozen_dtype: would be ignored: the stage has no frozen model",
        ),
        (
            "dpo",
            "lora: {rank: 2, path: .}",
            "stages.it.lora.path: would be ignored: dpo begins with fresh adapters, for its reference",
        ),
        ("dpo", "dpo: {batch_size: 6, microbatch_size: 4}", "stages.it.dpo.microbatch_size: must divide"),
    ],
)
def test_a_problem_is_told(problems, name, options, line):
    found = told(problems, name, options)
    assert any(problem.startswith(line) for problem in found), found


@pytest.mark.parametrize(
    "name, options",
    [
        ("robust_dpo", "robust_dpo: {label_smoothing: 0.2, precompute_ref: true, length_normalized: true}"),
        ("dpo", "model: {frozen_dtype: bfloat16, logprob_chunk: 64}, data: {packing: true}"),
        ("dpo", "rewards: {gold: 'rlhf_jax.data.synthetic:gold_reward'}"),
        ("kto", "lora: {rank: 2}, model: {frozen_dtype: float32}, kto: {desirable_weight: 0}"),
        ("cpo", "cpo: {nll_coef: 0, gamma: 1, length_normalized: true}"),
    ],
)
def test_what_makes_sense_is_no_problem(problems, name, options):
    assert told(problems, name, options) == []
