"""Records become rows of token ids: prompt, completion, EOS. What is too long is dropped or cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

from rlhf_jax.config import DataConfig
from rlhf_jax.data.collate import Row, row
from rlhf_jax.data.records import (
    SENTENCE_ENDS,
    AnyRecord,
    Kind,
    Preference,
    PromptCompletion,
    PromptOnly,
    completions,
)
from rlhf_jax.data.tokenizer import Tokenizer, encode_completions, encode_prompts


class Encoded(NamedTuple):
    """The records that are kept, and their rows."""

    records: list[AnyRecord]
    """As text; a prompt that was cut to its first tokens reads as cut."""
    rows: list[Row]
    """One per record, of a preference two: chosen, rejected; of a prompt its prompt alone."""
    longest_prompt: int
    """Tokens, BOS included."""


def encode_records(
    records: Sequence[AnyRecord],
    kind: Kind,
    tokenizer: Tokenizer,
    cfg: DataConfig,
    *,
    loss_on: Literal["completion", "all"] = "completion",
    where: str = "data.train",
) -> Encoded:
    """Returns the records with their token ids.

    A record whose prompt has more than cfg.max_prompt_length tokens, BOS included, is left out; a row of more
    than cfg.max_length tokens is cut on the right. A prompt without any token (empty text, a tokenizer
    without BOS) becomes EOS, the token after which texts begin; to sample from it is an error.

    Raises:
        ValueError: an empty prompt to sample from; no record left.
    """
    eos_id = cast(int, tokenizer.eos_token_id)
    limit = prompt_limit(cfg, kind)
    kept: list[AnyRecord] = []
    prompts: list[list[int]] = []
    lengths: list[int] = []
    for number, (record, prompt) in enumerate(
        zip(records, encode_prompts(tokenizer, [record.prompt for record in records]), strict=True), start=1
    ):
        if not isinstance(record, PromptCompletion) and record.prompt_tokens:
            prompt, text = opening(tokenizer, prompt, record.prompt_tokens)
            if not prompt:
                continue
            record = _after_opening(record, text)
        if not prompt and kind == "prompt_only":
            raise ValueError(
                f"{where}: record {number} has an empty prompt and the tokenizer has no BOS token to start "
                "from; give every record a prompt"
            )
        prompt = prompt or [eos_id]
        lengths.append(len(prompt))
        if len(prompt) <= limit:
            kept.append(record)
            prompts.append(prompt)
    if not kept:
        raise ValueError(_nothing_left(where, lengths, limit, cfg))
    if kind == "prompt_only":
        rows = [Row(prompt, len(prompt)) for prompt in prompts]
    else:
        texts = [text for record in kept for text in completions(record)]
        encoded = iter(encode_completions(tokenizer, texts))
        rows = [
            row(prompt, next(encoded), eos_id, cfg.max_length)
            for record, prompt in zip(kept, prompts, strict=True)
            for _ in completions(record)
        ]
    if loss_on == "all":
        rows = [row._replace(prompt_length=1) for row in rows]
    return Encoded(kept, rows, max(map(len, prompts)))


def prompt_limit(cfg: DataConfig, kind: Kind) -> int:
    """Returns the tokens of the longest prompt that is not dropped; a completion keeps one token at least."""
    return cfg.max_prompt_length if kind == "prompt_only" else min(cfg.max_prompt_length, cfg.max_length - 1)


def opening(tokenizer: Tokenizer, ids: Sequence[int], num_tokens: int) -> tuple[list[int], str]:
    """Returns the first num_tokens tokens of a text as prompt, BOS not counted, and how they read.

    The cut moves left to where the next token neither begins a sentence nor goes on with a word: after a
    sentence a model may well end its text. Nothing is returned of a text without a further token or without
    such a place.
    """
    first = 0 if tokenizer.bos_token_id is None else 1
    end = first + num_tokens
    if len(ids) <= end:
        return [], ""
    longer = _read(tokenizer, ids[first : end + 1])
    for stop in range(end, first, -1):
        text = _read(tokenizer, ids[first:stop])
        following = longer[len(text) :]
        splits_word = text[-1:].isalnum() and following[:1].isalnum()
        if not splits_word and text.strip() and not text.rstrip().endswith((*SENTENCE_ENDS, '"', "\ufffd")):
            return list(ids[:stop]), text
        longer = text
    return [], ""


def _after_opening(record: Preference | PromptOnly, text: str) -> Preference | PromptOnly:
    """Returns the record with its prompt cut to `text`; completions that were no continuation become one."""
    if isinstance(record, PromptOnly):
        return record._replace(prompt=text)
    blank = "" if text[-1:].isspace() else " "
    return Preference(text, blank + record.chosen, blank + record.rejected, record.prompt_tokens)


def _read(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _nothing_left(where: str, lengths: Sequence[int], limit: int, cfg: DataConfig) -> str:
    if not lengths:
        return f"{where}: no text has more than data.prompt_tokens = {cfg.prompt_tokens} tokens; lower it"
    key = "data.max_prompt_length" if limit == cfg.max_prompt_length else "data.max_length (less one)"
    return (
        f"{where}: all {len(lengths)} prompts are too long: they have {min(lengths)} to {max(lengths)} "
        f"tokens, {key} allows {limit}; raise it, or shorten the prompts"
    )
