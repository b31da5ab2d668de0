"""Where stop strings end completions, by the rule of rollout/stops.py, and however often the host looks."""

from functools import partial

import numpy as np
import pytest

from rlhf_jax.config import RolloutConfig
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.options import OPTIONS
from rlhf_jax.rollout.stops import StopStrings, StopWatch, read_stop_ids, read_stop_strings

TOKENIZER = train_tokenizer(["abab"], 260)  # single bytes and the pair ab
EOS = TOKENIZER.eos_token_id


def ids_of(*parts):
    """The tokens of texts, each encoded alone; an integer is a token."""
    plain = partial(TOKENIZER.encode, add_special_tokens=False)
    return [id_ for part in parts for id_ in ([part] if isinstance(part, int) else plain(part))]


def looked(ids, strings, at):
    """Returns (tokens left or 0, text before the stop string) when the host looks at these lengths."""
    watch = StopWatch(StopStrings(tuple(strings), TOKENIZER))
    tokens = np.asarray([ids], np.int32)
    found = [int(watch(tokens, np.asarray([length]))[0]) for length in at]
    assert sum(n > 0 for n in found) <= 1
    return max(found), watch.text(0)


@pytest.mark.parametrize(
    "parts, strings, length, text",
    [
        (("xyz",), ["y"], 2, "x"),
        (("xyz",), ["yz", "zz"], 3, "x"),
        (("xyz",), ["q"], 0, None),
        (("x", "ab", "z"), ["a"], 2, "x"),  # within a token, which is kept
        (("x", "ab", "z"), ["b", "a"], 2, "x"),  # one token completes both: before the earliest
        (("xaxb",), ["xb", "ax"], 3, "x"),  # the first that is completed
        (("xé!",), ["é"], 3, "x"),  # a character of two tokens: the last of them
        (("x", EOS, "y"), ["xy"], 3, ""),  # a special token adds nothing
        (("xx",), ["xxx"], 0, None),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(parts, strings, length, text):
    ids = ids_of(*parts)
    assert looked(ids, strings, [len(ids)]) == (length, text)


def test_it_does_not_matter_when_the_host_looks():
    rng = np.random.default_rng(0)
    alphabet = ids_of("ab", "aébc\n")
    strings = ["ba", "é\n", "cab"]
    for _ in range(30):
        ids = rng.choice(alphabet, 24).tolist()
        every = looked(ids, strings, range(1, 25))
        assert looked(ids, strings, [24]) == every == looked(ids, strings, [5, 6, 17, 24])
        length, before = every
        whole = TOKENIZER.decode(ids[: length or None])
        assert any(string in whole for string in strings) == (length > 0)
        if length:  # one token less has none
            assert not any(string in TOKENIZER.decode(ids[: length - 1]) for string in strings)
            assert whole.startswith(before) and len(before) < len(whole)


def test_stop_tokens_are_named_or_numbered():
    cfg = RolloutConfig(stop_tokens=("ab", 7, "<|bos|>"))
    ids = read_stop_ids(cfg, TOKENIZER, EOS)
    assert ids == (EOS, TOKENIZER.get_vocab()["ab"], 7, TOKENIZER.bos_token_id)
    for wrong in ("<|boss|>", 999, -1):
        with pytest.raises(ValueError, match="rollout.stop_tokens: .* is not in the tokenizer's vocabulary"):
            read_stop_ids(RolloutConfig(stop_tokens=(wrong,)), TOKENIZER)


@pytest.mark.parametrize("wrong", ["", "<|eos|>", "a\ufffd"])
def test_strings_that_no_text_has_are_refused(wrong):
    with pytest.raises(ValueError, match="rollout.stop_strings"):
        read_stop_strings(RolloutConfig(stop_strings=("a", wrong)), TOKENIZER)
    assert read_stop_strings(RolloutConfig(), TOKENIZER) is None


def test_lists_are_read_item_by_item():
    strings, tokens = (OPTIONS["rollout"][name] for name in ("stop_strings", "stop_tokens"))
    assert strings.read(["a", "b"]) == ("a", "b")
    assert tokens.read([3, "a"]) == (3, "a")
    for option, wrong in ((strings, "a"), (strings, [1]), (tokens, [True]), (tokens, [1.5])):
        with pytest.raises(ValueError, match="expected a list of"):
            option.read(wrong)
