"""What a conversation is, what the model reads of it, and what the chat shows. Pure.

A conversation is a tree: whoever asks again or edits gets another version beside the old one, and `leaf` says which
branch is open. Questions and answers alternate, because an answer is written down before it has words. Gradio's
chat shows a list of dictionaries; `shown` makes it, with a model's reasoning folded and each reply's figures below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["user", "assistant"]
REASONS = {  # why a message ended → what the chat says about it; "" is a message that was cut off
    "stop": "",
    "length": "longest answer reached",
    "context": "the context is full",
    "stopped": "stopped",
    "error": "",
    "": "unfinished",
}
TITLE_CHARS = 60
REASONING = re.compile(r"<think>(.*?)(</think>|\Z)", re.DOTALL)
# Code, which stays as it is, or a formula between single dollars as pandoc reads it, so that prices are none.
CODE_OR_FORMULA = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?(?:\$\$|\Z)|\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", re.DOTALL
)


@dataclass(frozen=True)
class Message:
    number: int  # within its conversation, from 1 in the order of writing
    parent: int | None  # the message that it follows; None begins the conversation
    role: Role
    text: str
    created: float  # s since 1970
    reason: str = "stop"  # a key of REASONS
    figures: Mapping[str, Any] = field(default_factory=dict)  # of an answer; see `note`


@dataclass(frozen=True)
class Conversation:
    id: str
    title: str
    created: float  # s since 1970
    updated: float
    changed: int  # grows with every change; no two changes of a store share one
    settings: Mapping[str, Any]  # system prompt, sampling, checkpoint
    leaf: int | None  # the last message of the open branch
    messages: tuple[Message, ...]  # of all branches, by number

    @property
    def path(self) -> tuple[Message, ...]:
        """The open branch, from its first message to `leaf`."""
        return self.path_to(self.leaf)

    def path_to(self, number: int | None) -> tuple[Message, ...]:
        found = {message.number: message for message in self.messages}
        path = []
        while number is not None:
            path.append(found[number])
            number = found[number].parent
        return tuple(reversed(path))

    @property
    def followers(self) -> dict[int | None, list[int]]:
        """Number of a message, or None for the beginning → the messages that follow it: versions of one another."""
        followers: dict[int | None, list[int]] = {}
        for message in self.messages:
            followers.setdefault(message.parent, []).append(message.number)
        return followers

    def newest_leaf(self, number: int) -> int:
        """The end of the newest branch that goes through message `number`."""
        followers = self.followers
        while number in followers:
            number = followers[number][-1]
        return number


class Part(NamedTuple):
    """A stretch of an answer."""

    text: str
    is_reasoning: bool
    is_whole: bool


def parts(text: str) -> list[Part]:
    """`text` cut into prose and reasoning. Some templates open the reasoning themselves, so only its end is seen."""
    if "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        text = f"<think>{text}"
    found, end = [], 0
    for match in REASONING.finditer(text):
        found += [Part(text[end : match.start()], False, True), Part(match[1], True, bool(match[2]))]
        end = match.end()
    found.append(Part(text[end:], False, True))
    return [part._replace(text=part.text.strip("\n")) for part in found if part.text.strip()]


def without_reasoning(text: str) -> str:
    return "\n\n".join(part.text for part in parts(text) if not part.is_reasoning)


def replace_prose(text: str, prose: str) -> str:
    """`text` with its reasoning as it was and `prose` for the rest."""
    kept = "".join(f"<think>{part.text}</think>\n" for part in parts(text) if part.is_reasoning)
    return kept + prose


def messages(system: str, path: Iterable[Message]) -> list[dict[str, str]]:
    """The branch as the model reads it: plain texts without reasoning, of user and assistant in turn."""
    turns: list[dict[str, str]] = []
    for message in path:
        text = message.text if message.role == "user" else without_reasoning(message.text)
        if not text:
            continue
        if turns and turns[-1]["role"] == message.role:  # the answer between them never got a word
            turns[-1] = {"role": message.role, "content": f"{turns[-1]['content']}\n\n{text}"}
        else:
            turns.append({"role": message.role, "content": text})
    return [{"role": "system", "content": system.strip()}, *turns] if system.strip() else turns


def as_text(turns: Sequence[Mapping[str, str]]) -> str:
    """The conversation for a model that has no chat template: its words one after another, to be continued."""
    return "\n\n".join(turn["content"] for turn in turns)


def title_of(text: str) -> str:
    """What a conversation is called that begins with `text`."""
    words = " ".join(text.split())
    return words if len(words) <= TITLE_CHARS else words[: TITLE_CHARS - 1].rstrip() + "…"


def shown(path: Iterable[Message]) -> list[dict[str, Any]]:
    """The branch as Gradio's chat takes it: one entry per stretch, those of a message one after another."""
    return [entry for message in path for entry in _entries(message)]


def owner(path: Iterable[Message], index: int) -> Message | None:
    """The message to which entry `index` of `shown` belongs."""
    owners = [message for message in path for _ in _entries(message)]
    return owners[index] if 0 <= index < len(owners) else None


def waiting(words: str) -> dict[str, Any]:
    """An entry of an answer that has no words yet: what is going on."""
    return _entry("assistant", "", {"title": words, "status": "pending"})


def _entries(message: Message) -> Iterator[dict[str, Any]]:
    if message.role == "user" or not message.text.strip():
        yield _entry(message.role, message.text)
        return
    for part in parts(message.text):
        thinks = part.is_reasoning and not part.is_whole and message.reason == ""
        metadata = {"title": "Reasoning", "status": "pending" if thinks else "done"} if part.is_reasoning else None
        yield _entry("assistant", with_formulas(part.text), metadata)


def _entry(role: Role, text: str, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """As a list of one part, because Gradio would take the indentation off a plain text."""
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata}


def with_formulas(text: str) -> str:
    """`$x$` as `\\(x\\)`, which the chat typesets."""
    return CODE_OR_FORMULA.sub(lambda match: f"\\({match[1]}\\)" if match[1] else match[0], text)


def rows(conversation: Conversation) -> list[dict[str, Any]]:
    """What stands under each message of the open branch."""
    path, followers = conversation.path, conversation.followers
    return [
        {
            "number": message.number,
            "role": message.role,
            "versions": followers[message.parent],
            "note": note(message),
            "failed": message.reason == "error",
            "continues": message is path[-1] and message.role == "assistant" and bool(without_reasoning(message.text)),
        }
        for message in path
    ]


def note(message: Message) -> str:
    """Speed and end of an answer, in words."""
    if message.role == "user":
        return ""
    figures = message.figures
    templates = {
        "tokens_per_s": "{:.1f} tokens/s",
        "ttft_s": "first token {:.2f} s",
        "new_tokens": "{} tokens",
        "error": "{}",
    }
    words = [template.format(figures[key]) for key, template in templates.items() if figures.get(key)]
    return " · ".join(filter(None, [*words, REASONS[message.reason]]))
