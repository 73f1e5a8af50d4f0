"""A tiny model with random weights of every architecture that writes text."""

from __future__ import annotations

from typing import Any

# Settings by what configs call them; a config takes those it has.
_SIZES: dict[str, Any] = {
    "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512,
    # width
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "lru_width",
                     "embedding_dim", "input_embedding_size", "output_embedding_size",
                     "attention_hidden_size", "embed_dim", "mamba_intermediate"], 32),
    # inside of the MLP
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size", "ffn_dim", "decoder_ffn_dim",
                     "encoder_ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "d_inner", "n_inner",
                     "shared_expert_intermediate_size", "intermediate_size_mlp",
                     "expert_ffn_hidden_size",
                     "feed_forward_size", "dense_intermediate_size", "shared_intermediate_size",
                     "block_ff_dim"], 48),
    # layers
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
                     "encoder_layers", "num_decoder_layers", "num_blocks"], 2),
    # heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
                     "decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "d_head", "dim_head", "v_head_dim", "qk_nope_head_dim",
                     "qk_rope_head_dim", "attention_head_dim", "global_head_dim", "rotary_dim",
                     "swa_head_dim", "index_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "kv_channels"], 8),
    "qk_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"], 2),
    "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    # Mamba
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 8, "mamba_head_dim": 8,
    "mamba_d_state": 16, "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_d_ssm": 64,
    "mamba_chunk_size": 16, "chunk_size": 16, "state_size": 16, "mamba_n_groups": 1,
    "n_groups": 1, "time_step_rank": 4,
    "first_k_dense_replace": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "sliding_window": 9, "attention_window_size": 9, "local_attention": 9,
}  # fmt: skip
_CONV_AND_ATTENTION = {"layer_types": ["conv", "full_attention"]}
_WINDOW_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
           "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 160,
           "hidden_size_per_layer_input": 8}  # fmt: skip
# More settings by model type; None: the config's own default.
_SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dots3_note_text": {
        "head_dim": 16,
        "index_n_heads": 4,
        "shared_experts_intermediate_size": 48,
        "per_layer_config": {
            1: {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
            }
        },
    },
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "gemma3n_text": _SHARED | {"activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONV_AND_ATTENTION,
    "lfm2_moe": _CONV_AND_ATTENTION | {"num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen2": _WINDOW_AND_FULL | {"use_sliding_window": True},
    "qwen3": _WINDOW_AND_FULL | {"use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "smollm3": {"no_rope_layers": [1, 0]},
    "zaya": {"num_experts_per_tok": 1},
}


# Model types that no small settings make a causal language model of, and why.
NOT_BUILT = {
    "blt": "its local and global models have widths that depend on each other",
    "dots3_note": "its settings by layer are fixed",
    "gemma3n": "its image encoder needs another package (the text part is gemma3n_text)",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
}


def tiny_settings(config: Any, kind: str = "") -> dict[str, Any]:
    """Return small settings for a default config, with one layer of each kind it has."""
    names = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    settings = {name: value for name, value in _SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # multi-head latent attention has no groups of heads
        settings["num_key_value_heads"] = 4
    lists: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        is_computed = isinstance(getattr(type(config), name, None), property)
        if kinds and name in config.to_dict() and not is_computed:
            lists[name] = list(dict.fromkeys(kinds))
    count = max([2, *map(len, lists.values())])
    for name, kinds in lists.items():
        settings[name] = (kinds * count)[:count]
    if lists and "num_hidden_layers" in settings:
        settings["num_hidden_layers"] = count
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            settings[name] = tiny_settings(inner, inner.model_type)
    return settings | _SPECIAL.get(kind, {})


def tiny_config(kind: str) -> Any:
    """Return a small config of a model type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    return cls(**tiny_settings(cls(), kind))


def tiny_model(kind: str) -> Any:
    """Return the model in evaluation mode, with weights so large that its layers matter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(kind)
    config.is_decoder = True
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 5_000_000:
        raise ValueError(f"{size:,} parameters")
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):  # as `load_model` does
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if parameter.ndim > 2 else parameter.shape[-1]
                parameter.normal_(0, fan_in**-0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model
