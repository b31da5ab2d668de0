"""What the recipes name on the hub, tiny: checkpoints and data sets of the same layout, for a stand-in.

A checkpoint has the config.json of the real one with a smaller width, depth and vocabulary; what decides the
computation and the longest row (rotary positions, windows, caps, context) is the real one's. Its tokenizer is
trained on the spot and has the real one's special tokens.
"""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import jax
import pyarrow
import pyarrow.parquet
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.transformer import make_model
from tests.stand_in_hub import StandIn

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN_LONG = QWEN | {"max_position_embeddings": 131072, "sliding_window": 131072, "max_window_layers": 28}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
}
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>")
LLAMA_SPECIAL = ("<|end_of_text|>", "<|begin_of_text|>", LLAMA_TOKENS)
GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
GEMMA_SPECIAL = ("<eos>", "<bos>", ("<pad>", "<start_of_turn>", "<end_of_turn>"))
# Name: (config.json, special tokens: of EOS, of BOS or "", and others).
MODELS: dict[str, tuple[dict[str, Any], tuple[str, str, tuple[str, ...]]]] = {
    "EleutherAI/pythia-1b-deduped": (PYTHIA, ("<|endoftext|>", "<|endoftext|>", ("<|padding|>",))),
    "Qwen/Qwen2.5-0.5B": (QWEN, ("<|endoftext|>", "", ("<|im_start|>", "<|im_end|>"))),
    "Qwen/Qwen2.5-1.5B": (QWEN_LONG, ("<|endoftext|>", "", ("<|im_start|>", "<|im_end|>"))),
    "meta-llama/Llama-3.1-8B": (LLAMA, LLAMA_SPECIAL),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA, LLAMA_SPECIAL),
    "google/gemma-2-2b": (GEMMA, GEMMA_SPECIAL),
    "google/gemma-2-2b-it": (GEMMA, GEMMA_SPECIAL),
}
PADS = {
    "Qwen/Qwen2.5-0.5B": "<|endoftext|>",
    "Qwen/Qwen2.5-1.5B": "<|endoftext|>",
    "google/gemma-2-2b": "<pad>",
    "google/gemma-2-2b-it": "<pad>",
}
"""Tokenizers that name a padding token; the others name none."""
TEMPLATES = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "google/gemma-2-2b-it": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}
"""Chat templates of the shape that the real ones have; the others have none."""

POST = "SUBREDDIT: r/AskReddit\n\nTITLE: A lamp\n\nPOST: My lamp number {} is broken.\n\nTL;DR:"
DIALOGUE = "\n\nHuman: What is {} and {}?\n\nAssistant: {}"
Rows = list[dict[str, Any]]


def rows_of(name: str) -> dict[str, Rows]:
    """Returns the records of a data set by [CONFIG/]SPLIT, with the columns of the real one."""
    count = range(24)
    match name:
        case "trl-lib/tldr":
            rows: Rows = [{"prompt": POST.format(i), "completion": f" Lamp {i} broke."} for i in count]
            return {"train": rows, "validation": rows[:8], "test": rows[8:16]}
        case "trl-lib/tldr-preference":
            rows = [
                {"prompt": POST.format(i), "chosen": f" Lamp {i} broke.", "rejected": " I sat down."}
                for i in count
            ]
            return {"train": rows, "validation": rows[:8]}
        case "Anthropic/hh-rlhf":
            rows = [
                {"chosen": DIALOGUE.format(i, i, 2 * i), "rejected": DIALOGUE.format(i, i, "I know.")}
                for i in count
            ]
            return {"train": rows, "test": rows[:8]}
        case "stanfordnlp/imdb":  # all negative reviews stand before the positive ones
            words = ("I had hoped for much of this film; it is dull", "I had feared this film; it is fun")
            test = [{"text": f"{words[i // 12500]} ({i}).", "label": i // 12500} for i in range(25000)]
            return {f"plain_text/{split}": test[:: 25000 // 64] for split in ("train", "unsupervised")} | {
                "plain_text/test": test
            }
        case "HuggingFaceH4/ultrafeedback_binarized":
            chats = [
                [
                    {"role": "user", "content": f"What is {i} and {i}?"},
                    {"role": "assistant", "content": answer},
                ]
                for i in count
                for answer in (f"{2 * i}.", "I know.")
            ]
            rows = [
                {"prompt": chosen[0]["content"], "prompt_id": str(i), "chosen": chosen, "rejected": rejected}
                | {"messages": chosen, "score_chosen": 8.0, "score_rejected": 4.0}
                for i, (chosen, rejected) in enumerate(zip(chats[::2], chats[1::2], strict=True))
            ]
            return {f"{split}_{part}": rows for split in ("train", "test") for part in ("prefs", "sft")}
        case "openai/gsm8k":
            rows = [
                {"question": f"What is {i} and {i}?", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
                for i in count
            ]
            return {
                f"{config}/{split}": rows for config in ("main", "socratic") for split in ("train", "test")
            }
    raise KeyError(name)


DATASETS = (
    "trl-lib/tldr",
    "trl-lib/tldr-preference",
    "Anthropic/hh-rlhf",
    "stanfordnlp/imdb",
    "openai/gsm8k",
    "HuggingFaceH4/ultrafeedback_binarized",
)


def fill(hub: StandIn, directory: Path) -> None:
    """Puts all models and data sets into a hub; checkpoints are written below a directory first."""
    for name, (config, special) in MODELS.items():
        add_model(hub, name, config, special, directory / name)
    for name in DATASETS:
        hub.add("datasets", name, dataset_files(name, rows_of(name)))


def add_model(
    hub: StandIn, name: str, config: dict[str, Any], special: tuple[str, str, tuple[str, ...]], at: Path
) -> None:
    """Puts a random checkpoint into a hub; special: see MODELS."""
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps(SMALL | config))
    architecture = hf.read_architecture(at)
    text = (at / "config.json").read_text()
    hf.save_policy(at, architecture, make_model(architecture).init_policy(jax.random.key(0)))
    (at / "config.json").write_text(text)
    tokenizer(name, *special).save_pretrained(str(at))
    hub.add_directory("models", name, at)


def tokenizer(name: str, eos: str, bos: str, others: tuple[str, ...]) -> PreTrainedTokenizerBase:
    """Returns a tokenizer of bytes and few pairs with the special tokens of the model `name`."""
    made = train_tokenizer([POST, DIALOGUE], 300)
    made.add_tokens(
        [AddedToken(token, special=True) for token in dict.fromkeys((eos, bos, *others)) if token]
    )
    made.eos_token, made.bos_token, made.pad_token = eos, bos or None, PADS.get(name)
    made.chat_template = TEMPLATES.get(name)
    return made


def dataset_files(name: str, splits: dict[str, Rows]) -> dict[str, bytes]:
    """Returns the files of a data set: Parquet, and a README that lists it; hh-rlhf has JSONL alone."""
    if name == "Anthropic/hh-rlhf":
        return {
            f"{part}/{split}.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode())
            for part in ("harmless-base", "helpful-base")
            for split, rows in splits.items()
        }
    files = {}
    configs: dict[str, list[str]] = {}
    for path, rows in splits.items():
        config, _, split = path.rpartition("/")
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        files[f"{config or 'data'}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        configs.setdefault(config or "default", []).append(
            f"  - split: {split}\n    path: {config or 'data'}/{split}-*\n"
        )
    listed = "".join(f"- config_name: {c}\n  data_files:\n{''.join(s)}" for c, s in configs.items())
    return files | {"README.md": f"---\nconfigs:\n{listed}---\n".encode()}
