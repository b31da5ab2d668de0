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
