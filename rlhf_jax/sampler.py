"""A policy of any directory, loaded once, and completions of any prompts by it.

    sampler = Sampler.load("runs/quickstart/export", max_new_tokens=48)
    for completion in sampler(["my toy broke"], temperature=0.7):
        print(completion.text)

The engine is that of training: same prompt, key and options, same tokens. Static shapes are few: the
number of prompts is rounded up to a power of four, their length to one of two, with prompts and tokens that
are none; what a call may change is an argument of its programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from rlhf_jax import keys
from rlhf_jax.config import RolloutConfig
from rlhf_jax.data.collate import collate_prompts
from rlhf_jax.data.columns import Content
from rlhf_jax.options import OPTIONS, did_you_mean
from rlhf_jax.programs import decode_weights, sampling_programs
from rlhf_jax.roles import load_policy
from rlhf_jax.rollout.generate import run_to_end
from rlhf_jax.rollout.sampling import Sampling, read_sampling
from rlhf_jax.rollout.slots import Completions, Engine, Queue, Slots
from rlhf_jax.rollout.stops import StopStrings, StopWatch, read_stop_ids, read_stop_strings
from rlhf_jax.sharding import axis_rules, gathered, make_mesh, num_parts, place_rows, traced_on
from rlhf_jax.stage import stage_model
from rlhf_jax.stored_policy import Requests, StoredPolicy, find_policy, read_limit, read_prompts

OF_A_CALL = ("temperature", "top_k", "top_p", "min_p", "stop_tokens", "stop_strings")
"""Options of the section rollout that each call may change."""
QUEUE = 1024  # prompts of one run of the loop, or a few more
WIDTH = 16  # tokens of the shortest static prompt
STOPS = 8  # the static number of stop tokens is a multiple of it


class Completion(NamedTuple):
    """One completion of a prompt."""

    prompt: Content
    """Text, or messages."""
    text: str
    """Without special tokens, and up to the stop string if there was one."""
    tokens: list[int]
    """With the one that ended it."""
    logprobs: list[float]
    """Nats, of each token, under the policy at the temperature, nothing left out."""
    ended: bool
    """By EOS, a stop token or a stop string, and not by its length."""
    prompt_index: int
    sample_index: int

    @property
    def mean_logprob(self) -> float:
        """Returns the mean over the tokens, in nats."""
        return float(np.mean(self.logprobs))


class Sampler:
    """A policy on the devices, and the programs that sample from it."""

    def __init__(self, policy: StoredPolicy) -> None:
        """Loads the policy. Raises ValueError where the mesh does not divide it."""
        self.policy = policy
        self._axes = policy.stage.mesh.axes
        with axis_rules(self._axes):
            self._mesh = make_mesh(policy.stage.mesh)
            self._parts = traced_on(self._mesh, num_parts)("batch")
            model = stage_model(policy.stage, policy.architecture)
            loaded = load_policy(policy.path, model, self._mesh, policy.stage.model.dtype)
            self._weights = decode_weights(model, self._mesh, loaded)
        self._programs = functools.cache(functools.partial(sampling_programs, mesh=self._mesh))

    @classmethod
    def load(cls, model: str, flags: Sequence[str] = (), **rollout: Any) -> Sampler:
        """Returns a sampler of a directory's policy.

        Args:
            model: a run, RUN/STAGE, a Hugging Face directory, or hub:OWNER/NAME[@REVISION].
            flags: of other sections, as on the command line: `["--model.dtype", "bfloat16"]`.
            rollout: options of the section rollout; `max_new_tokens` is the most that a call may ask for.

        Raises:
            ValueError: options that are wrong, no policy there, or a mesh that does not divide it.
        """
        return cls(find_policy(model, flags, **rollout))

    def __call__(
        self,
        prompts: Sequence[Content],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        group_size: int = 1,
        greedy: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> list[Completion]:
        """Returns group_size completions of each prompt, one behind the other.

        A completion depends on its prompt, the place of that in the list, its number in the group, the seed
        and the options alone. Only another group size, `greedy`, more prompts than the next power of four,
        or a longer one than the next power of two, compile anything; and each of top_k, top_p, min_p when it
        is used for the first time.

        Args:
            prompts: texts, or conversations: lists of {role, content}.
            max_new_tokens: for all or for each, at most those of the sampler, which are the default.
            group_size: completions of each prompt, which is computed once for all of them.
            greedy: take the most likely token at each step.
            seed: another one draws others.
            options: of OF_A_CALL, instead of those that the sampler was loaded with.

        Raises:
            ValueError: see `read_prompts`; options that are wrong.
        """
        requests = read_prompts(self.policy, prompts)
        if max_new_tokens is not None:
            is_list = isinstance(max_new_tokens, Sequence)
            limits = list(max_new_tokens) if is_list else [max_new_tokens] * len(prompts)
            if len(limits) != len(prompts):
                raise ValueError(f"max_new_tokens: {len(limits)} numbers for {len(prompts)} prompts")
            most = self.policy.stage.rollout.max_new_tokens
            requests = requests._replace(limits=[read_limit(x, most, "the call") for x in limits])
        cfg = changed(self.policy.stage.rollout, options)
        return list(self.complete(requests, cfg, group_size=group_size, greedy=greedy, seed=seed))

    def complete(
        self, requests: Requests, cfg: RolloutConfig, *, group_size: int, greedy: bool, seed: int
    ) -> Iterator[Completion]:
        """Yields the completions of prompts in their order, QUEUE prompts at a time; see `__call__`."""
        tokenizer = self.policy.tokenizer
        check_call(cfg, group_size=group_size, greedy=greedy)
        stops = read_stop_ids(cfg, tokenizer, requests.stop, cast(int, tokenizer.eos_token_id))
        strings = read_stop_strings(cfg, tokenizer)
        num_stops = -(-len(stops) // STOPS) * STOPS
        sampling = _traced(read_sampling(cfg, cast(jax.Array, np.resize(stops, num_stops))))
        engine = Engine(
            num_columns=cfg.max_new_tokens,
            pad_id=cast(int, tokenizer.pad_token_id),
            num_slots=-(-cfg.slots // self._parts) * self._parts,
            refill_size=cfg.refill_size,
            group_size=group_size,
            greedy=greedy,
        )
        key = keys.named(jax.random.key(seed), "rollout")
        at_once = _rounded(QUEUE, self._parts, factor=4)
        for start in range(0, len(requests.ids), at_once):
            numbers = range(start, min(start + at_once, len(requests.ids)))
            with axis_rules(self._axes):
                completed = self._run(engine, requests, numbers, sampling, key, strings)
            yield from completed

    def _run(
        self,
        engine: Engine,
        requests: Requests,
        numbers: range,
        sampling: Sampling,
        key: jax.Array,
        strings: StopStrings | None,
    ) -> list[Completion]:
        """Returns the completions of some of the prompts: one run of the loop."""
        programs = self._programs(engine)
        cfg, limit = self.policy.stage.rollout, engine.num_columns
        width = min(
            _rounded(max(len(requests.ids[number]) for number in numbers), WIDTH, factor=2),
            self.policy.architecture.context_length - limit,
        )
        num_rows = _rounded(len(numbers), self._parts, factor=4)
        ids = [requests.ids[number] for number in numbers]
        prompts = collate_prompts(ids, numbers, width, engine.pad_id, num_rows)
        limits = np.full(num_rows, limit, np.int32)
        limits[: len(numbers)] = [requests.limits[number] or limit for number in numbers]
        queue = place_rows(self._mesh, Queue(prompts, cast(jax.Array, limits)))

        steps = cast(jax.Array, np.int32(cfg.steps_per_call))

        def run(slots: Slots) -> Slots:
            return programs.run(self._weights, queue, sampling, key, slots, steps)

        # It sees rows in the order of the slots' queues.
        watch = StopWatch(strings) if strings else None
        slots = run_to_end(run, programs.end, run(programs.start(self._weights, queue.prompts)), watch)
        done = gathered(programs.in_order(queue, slots.done))
        texts = StopWatch(strings) if strings else None
        if texts is not None:
            texts(done.tokens, done.lengths)
        return [
            self._completion(requests, number, sample, place * engine.group_size + sample, done, texts)
            for place, number in enumerate(numbers)
            for sample in range(engine.group_size)
        ]

    def _completion(
        self,
        requests: Requests,
        number: int,
        sample: int,
        row: int,
        done: Completions,
        texts: StopWatch | None,
    ) -> Completion:
        length = int(done.lengths[row])
        tokens = done.tokens[row, :length].tolist()
        text = texts.text(row) if texts else None
        if text is None:
            tokenizer = self.policy.tokenizer
            text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(
            prompt=requests.records[number].prompt,
            text=str(text),
            tokens=tokens,
            logprobs=done.logprobs[row, :length].tolist(),
            ended=bool(done.ended[row]),
            prompt_index=number,
            sample_index=sample,
        )


def check_call(cfg: RolloutConfig, *, group_size: int, greedy: bool) -> None:
    """Raises ValueError where a group has no completions, or an option would be ignored."""
    if group_size < 1:
        raise ValueError(f"group_size: must be >= 1, got {group_size}")
    unset = RolloutConfig()
    idle = [name for name in ("top_k", "top_p", "min_p") if getattr(cfg, name) != getattr(unset, name)]
    if greedy and idle:
        raise ValueError(f"rollout.{idle[0]}: would be ignored: greedy takes the most likely token")


def changed(cfg: RolloutConfig, options: Mapping[str, Any]) -> RolloutConfig:
    """Returns the options with some of OF_A_CALL changed; ValueError where one is wrong, or none of them."""
    read = {}
    for name, value in options.items():
        if name not in OF_A_CALL:
            hint = did_you_mean(name, OF_A_CALL) or f"; a call may change {', '.join(OF_A_CALL)}"
            raise ValueError(f"{name}: no such option of a call{hint}")
        try:
            read[name] = OPTIONS["rollout"][name].read(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return dataclasses.replace(cfg, **read)


def _rounded(number: int, least: int, factor: int) -> int:
    """Returns the least of least, factor * least, factor^2 * least, ... that is not below the number."""
    while least < number:
        least *= factor
    return least


def _traced(sampling: Sampling) -> Sampling:
    """Returns the values as arrays of one type each, so that another value is the same program's."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32 if isinstance(x, float) else np.int32), sampling)
