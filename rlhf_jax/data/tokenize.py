"""Records become rows of token ids: prompt, completion, EOS. What is too long is dropped or cut."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from rlhf_jax.config import DataConfig
from rlhf_jax.config_types import Kind
from rlhf_jax.data.chat import Turns, chat_encoder
from rlhf_jax.data.collate import Row
from rlhf_jax.data.columns import Message
from rlhf_jax.data.prose import SENTENCE_ENDS
from rlhf_jax.data.records import (
    AnyRecord,
    Preference,
    PromptOnly,
    completions,
    is_conversational,
)
from rlhf_jax.data.token_rows import TokenRows, token_rows
from rlhf_jax.data.tokenizer import Tokenizer, encode_after, encode_prompts, template_date
from rlhf_jax.progress import watched


class Losses(NamedTuple):
    """How much of the records is left out, by why."""

    long_prompts: int = 0
    """Records dropped: the prompt is too long, or the text too short to have one."""
    long_rows: int = 0
    """Records dropped: prompt and completion are too long."""
    without_turns: int = 0
    """Conversations dropped: no turn of the assistant stands in them as it is sampled."""
    uneven_starts: int = 0
    """Records dropped: their completions do not follow the same prompt, for the chat template rewrites turns
    that more turns follow."""
    cut_prompts: int = 0
    unlearned_turns: int = 0
    """Turns of the assistant without loss, as the chat template writes them otherwise once more follow."""
    apart: int = 0
    """Completions encoded alone, as the joined text does not begin with the prompt's tokens."""


OTHER_DROPS = ("long_rows", "without_turns", "uneven_starts")
"""The fields of Losses that count records, besides long_prompts."""


class Encoded(NamedTuple):
    """The records that are kept, and their rows."""

    records: list[AnyRecord]
    """As text or messages; a prompt that was cut to its first tokens reads as cut."""
    rows: TokenRows
    """One per completion: of a preference two: chosen, rejected; of a prompt its prompt alone. Rankings all
    have as many, of which the last may be empty."""
    longest_prompt: int
    """Tokens, BOS included."""
    losses: Losses


class _Candidate(NamedTuple):
    """A record with its tokens, before any are cut."""

    record: AnyRecord
    prompt: list[int]
    turns: list[Turns]
    """Of each completion, its prompt included."""


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

    What is longer than cfg.max_prompt_length (BOS included) and cfg.max_length is dropped or cut, as
    cfg.prompt_truncation and cfg.truncation say. A prompt without any token (empty text, a tokenizer without
    BOS) becomes EOS, the token after which texts begin; to sample from it is an error.

    Raises:
        ValueError: an empty prompt to sample from; conversations beside plain text, without a chat template,
            or with prompts cut on the right; no record left.
    """
    if has_conversations(records, where):
        if cfg.prompt_truncation == "right":
            raise ValueError(
                f"{where}: holds conversations and data.prompt_truncation is 'right', which would cut "
                "off where the assistant begins; allowed: drop, left"
            )
        candidates = _conversations(records, kind, tokenizer, where)
    else:
        candidates = _plain(records, kind, tokenizer, where)
    limit = prompt_limit(cfg, kind)
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    kept: list[AnyRecord] = []
    of_records: list[list[Row]] = []
    lengths: list[int] = []
    counts = collections.Counter[str]()
    for record, prompt, turns in candidates:
        counts["unlearned_turns"] += sum(of.num_unlearned for of in turns)
        counts["apart"] += sum(of.was_apart for of in turns)
        if not all(of.spans for of in turns):
            counts["without_turns"] += 1
            continue
        if any(of.ids[: of.spans[0][0]] != prompt for of in turns):
            counts["uneven_starts"] += 1
            continue
        lengths.append(len(prompt))
        if len(prompt) > limit:
            if cfg.prompt_truncation == "drop":
                continue
            counts["cut_prompts"] += 1
            turns = [_cut_prompt(of, len(prompt), limit, cfg.prompt_truncation, bos) for of in turns]
            prompt = _cut_prompt(Turns(prompt, []), len(prompt), limit, cfg.prompt_truncation, bos).ids
            if isinstance(record, PromptOnly) and isinstance(record.prompt, str):
                record = record._replace(prompt=_read(tokenizer, prompt[len(bos) :]))
        if kind == "prompt_only":
            of_record = [Row(prompt, len(prompt))]
        else:
            of_record = [_row(of, cfg.max_length, cfg.truncation, bos) for of in turns]
        if cfg.truncation == "drop" and any(row.was_cut for row in of_record):
            counts["long_rows"] += 1
            continue
        kept.append(record)
        of_records.append(of_record)
    if not kept:
        raise ValueError(_nothing_left(where, lengths, limit, cfg, counts))
    counts["long_prompts"] = len(records) - len(kept) - sum(counts[why] for why in OTHER_DROPS)
    most = max(map(len, of_records))  # of rankings they differ
    rows = [row for of in of_records for row in (*of, *[Row([], 0)] * (most - len(of)))]
    longest_prompt = max(row.prompt_length for row in rows)
    if loss_on == "all":
        rows = [row._replace(prompt_length=1, excluded=()) for row in rows]
    return Encoded(kept, token_rows(rows), longest_prompt, Losses(**counts))


def has_conversations(records: Sequence[AnyRecord], where: str) -> bool:
    """Returns whether the records hold messages; ValueError where some do and others are text."""
    are = [is_conversational(record) for record in records]
    if len(set(are)) > 1:
        number = are.index(not are[0]) + 1
        forms = ("conversations", "plain text") if are[0] else ("plain text", "conversations")
        raise ValueError(
            f"{where}: record 1 is of {forms[0]}, record {number} of {forms[1]}; let all be alike, for a "
            "conversation ends with a token of its chat template"
        )
    return are[0]


def text_settings(tokenizer: Tokenizer, cfg: DataConfig, *, has_conversations: bool) -> dict[str, Any]:
    """Returns how text becomes tokens, as JSON values: what a checkpoint tells of the text it was trained on.

    Args:
        tokenizer: of the run.
        cfg: reads prompt_template, prompt_truncation, truncation.
        has_conversations: whether the records are; otherwise the chat template does not matter.
    """
    backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    rules = [backend.get(part) for part in ("normalizer", "pre_tokenizer", "model")]
    return {
        "tokenizer": _digest([tokenizer.get_vocab(), rules]),
        "bos": tokenizer.bos_token_id,
        "stop": stop_id(tokenizer, has_conversations=has_conversations),
        "pad": tokenizer.pad_token_id,
        "conversations": has_conversations,
        "chat_template": _digest(tokenizer.chat_template) if has_conversations else "",
        "template_date": template_date(tokenizer) if has_conversations else "",
        "prompt_template": cfg.prompt_template,
        "prompt_truncation": cfg.prompt_truncation,
        "truncation": cfg.truncation,
    }


def text_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Iterable[str] = ()) -> str:
    """Returns what differs between two text_settings, such as `stop 2 there and 7 here`; empty for nothing.

    Args:
        theirs: of a checkpoint.
        ours: of the stage that reads it.
        keys: to compare; all where none are named.
    """
    return ", ".join(
        f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in keys or ours
        if theirs.get(key) != ours.get(key)
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stop_id(tokenizer: Tokenizer, *, has_conversations: bool) -> int:
    """Returns the token that ends a completion: of conversations the one that ends the template's turns."""
    if has_conversations:
        return chat_encoder(tokenizer).end_of_turn_id
    return cast(int, tokenizer.eos_token_id)


def _conversations(
    records: Sequence[AnyRecord], kind: Kind, tokenizer: Tokenizer, where: str
) -> Iterator[_Candidate]:
    """Yields conversations in tokens; a prompt ends where the first turn begins that is learned."""
    encoder = chat_encoder(tokenizer)
    for number, record in enumerate(watched(records, f"tokenising {where}"), start=1):
        here, prompt = f"{where}: record {number}", cast("list[Message]", record.prompt)
        if kind == "prompt_only":
            yield _Candidate(record, encoder.prompt(prompt, record.variables, here), [])
            continue
        turns = [
            encoder.turns(prompt, cast("list[Message]", completion), record.variables, here)
            for completion in completions(record)
        ]
        spans = turns[0].spans
        yield _Candidate(record, turns[0].ids[: spans[0][0]] if spans else [], turns)


def _plain(
    records: Sequence[AnyRecord], kind: Kind, tokenizer: Tokenizer, where: str
) -> Iterator[_Candidate]:
    """Yields texts in tokens, EOS after each completion, but those that are too short to have a prompt."""
    eos_id = cast(int, tokenizer.eos_token_id)
    encoded: list[tuple[AnyRecord, list[int]]] = []
    prompts = encode_prompts(
        tokenizer, [cast(str, record.prompt) for record in records], f"tokenising prompts of {where}"
    )
    for record, prompt in zip(records, prompts, strict=True):
        if isinstance(record, (Preference, PromptOnly)) and record.prompt_tokens:
            ids, text = opening(tokenizer, prompt, record.prompt_tokens)
            if ids:
                encoded.append((_after_opening(record, text), ids))
        else:
            encoded.append((record, prompt))
    if kind == "prompt_only":
        answers = iter(())
    else:
        of = [(record, prompt, text) for record, prompt in encoded for text in completions(record)]
        befores = [(cast(str, record.prompt), prompt) for record, prompt, _ in of]
        answers = iter(
            encode_after(tokenizer, befores, [cast(str, text) for *_, text in of], f"tokenising {where}")
        )
    for number, (record, prompt) in enumerate(encoded, start=1):
        if not prompt and kind == "prompt_only":
            raise ValueError(
                f"{where}: record {number} has an empty prompt and the tokenizer has no BOS token to start "
                "from; give every record a prompt"
            )
        turns = []
        prompt = prompt or [eos_id]
        for _ in completions(record) if kind != "prompt_only" else ():
            answer, was_apart = next(answers)
            ids = [*prompt, *answer, eos_id]
            turns.append(Turns(ids, [(len(prompt), len(ids))], was_apart=was_apart))
        yield _Candidate(record, prompt, turns)


def _cut_prompt(turns: Turns, length: int, limit: int, side: str, bos: list[int]) -> Turns:
    """Returns turns whose prompt of `length` tokens is cut to `limit` tokens; BOS stays."""
    ids = turns.ids
    if side == "right":
        kept = ids[:limit]
    else:
        start = bos if ids[: len(bos)] == bos else []
        kept = [*start, *ids[length - limit + len(start) : length]]
    gone = length - limit
    spans = [(start - gone, stop - gone) for start, stop in turns.spans]
    return turns._replace(ids=kept + ids[length:], spans=spans)


def _row(turns: Turns, max_length: int, truncation: str, bos: list[int]) -> Row:
    """Returns turns as a row of at most max_length tokens; what is cut on the right has no EOS."""
    ids, spans = turns.ids, turns.spans
    gone = len(ids) - max_length
    if gone > 0 and truncation == "left":
        start = bos if ids[: len(bos)] == bos else []
        ids = [*start, *ids[gone + len(start) :]]
        first = max(len(start), 1)  # nothing predicts the first token
        spans = [(max(a - gone, first), b - gone) for a, b in spans if b - gone > first]
    elif gone > 0:
        ids = ids[:max_length]
        spans = [(a, min(b, max_length)) for a, b in spans if a < max_length]
    excluded = tuple((before[1], after[0]) for before, after in itertools.pairwise(spans))
    return Row(ids, spans[0][0], was_cut=gone > 0, excluded=excluded)


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
    chosen, rejected = cast(str, record.chosen), cast(str, record.rejected)
    return Preference(text, blank + chosen, blank + rejected, record.prompt_tokens)


def _read(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _nothing_left(
    where: str, lengths: Sequence[int], limit: int, cfg: DataConfig, counts: Mapping[str, int]
) -> str:
    if counts["without_turns"]:
        return (
            f"{where}: no turn of the assistant in {counts['without_turns']} conversations stands in the "
            "text as it is sampled: the chat template writes something else after the messages before it; "
            "set tokenizer.chat_template to one that does not"
        )
    if counts["uneven_starts"]:
        return (
            f"{where}: the completions of {counts['uneven_starts']} records do not follow the same prompt: "
            "the chat template writes turns otherwise once more follow; set tokenizer.chat_template to one "
            "that does not, or give completions of one turn"
        )
    if counts["long_rows"]:
        return (
            f"{where}: all records have more than data.max_length = {cfg.max_length} tokens; raise it, or "
            "set data.truncation"
        )
    if not lengths:
        return f"{where}: no text has more than data.prompt_tokens = {cfg.prompt_tokens} tokens; lower it"
    key = "data.max_prompt_length" if limit == cfg.max_prompt_length else "data.max_length (less one)"
    return (
        f"{where}: all {len(lengths)} prompts are too long: they have {min(lengths)} to {max(lengths)} "
        f"tokens, {key} allows {limit}; raise it, or shorten the prompts"
    )
