"""Completions by any policy: `python -m rlhf_jax.sample --model RUN_OR_HF_DIRECTORY --prompt TEXT`.

Prompts are those of --prompt, of a file of records, or the lines of stdin. A conversation is given to the
model by its chat template, a text as it is. What is drawn is a function of prompts, options and seed: the
number of slots, devices and hosts changes nothing. Exit codes: 0 sampled; 2 model, prompts or a flag are
wrong, and the reason is named.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from rlhf_jax import distributed
from rlhf_jax.agreement import check_alike, ended_with
from rlhf_jax.best_of import Best, Scorer, best_of, find_reward, kl_bound
from rlhf_jax.config import RewardsConfig, StageConfig
from rlhf_jax.data.columns import Content
from rlhf_jax.files import replace_file, to_json
from rlhf_jax.origins import fingerprint
from rlhf_jax.sampler import Completion, Sampler, check_call
from rlhf_jax.stored_policy import (
    Requests,
    StoredPolicy,
    find_policy,
    read_file,
    read_options,
    read_prompts,
)

__all__ = ["Completion", "Sampler"]

OPEN, CLOSE = "⟦", "⟧"


def main(argv: list[str] | None = None) -> int:
    """Samples what the flags name and prints it; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_jax.sample",
        description=__doc__,
        epilog="Options of rollout, data, model, tokenizer, rewards, mesh and distributed are given as for\n"
        "rlhf_jax.train, such as --rollout.temperature 0.7, --rollout.max_new_tokens 128,\n"
        "--rollout.stop_strings '[\"Customer:\"]', --data.columns.prompt question. By default\n"
        "rollout.slots is 16, and rollout.steps_per_call 32.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="a run, RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="to complete; may be given several times"
    )
    parser.add_argument(
        "--data",
        default="",
        help="a file of prompts, in the notation of data.train; synthetic: those held out of the embedded\n"
        "task; a column max_new_tokens bounds the completions of its record",
    )
    parser.add_argument(
        "--chat", action="store_true", help="a prompt of --prompt or stdin is the message of a user"
    )
    parser.add_argument("--group_size", type=int, default=1, help="completions of each prompt; by default 1")
    parser.add_argument(
        "--best_of",
        type=int,
        default=0,
        metavar="N",
        help="draw N completions of each prompt and give the one of the highest score, by --reward_from or\n"
        "--rewards.function package.module:name, or both, weighted as in training",
    )
    parser.add_argument(
        "--reward_from",
        default="",
        help="the reward model of --best_of: RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME",
    )
    parser.add_argument("--greedy", action="store_true", help="the most likely token at each step")
    parser.add_argument("--seed", type=int, default=0, help="another one draws others; by default 0")
    parser.add_argument(
        "--out", default="", help="write JSON lines to this file; must not exist", metavar="FILE"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines on stdout")
    parser.add_argument(
        "--logprobs", action="store_true", help="JSON has each token and its log-probability too"
    )
    args, flags = parser.parse_known_args(argv)
    try:
        return _sampled(args, flags)
    except (ValueError, OSError) as error:
        return ended_with(error)


def _sampled(args: argparse.Namespace, flags: list[str]) -> int:
    """Returns 0 after what the flags name is sampled, and shown or written by the first process."""
    out = Path(args.out)
    if args.prompt and args.data:
        raise ValueError("--prompt and --data are both given; leave one of them out")
    if args.chat and args.data:
        raise ValueError("--chat: would be ignored: records of --data tell themselves whether they are chats")
    if args.logprobs and not (args.json or args.out):
        raise ValueError("--logprobs: would be ignored without --json or --out")
    if args.out and out.exists():
        raise ValueError(f"--out {out}: exists already; choose another file")
    stage = read_options(args.model, flags, data=args.data, reward_from=args.reward_from)
    check_call(stage.rollout, group_size=args.group_size, greedy=args.greedy)
    group_size = _check_best_of(args, stage)
    distributed.initialize(stage.distributed)
    policy = find_policy(args.model, flags, data=args.data, reward_from=args.reward_from)
    requests = _requests(args, policy)
    reward = find_reward(policy, requests) if args.best_of else None
    check_alike(
        "models, prompts or the flags",
        lambda: (
            fingerprint(policy.path),
            requests,
            repr(policy.stage),
            args.seed,
            group_size,
            args.greedy,
            fingerprint(reward.model.path) if reward and reward.model else "",
        ),
    )
    sampler = Sampler(policy)
    start = time.perf_counter()
    drawn = sampler.complete(
        requests, policy.stage.rollout, group_size=group_size, greedy=args.greedy, seed=args.seed
    )
    completions: Iterable[Completion | Best] = drawn
    if reward is not None:
        completions = best_of(drawn, group_size, Scorer(policy, requests, reward, group_size))
    lines, num_completions, num_tokens, bests = [], 0, 0, []
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for found in completions:
        completion = found.completion if isinstance(found, Best) else found
        if isinstance(found, Best):
            bests.append((found.score, found.mean_score))
        num_completions, num_tokens = num_completions + 1, num_tokens + len(completion.tokens)
        if not distributed.is_first():
            continue
        told = as_json(completion, with_logprobs=args.logprobs)
        if isinstance(found, Best):
            told |= {"score": found.score, "mean_score": found.mean_score}
        line = to_json(told) if args.json or args.out else ""
        if args.json:
            print(line, flush=True)
        if args.out:
            lines.append(line)
        if not (args.json or args.out):
            for text in shown(found, group_size, in_colour=console.is_terminal):
                console.print(text)
    distributed.wait_for_all("done")
    if not distributed.is_first():
        return 0
    if args.out:
        replace_file(out, "".join(f"{line}\n" for line in lines))
    seconds = time.perf_counter() - start
    if bests:
        best, mean = np.mean(bests, axis=0)
        print(
            f"best of {group_size}: mean score {best:.4g}, of all {mean:.4g}; KL to the policy at most "
            f"{kl_bound(group_size):.4g} nats per completion",
            file=sys.stderr,
        )
    print(
        f"{num_completions} completions, {num_tokens} tokens in {seconds:.1f} s, compiling included"
        + (f" -> {out}" if args.out else ""),
        file=sys.stderr,
    )
    return 0


def _check_best_of(args: argparse.Namespace, stage: StageConfig) -> int:
    """Returns the completions of a prompt; ValueError where rewards would be ignored, or choose nothing."""
    if not args.best_of:
        for flag, is_set in (
            ("--reward_from", args.reward_from),
            ("--rewards", stage.rewards != RewardsConfig()),
        ):
            if is_set:
                raise ValueError(f"{flag}: would be ignored without --best_of")
        return args.group_size
    if args.best_of < 2:
        raise ValueError(f"--best_of: must be >= 2, got {args.best_of}")
    if args.group_size != 1:
        raise ValueError("--group_size: would be ignored: --best_of says how many completions are drawn")
    if args.greedy:
        raise ValueError("--greedy: all completions of a prompt would be the same one, and --best_of idle")
    return args.best_of


def _requests(args: argparse.Namespace, policy: StoredPolicy) -> Requests:
    """Returns the prompts that the flags name, or those of stdin."""
    if args.data:
        return read_file(policy)
    texts, where = args.prompt, "--prompt"
    if not texts:
        texts, where = [line.rstrip("\r\n") for line in sys.stdin], "stdin"
    if not texts:
        raise ValueError("stdin: has no lines; give prompts with --prompt, --data or on stdin, one per line")
    prompts: list[Content] = [[{"role": "user", "content": text}] for text in texts] if args.chat else texts
    return read_prompts(policy, prompts, where)


def as_json(completion: Completion, *, with_logprobs: bool) -> dict[str, Any]:
    """Returns what a line of JSON tells of a completion; log-probabilities are in nats."""
    told = {
        "prompt": completion.prompt,
        "completion": completion.text,
        "num_tokens": len(completion.tokens),
        "ended": completion.ended,
        "mean_logprob": completion.mean_logprob,
        "prompt_index": completion.prompt_index,
        "sample_index": completion.sample_index,
    }
    of_tokens = {"tokens": completion.tokens, "logprobs": completion.logprobs}
    return told | of_tokens if with_logprobs else told


def shown(found: Completion | Best, group_size: int, *, in_colour: bool) -> Iterator[Text]:
    """Yields what is printed of a completion: a title, then its text behind the prompt's.

    Args:
        found: the completion to be shown, with its score where it is the best of its group.
        group_size: of each prompt.
        in_colour: a colour tells the completion from the prompt; otherwise brackets do.
    """
    completion = found.completion if isinstance(found, Best) else found
    score = f", score {found.score:.4g}" if isinstance(found, Best) else ""
    sample = f", completion {completion.sample_index + 1}" if group_size > 1 else ""
    end = "ended" if completion.ended else "cut at its length"
    title = (
        f"-- prompt {completion.prompt_index + 1}{sample}: {len(completion.tokens)} tokens, {end}, "
        f"mean logprob {completion.mean_logprob:.2f}{score}"
    )
    yield Text(title, style="dim" if in_colour else "")
    prompt = completion.prompt
    if not isinstance(prompt, str):
        prompt = "".join(f"{message['role']}: {message.get('content')}\n" for message in prompt)
    text = Text(prompt, style="cyan" if in_colour else "")
    text.append(
        completion.text if in_colour else OPEN + completion.text + CLOSE,
        style="bold green" if in_colour else "",
    )
    yield text


if __name__ == "__main__":
    sys.exit(main())
