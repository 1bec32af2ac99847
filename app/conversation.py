"""From what the chat shows to what the model reads. Pure.

Gradio's history is a list of messages whose content is a list of parts. The model gets plain texts, and turns of user
and assistant that alternate, since many chat templates insist on it: after a stop before the first token, or after an
error, two messages of the user follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def messages(system: str, history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """`history` as the model reads it, behind the system prompt if there is one."""
    turns: list[dict[str, str]] = []
    for entry in history:
        text = "" if _is_reasoning(entry) else text_of(entry)
        if not text:
            continue
        if turns and turns[-1]["role"] == entry["role"]:
            turns[-1] = {"role": entry["role"], "content": f"{turns[-1]['content']}\n\n{text}"}
        else:
            turns.append({"role": entry["role"], "content": text})
    return [{"role": "system", "content": system.strip()}, *turns] if system.strip() else turns


def as_text(turns: Sequence[Mapping[str, str]]) -> str:
    """The conversation for a model that has no chat template: its words one after another, to be continued."""
    return "\n\n".join(turn["content"] for turn in turns)


def _is_reasoning(entry: Mapping[str, Any]) -> bool:
    """Gradio shows a model's reasoning as a message of its own; templates leave out that of earlier turns."""
    return bool((entry.get("metadata") or {}).get("title"))


def text_of(entry: Mapping[str, Any]) -> str:
    """The words of one message."""
    content = entry["content"]
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
