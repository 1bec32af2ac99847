"""The checkpoints that benchmarks run on: random weights, the shapes of real models, written in the hub's format.

`python -m benchmarks.reference_checkpoints a|b|c FOLDER`. A is Mixtral-like (few large experts), B Qwen3-MoE-like
(many small ones), about 2 GB each; C has Qwen3-30B-A3B's layers, eight of its 48, about 10 GB, for GPUs. Embeddings
have unit variance: with the usual 0.02 the routing of a random model collapses. Random weights route almost uniformly,
which is the hardest case for a cache: hit rates measured here are no forecast for real text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

_QWEN = {"num_attention_heads": 16, "num_key_value_heads": 4, "norm_topk_prob": True, "vocab_size": 32000}
CONFIGS: dict[str, Any] = {
    "a": lambda: MixtralConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=4,
    ),
    "b": lambda: Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=384, intermediate_size=2048, num_hidden_layers=12, num_experts=64,
        num_experts_per_tok=8, head_dim=64, **_QWEN,
    ),
    "c": lambda: Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144, num_hidden_layers=8, num_experts=128,
        num_experts_per_tok=8, head_dim=128, **{**_QWEN, "num_attention_heads": 32},
    ),
}  # fmt: skip


def make(name: str, folder: Path, device: str = "cpu") -> Path:
    """Writes reference checkpoint `name` in bfloat16 to `folder` unless it is there; the same bytes for the same
    device.
    """
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        torch.set_default_dtype(torch.float32)
    model.get_input_embeddings().weight.data.normal_()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size="5GB")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(make(options.name, options.folder, options.device))


if __name__ == "__main__":
    main()
