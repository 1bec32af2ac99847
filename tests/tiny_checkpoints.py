"""Make tiny random checkpoints of many Mixture-of-Experts families, on disk as the hub has them.

Tests get them through the `checkpoints` fixture. Transformers' own config and model classes and `save_pretrained` do
the work, so tensors carry the names of real checkpoints. Weights are scaled so that every part matters to the logits
and routing spreads over all experts; with Transformers' own initialisation experts would vanish beside the residual
stream. Everything follows from the seed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 64}
_SHARED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 64}
_PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 40}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 40}

# Family (Transformers' model_type) to what differs from _COMMON. Where a family can have a dense layer, it has one.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_LOCAL, "hidden_size": 48, "num_attention_heads": 6},
    "qwen2_moe": {**_SHARED, "shared_expert_intermediate_size": 40, "mlp_only_layers": [2]},
    "qwen3_moe": {**_SHARED, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": _PLAIN,
    "deepseek_v2": {**_ROUTED, **_MLA, "q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {
        **_ROUTED, **_MLA, "q_lora_rank": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1,
    },
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 16},
    "phimoe": _LOCAL,
    "qwen3_next": {
        **_SHARED, "head_dim": 16, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "glm4_moe": {**_ROUTED, "head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granitemoe": {**_LOCAL, "attention_multiplier": 0.25, "logits_scaling": 2.0},
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "intermediate_size": 64,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_interval": 2, "num_hidden_layers": 5,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 40, "head_dim": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16},
    "afmoe": {**_SHARED, "head_dim": 16, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 16},
    "flex_olmo": _PLAIN,
    "nemotron_h": {
        **_ROUTED, "moe_shared_expert_intermediate_size": 40, "n_shared_experts": 1, "head_dim": 16,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "moe"], "num_hidden_layers": 5,
        "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16,
    },
    "lfm2_moe": {**_SHARED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "jamba": {
        **_PLAIN, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "dots1": {**_ROUTED, "head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1},
}  # fmt: skip


def make_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any
) -> PreTrainedModel:
    """The random model of `family` in memory: what `make` saves."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # Mamba's and routers' own initial values are drawn from the global generator
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    num_experts = next(getattr(text, name) for name in ("num_local_experts", "num_experts") if hasattr(text, name))
    with torch.no_grad():
        for name, values in sorted([*model.named_parameters(), *model.named_buffers()]):
            _randomise(name, values, text.hidden_size, num_experts, generator)
    return model.eval()


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any) -> Path:
    """A checkpoint of `family` with a tokenizer in `folder`, made anew. Returns `folder`."""
    make_model(family, dtype, seed, **config_overrides).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of `VOCAB` tokens with a chat template; any text survives a round trip."""
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    text = "A token uses only a few experts; the others wait in host memory until the router asks for them. "
    tokenizer.train_from_iterator([text + text.swapcase()], trainer)
    assert tokenizer.get_vocab_size() == VOCAB, f"vocabulary has {tokenizer.get_vocab_size()} tokens, wanted {VOCAB}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _randomise(name: str, values: torch.Tensor, hidden: int, num_experts: int, generator: torch.Generator) -> None:
    """Overwrite one parameter or buffer in place with values of a size that suits its role."""
    if "inv_freq" in name or "A_log" in name or not values.is_floating_point():
        return
    noise = torch.randn(values.shape, generator=generator)
    if values.ndim == 1 or "bias" in name:  # norms, biases, time constants: around their initial value
        noise = values + 0.1 * noise
    elif tuple(values.shape) == (num_experts, hidden):  # routers: logits with a deviation of 2 spread over experts
        noise *= 2 / math.sqrt(hidden)
    elif "embed" not in name:
        noise /= math.sqrt(hidden)
    values.copy_(noise)


def write_sparse(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A valid safetensors file at `path` of zeros that take no room on disk: tensor name to (dtype, shape)."""
    table, stop = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + math.prod(shape) * {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1}[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + stop)
