"""Text to token ids: a tokenizer that is loaded or trained, and the one way in which text is encoded.

The tokens of a prompt do not depend on what follows, in training as in sampling. A completion's tokens are
those that the joined text has after the prompt's: a tokenizer that puts a blank before every text puts none
between the two. Where the joined text does not begin with the prompt's tokens, as where a prompt ends
within a word, the completion is encoded alone.
"""

from __future__ import annotations

import datetime
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

# Keeps advice off the terminal, such as to install PyTorch, which nothing here needs; warnings still show.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_jax.config import TokenizerConfig
from rlhf_jax.data.third_party import told_as
from rlhf_jax.options import did_you_mean
from rlhf_jax.progress import watched

Tokenizer = PreTrainedTokenizerBase
"""Other modules import the type from here, so that the line above runs before transformers is imported."""

TEXTS_AT_ONCE = 4096  # between two looks at how far it is
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def load_tokenizer(cfg: TokenizerConfig, model_path: str = "") -> Tokenizer:
    """Returns the tokenizer of cfg.path, or else of model_path, with its EOS and padding token settled.

    Args:
        cfg: reads path, eos_token, pad_token. Code that comes with a tokenizer is never run.
        model_path: directory of the model, used where cfg.path is empty.

    Raises:
        ValueError: no tokenizer there; no EOS or padding token; a named token that is not in the vocabulary.
    """
    path, key = (cfg.path, "tokenizer.path") if cfg.path else (model_path, "model.path")
    if not path:
        raise ValueError(
            "tokenizer.path: is empty and so is model.path; name a tokenizer, or train one on the text"
        )
    return settle_template(settle_special_tokens(open_tokenizer(path, key), cfg, path), cfg)


def open_tokenizer(path: str, key: str) -> Tokenizer:
    """Returns the tokenizer of a directory or hub name as it is; its own code is never run.

    Raises:
        ValueError: no tokenizer there; the message begins with the key.
    """
    _check_directory(path, key)
    with told_as(f"{key}: {path} holds no tokenizer that transformers can load"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def settle_template(tokenizer: Tokenizer, cfg: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer with cfg's chat template, or its own, in which today is cfg.template_date.

    A macro before the template takes the place of `strftime_now`, so that the date goes where it goes.

    Raises:
        ValueError: there is no such file, or no such date.
    """
    template = cfg.chat_template
    if template and not re.search(r"{[{%]", template):
        try:
            template = Path(template).read_text()
        except OSError as error:
            raise ValueError(
                f"tokenizer.chat_template: {template}: {error.strerror or error}; it is a .jinja file or the "
                "template's text"
            ) from None
    try:
        date = datetime.date.fromisoformat(cfg.template_date)
    except ValueError as error:
        raise ValueError(f"tokenizer.template_date: {cfg.template_date!r} is no date: {error}") from None
    template = template or tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_date(text, date) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = _with_date(template, date)
    return tokenizer


def template_date(tokenizer: Tokenizer) -> str:
    """Returns the date that the chat template prints as today's, YYYY-MM-DD; empty where it prints none."""
    found = re.search(re.escape(_DATE_MACRO) + r".*?'%F', '(.+?)'", str(tokenizer.chat_template or ""))
    return found.group(1) if found else ""


_DATE_MACRO = "{% macro strftime_now(format) %}"


def _with_date(template: str, date: datetime.date) -> str:
    if "strftime_now" not in template or template.startswith(_DATE_MACRO):
        return template
    directives = [f"%-{letter}" for letter in "dmHIjy"] + [
        f"%{letter}" for letter in "FaAbBdDjmpyYHMSTIxXcZ%"
    ]
    values = "".join(f" | replace('{of}', '{date.strftime(of)}')" for of in directives)
    return f"{_DATE_MACRO}{{{{ format{values} }}}}{{% endmacro %}}\n{template}"


def settle_special_tokens(tokenizer: Tokenizer, cfg: TokenizerConfig, path: str) -> Tokenizer:
    """Returns the tokenizer with cfg's EOS and padding token; ValueError where one is missing or unknown.

    The padding token may equal EOS: masks come from lengths, so nothing is lost by it.
    """
    for key, name in (("eos_token", cfg.eos_token), ("pad_token", cfg.pad_token)):
        if not name:
            continue
        vocabulary = tokenizer.get_vocab()
        if name not in vocabulary:
            raise ValueError(
                f"tokenizer.{key}: {name!r} is not in the vocabulary of {path}; allowed: one of its "
                f"{len(vocabulary)} tokens, such as {_examples(tokenizer)}{did_you_mean(name, vocabulary)}"
            )
        setattr(tokenizer, key, name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.eos_token: the tokenizer of {path} names no EOS token, so that no completion could "
            f"end; set tokenizer.eos_token to a token of its vocabulary, such as {_examples(tokenizer)}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer.pad_token: the tokenizer of {path} names no padding token; set tokenizer.pad_token "
            f"to a token of its vocabulary; {tokenizer.eos_token!r}, its EOS token, is allowed"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE trained on the texts, a function of the texts and vocab_size alone.

    Any text can be encoded. The vocabulary has vocab_size tokens at most, among them distinct ones for
    padding, BOS and EOS with ids 0, 1, 2; it is smaller where the texts do not have so many pairs to merge.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # For those who call the saved tokenizer themselves; our own encoding puts BOS there itself.
    bos_first = processors.TemplateProcessing(single=f"{BOS} $A", pair=None, special_tokens=[(BOS, 1)])
    backend.post_processor = bos_first  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], what: str = "tokenising") -> list[list[int]]:
    """Returns the ids of each prompt: BOS once where the tokenizer has one, then the text's."""
    start = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    return [start + ids for ids in encode_completions(tokenizer, texts, what)]


def encode_completions(
    tokenizer: Tokenizer, texts: Sequence[str], what: str = "tokenising"
) -> list[list[int]]:
    """Returns the ids of each text alone, without control tokens; EOS is appended where rows are made.

    A control token's name in a text stays plain letters. `what` names the work where it takes long.

    Raises:
        ValueError: the tokenizer fails, being damaged, or without a token for words it does not know.
    """
    found: list[list[int]] = []
    batches = itertools.batched(texts, TEXTS_AT_ONCE)
    for batch in watched(batches, what, total=len(texts), size=len):
        with told_as(f"tokenizer.path: the tokenizer of {tokenizer.name_or_path} cannot encode the text"):
            encoded = tokenizer(
                list(batch),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        found += cast("list[list[int]]", encoded["input_ids"])
    return found


def encode_after(
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, Sequence[int]]],
    texts: Sequence[str],
    what: str = "tokenising",
) -> list[tuple[list[int], bool]]:
    """Returns the ids of each text after its prompt, and whether it had to be encoded alone.

    Args:
        tokenizer: of both.
        prompts: text and ids, as encode_prompts has them, of the prompt of each text.
        texts: completions.
        what: names the work where it takes long.
    """
    joined = encode_prompts(
        tokenizer, [prompt + text for (prompt, _), text in zip(prompts, texts, strict=True)], what
    )
    is_apart = [whole[: len(ids)] != list(ids) for whole, (_, ids) in zip(joined, prompts, strict=True)]
    alone = iter(
        encode_completions(
            tokenizer, [text for text, apart in zip(texts, is_apart, strict=True) if apart], what
        )
    )
    return [
        (next(alone), True) if apart else (whole[len(ids) :], False)
        for whole, (_, ids), apart in zip(joined, prompts, is_apart, strict=True)
    ]


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Returns the ids of the tokens that are no part of a text when it is decoded."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)}


class GrowingText:
    """The text of tokens that come one by one; a character of several tokens comes with its last one.

    Decoded is no more than the tokens since the last two places where a character ended: what a decoder does
    at the beginning of a text (such as to leave out a blank) then falls into what is already read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begins with no tokens."""
        self.text = ""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._told = 0

    @property
    def num_tokens(self) -> int:
        """Returns how many tokens there are so far."""
        return len(self._ids)

    def add(self, id_: int, *, is_last: bool = False) -> str:
        """Returns what a token adds to the text; what is no whole character yet, only if it is the last."""
        self._ids.append(id_)
        longer = self._read(self.num_tokens)
        if longer.endswith("\ufffd") and not is_last:
            return ""
        added = longer[len(self._read(self._told)) :]
        if added:
            self._start, self._told = self._told, self.num_tokens
            self.text += added
        return added

    def _read(self, end: int) -> str:
        ids = self._ids[self._start : end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_directory(path: str, key: str) -> None:
    """Raises ValueError for what can only be a directory and is none; all else may be a name on the hub."""
    directory = Path(path)
    if directory.is_dir() or not (path.startswith(("/", ".")) or path.count("/") > 1):
        return
    siblings = sorted(entry.name for entry in directory.parent.iterdir()) if directory.parent.is_dir() else []
    raise ValueError(f"{key}: no such directory: {path}{did_you_mean(directory.name, siblings)}")


def _examples(tokenizer: Tokenizer) -> str:
    names = tokenizer.all_special_tokens or list(tokenizer.get_vocab())
    return ", ".join(repr(name) for name in names[:3])
