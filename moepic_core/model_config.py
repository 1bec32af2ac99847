"""What a checkpoint's `config.json` says, under whatever names its family uses.

`checkpoint` asks for the few numbers that tensors do not show (top-k, context length, dtype) and for those that the
tensors must confirm. Keys that mean the same are listed here once; there is no list of models. Transformers' own config
classes are not used: they would fill gaps with defaults, and the question here is what the file really says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import BadCheckpoint
from .shards import read_json

_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_STATE_WIDTH = ("mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim")
_DTYPES = ("float32", "bfloat16", "float16")


class ModelConfig:
    """The config of the language model in `folder`. Multimodal checkpoints nest it; outer values fill in."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        if not self.path.is_file():
            raise BadCheckpoint(f"{folder} has no config.json; choose a folder with config.json and *.safetensors")
        self._outer = read_json(self.path)
        self.text = self.path.read_text(encoding="utf-8")
        self._values = {**self._outer, **_language_part(self._outer)}

    @property
    def names_experts(self) -> bool:
        """Whether the config speaks of a Mixture-of-Experts model at all."""
        return any(self._values.get(key) not in (None, 0, 1) for key in _NUM_EXPERTS)

    @property
    def num_experts(self) -> int:
        return self._count("number of experts", _NUM_EXPERTS)

    @property
    def top_k(self) -> int:
        return self._count("number of experts per token", _TOP_K)

    @property
    def hidden(self) -> int:
        return self._count("hidden size", ("hidden_size",))

    @property
    def expert_hidden(self) -> int:
        """Input and output size of one expert: the hidden size, unless the model projects to a latent size first."""
        return self._count("latent size", ("moe_latent_size",)) if self._values.get("moe_latent_size") else self.hidden

    @property
    def vocab_size(self) -> int:
        return self._count("vocabulary size", ("vocab_size",))

    @property
    def context_length(self) -> int:
        return self._count("context length", ("max_position_embeddings", "max_sequence_length", "seq_length"))

    @property
    def num_layers(self) -> int:
        kinds = self._values.get("layers_block_type")  # Nemotron-H lists its layers instead of counting them
        return len(kinds) if isinstance(kinds, list) else self._count("number of layers", ("num_hidden_layers",))

    @property
    def attention_heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        query = self._count("number of attention heads", ("num_attention_heads",))
        return query, self._count("number of key-value heads", ("num_key_value_heads", "num_attention_heads"))

    @property
    def state_width(self) -> int:
        """Numbers in one row of the state of a state space or of linear attention; 0 where the model has neither."""
        widths = [self._values.get(key) for key in _STATE_WIDTH]
        return max((width for width in widths if type(width) is int), default=0)

    @property
    def model_type(self) -> str:
        model_type = self._outer.get("model_type")
        if not isinstance(model_type, str):
            raise BadCheckpoint(f"{self.path} needs a model_type, found {model_type!r}; download the file again")
        return model_type

    @property
    def architecture(self) -> str:
        """The first of `architectures`, or an empty string where the config names none."""
        names = self._outer.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def dtype(self) -> str | None:
        """The dtype that the authors meant to run in, or None when the config is silent."""
        dtype = self._values.get("dtype") or self._values.get("torch_dtype")
        if dtype is None:
            return None
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise BadCheckpoint(f"{self.path} wants dtype {name!r}; choose one of {', '.join(_DTYPES)} instead of auto")
        return name

    @property
    def is_untied(self) -> bool:
        """Whether the config says that token embedding and output head are two tables. Silence does not say so, since
        families differ in what it means, nor do two parts that disagree.
        """
        said = [part.get("tie_word_embeddings") for part in (self._outer, self._values)]
        return False in said and all(value in (None, False) for value in said)

    @property
    def quantization(self) -> str | None:
        """Method by which the weights were quantized, or None when they were not."""
        for part in (self._outer, self._values):
            if quantization := part.get("quantization_config") or part.get("compression_config"):
                method = quantization.get("quant_method") if isinstance(quantization, dict) else None
                return str(method or "unnamed method")
        return None

    def _count(self, meaning: str, keys: tuple[str, ...]) -> int:
        """The whole number from 1 under the first of `keys` that has a value."""
        value = next((self._values[key] for key in keys if self._values.get(key) is not None), None)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # some families repeat the number for every layer
        if type(value) is not int or value < 1:
            raise BadCheckpoint(f"{self.path} gives no {meaning} ({' or '.join(keys)} from 1), found {value!r}")
        return value


def _language_part(config: dict[str, Any]) -> dict[str, Any]:
    """The innermost nested config of the language model, or nothing when the config is flat."""
    for key in _LANGUAGE_PARTS:
        if isinstance(part := config.get(key), dict):
            return {**part, **_language_part(part)}
    return {}
