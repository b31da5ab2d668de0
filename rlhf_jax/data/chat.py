"""Conversations become token ids by the tokenizer's chat template; the assistant's turns carry loss.

What a turn adds to the rendered text says where it stands: turn i is what render(messages[:i + 1]) has after
render(messages[:i], add_generation_prompt=True), up to the token that ends the template's turns. No template
needs {% generation %} for it; where one has it around just that, the result is the same. A template that
writes an earlier turn otherwise once more messages follow (Qwen3 leaves out its reasoning) gives loss only to
the turns that stand in the whole text as they were sampled.

Only the template writes control tokens. The name of one in a message is plain letters: the conversation is
rendered a second time with such names masked, and text between two control tokens that holds one is encoded
as plain text.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import tokenizers

from rlhf_jax.data.columns import Message
from rlhf_jax.data.third_party import told_as
from rlhf_jax.data.tokenizer import Tokenizer

MASK = "\ue000"  # of the private use area: in no control token's name
PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})

Span = tuple[int, int]
"""Half-open."""


class Turns(NamedTuple):
    """A conversation in tokens, up to the end of its last turn that carries loss."""

    ids: list[int]
    spans: list[Span]
    """Tokens that carry loss, each up to the token that ends a turn; of a prompt none."""
    num_unlearned: int = 0
    """Assistant turns without loss, as the template writes them otherwise in the whole conversation."""
    was_apart: bool = False
    """The tokens of the whole text do not begin with those of some turn's prompt: it was encoded in parts,
    cut where the turns begin."""


class ChatEncoder:
    """Encodes conversations with a tokenizer and its template."""

    def __init__(self, tokenizer: Tokenizer):
        """Looks at the template; raises ValueError where there is none, or its turns end with no token."""
        if not tokenizer.chat_template:
            raise ValueError(
                "tokenizer.chat_template: the records are conversations, but the tokenizer "
                f"{tokenizer.name_or_path or 'of this run'} has no chat template; set it to a .jinja file or "
                "to the template's text, or name the tokenizer of a chat model"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer.path: the tokenizer {tokenizer.name_or_path} does not tell where in a text its "
                "tokens stand, which conversations need; convert it to a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._plain, self._parsed = (_backend(tokenizer, parses_special=parses) for parses in (False, True))
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        self._special = {*(name for name in added if added[name]), *tokenizer.all_special_tokens}
        asked, answered = (
            self._render(messages, {}, "tokenizer.chat_template", asks=asks)
            for messages, asks in ((PROBE[:1], True), (PROBE, False))
        )
        markers = self._special | {name for name in added if name.strip() and name in asked + answered}
        # An assistant's message may hold added tokens that are not special, such as <think>; others may not.
        self._names = {True: _pattern(self._special), False: _pattern(markers)}
        self._control_ids = {cast(int, tokenizer.convert_tokens_to_ids(name)) for name in markers}
        self.end_of_turn, tail = self._end_of_turn(answered)
        self.end_of_turn_id = cast(int, tokenizer.convert_tokens_to_ids(self.end_of_turn))
        # What the template writes behind that, such as a newline: part of a text, but never sampled.
        self.after_turn = self._parsed.encode(self.end_of_turn + tail, add_special_tokens=False).ids[1:]
        first = cast("list[int]", tokenizer("")["input_ids"])[:1]
        self._bos = first if first == [tokenizer.bos_token_id] else []
        after_control = self._parsed.encode(self.end_of_turn + "a", add_special_tokens=False).ids[1:]
        self._starts_with_blank = after_control != self._parsed.encode("a", add_special_tokens=False).ids

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, object], where: str) -> list[int]:
        """Returns the ids of messages that the assistant is to answer: what a completion is sampled after.

        Args:
            messages: of which the assistant's is not the last.
            variables: of the template: tools, and others by name.
            where: the record, for messages.
        Raises:
            ValueError: the template refuses the conversation.
        """
        text, foreign = self._render_safely(messages, variables, where, asks=True)
        return self._with_bos(self._encode(text, foreign)[0])

    def turns(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        variables: Mapping[str, object],
        where: str,
    ) -> Turns:
        """Returns prompt and completion in tokens; the assistant's turns in the completion carry loss.

        Before each such turn k stand the ids of `prompt(messages[:k], ...)`, after which it would be sampled.
        Where the tokens of the whole text do not allow that (`was_apart`), this holds for the first of them;
        the others begin with a token of their own, but the turns before them have the tokens with which those
        were sampled. A turn with nothing before it carries no loss. Arguments and errors otherwise as in
        `prompt`.
        """
        messages = [*prompt, *completion]
        text, foreign = self._render_safely(messages, variables, where, asks=False)
        answers = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
        places = [place for i in answers if i and (place := self._place(text, messages, i, variables, where))]
        num_unlearned = len(answers) - len(places)
        if not places:
            return Turns([], [], num_unlearned)
        end, starts = places[-1][1], [start for start, _ in places]
        ids, ends = self._encode_part(text, 0, end, foreign)
        was_apart = False
        for start, before in zip(starts, [0, *(stop for _, stop in places)], strict=False):
            # What stands before the token that ends the turn before decides no token behind it.
            begin = before - len(self.end_of_turn) if text.endswith(self.end_of_turn, 0, before) else 0
            part, _ = self._encode_part(text, begin, start, foreign)
            first = bisect.bisect_right(ends, begin)
            was_apart |= ids[first : first + len(part)] != part
        if was_apart:
            parts = [
                self._encode_part(text, start, stop, foreign)
                for start, stop in itertools.pairwise([0, *starts, end])
            ]
            ids, ends = ([x for part in parts for x in part[k]] for k in (0, 1))
        num_bos = len(self._with_bos(ids)) - len(ids)
        # The first token that reaches beyond a place is the first one after it.
        spans = [tuple(num_bos + bisect.bisect_right(ends, place) for place in span) for span in places]
        return Turns(self._with_bos(ids), cast("list[Span]", spans), num_unlearned, was_apart)

    def _place(
        self, text: str, messages: list[Message], i: int, variables: Mapping[str, object], where: str
    ) -> Span | None:
        """Returns where message i, the assistant's, stands in the text; None if it stands there otherwise."""
        before = self._render(messages[:i], variables, where, asks=True)
        after = (
            text if i + 1 == len(messages) else self._render(messages[: i + 1], variables, where, asks=False)
        )
        end = after.rfind(self.end_of_turn, len(before))
        end = len(after.rstrip()) if end < 0 else end + len(self.end_of_turn)
        return (len(before), end) if after.startswith(before) and text.startswith(after[:end]) else None

    def _render_safely(
        self, messages: Sequence[Message], variables: Mapping[str, object], where: str, *, asks: bool
    ) -> tuple[str, list[Span]]:
        """Returns the text, and where in it the names of control tokens come from messages or variables."""
        text = self._render(messages, variables, where, asks=asks)
        masked = [_masked(message, self._names[message["role"] == "assistant"]) for message in messages]
        masked_variables = _masked(variables, self._names[False])
        if masked == list(messages) and masked_variables == variables:
            return text, []
        other = self._render(masked, masked_variables, where, asks=asks)
        differs = [a != b for a, b in zip(text, other, strict=False)]
        if len(other) != len(text) or any(
            b != MASK for b, is_other in zip(other, differs, strict=True) if is_other
        ):
            raise ValueError(
                f"{where}: a message holds the name of a control token, and the chat template takes it for "
                "one; take it out of the record"
            )
        # Names stand in runs of characters that differ; no name begins before a run.
        names = (match.span() for match in self._names[False].finditer(text))
        return text, [(start, stop) for start, stop in names if all(differs[start:stop])]

    def _render(
        self, messages: Sequence[Message], variables: Mapping[str, object], where: str, *, asks: bool
    ) -> str:
        roles = ", ".join(str(message["role"]) for message in messages)
        with told_as(f"{where}: the chat template refuses a conversation of {roles}"):
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    cast("list[dict[str, str]]", list(messages)),
                    tokenize=False,
                    add_generation_prompt=asks,
                    **cast("dict[str, Any]", variables),
                ),
            )

    def _end_of_turn(self, answered: str) -> tuple[str, str]:
        """Returns the token that ends the assistant's turn, and the text behind it."""
        _, answer, tail = answered.rpartition(str(PROBE[1]["content"]))
        found = self._names[False].search(tail)
        if not answer or found is None:
            raise ValueError(
                f"tokenizer.chat_template: after the assistant's message stands {tail!r}, which holds no "
                "special token of the tokenizer, so that no completion could end; let the template write "
                "{{ eos_token }} there, or name a tokenizer that has the template's tokens"
            )
        return found.group(), tail[found.end() :]

    def _encode_part(
        self, text: str, start: int, stop: int, foreign: Sequence[Span]
    ) -> tuple[list[int], list[int]]:
        """Returns ids of text[start:stop] alone, and where in the text each ends."""
        within = [(a - start, b - start) for a, b in foreign if a >= start]
        ids, offsets = self._encode(text[start:stop], within)
        return ids, [start + b for _, b in offsets]

    def _encode(self, text: str, foreign: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Returns ids, and the characters that each stands for; the names at `foreign` are plain letters."""
        foreign = [span for span in foreign if span[1] <= len(text)]
        masked = text
        for start, stop in foreign:
            masked = masked[:start] + MASK * (stop - start) + masked[stop:]
        encoding = self._parsed.encode(masked, add_special_tokens=False)
        if not foreign:
            return encoding.ids, encoding.offsets
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        ids: list[int] = []
        offsets: list[Span] = []
        is_control = [id_ in self._control_ids and MASK not in masked[a:b] for id_, (a, b) in tokens]
        for controls, group in itertools.groupby(range(len(tokens)), is_control.__getitem__):
            numbers = list(group)
            first, last = numbers[0], numbers[-1]
            start = tokens[first - 1][1][1] if first else 0
            stop = tokens[last + 1][1][0] if last + 1 < len(tokens) else len(text)
            within = [span for span in foreign if start <= span[0] < stop]
            rewritten = within and not controls
            section = self._encode_plain(text, start, stop, within) if rewritten else tokens[first : last + 1]
            ids += [id_ for id_, _ in section]
            offsets += [offset for _, offset in section]
        return ids, offsets

    def _encode_plain(
        self, text: str, start: int, stop: int, foreign: Sequence[Span]
    ) -> list[tuple[int, Span]]:
        """Returns the tokens of text[start:stop], none of them a control token.

        A tokenizer takes the names of added tokens that are not special for tokens in any case: those are cut
        after their first letter.
        """
        cuts = [a + 1 for a, b in foreign if text[a:b] not in self._special]
        tokens: list[tuple[int, Span]] = []
        for a, b in itertools.pairwise([start, *cuts, stop]):
            # Some tokenizers put a blank before the beginning of a text, but not after a control token.
            lead = "\n" if a and self._starts_with_blank else ""
            lead_ids = self._plain.encode(lead, add_special_tokens=False).ids
            encoding = self._plain.encode(lead + text[a:b], add_special_tokens=False)
            if encoding.ids[: len(lead_ids)] != lead_ids:
                lead, lead_ids = "", []
                encoding = self._plain.encode(text[a:b], add_special_tokens=False)
            shift = a - len(lead)
            tokens += [
                (id_, (shift + first, shift + last))
                for id_, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
            ][len(lead_ids) :]
        return tokens

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else self._bos + ids


@functools.lru_cache(maxsize=4)
def chat_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    """Returns the tokenizer's encoder of conversations; raises as ChatEncoder."""
    return ChatEncoder(tokenizer)


def _backend(tokenizer: Tokenizer, *, parses_special: bool) -> tokenizers.Tokenizer:
    """Returns a copy that tells where a token begins, blanks included, and adds nothing."""
    settings = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    settings |= {"post_processor": None, "truncation": None, "padding": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
    backend.encode_special_tokens = not parses_special
    return backend


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Returns what matches any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _masked(value: Any, names: re.Pattern[str]) -> Any:
    """Returns nested values with each of the names masked by as many characters."""
    match value:
        case str():
            return names.sub(lambda found: MASK * len(found.group()), value)
        case Mapping():
            return {_masked(key, names): _masked(item, names) for key, item in value.items()}
        case list() | tuple():
            return [_masked(item, names) for item in value]
        case _:
            return value
