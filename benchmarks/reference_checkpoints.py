"""The checkpoints that benchmarks run on, written in the hub's format.

`python -m benchmarks.reference_checkpoints a|b|c|even|wide FOLDER`. A is Mixtral-like (few large experts), B
Qwen3-MoE-like (many small ones), about 2 GB each; C has Qwen3-30B-A3B's layers, eight of its 48, about 10 GB, for GPUs.
Embeddings have unit variance: with the usual 0.02 the routing of a random model collapses. Random weights route almost
uniformly, which is the hardest case for a cache: hit rates measured here are no forecast for real text. All have the
bundled model's tokenizer, so that they can be talked to and calibrated.

Two are for comparing strategies. `even` is a random one too, Mixtral in small:
16 layers of 8 experts, 6.3 MB each, used evenly, as Mixtral's nearly are. `wide` is the bundled model with each neuron
of its experts 32 times, each counting a 32nd: it says and routes what the bundled model does, but its experts have
3.1 MB, the size that real models' experts have, in place of 98 KB.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "demo-moe"
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
    "even": lambda: MixtralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(BUNDLED)), hidden_size=1024, intermediate_size=1024,
        num_hidden_layers=16, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=4,
        max_position_embeddings=2048,
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
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def widen(source: Path, folder: Path, times: int = 32) -> Path:
    """Writes the Qwen3-MoE checkpoint `source` with experts `times` (a power of two) as wide, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    narrow = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = copy.deepcopy(narrow.config)
    config.moe_intermediate_size *= times
    weights = narrow.state_dict()
    for name in list(weights):
        if name.endswith("experts.gate_up_proj"):
            weights[name] = weights[name].repeat_interleave(times, dim=1)
        elif name.endswith("experts.down_proj"):
            weights[name] = weights[name].repeat_interleave(times, dim=2) / times  # exact
    wide = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    wide.load_state_dict(weights)
    wide.generation_config = narrow.generation_config
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=(*CONFIGS, "wide"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.name == "wide":
        print(widen(BUNDLED, options.folder))
    else:
        print(make(options.name, options.folder, options.device))


if __name__ == "__main__":
    main()
