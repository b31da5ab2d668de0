"""Configurations that tests start from; RUN stands for the run directory."""

CHAIN = """
run: {dir: RUN}
stages:
  - {name: sft, algorithm: sft}
  - {name: reward, algorithm: reward_model, from: sft}
  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward}
"""
