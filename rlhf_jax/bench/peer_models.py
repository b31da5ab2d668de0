"""What the scripts that run other libraries share: random models and data, tokenizers, when to go on.

It imports nothing of rlhf_jax, and another library only in the function that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PAD, STOP, FIRST_WORD = 0, 2, 4
LEARNING_RATE = 1e-6


def turns(ready: Callable[[], Any] = lambda: None) -> Iterator[int]:
    """Yields 0, 1, ..., each when the other side asks; says that it is done when the next one is wanted.

    Args:
        ready: returns when what was made in this turn is there.
    """
    print("peer: ready", flush=True)
    turn = 0
    while sys.stdin.readline():
        yield turn
        ready()
        print("peer: done", flush=True)
        turn += 1


def random_rows(job: dict[str, Any], count: int, length: int, seed: int) -> Any:
    """Returns i32[count, length] random tokens."""
    import numpy as np

    return np.random.default_rng(seed).integers(FIRST_WORD, job["vocab_size"], (count, length), np.int32)


def as_text(rows: Any, prefix: str = "") -> list[str]:
    """Returns the words of rows of tokens: those of `word_tokenizer` begin with a w."""
    return [" ".join(f"{prefix}{token}" for token in row) for row in rows]


def text_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """Returns a number of each text, which depends on all of its letters: the reward of all libraries."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


class Cut:
    """Gives the completions of a turn the lengths that they had to have."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._turn = 0

    def __call__(self, completions: Sequence[Any]) -> list[Any]:
        """Returns completions of all tokens cut to the turn's lengths, with a stop token at their ends.

        Where there are no lengths they stay as they are. Says on stderr how long they have become.
        """
        import numpy as np

        found = [len(row) for row in completions]
        assert found == [self._job["new"]] * self._job["batch"], found
        if not self._job["lengths"]:
            return list(completions)
        ends = self._job["lengths"][self._turn]
        self._turn += 1
        words = [np.maximum(row, FIRST_WORD) for row in completions]
        cut = [np.append(row[: end - 1], STOP) for row, end in zip(words, ends, strict=True)]
        lengths = [len(row) for row in cut]
        assert lengths == ends, (lengths, ends)
        print(f"{sys.argv[1]}: completions of {sum(lengths) / len(lengths):.1f} tokens", file=sys.stderr)
        return cut


def llama_config(job: dict[str, Any], **more: Any) -> Any:
    """Returns transformers' configuration of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=job["vocab_size"],
        hidden_size=job["hidden_size"],
        intermediate_size=job["mlp_size"],
        num_hidden_layers=job["num_layers"],
        num_attention_heads=job["num_heads"],
        num_key_value_heads=job["num_kv_heads"],
        max_position_embeddings=job["prompt"] + job["new"],
        tie_word_embeddings=True,
        pad_token_id=PAD,
        **more,
    )


def word_tokenizer(job: dict[str, Any]) -> Any:
    """Returns a fast tokenizer of transformers' whose token i is the word w<i>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": 1, "</s>": STOP, "<unk>": 3}
    words |= {f"w{i}": i for i in range(FIRST_WORD, job["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def tunix_llama(job: dict[str, Any], seed: int = 0) -> Any:
    """Returns Tunix's Llama, every matrix filled: some are zeros in a new one."""
    import jax
    from flax import nnx
    from tunix.models.llama3 import model as llama

    model = llama.Llama3(
        llama.ModelConfig(
            num_layers=job["num_layers"],
            vocab_size=job["vocab_size"],
            embed_dim=job["hidden_size"],
            hidden_dim=job["mlp_size"],
            num_heads=job["num_heads"],
            head_dim=job["hidden_size"] // job["num_heads"],
            num_kv_heads=job["num_kv_heads"],
            rope_theta=10000,
            norm_eps=1e-5,
            weight_tying=True,
        ),
        rngs=nnx.Rngs(seed),
    )
    leaves, tree = jax.tree.flatten(nnx.state(model))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [
        0.02 * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 1 else x
        for key, x in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(tree, filled))
    return model


class Words:
    """A tokenizer for Tunix: token i is the word i."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        return 0  # none is put in front

    def eos_id(self) -> int:
        return STOP

    def pad_id(self) -> int:
        return PAD
