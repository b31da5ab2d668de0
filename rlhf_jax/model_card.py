"""The README.md of an exported model: what it is, what the run measured, and how to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.config import Config, StageConfig
from rlhf_jax.offline_config import RewardModelConfig
from rlhf_jax.summary import table_rows

_METHODS = {
    "sft": "supervised fine-tuning",
    "ppo": "PPO against a reward",
    "grpo": "GRPO against a reward",
    "dr_grpo": "Dr. GRPO against a reward",
    "dapo": "DAPO against a reward",
    "gspo": "GSPO against a reward",
    "rloo": "RLOO against a reward",
    "reinforce": "REINFORCE against a reward",
    "reinforce_pp": "REINFORCE++ against a reward",
    "remax": "ReMax against a reward",
    "dpo": "DPO",
    "cdpo": "DPO with label smoothing",
    "robust_dpo": "robust DPO",
    "ipo": "IPO",
    "slic": "DPO with a hinge loss",
    "kto": "KTO",
    "simpo": "SimPO",
    "cpo": "CPO",
    "orpo": "ORPO",
    "trpo": "TRPO against a reward",
    "online_dpo": "online DPO against a reward",
    "raft": "SFT on the best of its own samples",
    "distill": "on-policy distillation from a teacher",
}
_REWARD_LOSSES = {
    "bradley_terry": "Bradley-Terry",
    "hinge": "hinge",
    "info_nce": "InfoNCE",
    "plackett_luce": "Plackett-Luce",
    "regression": "regression",
}
_USE = {
    "policy": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
```""",
    "scorer": """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForSequenceClassification.from_pretrained("PATH")
normalizer = model.config.score_normalizer  # score: (logits[0, 0] - normalizer["mean"]) / normalizer["std"]
```""",
    "policy adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "PATH")
```""",
    "scorer adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
base = AutoModelForSequenceClassification.from_pretrained(
    "BASE", num_labels=1, pad_token_id=tokenizer.pad_token_id
)
model = PeftModel.from_pretrained(base, "PATH")  # score: (logits[0, 0] - MEAN) / STD
```""",
}


def lineage(config: Config, name: str) -> list[StageConfig]:
    """Returns the stages of a run that a stage came from, itself last, in the order in which they ran."""
    stages = {stage.name: stage for stage in config.stages}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        stage = stages.get(waiting.pop())
        if stage is not None and stage.name not in found:
            found.add(stage.name)
            waiting += stage.rests_on
    return [stage for stage in config.stages if stage.name in found]


def _method(stage: StageConfig) -> str:
    if isinstance(stage.settings, RewardModelConfig):
        return f"{_REWARD_LOSSES[stage.settings.loss]} reward modelling"
    return _METHODS[stage.algorithm]


def model_card(
    stages: Sequence[StageConfig],
    role: str,
    results: Mapping[str, Mapping[str, Any]],
    *,
    base: str = "",
    normalizer: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Returns the text of a model card in Markdown, with the front matter that the hub reads.

    Args:
        stages: of `lineage`: the exported stage last.
        role: policy, value or reward: what is exported of it.
        results: the figures of each stage by name, as in summary.json.
        base: of an adapter, the model that it is for.
        normalizer: of a scorer's adapter, mean and deviation of its scores; merged, config.json has them.
    """
    last, by_name = stages[-1], {stage.name: stage for stage in stages}
    steps = [last]
    while steps[0].start_from in by_name:
        steps.insert(0, by_name[steps[0].start_from])
    start = _last_part(steps[0].start_from or steps[0].model.path)
    measured = table_rows({stage.name: results[stage.name] for stage in stages if stage.name in results})
    adapted = _last_part(base).removeprefix("hub:").partition("@")[0]
    front = [
        "---",
        f"library_name: {'peft' if base else 'transformers'}",
        *([f"base_model: {adapted}"] if base else []),
        f"pipeline_tag: {'text-generation' if role == 'policy' else 'text-classification'}",
        f"tags: [rlhf_jax, {last.algorithm}]",
        "---",
    ]
    origin = f"from `{start}`" if start else "from scratch"
    what = "a LoRA adapter, " if base else ""
    methods = ", then ".join(map(_method, steps))
    num_heads = getattr(last.settings, "num_heads", 1)
    heads = ""
    if num_heads > 1:
        heads = f" Its score is the mean of the {num_heads} heads that were trained, as one head."
    kind = "policy" if role == "policy" else "scorer"
    use = _USE[f"{kind} adapter" if base else kind]
    for name, value in {"BASE": adapted, "MEAN": normalizer[0], "STD": normalizer[1]}.items():
        use = use.replace(name, str(value))
    lines = [
        *front,
        f"# {last.name}: {role}",
        "",
        f"The {role} of stage `{last.name}`, {what}trained {origin} by {methods}, with rlhf_jax.{heads}",
        "",
        "| stage | measure | before | after |",
        "|---|---|---|---|",
        *(f"| {row.stage} | {row.measure} | {row.before} | {row.after} |" for row in measured),
        "",
        "## Settings",
        "",
        *(f"* `{stage.name}`: {_settings(stage)}" for stage in stages),
        "",
        "## Use",
        "",
        use,
    ]
    return "\n".join(lines) + "\n"


def _settings(stage: StageConfig) -> str:
    """Returns what decides a stage's outcome: its data, its judge and teacher, options and optimiser."""
    optimizer = dataclasses.asdict(stage.optimizer)
    facts = dataclasses.asdict(stage.lora) | {"path": _last_part(stage.lora.path)}
    adapters = {f"lora.{key}": value for key, value in facts.items() if key != "path" or value}
    others = {"teacher_from": stage.teacher_from, "reward_from": stage.reward_from}
    read = (
        {"data": " + ".join(map(_last_part, stage.data.sources))}
        | {key: _last_part(source) for key, source in others.items() if source}
        | dataclasses.asdict(stage.settings)
        | optimizer
        | (adapters | {"base": stage.model.base_dtype} if stage.lora.rank else {})
    )
    return ", ".join(f"{name} {value}" for name, value in read.items()) + f"; seed {stage.run.seed}"


def _last_part(path: str) -> str:
    """Returns the last part of a path: where it lay on somebody's disk is nobody's business."""
    return path if path.startswith(("hub:", "stream:", "tfds:")) else path.rstrip("/").rpartition("/")[2]
