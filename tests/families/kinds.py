"""Tiny random models of every causal language model class of the installed transformers, and of variants of some.

kinds() returns a function for each kind that builds its model. tests/families/models.py tries observe on them.

A tiny configuration is made without knowing the family: each field of the config class whose name is in SMALL gets the
value there. NEEDED holds what some families need beyond that, VARIANTS the kinds beside the plain ones.

Queries and keys are enlarged, because fresh weights attend almost evenly, and an even map would test nothing.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# ---- 1. Sizes ----

# What a config field is set to, if the config class has a field of that name. attribute_map translates the names that a
# family has of its own, for example n_embd for hidden_size.
SMALL = {
    # sizes
    "vocab_size": 80, "vocab_size_per_layer_input": 80, "audio_vocab_size": 80, "hidden_size": 64, "embedding_size": 64,
    "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 256, "type_vocab_size": 2,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    # other names of the same, which no attribute_map translates
    "d_model": 64, "word_embed_proj_dim": 64, "input_embedding_size": 64, "output_embedding_size": 48,
    "hidden_size_global": 64, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96, "dim_ff": 96,
    "d_inner": 96, "dff": 96, "ffn_hidden_size": 96, "feed_forward_size": 96, "dense_intermediate_size": 96,
    "num_layers": 8, "decoder_layers": 8, "encoder_layers": 8, "num_encoder_layers": 8, "num_decoder_layers": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "attention_heads": 4, "num_heads": 4, "cross_attention_hidden_size": 64,
    "max_seq_len": 256, "n_positions": 256, "rotary_dim": 8, "dim_head": 16, "query_pre_attn_scalar": 16,
    "attention_head_size": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "num_codebooks": 1,
    # fresh weights: some families begin with larger or smaller ones
    "initializer_range": 0.02, "init_std": 0.02,
    # encoders are used as decoders
    "is_decoder": True,
    # sliding windows and chunks
    "sliding_window": 24, "sliding_window_size": 24, "window_size": 24, "attention_window_size": 24,
    "local_attention": 48, "attention_chunk_size": 16, "keep_window_size": 16,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_top_k": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "router_hidden_size": 32,
    # multi-head latent attention: values of another width than the queries, 16 + 8
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    # sparse attention; with few heads, scores of keys would be equal, namely 0
    "index_n_heads": 16, "index_head_dim": 16, "index_topk": 12, "indexer_n_heads": 16, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "index_block_size": 4,
    "index_topk_blocks": 3,
    # linear attention and state spaces
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_headdim": 16, "mamba_n_groups": 1,
    "mamba_ngroups": 1, "mamba_chunk_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_dt_rank": 4,
    "n_mamba_heads": 2, "mamba_d_ssm": 128, "ssm_state_size": 8, "state_size": 8, "conv_kernel": 4, "expand": 2,
    "chunk_size": 16, "n_groups": 1, "time_step_rank": 4, "lru_width": 64, "conv_dim": 64, "use_mamba_kernels": False,
    # Gemma 3n and 4: layers that share keys and values, embeddings of each layer
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    # special tokens
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIAL_TOKEN = re.compile(r"_token_(id|index)$")

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What families need beyond that: to be built so small, to be causal, or to have a layer of each type. Two words are no
# fields: `seed` of the weights, and `gain`, how much queries and keys are enlarged (see sharpen).
NEEDED: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 6]},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL] * 4,
        "rope_parameters": dict.fromkeys((SLIDING, FULL), DEFAULT_ROPE | {"mrope_section": [3, 3, 2]}),
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "flex_olmo": {"seed": 1},  # with seed 0, eager and sdpa send one token to different experts, by a rounding error
    "gemma3n_text": {"layer_types": [SLIDING, FULL] * 4, "gain": 0.8},
    "gemma4": {"layer_types": [SLIDING, FULL] * 4, "gain": 0.8},
    "gemma4_text": {"layer_types": [SLIDING, FULL] * 4, "gain": 0.8},
    "gemma4_unified": {"layer_types": [SLIDING, FULL] * 4, "gain": 0.8},
    "gemma4_unified_text": {"layer_types": [SLIDING, FULL] * 4, "gain": 0.8},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "granite": {"attention_multiplier": 0.25},
    "granite_swa": {"attention_multiplier": 0.25},
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "granitemoehybrid": {
        "attention_multiplier": 0.25, "layer_types": [LINEAR, FULL, LINEAR, LINEAR] * 2,
        "position_embedding_type": "rope",
    },
    "hrm_text": {"num_hidden_layers": 1},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 5, "attn_layer_offset": 1},
    "jetmoe": {"gain": 12.0},
    "lfm2": {"layer_types": ["conv", FULL, "conv", FULL, "conv", "conv", FULL, "conv"]},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv", FULL, "conv", "conv", FULL, "conv"]},
    "longcat_flash": {"head_dim": 8, "num_layers": 4},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"index_n_heads": 2},  # as many as key heads
    "mllama": {"cross_attention_layers": [3]},
    "nemotron": {"gain": 1.3},
    "nemotron_h": {"layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, "moe", LINEAR, FULL]},
    "recurrent_gemma": {"gain": 0.5},
    "reformer": {"attn_layers": ["local"] * 8, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": [LINEAR, "hybrid"] * 4, "head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {
        "layers_block_type": [LINEAR, "hybrid"] * 4, "head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "gain": 4.0},
}  # fmt: skip

# Families whose language model takes another config than the one that AutoConfig knows.
OWN_CONFIG = {"musicgen": "MusicgenDecoderConfig", "musicgen_melody": "MusicgenMelodyDecoderConfig"}

# ---- 2. Variants ----

# Kinds beside the plain ones: name, then the family and what is changed.
VARIANTS: dict[str, tuple[str, dict]] = {
    # head counts and widths, depth, ties, biases
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, a key head for each head": ("llama", {"num_key_value_heads": 4}),
    "llama, one head a layer": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama, one layer, one head": (
        "llama", {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "llama, one layer, two heads of width 2": (
        "llama", {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2},
    ),
    "llama, wide heads": ("llama", {"head_dim": 80}),
    "llama, 3 layers": ("llama", {"num_hidden_layers": 3}),
    "llama, 24 layers": ("llama", {"num_hidden_layers": 24}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, one key head": ("qwen3", {"num_key_value_heads": 1}),
    "gpt_bigcode, a key head for each head": ("gpt_bigcode", {"multi_query": False}),
    "laguna, other head counts in each layer": (
        "laguna", {"num_attention_heads_per_layer": [4, 2] * 4, "layer_types": [SLIDING, FULL] * 4},
    ),
    # positions
    "llama, dynamic rope": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        }},
    ),
    "llama, llama 3 rope": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }},
    ),
    "phi3, long rope": (
        "phi3",
        {"original_max_position_embeddings": 32, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,
        }},
    ),
    "smollm3, layers without positions": ("smollm3", {"no_rope_layers": [1, 0] * 4}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    # windows and chunks
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, window 3": ("mistral", {"sliding_window": 3}),
    "mistral, window 63": ("mistral", {"sliding_window": 63}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None}),
    "phi3, no window": ("phi3", {"sliding_window": None}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}),
    "qwen2_moe, windows": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 4}),
    "gemma3_text, window 5": ("gemma3_text", {"sliding_window": 5}),
    "gemma3_text, windows only": ("gemma3_text", {"layer_types": [SLIDING] * 8}),
    "cohere2, windows": ("cohere2", {"layer_types": [SLIDING, FULL] * 4}),
    "exaone4, windows": ("exaone4", {"layer_types": [SLIDING, FULL] * 4}),
    "olmo3, windows only": ("olmo3", {"layer_types": [SLIDING] * 8}),
    "llama4_text, no chunks": ("llama4_text", {"attention_chunk_size": 256}),
    "modernbert-decoder, full": ("modernbert-decoder", {"layer_types": [FULL] * 8}),
    # norms, temperatures and clipping of queries and keys
    "cohere, norm of queries and keys": ("cohere", {"use_qk_norm": True}),
    "phi, norm of queries and keys": ("phi", {"qk_layernorm": True}),
    "stablelm, norm of queries and keys": ("stablelm", {"qk_layernorm": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "persimmon, no norm": ("persimmon", {"qk_layernorm": False}),
    "glm4_moe, norm of queries and keys": ("glm4_moe", {"use_qk_norm": True}),
    "llama4_text, no norm": ("llama4_text", {"use_qk_norm": False}),
    "llama4_text, temperature": ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 16}),
    "olmo, clipped": ("olmo", {"clip_qkv": 2.0}),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 2.0}),
    "gpt2, scaled by layer": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "gain": 5.0},
    ),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, projected embeddings": ("opt", {"word_embed_proj_dim": 32, "gain": 8.0}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    # logits that are scaled, capped or transformed
    "granite, scaled": (
        "granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    ),
    "granitemoe, scaled": ("granitemoe", {"logits_scaling": 4.0, "attention_multiplier": 0.5}),
    "granitemoeshared, scaled": ("granitemoeshared", {"logits_scaling": 4.0, "attention_multiplier": 0.5}),
    "granitemoehybrid, scaled": ("granitemoehybrid", {"logits_scaling": 4.0, "attention_multiplier": 0.5}),
    "granite_swa, scaled": ("granite_swa", {"logits_scaling": 4.0, "attention_multiplier": 0.5}),
    "hyperclovax, scaled": ("hyperclovax", {"logits_scaling": 4.0, "attention_multiplier": 0.15}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.5}),
    "falcon_h1, scaled": ("falcon_h1", {"lm_head_multiplier": 0.3, "key_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "minicpm3, scaled": ("minicpm3", {"dim_model_base": 16}),
    "gemma2, no cap of logits": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma3_text, cap of logits": ("gemma3_text", {"final_logit_softcapping": 5.0}),
    "nanochat, cap of logits": ("nanochat", {"final_logit_softcapping": 2.0}),
    # caps of scores
    "gemma2, eager": ("gemma2", {"attn_implementation": "eager"}),
    "gemma2, eager, cap 3": ("gemma2", {"attn_implementation": "eager", "attn_logit_softcapping": 3.0}),
    "gemma2, no cap of scores": ("gemma2", {"attn_logit_softcapping": None}),
    "vaultgemma, eager": ("vaultgemma", {"attn_implementation": "eager"}),
    # sinks
    "gpt_oss, no windows": ("gpt_oss", {"layer_types": [FULL] * 8}),
    "gpt_oss, one key head": ("gpt_oss", {"num_key_value_heads": 1}),
    "mimo_v2_flash, full": ("mimo_v2_flash", {"layer_types": [FULL] * 8}),
    # latent attention
    "deepseek_v3, equal widths": ("deepseek_v3", {"v_head_dim": 24}),
    "deepseek_v3, wide values": ("deepseek_v3", {"v_head_dim": 40}),
    "deepseek_v3, queries of full rank": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v2, equal widths": ("deepseek_v2", {"v_head_dim": 24}),
    # sparse attention
    "deepseek_v32, equal widths": ("deepseek_v32", {"v_head_dim": 24}),
    "deepseek_v32, all tokens": ("deepseek_v32", {"index_topk": 64}),
    "glm_moe_dsa, equal widths": ("glm_moe_dsa", {"v_head_dim": 24}),
    "axk2, equal widths": ("axk2", {"v_head_dim": 24}),
    "minimax_m3_vl_text, sparse": ("minimax_m3_vl_text", {"layer_types": ["minimax_m3_sparse", FULL] * 4}),
    "big_bird, full attention": ("big_bird", {"attention_type": "original_full"}),
    "bigbird_pegasus, full attention": ("bigbird_pegasus", {"attention_type": "original_full"}),
    "doge, no choice of keys": ("doge", {"keep_window_size": 64}),
    "doge, window": ("doge", {"layer_types": [SLIDING] * 8}),
    # hybrids: where the layers with softmax attention lie
    "qwen3_next, attention at the ends": ("qwen3_next", {"layer_types": [FULL, *[LINEAR] * 6, FULL]}),
    "qwen3_next, one attention layer": ("qwen3_next", {"layer_types": [*[LINEAR] * 7, FULL]}),
    "qwen3_next, all attention": ("qwen3_next", {"layer_types": [FULL] * 8}),
    "qwen3_next, no attention": ("qwen3_next", {"layer_types": [LINEAR] * 8}),
    "qwen3_5_text, attention at the ends": ("qwen3_5_text", {"layer_types": [FULL, *[LINEAR] * 6, FULL]}),
    "qwen3_5_text, all attention": ("qwen3_5_text", {"layer_types": [FULL] * 8}),
    "lfm2, all attention": ("lfm2", {"layer_types": [FULL] * 8}),
    "lfm2, no attention": ("lfm2", {"layer_types": ["conv"] * 8}),
    "bamba, no attention": ("bamba", {"attn_layer_indices": None}),
    "granitemoehybrid, no attention": ("granitemoehybrid", {"layer_types": [LINEAR] * 8}),
    "granitemoehybrid, no positions": ("granitemoehybrid", {"position_embedding_type": None}),
    "jamba, all attention": ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    "nemotron_h, attention first": (
        "nemotron_h", {"layers_block_type": [FULL, FULL, LINEAR, "mlp", LINEAR, "moe", LINEAR, "mlp"]},
    ),
    "olmo_hybrid, attention at the ends": ("olmo_hybrid", {"layer_types": [FULL, *[LINEAR] * 6, FULL]}),
    "kimi_linear, all attention": ("kimi_linear", {"layer_types": [FULL] * 8}),
    "recurrent_gemma, attention last": ("recurrent_gemma", {"block_types": [*["recurrent"] * 7, "attention"]}),
    # attention that is not causal
    "gemma, bidirectional": ("gemma", {"use_bidirectional_attention": True}),
    "gemma2, bidirectional": ("gemma2", {"use_bidirectional_attention": True}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, bidirectional": ("gemma4_text", {"use_bidirectional_attention": "all"}),
    "bert, not a decoder": ("bert", {"is_decoder": False}),
    "roberta, not a decoder": ("roberta", {"is_decoder": False}),
    "electra, not a decoder": ("electra", {"is_decoder": False}),
    "xlm-roberta, not a decoder": ("xlm-roberta", {"is_decoder": False}),
    "camembert, not a decoder": ("camembert", {"is_decoder": False}),
    "bert-generation, not a decoder": ("bert-generation", {"is_decoder": False}),
    "roformer, not a decoder": ("roformer", {"is_decoder": False}),
    "xlm, not causal": ("xlm", {"causal": False}),
    "xlnet, one direction": ("xlnet", {"attn_type": "uni"}),
    # decoders of encoder-decoders
    "bart, two encoder layers": ("bart", {"encoder_layers": 2}),
    "bart, scaled embeddings": ("bart", {"scale_embedding": True}),
    "whisper, two encoder layers": ("whisper", {"encoder_layers": 2}),
    # Gemma 4
    "gemma4_text, keys are values": ("gemma4_text", {"attention_k_eq_v": True}),
    "gemma4_text, nothing shared": ("gemma4_text", {"num_kv_shared_layers": 0}),
    "gemma4_text, experts": ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2}),
    "gemma3n_text, nothing shared": ("gemma3n_text", {"num_kv_shared_layers": 0}),
}  # fmt: skip


def kinds() -> dict[str, Callable[[], PreTrainedModel]]:
    """All kinds by name, each with a function that builds its model."""
    plain = {model_type: partial(build, model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return plain | {name: partial(build, family, **changes) for name, (family, changes) in VARIANTS.items()}


# ---- 3. Building ----


def build(model_type: str, attn_implementation: str | None = None, **changes) -> PreTrainedModel:
    """A tiny random model of a family. attn_implementation: default is the one that transformers chooses for it."""
    changes = NEEDED.get(model_type, {}) | changes
    gain, seed = changes.pop("gain", 2.0), changes.pop("seed", 0)
    config = tiny_config(model_type, changes)
    torch.manual_seed(seed)
    if model_type in OWN_CONFIG:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        model = model_class._from_config(config, attn_implementation=attn_implementation)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    model = model.float().eval()
    sharpen(model, gain)
    return model


def tiny_config(model_type: str, changes: dict) -> PreTrainedConfig:
    """The configuration of a family with small sizes. `changes` hold for it and for the parts that have such fields."""
    own_config = OWN_CONFIG.get(model_type)
    config_class = getattr(transformers, own_config) if own_config else CONFIG_MAPPING[model_type]
    small = small_fields(config_class, SMALL | changes)

    # A change that is a field neither of the whole nor of a part goes to the whole: its __post_init__ takes it.
    parts = [value for value in small.values() if isinstance(value, PreTrainedConfig)]
    for name, value in changes.items():
        if name not in small and name not in config_class.attribute_map and not any(hasattr(p, name) for p in parts):
            small[name] = value
    return config_class(**small)


def small_fields(config_class: type[PreTrainedConfig], values: dict) -> dict:
    """Arguments for a config class: the values that it has fields for, token numbers that exist, and small parts."""
    names = {field.name: field.default for field in fields(config_class)}
    own_names = config_class.attribute_map  # for example hidden_size -> n_embd
    small = {name: 3 for name, default in names.items() if SPECIAL_TOKEN.search(name) and isinstance(default, int)}
    small |= {own_names[name]: value for name, value in values.items() if name in own_names}
    small |= {name: value for name, value in values.items() if name in names}
    if "kv_lora_rank" in names:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has no groups
    if config_class.sub_configs:
        whole = config_class()
        for name in config_class.sub_configs:
            part = getattr(whole, name, None)
            if part is not None:
                small[name] = type(part)(**small_fields(type(part), values) | values.get(name, {}))
    return small


# The names that families give to what makes queries and keys.
PEAKED = re.compile(
    r"q_proj|k_proj|qkv|Wqkv|c_attn|query|key|[qk]_lin\b|project_[qk]\b|\.[wW][qk]\b|q_([ab]|gate)_proj|kv_([ab]_)?proj|"
    r"r_proj|rel_logits|k_sconv|self_attn\.dt_proj|(\b|_)q?[qk]_?(layer)?_?norm"
)


@torch.no_grad()
def sharpen(model: PreTrainedModel, gain: float) -> None:
    """Enlarge what makes scores and logits, and add noise to weights that begin as a constant.

    A weight that begins at 0 or 1 (a bias, a norm, a sink, a gate) would hide the error of whoever leaves it out.
    gain: more makes sharper maps. If maps have one entry near 1 a row, rounding errors grow from layer to layer.
    """
    for name, p in model.named_parameters():
        is_constant = p.numel() > 1 and bool((p == p.flatten()[0]).all())
        if is_constant:
            p += 0.1 * torch.randn_like(p)
        if PEAKED.search(name):
            if "norm" in name:
                p += gain - 1  # a norm multiplies by w or by 1 + w
            elif p.ndim > 1:
                p *= 6 * gain
        elif "sink" in name:
            p += torch.randn_like(p)
    outputs = model.get_output_embeddings()
    for output in outputs if isinstance(outputs, torch.nn.ModuleList) else [outputs]:
        if output is not None:
            output.weight *= 8
