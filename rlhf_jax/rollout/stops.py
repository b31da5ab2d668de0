"""What ends a completion besides its length: tokens, on the device; strings, by the host between calls.

The rule for strings. A completion's text grows by what each token adds to it, special tokens nothing, a
character of several tokens with the last of them. The completion ends with the first token with which the
text has a stop string in it; that token is kept, and the completion has ended as with EOS. What is shown of
its text ends before the stop string (before the earliest, where that token completes several). All of it
depends on the completion's tokens alone, and not on when the host looks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlhf_jax.config import RolloutConfig
from rlhf_jax.data.tokenizer import GrowingText, Tokenizer, special_ids
from rlhf_jax.options import did_you_mean


class StopStrings(NamedTuple):
    """Strings that end completions."""

    strings: tuple[str, ...]
    tokenizer: Tokenizer


def read_stop_ids(cfg: RolloutConfig, tokenizer: Tokenizer, *ids: int) -> tuple[int, ...]:
    """Returns the tokens that end completions: those of rollout.stop_tokens after the given ones.

    Raises:
        ValueError: one that the vocabulary does not have.
    """
    vocabulary = tokenizer.get_vocab()
    read = list(ids)
    for token in cfg.stop_tokens:
        is_known = token in vocabulary if isinstance(token, str) else 0 <= token < len(tokenizer)
        if not is_known:
            hint = did_you_mean(token, vocabulary) if isinstance(token, str) else ""
            raise ValueError(
                f"rollout.stop_tokens: {token!r} is not in the tokenizer's vocabulary; allowed: the name of "
                f"one of its tokens, or an id below {len(tokenizer)}{hint}"
            )
        read.append(vocabulary[token] if isinstance(token, str) else token)
    return tuple(dict.fromkeys(read))


def read_stop_strings(cfg: RolloutConfig, tokenizer: Tokenizer) -> StopStrings | None:
    """Returns the strings of rollout.stop_strings that end completions; None where there are none.

    Raises:
        ValueError: one that is empty, or could never be met.
    """
    special = {str(tokenizer.convert_ids_to_tokens(id_)) for id_ in special_ids(tokenizer)}
    for string in cfg.stop_strings:
        if not string or "\ufffd" in string:
            raise ValueError(
                f"rollout.stop_strings: {string!r} is no text that could be waited for; give at least one "
                "character, and not U+FFFD, which stands for what is none"
            )
        if string in special:
            raise ValueError(
                f"rollout.stop_strings: {string!r} is a special token, which is no part of a completion's "
                "text; name it in rollout.stop_tokens"
            )
    return StopStrings(cfg.stop_strings, tokenizer) if cfg.stop_strings else None


class StopWatch:
    """Follows the completions of one rollout, and tells where stop strings end them."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._texts: dict[int, GrowingText] = {}
        self._cut: dict[int, str] = {}

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns i32[B], the tokens that are left of each row in which a stop string was met now, else 0.

        Args:
            tokens: i32[B, C], completions so far.
            lengths: i32[B]; what was there at the last call is there still.
        """
        found = np.zeros(len(lengths), np.int32)
        for row, length in enumerate(lengths.tolist()):
            if row in self._cut:
                continue
            text = self._texts.setdefault(row, GrowingText(self._stops.tokenizer))
            for number in range(text.num_tokens, length):
                if self._is_met(row, text, text.add(int(tokens[row, number]))):
                    found[row] = number + 1
                    break
        return found

    def text(self, row: int) -> str | None:
        """Returns a row's text before its stop string; None where it has none."""
        return self._cut.get(row)

    def _is_met(self, row: int, text: GrowingText, added: str) -> bool:
        """Returns whether what a token added completes a stop string; keeps the text before it."""
        before = len(text.text) - len(added)
        places = [
            place
            for string in self._stops.strings
            if added and (place := text.text.find(string, max(before - len(string) + 1, 0))) >= 0
        ]
        if places:
            self._cut[row] = text.text[: min(places)]
        return bool(places)
