"""Tiny random models of every decoder-only language model of transformers.

    for name in architectures():
        model = build(name, attention="sdpa")

A configuration is the class's own default with its sizes made small (`SIZES`) and one layer of each kind; what a class
needs beyond that stands in `SPECIAL`, with the reason. Windows are 16 tokens, so a test of more than 16 crosses them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 256
TOKENS = range(10, 190)  # token ids that are special in no configuration here
WINDOW = 16
LARGEST = 12_000_000  # parameters of what still counts as tiny

# ---------------------------------------------------------------- which architectures


def named(names: str) -> frozenset[str]:
    return frozenset(names.split())


ENCODERS = named(
    """bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra
    ernie marian mbart megatron-bert mvp pegasus plbart prophetnet reformer rembert roberta roberta-prelayernorm
    roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod"""
)  # and decoders of encoder-decoder models
COMPOSITES = named(
    """blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git
    got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe
    qwen4_exp"""
)  # of several models; the text model of most is an architecture of its own (gemma3_text)
WITHOUT_KV_CACHE = named("falcon_mamba mamba mamba2 openai-gpt rwkv xlstm")
SAME_CLASS = named("gpt-sw3")  # as gpt2

OWN_CACHE = named("minimax")  # makes its cache itself and refuses any other


def architectures() -> list[str]:
    """Model types of decoder-only language models with a KV cache, sorted."""
    others = ENCODERS | COMPOSITES | WITHOUT_KV_CACHE | SAME_CLASS
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - others)


def supports_sdpa(name: str) -> bool:
    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]], "_supports_sdpa", False))


# ---------------------------------------------------------------- configurations

HIDDEN, HEADS, HEAD_DIM = 64, 4, 16

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model_base", "lru_width"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    "swa_num_attention_heads": HEADS,
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "dim_head"), HEAD_DIM),
    # feed-forward
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "n_inner"), 128),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers"), 0),
    # tokens
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "original_max_position_embeddings": 64,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    "attention_chunk_size": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    **dict.fromkeys(("eos_token_id", "eod_token_id"), 2),
    # latent and indexed attention
    "q_lora_rank": 32,
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_head_dim": 24,
    "index_n_heads": 2,
    "index_topk": 64,
    # layers that are no attention
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_chunk_size", "chunk_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("n_mamba_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "use_mambapy": False,
    # The usual 0.02 leaves the softmax so flat that a wrong scale or mask hardly shows.
    "initializer_range": 0.1,
}
# A default of None says that these are derived from others, or absent.
OPTIONAL = frozenset(("head_dim", "swa_head_dim", "q_lora_rank", "sliding_window", "n_inner"))
LAYER_KINDS = ("layer_types", "layers_block_type")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # otherwise no layer of two is attention
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING_AND_FULL}
    },
    "cpmant": {"prompt_length": 4},
    "dbrx": {  # its sizes are in two sub-configurations
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note_text": {  # sizes of its sliding layers are no fields, and large
        "num_key_value_heads": 4,
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon": {"num_kv_heads": 4},
    # Half of the layers read the cache of the others.
    "gemma3n_text": {
        "layer_types": 2 * SLIDING_AND_FULL,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": 2 * SLIDING_AND_FULL, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "head_dim": 8},  # each layer has two attentions
    # Needed, and None by default.
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "qwen4_exp_text": {  # None by default, and needed by its only kind of attention
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},  # two recurrent layers, then attention
    "zamba": {  # two attention layers that share their weights
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid"],
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config(name: str) -> PreTrainedConfig:
    """The tiny configuration of an architecture."""
    cls = CONFIG_MAPPING[name]
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    settings = {k: v for k, v in SIZES.items() if k in defaults and not (k in OPTIONAL and defaults[k] is None)}
    settings |= key_heads(defaults) | one_of_each(cls) | SPECIAL.get(name, {})
    for kinds in LAYER_KINDS:
        if kinds in settings:
            settings["num_hidden_layers"] = len(settings[kinds])
    return cls(**settings)


def key_heads(defaults: dict[str, Any]) -> dict[str, int]:
    """As many key heads as query heads where that is the default (and in latent attention, which has no choice), one
    where one is; else half as many as query heads."""
    every = next((defaults[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in defaults), None)
    latent = "kv_lora_rank" in defaults

    def tiny(usual: int | None) -> int:
        return HEADS if latent or usual in (every,) else 1 if usual == 1 else HEADS // 2

    return {name: tiny(defaults[name]) for name in KEY_HEADS if name in defaults}


def one_of_each(cls: type[PreTrainedConfig]) -> dict[str, list[str]]:
    """One layer of each kind that the default configuration has, two if there is one kind only."""
    for alias in LAYER_KINDS:
        name = cls.attribute_map.get(alias, alias)
        if isinstance(getattr(cls, name, None), property):  # derived from other settings
            continue
        kinds = list(dict.fromkeys(getattr(cls(), name, None) or ()))
        if kinds:
            return {name: kinds if len(kinds) > 1 else 2 * kinds}
    return {}


def build(name: str, attention: str) -> PreTrainedModel:
    """A random model in float32 for inference, the same one every time."""
    settings = config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(settings).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} is not tiny: {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=torch.float32).eval()
    return vary(model)


@torch.no_grad()
def vary(model: PreTrainedModel) -> PreTrainedModel:
    """Noise on every parameter that is initialised to one number: a bias of zeros hides whoever forgets it."""
    for p in model.parameters():
        if p.dim() and bool((p == p.flatten()[0]).all()):
            p += 0.1 * torch.randn_like(p)
    return model


def new_cache(model: PreTrainedModel, kind: str, tokens: int = 32):
    """An empty cache, "static" or "dynamic"; None where the model makes its own."""
    text = model.config.get_text_config(decoder=True)
    if kind == "static":
        return StaticCache(config=text, max_cache_len=tokens)
    return None if text.model_type in OWN_CACHE else DynamicCache(config=text)
