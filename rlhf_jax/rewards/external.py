"""A reward model that is not the policy's twin: another architecture, and perhaps another tokenizer.

It has a program of its own on the same mesh, and is given rows of its own: the policy's tokens where both
have one tokenizer, the text rendered again where they have not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax.batch import Mean, Metrics, Params, Rows
from rlhf_jax.data.chat import chat_encoder
from rlhf_jax.data.collate import Row, collate_rows
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.tokenizer import Tokenizer, encode_after, encode_completions, encode_prompts
from rlhf_jax.sharding import place_rows

SHORTEST = 32
"""Tokens of the shortest rows; longer ones have twice as many, and so on: few programs are compiled."""


class RewardReader(NamedTuple):
    """How a reward model reads."""

    tokenizer: Tokenizer | None
    """None: the policy's tokenizer is its own, and it is given the policy's tokens."""
    joins: bool
    """Whether it learned from whole texts, as others make them, or from rows as they are made here."""
    bos_id: int | None
    pad_id: int | None
    """Its score is read at the last token that is not this one, as transformers does; None: at the last."""
    context_length: int

    def rows(
        self, rows: Rows, records: Sequence[PromptOnly], completions: Sequence[str], ended: np.ndarray
    ) -> tuple[Rows, int]:
        """Returns as many rows as the rollout has, and how many of them were cut to fit the context.

        Too long ones are cut on the left, for the completion is what is judged; BOS stays.

        Args:
            rows: the rollout's, on the host.
            records: of the first rows, the others being filling.
            completions: their texts.
            ended: bool[B], whether a completion has its EOS.
        """
        made, num_cut = [], 0
        for number, (record, completion) in enumerate(zip(records, completions, strict=True)):
            if self.tokenizer is None:
                ids = rows.tokens[number, : rows.lengths[number]].tolist()
            else:
                ids = render(self.tokenizer, record, completion, bool(ended[number]), joins=self.joins)
            while len(ids) > 1 and ids[-1] == self.pad_id:
                ids.pop()
            num_cut += len(ids) > self.context_length
            made.append(Row(self._cut(ids), 0))
        length = self.row_length(max(len(row.ids) for row in made))
        return collate_rows(made, length, pad_id=0, num_rows=len(rows.lengths)), num_cut

    def row_length(self, longest: int) -> int:
        """Returns the length of rows of which the longest has so many tokens."""
        length = SHORTEST
        while length < longest:
            length *= 2
        return min(length, self.context_length)

    def _cut(self, ids: list[int]) -> list[int]:
        excess = len(ids) - self.context_length
        if excess <= 0:
            return ids
        bos = ids[:1] if ids[0] == self.bos_id else []
        return bos + ids[excess + len(bos) :]


def render(
    tokenizer: Tokenizer, record: PromptOnly, completion: str, ended: bool, *, joins: bool
) -> list[int]:
    """Returns prompt and completion in a reward model's tokens, its EOS last where the completion ended.

    Conversations are rendered by the reward model's own chat template. Never nothing: a score needs a token.

    Args:
        tokenizer: the reward model's.
        record: the prompt.
        completion: text, without EOS.
        ended: whether the completion has its EOS.
        joins: give it what others train on: both encoded as one text, with BOS where the tokenizer puts it
            by itself, and what a template writes behind the last turn. Otherwise as rows are made here: the
            prompt keeps the tokens that it has alone, with BOS where there is one, and a turn's end is last.
    """
    if not isinstance(record.prompt, str):
        chat = chat_encoder(tokenizer)
        prompt = chat.prompt(record.prompt, record.variables, "a prompt, for the reward model")
        (answer,) = encode_completions(tokenizer, [completion])
        end = [chat.end_of_turn_id, *(chat.after_turn if joins else [])] if ended else []
        return prompt + answer + end
    end = [cast(int, tokenizer.eos_token_id)] if ended and tokenizer.eos_token_id is not None else []
    if joins:
        (ids,) = encode_completions(tokenizer, [record.prompt + completion])
        ids = leading_bos(tokenizer) + ids
    else:
        (prompt,) = encode_prompts(tokenizer, [record.prompt])
        ((answer, _),) = encode_after(tokenizer, [(record.prompt, prompt)], [completion])
        ids = prompt + answer
    return [*ids, *end] or [0]


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns [BOS] where the tokenizer puts it before a text by itself, [] where it does not."""
    first = cast("list[int]", tokenizer("a")["input_ids"])[:1]
    return first if first == [tokenizer.bos_token_id] else []


class ExternalReward:
    """Scores completions with a reward model that has a program of its own."""

    def __init__(
        self,
        reader: RewardReader,
        score: Callable[[Params, Params, Rows], Array],
        params: Params,
        mesh: Mesh,
    ) -> None:
        """Keeps the parameters, which the program is given as the frozen role `reward`."""
        self._reader = reader
        self._score = score
        self._frozen = {"reward": params}
        self._mesh = mesh

    def __call__(
        self, rows: Rows, records: Sequence[PromptOnly], completions: Sequence[str], ended: np.ndarray
    ) -> tuple[Array, Metrics]:
        """Returns f32[B], still on its way from the device, and the share of texts that were cut.

        Args: see `RewardReader.rows`.
        """
        read, num_cut = self._reader.rows(rows, records, completions, ended)
        scores = self._score({}, self._frozen, place_rows(self._mesh, read))
        return scores, {"reward/cut_rate": Mean(jnp.float32(num_cut), jnp.float32(len(records)))}
