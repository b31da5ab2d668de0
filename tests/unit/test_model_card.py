"""What a model card says of where a model comes from."""

from rlhf_jax.config_file import resolve
from rlhf_jax.model_card import lineage, model_card


def config(*stages):
    return resolve(
        {"run": {"dir": "somewhere"}, "stages": list(stages), "data": {"train": "/home/me/x.jsonl"}}
    ).config


def test_the_origin_is_that_of_the_model_and_not_of_its_judge():
    of = config(
        {"name": "reward", "algorithm": "reward_model", "from": "/models/judge-base"},
        {"name": "other", "algorithm": "sft"},
        {"name": "ppo", "algorithm": "ppo", "from": "/models/my-sft/", "reward_from": "reward"},
    )
    chain = lineage(of, "ppo")
    assert [stage.name for stage in chain] == ["reward", "ppo"]
    text = model_card(chain, "policy", {"ppo": {"kl": 1.5}})
    assert "The policy of stage `ppo`, trained from `my-sft` by PPO against a reward, with rlhf_jax." in text
    assert "| ppo | kl |  | 1.5 |" in text
    assert "* `reward`: data x.jsonl, " in text and "/home/me" not in text and "/models" not in text


def test_demonstrations_beside_samples_are_among_what_a_model_came_from():
    of = config(
        {"name": "texts", "algorithm": "sft"},
        {"name": "other", "algorithm": "sft"},
        {"name": "ppo", "algorithm": "ppo", "ppo": {"ptx_coef": 1, "ptx_from": "texts"}},
    )
    assert [stage.name for stage in lineage(of, "ppo")] == ["texts", "ppo"]


def test_a_teacher_and_a_judge_from_elsewhere_are_named_by_the_last_part_of_their_path():
    of = config(
        {
            "name": "own",
            "algorithm": "distill",
            "teacher_from": "hub:org/large",
            "reward_from": "/models/judge",
        },
        {"name": "disk", "algorithm": "distill", "from": "own", "teacher_from": "/models/large/"},
    )
    text = model_card(lineage(of, "disk"), "policy", {})
    assert "* `own`: data x.jsonl, teacher_from hub:org/large, reward_from judge, " in text
    assert "* `disk`: data x.jsonl, teacher_from large, " in text and "/models" not in text
    assert text.count("reward_from") == 1


def test_a_chain_is_told_in_its_order():
    of = config(
        {"name": "sft", "algorithm": "sft"},
        {"name": "reward", "algorithm": "reward_model", "from": "sft"},
        {"name": "ppo", "algorithm": "ppo", "from": "sft", "reward_from": "reward"},
    )
    text = model_card(lineage(of, "ppo"), "policy", {})
    assert "trained from scratch by supervised fine-tuning, then PPO against a reward, with" in text
    text = model_card(lineage(of, "reward"), "reward", {})
    assert "from scratch by supervised fine-tuning, then Bradley-Terry reward modelling, with" in text
    assert "pipeline_tag: text-classification" in text and "`ppo`" not in text


def test_an_ensemble_of_heads_is_exported_as_their_mean_which_is_told():
    of = config(
        {"name": "reward", "algorithm": "reward_model", "reward_model": {"num_heads": 3, "loss": "hinge"}}
    )
    text = model_card(lineage(of, "reward"), "reward", {})
    assert "by hinge reward modelling, with rlhf_jax. Its score is the mean of the 3 heads" in text


def test_an_adapter_tells_its_base_and_how_scores_are_read():
    of = config({"name": "reward", "algorithm": "reward_model", "from": "hub:org/base@abc"})
    text = model_card(lineage(of, "reward"), "reward", {}, base="hub:org/base@abc", normalizer=(0.5, 2.0))
    assert "library_name: peft\nbase_model: org/base\n" in text
    assert "The reward of stage `reward`, a LoRA adapter, trained from `hub:org/base@abc` by" in text
    assert '    "org/base", num_labels=1' in text and "score: (logits[0, 0] - 0.5) / 2.0" in text
    text = model_card(lineage(of, "reward"), "policy", {}, base="/home/me/exports/base/")
    assert "base_model: base\n" in text and 'CausalLM.from_pretrained("base"), "PATH")' in text
    assert "/home/me" not in text and "peft" not in model_card(lineage(of, "reward"), "reward", {})
