"""What a generation reports while it runs. Frozen; the command line and the page read these and nothing else of a
reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "context", "stopped"]  # end token, token limit, context full, by the user


@dataclass(frozen=True)
class PromptRead:
    """Part of the prompt has been run through the model."""

    read: int  # new prompt tokens so far
    total: int  # new prompt tokens in all
    cached: int  # tokens kept from the turn before, which cost nothing


@dataclass(frozen=True)
class TokenMade:
    token_id: int
    text: str  # may be empty while a character is incomplete


@dataclass(frozen=True)
class Notice:
    """Something changed that the user should know, such as a smaller cache after memory ran out."""

    text: str


@dataclass(frozen=True)
class Done:
    reason: FinishReason
    token_ids: tuple[int, ...]
    text: str


Event = PromptRead | TokenMade | Notice | Done
