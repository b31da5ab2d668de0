"""Samples a queue of prompts with another library, when told to; a script for the Python that has it.

It imports nothing of rlhf_jax. The first line of stdin is the job as JSON; each further one makes it complete
the whole queue, in batches that end with their longest completion. It answers each with a line `peer: ...`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from peer_models import PAD, Words, llama_config, tunix_llama, turns

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Complete = Callable[[list[list[int]], list[int]], None]
"""Completes a batch of prompts, each by so many tokens."""


def with_transformers(job: dict[str, Any]) -> Complete:
    """Returns transformers' generate, on random weights, in float32."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, StoppingCriteria

    torch.set_num_threads(job["threads"])
    model = LlamaForCausalLM(llama_config(job)).eval()

    class Limits(StoppingCriteria):
        """Ends each row at its own limit."""

        def __init__(self, limits: list[int]) -> None:
            self.ends = job["prompt"] + torch.tensor(limits)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    def complete(prompts: list[list[int]], limits: list[int]) -> None:
        ids = torch.tensor(prompts)
        settings = GenerationConfig(
            max_new_tokens=max(limits), do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=None
        )
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=[Limits(limits)],
            )
        assert found.shape[1] == job["prompt"] + max(limits), found.shape

    return complete


def with_tunix(job: dict[str, Any]) -> Complete:
    """Returns Tunix's sampler, on random weights, in float32, with a cache no larger than has to be."""
    import tunix

    cache = tunix.CacheConfig(
        cache_size=job["prompt"] + job["new"],
        num_layers=job["num_layers"],
        num_kv_heads=job["num_kv_heads"],
        head_dim=job["hidden_size"] // job["num_heads"],
    )
    sampler = tunix.Sampler(tunix_llama(job), Words(), cache)
    never = [job["vocab_size"] + 7]

    def complete(prompts: list[list[int]], limits: list[int]) -> None:
        found = sampler(
            [" ".join(map(str, prompt)) for prompt in prompts],
            max_generation_steps=max(limits),
            max_prompt_length=job["prompt"],
            temperature=1.0,
            top_p=1.0,
            eos_tokens=never,
            seed=0,
        )
        assert all(len(row) == max(limits) for row in found.tokens)

    return complete


def main() -> None:
    """Reads the job, answers, and completes the queue once for each line."""
    job = json.loads(sys.stdin.readline())
    complete = {"transformers": with_transformers, "tunix": with_tunix}[sys.argv[1]](job)
    batches = [slice(i, i + job["batch"]) for i in range(0, len(job["prompts"]), job["batch"])]
    for _ in turns():
        for rows in batches:
            complete(job["prompts"][rows], job["limits"][rows])


if __name__ == "__main__":
    main()
