"""Tiny random models and a tokenizer for tests: odd sizes, non-zero biases, grouped-query attention."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

FAMILIES = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    "mistral": (MistralConfig, {"head_dim": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"attention_bias": True, "head_dim": 16}),
    "gemma2": (
        Gemma2Config,
        {
            "attention_bias": True, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 4,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "attn_implementation": "eager",
        },
    ),
    "phi3": (
        Phi3Config,
        {
            "sliding_window": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "mixtral": (MixtralConfig, {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
            "attention_bias": True, "norm_topk_prob": False,
        },
    ),
    "opt": (OPTConfig, {"ffn_dim": 97, "word_embed_proj_dim": 64, "dropout": 0.0}),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe")
DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> PreTrainedModel:
    kind, own = FAMILIES[family]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
    }
    if family != "opt":
        sizes |= {"intermediate_size": 97, "num_key_value_heads": 4}
    if family in MIXTURES and dtype == torch.float64:
        sizes["experts_implementation"] = "eager"  # grouped_mm, the default, takes no float64
    config = kind(**sizes | own | overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.manual_seed(seed)  # after construction, so that every dtype draws the same weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (0.3 if parameter.ndim == 1 else 0.15))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def tiny_tokenizer():
    """Byte-level BPE with 64 entries, the vocabulary of the tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted("Ġ.,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
