"""Text in, text out: chat templates, tokens, sampling. All of it is Transformers' own, given our shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import BadCheckpoint, BadSettings
from .refusals import refusals

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (1, 10**9), "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, 10**9),
            "min_p": (0, 1), "repetition_penalty": (0.01, 100), "seed": (0, 2**64 - 1),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadSettings(f"{name} {value} is out of range; allowed is {low} to {high}")


class Sampler:
    """Draws tokens with Transformers' logits processors and one seeded generator."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self.processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self.generator = torch.Generator(device)
        if self.greedy:
            return
        self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)
        self.processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.processors.append(TopKLogitsWarper(sampling.top_k))
        if 0 < sampling.top_p < 1:
            self.processors.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self.processors.append(MinPLogitsWarper(float(sampling.min_p)))

    def next(self, logits: Tensor, ids: Sequence[int]) -> int:
        """The next token after `ids`, from logits `[vocab]`."""
        scores = logits.float().unsqueeze(0)  # [1, vocab]
        if self.processors:
            scores = self.processors(torch.tensor([ids], device=logits.device), scores)
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


class Text:
    """A checkpoint's tokenizer and chat template; a checkpoint without them still runs on token ids."""

    def __init__(self, path: str, generation_config: Any) -> None:
        self.path = path
        self.tokenizer: Any = None
        if (Path(path) / "tokenizer_config.json").is_file() or (Path(path) / "tokenizer.json").is_file():
            with refusals(f"the tokenizer of {Path(path).name}", "download its tokenizer files again"):
                self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        self.stop_ids = self._stop_ids(generation_config)

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    def encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._need_tokenizer()(prompt).input_ids
        return ids

    def encode_chat(self, messages: Sequence[Message], continue_last: bool = False) -> list[int]:
        """Token ids of a conversation. `continue_last` leaves the last (assistant) message open instead of adding a
        turn.
        """
        tokenizer = self._need_tokenizer()
        if not self.has_chat_template:
            raise BadCheckpoint(f"{Path(self.path).name} has no chat template; give a plain prompt instead")
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
            )
        except TemplateError as error:  # a template may refuse roles, or two turns of one side
            raise BadSettings(
                f"the model's chat template refuses this conversation: {error}; change its roles"
            ) from error
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def stream(self) -> TextStream:
        return TextStream(self.tokenizer)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise BadCheckpoint(f"{Path(self.path).name} has no tokenizer files; give token ids instead of text")
        return self.tokenizer

    def _stop_ids(self, generation_config: Any) -> frozenset[int]:
        stop = getattr(generation_config, "eos_token_id", None)
        listed = [stop] if isinstance(stop, int) else stop or []
        if not isinstance(listed, list) or not all(isinstance(token, int) for token in listed):
            raise BadCheckpoint(
                f"{Path(self.path).name} gives {stop!r} as eos_token_id; correct it to a token id or a list of them"
            )
        ids = set(listed)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


class TextStream:
    """Turns tokens into text as they come; a character that is not complete yet waits for its other tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""
        self._stream = DecodeStream(skip_special_tokens=True) if getattr(tokenizer, "is_fast", False) else None

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes, perhaps empty. Without a tokenizer, the number itself."""
        if self.tokenizer is None:
            return f"{token_id} "
        if self._stream is not None:
            piece: str | None = self._stream.step(self.tokenizer.backend_tokenizer, token_id)
            return piece or ""
        self._ids.append(token_id)
        text: str = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new
