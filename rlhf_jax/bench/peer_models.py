"""What the scripts that run other libraries share: models on random weights, tokenizers, when to go on.

It imports nothing of rlhf_jax, and another library only in the function that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

PAD, STOP, FIRST_WORD = 0, 2, 4


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
