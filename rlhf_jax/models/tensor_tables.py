"""Which tensor of a Hugging Face checkpoint is which parameter, and how it lies there: a table per family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Layout(NamedTuple):
    """How the dimensions of a parameter (of one layer), inputs ... outputs ..., lie in its tensor.

    A tensor is [outputs, inputs], each of the two one dimension.
    """

    num_inputs: int  # leading dimensions of the parameter that a product sums over; 0: tensor is [outputs]
    inputs_first: bool = False  # the tensor is [inputs, outputs]
    by_head: bool = False  # parameters of one tensor alternate head by head, else one lies behind the other


VECTOR, LINEAR, FROM_HEADS = Layout(0), Layout(1), Layout(2)
ROWS, ROWS_FROM_HEADS = Layout(1, inputs_first=True), Layout(2, inputs_first=True)
VECTOR_BY_HEAD, LINEAR_BY_HEAD = Layout(0, by_head=True), Layout(1, by_head=True)

# Parameter: (tensor, layout). Parameters of one tensor share it in the order of the table. A parameter that
# an architecture does not have, as a bias, is no part of its checkpoint either.
Tensors = Mapping[str, tuple[str, Layout]]
EMBEDDING, LM_HEAD = "trunk/embed/embedding", "lm_head/kernel"


def _tensors(outside: Tensors, prefix: str, in_layer: Tensors) -> Tensors:
    layers = {
        f"trunk/layers/{name}": (prefix + tensor, layout) for name, (tensor, layout) in in_layer.items()
    }
    return {**outside, **layers}


_LLAMA_OUTSIDE = {
    EMBEDDING: ("model.embed_tokens.weight", ROWS),
    "trunk/final_norm/scale": ("model.norm.weight", VECTOR),
    LM_HEAD: ("lm_head.weight", LINEAR),
}
_LLAMA_ATTENTION = {
    "attention/q": ("self_attn.q_proj.weight", LINEAR),
    "attention/k": ("self_attn.k_proj.weight", LINEAR),
    "attention/v": ("self_attn.v_proj.weight", LINEAR),
    "attention/o": ("self_attn.o_proj.weight", FROM_HEADS),
    "attention/q_bias": ("self_attn.q_proj.bias", VECTOR),
    "attention/k_bias": ("self_attn.k_proj.bias", VECTOR),
    "attention/v_bias": ("self_attn.v_proj.bias", VECTOR),
    "attention/o_bias": ("self_attn.o_proj.bias", VECTOR),
    "attention/q_norm/scale": ("self_attn.q_norm.weight", VECTOR),
    "attention/k_norm/scale": ("self_attn.k_norm.weight", VECTOR),
}
_LLAMA_MLP = {
    "mlp/gate": ("mlp.gate_proj.weight", LINEAR),
    "mlp/up": ("mlp.up_proj.weight", LINEAR),
    "mlp/down": ("mlp.down_proj.weight", LINEAR),
    "mlp/gate_bias": ("mlp.gate_proj.bias", VECTOR),
    "mlp/up_bias": ("mlp.up_proj.bias", VECTOR),
    "mlp/down_bias": ("mlp.down_proj.bias", VECTOR),
}
_PRE_NORMS = {
    "attention_norm/scale": ("input_layernorm.weight", VECTOR),
    "mlp_norm/scale": ("post_attention_layernorm.weight", VECTOR),
}
_POST_NORMS = {
    "attention_post_norm/scale": ("post_attention_layernorm.weight", VECTOR),
    "mlp_post_norm/scale": ("post_feedforward_layernorm.weight", VECTOR),
}
_SANDWICH_NORMS = _POST_NORMS | {
    "attention_norm/scale": ("input_layernorm.weight", VECTOR),
    "mlp_norm/scale": ("pre_feedforward_layernorm.weight", VECTOR),
}
_LAYER = "model.layers.{layer}."
LLAMA = _tensors(_LLAMA_OUTSIDE, _LAYER, _PRE_NORMS | _LLAMA_ATTENTION | _LLAMA_MLP)
OLMO2 = _tensors(_LLAMA_OUTSIDE, _LAYER, _POST_NORMS | _LLAMA_ATTENTION | _LLAMA_MLP)
GEMMA2 = _tensors(_LLAMA_OUTSIDE, _LAYER, _SANDWICH_NORMS | _LLAMA_ATTENTION | _LLAMA_MLP)
PHI3 = _tensors(
    _LLAMA_OUTSIDE,
    _LAYER,
    _PRE_NORMS
    | {
        "attention/q": ("self_attn.qkv_proj.weight", LINEAR),
        "attention/k": ("self_attn.qkv_proj.weight", LINEAR),
        "attention/v": ("self_attn.qkv_proj.weight", LINEAR),
        "attention/o": ("self_attn.o_proj.weight", FROM_HEADS),
        "mlp/gate": ("mlp.gate_up_proj.weight", LINEAR),
        "mlp/up": ("mlp.gate_up_proj.weight", LINEAR),
        "mlp/down": ("mlp.down_proj.weight", LINEAR),
    },
)
MIXTRAL = _tensors(
    _LLAMA_OUTSIDE,
    _LAYER,
    _PRE_NORMS
    | _LLAMA_ATTENTION
    | {
        "mlp/router": ("block_sparse_moe.gate.weight", LINEAR),
        "mlp/gate": ("block_sparse_moe.experts.{expert}.w1.weight", LINEAR),
        "mlp/up": ("block_sparse_moe.experts.{expert}.w3.weight", LINEAR),
        "mlp/down": ("block_sparse_moe.experts.{expert}.w2.weight", LINEAR),
    },
)
QWEN3_MOE = _tensors(
    _LLAMA_OUTSIDE,
    _LAYER,
    _PRE_NORMS
    | _LLAMA_ATTENTION
    | {
        "mlp/router": ("mlp.gate.weight", LINEAR),
        "mlp/gate": ("mlp.experts.{expert}.gate_proj.weight", LINEAR),
        "mlp/up": ("mlp.experts.{expert}.up_proj.weight", LINEAR),
        "mlp/down": ("mlp.experts.{expert}.down_proj.weight", LINEAR),
    },
)
GPT2 = _tensors(
    {
        EMBEDDING: ("transformer.wte.weight", ROWS),
        "trunk/embed/position": ("transformer.wpe.weight", ROWS),
        "trunk/final_norm/scale": ("transformer.ln_f.weight", VECTOR),
        "trunk/final_norm/bias": ("transformer.ln_f.bias", VECTOR),
        LM_HEAD: ("lm_head.weight", LINEAR),
    },
    "transformer.h.{layer}.",
    {
        "attention_norm/scale": ("ln_1.weight", VECTOR),
        "attention_norm/bias": ("ln_1.bias", VECTOR),
        "attention/q": ("attn.c_attn.weight", ROWS),
        "attention/k": ("attn.c_attn.weight", ROWS),
        "attention/v": ("attn.c_attn.weight", ROWS),
        "attention/q_bias": ("attn.c_attn.bias", VECTOR),
        "attention/k_bias": ("attn.c_attn.bias", VECTOR),
        "attention/v_bias": ("attn.c_attn.bias", VECTOR),
        "attention/o": ("attn.c_proj.weight", ROWS_FROM_HEADS),
        "attention/o_bias": ("attn.c_proj.bias", VECTOR),
        "mlp_norm/scale": ("ln_2.weight", VECTOR),
        "mlp_norm/bias": ("ln_2.bias", VECTOR),
        "mlp/up": ("mlp.c_fc.weight", ROWS),
        "mlp/up_bias": ("mlp.c_fc.bias", VECTOR),
        "mlp/down": ("mlp.c_proj.weight", ROWS),
        "mlp/down_bias": ("mlp.c_proj.bias", VECTOR),
    },
)
GPT_NEOX = _tensors(
    {
        EMBEDDING: ("gpt_neox.embed_in.weight", ROWS),
        "trunk/final_norm/scale": ("gpt_neox.final_layer_norm.weight", VECTOR),
        "trunk/final_norm/bias": ("gpt_neox.final_layer_norm.bias", VECTOR),
        LM_HEAD: ("embed_out.weight", LINEAR),
    },
    "gpt_neox.layers.{layer}.",
    {
        "attention_norm/scale": ("input_layernorm.weight", VECTOR),
        "attention_norm/bias": ("input_layernorm.bias", VECTOR),
        "attention/q": ("attention.query_key_value.weight", LINEAR_BY_HEAD),
        "attention/k": ("attention.query_key_value.weight", LINEAR_BY_HEAD),
        "attention/v": ("attention.query_key_value.weight", LINEAR_BY_HEAD),
        "attention/q_bias": ("attention.query_key_value.bias", VECTOR_BY_HEAD),
        "attention/k_bias": ("attention.query_key_value.bias", VECTOR_BY_HEAD),
        "attention/v_bias": ("attention.query_key_value.bias", VECTOR_BY_HEAD),
        "attention/o": ("attention.dense.weight", FROM_HEADS),
        "attention/o_bias": ("attention.dense.bias", VECTOR),
        "mlp_norm/scale": ("post_attention_layernorm.weight", VECTOR),
        "mlp_norm/bias": ("post_attention_layernorm.bias", VECTOR),
        "mlp/up": ("mlp.dense_h_to_4h.weight", LINEAR),
        "mlp/up_bias": ("mlp.dense_h_to_4h.bias", VECTOR),
        "mlp/down": ("mlp.dense_4h_to_h.weight", LINEAR),
        "mlp/down_bias": ("mlp.dense_4h_to_h.bias", VECTOR),
    },
)
