"""Transformers' own ways to run a checkpoint that does not fit: mapped weights, or experts on accelerate's disk tier.

`capped_decode` starts `python -m benchmarks.rival_transformers CHECKPOINT …`; with `--offload-dir` it is accelerate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.rival_replies import print_replies, rival_options


def main() -> None:
    parser = rival_options(__doc__.splitlines()[0])
    parser.add_argument("--offload-dir", help="let accelerate keep the experts on disk, with its own files in here")
    options = parser.parse_args()
    more: dict[str, Any] = {}
    if options.offload_dir:
        more = {"device_map": experts_on_disk(options.weights), "offload_folder": options.offload_dir}
    model = AutoModelForCausalLM.from_pretrained(
        options.weights, dtype="auto", experts_implementation="eager", **more
    ).eval()
    print_replies(lambda prompt: greedy(model, prompt), options)


def experts_on_disk(checkpoint: str) -> dict[str, str]:
    """accelerate's map of modules to tiers: routed experts on disk, all else in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = dict.fromkeys(name.rpartition(".")[0] for name, _ in tensors)
    return {name: "disk" if name.endswith(".experts") else "cpu" for name in modules}


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> Iterator[int]:
    """The likeliest tokens, one after the other, without end."""
    output = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
    while True:
        token = int(output.logits[0, -1].argmax())
        yield token
        ids = torch.tensor([[token]], device=model.device)
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)


if __name__ == "__main__":
    sys.exit(main())
