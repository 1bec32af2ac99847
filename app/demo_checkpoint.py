"""Makes a small Mixture-of-Experts checkpoint with random weights, for a first start without any other checkpoint.

The application asks for it when the user names no checkpoint and none comes with it. It is a real Qwen3-MoE checkpoint
on disk and shows how offloading works, but it was never trained: it answers with random words, and whoever shows it
says so (`WARNING`). Everything follows from the seed, so it is the same on every machine and made only once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moepic_core.errors import OutOfRoom
from moepic_core.folders import user_folder

WARNING = "random weights: it produces noise, it shows how offloading works"
NAME = "demo-random-moe"
LAYERS, EXPERTS, TOP_K, HIDDEN, NEURONS = 8, 32, 4, 256, 192
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SEED = 2509_08342
PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = """
a mixture of experts holds many small networks and uses only a few of them for each token . the router looks at the
token and picks its experts , so most weights rest at any moment and can wait in host memory until they are wanted .
hot experts stay on the device , cold ones travel over the link while the device is busy with what it already has .
each expert is cut in two by neurons : the top segment is cached , the bottom arrives in time when the guess was right .
a larger budget keeps more tops , a faster link hides more bytes , and a good guess turns a stall into nothing at all .
one layer after another asks , one answer after another comes back , and word by word a sentence grows out of numbers .
"""


def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint, made if it is not there yet. Raises OutOfRoom when it cannot be written."""
    folder = user_folder() / "checkpoints" / NAME
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=folder.parent))
            try:
                make(unfinished)
                os.replace(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            if (folder / "config.json").is_file():  # another process was faster
                return folder
            raise OutOfRoom(
                f"the demo checkpoint cannot be written to {folder.parent} ({error.strerror}); give a --checkpoint, "
                "or set MOEPIC_HOME to a folder with 100 MB of room"
            ) from error
    return folder


def make(folder: Path) -> None:
    """Writes the checkpoint into `folder`."""
    tokenizer = _tokenizer()
    vocabulary = tokenizer.get_vocab()
    save_file(_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token_id": vocabulary[PAD], "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END]}
    _write_json(folder / "generation_config.json", special)
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": START, "eos_token": END,
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    _write_json(folder / "config.json", {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "vocab_size": len(vocabulary), "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": 4 * NEURONS,
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": NEURONS, "norm_topk_prob": True,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [], **special,
    })  # fmt: skip


def _tokenizer() -> Tokenizer:
    """A byte-level tokenizer in which every word of WORDS is one token; any other text is spelled out in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [" ".join(WORDS.split()), "user\n", "assistant\n", "system\n"],
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=1,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _weights(vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Random tensors under the names that Qwen3-MoE has on the hub.

    Dimension 0 of the residual stream is the same for every token. Through it routers prefer some experts to others, as
    trained ones do, and the output prefers whole words to pieces of words.
    """
    generator = torch.Generator().manual_seed(SEED)

    def random(rows: int, columns: int, gain: float = 1.0) -> Tensor:  # [rows, columns]
        return torch.randn(rows, columns, generator=generator).mul_(gain / math.sqrt(columns))

    def into_residual(columns: int) -> Tensor:  # [HIDDEN, columns]
        values = random(HIDDEN, columns, 1 / math.sqrt(2 * LAYERS))
        values[0] = 0
        return values

    words = {f"Ġ{word}" for word in WORDS.split()}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    likelihood = [0.0 if token in words else -1.5 if token == END else -16.0 for token in tokens]
    embedding = random(len(vocabulary), HIDDEN, math.sqrt(HIDDEN))
    embedding[:, 0] = 4.0
    head = random(len(vocabulary), HIDDEN, 2.0)
    head[:, 0] = torch.tensor(likelihood)
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(HIDDEN)}
    for number in range(LAYERS):
        router = random(EXPERTS, HIDDEN, 1.5)
        router[:, 0] = 0.6 * torch.randn(EXPERTS, generator=generator)
        layer = {
            "input_layernorm": torch.ones(HIDDEN),
            "post_attention_layernorm": torch.ones(HIDDEN),
            "self_attn.q_norm": torch.ones(HEAD_DIM),
            "self_attn.k_norm": torch.ones(HEAD_DIM),
            "self_attn.q_proj": random(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": random(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": random(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": into_residual(HEADS * HEAD_DIM),
            "mlp.gate": router,
        }
        for expert in range(EXPERTS):
            layer[f"mlp.experts.{expert}.gate_proj"] = random(NEURONS, HIDDEN)
            layer[f"mlp.experts.{expert}.up_proj"] = random(NEURONS, HIDDEN)
            layer[f"mlp.experts.{expert}.down_proj"] = into_residual(NEURONS)
        weights |= {f"model.layers.{number}.{name}.weight": values for name, values in layer.items()}
    return {name: values.to(torch.bfloat16) for name, values in weights.items()}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
