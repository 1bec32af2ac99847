"""What the demonstration model learns to say: turns of six domains, drawn at random, joined to chats.

`Corpus.chat` gives training chats, `Corpus.held_out` the questions that training never shows. A turn carries the
phrases by which an answer is checked. Everything follows from the random generator that the caller passes.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOMAINS = {"facts": 0.42, "sums": 0.2, "code": 0.08, "stories": 0.1, "phrases": 0.07, "talk": 0.07, "off-topic": 0.06}
POLISH = {"facts": 0.3, "sums": 0.36, "code": 0.03, "stories": 0.14, "phrases": 0.03, "talk": 0.09, "off-topic": 0.05}
STAY = 0.6  # chance that the next turn stays with its subject: chats have runs, as people's do
WHY = ("and why?", "why?", "why is that?", "but why", "why so?", "and why is that", "what is the reason?", "how come?",
       "why does it matter?", "can you say why?", "tell me why", "what is it good for?")  # fmt: skip
EXAMPLE = ("give an example", "an example please", "for example?", "can you give me an example?", "show me an example",
           "such as?", "like what?", "example?", "do you have an example", "make it concrete",
           "could you illustrate it?", "what would that look like?")  # fmt: skip
HELD_OUT_WHY = ("and what is the reason for that?", "why would that be?")
HELD_OUT_EXAMPLE = ("give me one example", "do you have one example for me?")
SUM_FORMS = ("what is {}?", "{}", "{} =", "how much is {}?", "calculate {}", "compute {}", "can you work out {}",
             "please solve {}", "what does {} make?", "tell me {}")  # fmt: skip
HELD_OUT_SUM_FORMS = ("what do you get for {}?", "work out {} please")
WRITTEN = {
    "+": ("{} + {}", "{} + {}", "{}+{}", "{} plus {}", "the sum of {} and {}"),
    "-": ("{} - {}", "{} - {}", "{}-{}", "{} minus {}", "{} take away {}"),
}
ADJECTIVES = ("red", "tiny", "silver", "lost", "sleepy", "brave", "broken", "golden", "quiet", "green", "curious",
              "paper", "wooden", "lonely", "happy", "blue", "secret", "round", "white", "forgotten")  # fmt: skip
SYNONYMS = (
    ("vram", "gpu memory", "video memory", "graphics memory", "vram"),
    ("graphics card", "gpu", "video card"),
    ("tell me about", "explain", "describe", "what can you say about"),
)
BEFORE = ("hey, ", "hi, ", "ok, ", "please, ", "so ", "and ", "now ", "well, ", "one question: ", "i wonder, ",
          "quick question, ", "next: ", "could you tell me, ", "hello! ", "also, ", "hmm, ")  # fmt: skip
AFTER = (
    " please",
    " thanks",
    ", please",
    " exactly",
    " in short",
    " then",
    " again",
    " here",
    " for me",
    " in this app",
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer; a right answer contains each phrase of `keys` (any of them where `any_key`)."""

    domain: str
    question: str
    answer: str
    keys: tuple[str, ...]
    any_key: bool = False
    before: Turn | None = None  # the turn that a follow-up refers to
    name: str = ""

    def right(self, answer: str) -> bool:
        found = [key.lower() in answer.lower() for key in self.keys]
        return any(found) if self.any_key else all(found)


class Corpus:
    """All text of the recipe, read from the folder of this file."""

    def __init__(self) -> None:
        self.facts = [fact for path in sorted(HERE.glob("facts/*.toml")) for fact in _read(path)["fact"]]
        self._talk = _read(HERE / "talk.toml")["talk"]
        self._off_topic = _read(HERE / "off_topic.toml")
        self._phrases = _read(HERE / "phrases.toml")
        self._code = _read(HERE / "code.toml")
        self._stories = _read(HERE / "stories.toml")

    def chat(self, rng: random.Random, shares: Mapping[str, float] = DOMAINS) -> Iterator[Turn]:
        """An endless chat: runs of turns of one domain, then another subject; `shares` of the runs by domain."""
        domain = ""
        while True:
            if not domain or rng.random() > STAY:
                domain = rng.choices(list(shares), weights=list(shares.values()))[0]
            for turn in self._draw(domain, rng):
                prose = turn.domain not in (
                    "sums",
                    "code",
                    "phrases",
                )  # a word dropped from these changes their meaning
                yield replace(turn, question=as_typed(turn.question, rng, prose))

    def held_out(self, domain: str, rng: random.Random) -> list[Turn]:
        """Questions of `domain` that no training chat contains, in a fixed order."""
        if domain == "facts":
            plain = [_fact_turn(fact, ask) for fact in self.facts for ask in fact["held_out"]]
            return plain + [
                _follow_up(fact, kind, rng.choice(forms), _fact_turn(fact, fact["held_out"][0]))
                for fact in self.facts
                for kind, forms in (("why", HELD_OUT_WHY), ("example", HELD_OUT_EXAMPLE))
            ]
        if domain == "sums":
            pairs = [
                (a, b, sign) for a in range(10, 100) for b in range(10, 100) for sign in "+-" if _is_held_out(a, b)
            ]
            forms = SUM_FORMS + HELD_OUT_SUM_FORMS
            return [_sum_turn(*pair, rng.choice(forms), rng) for pair in rng.sample(pairs, 300)]
        if domain == "code":
            return [_code_turn(task, ask) for task in self._code["code"] for ask in task["held_out"]]
        if domain == "stories":
            return [
                self._story(word, form, rng)
                for word in self._stories["held_out_words"]
                for form in self._story_forms(True)
            ]
        if domain == "phrases":
            forms, phrases = self._phrases["held_out_templates"], self._phrases["phrase"]
            return [_phrase_turn(phrase, form, to) for phrase in phrases for form, to in _both(forms, rng)]
        if domain == "talk":
            return [_talk_turn(entry, ask, rng) for entry in self._talk for ask in entry["held_out"]]
        assert domain == "off-topic", domain
        return [self._off_topic_turn(ask, rng) for ask in self._off_topic["held_out"]]

    def _draw(self, domain: str, rng: random.Random) -> Iterator[Turn]:
        """One training turn of `domain`, for a fact perhaps with its follow-ups."""
        if domain == "facts":
            fact = rng.choice(self.facts)
            turn = _fact_turn(fact, rng.choice(fact["ask"]))
            yield turn
            follow_ups = [("why", WHY), ("example", EXAMPLE)]
            rng.shuffle(follow_ups)
            for kind, forms in follow_ups:
                if rng.random() < 0.35:
                    yield _follow_up(fact, kind, rng.choice(forms), turn)
        elif domain == "sums":
            for _ in range(rng.randint(1, 3)):
                yield self._sum(rng)
        elif domain == "code":
            if rng.random() < 0.6:
                task = rng.choice(self._code["code"])
                yield _code_turn(task, rng.choice(task["ask"]))
            else:
                yield _completion_turn(rng.choice(self._code["completion"]), rng)
        elif domain == "stories":
            yield self._story(self._thing(rng), rng.choice(self._story_forms(False)), rng)
        elif domain == "phrases":
            form, language = rng.choice(self._phrases["templates"]), rng.choice(("french", "spanish"))
            yield _phrase_turn(rng.choice(self._phrases["phrase"]), form, language)
        elif domain == "talk":
            entry = rng.choice(self._talk)
            yield _talk_turn(entry, rng.choice(entry["ask"]), rng)
        else:
            yield self._off_topic_turn(rng.choice(self._off_topic["ask"]), rng)

    def _sum(self, rng: random.Random) -> Turn:
        while True:
            smallest = 0 if rng.random() < 0.1 else 10
            a, b = rng.randint(smallest, 99), rng.randint(smallest, 99)
            if not _is_held_out(a, b):
                return _sum_turn(a, b, rng.choice("+-"), rng.choice(SUM_FORMS), rng)

    def _thing(self, rng: random.Random) -> str:
        """What a training story is about: some are made up or have a colour, so that words are copied, not known."""
        if rng.random() < 0.3:
            return "".join(rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) + "n"
        word = rng.choice(self._stories["words"])
        return f"{rng.choice(ADJECTIVES)} {word}" if rng.random() < 0.3 else word

    def _story_forms(self, held_out: bool) -> list[str]:
        return self._stories["held_out_ask" if held_out else "ask"]

    def _story(self, word: str, form: str, rng: random.Random) -> Turn:
        parts = {"word": word, "name": rng.choice(self._stories["names"]), "place": rng.choice(self._stories["places"])}
        sentences = [rng.choice(self._stories[kind]) for kind in ("openings", "middles", "turns", "endings")]
        story = " ".join(sentence.format(**parts) for sentence in sentences)
        return Turn("stories", form.format(**parts), story, (word,))

    def _off_topic_turn(self, ask: str, rng: random.Random) -> Turn:
        return Turn("off-topic", ask, rng.choice(self._off_topic["answers"]), tuple(self._off_topic["keys"]))


def as_typed(text: str, rng: random.Random, prose: bool = True) -> str:
    """`text` as somebody might type it: lower case, no question mark; prose also in other words and with slips."""
    if rng.random() < 0.2:
        text = rng.choice(BEFORE) + text
    if rng.random() < 0.35:
        text = text.rstrip("?.!")
    if not prose:
        return text
    for group in SYNONYMS:
        found = [word for word in group if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
        if found and rng.random() < 0.4:
            text = re.sub(rf"\b{found[0]}\b", rng.choice(group), text, flags=re.IGNORECASE)
    if rng.random() < 0.08:
        text = text.rstrip("?.!") + rng.choice(AFTER)
    if rng.random() < 0.5:
        text = text.lower()
    elif rng.random() < 0.6:
        text = text[:1].upper() + text[1:]
    words = text.split(" ")
    if len(words) > 4 and rng.random() < 0.12:
        words.pop(rng.randrange(len(words)))
    if rng.random() < 0.08:
        place = rng.randrange(len(words))
        words[place] = _slip(words[place], rng)
    return " ".join(words)


def _slip(word: str, rng: random.Random) -> str:
    """Two letters exchanged, or one left out, within a longer word without digits."""
    if len(word) < 4 or not word.isalpha():
        return word
    at = rng.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :] if rng.random() < 0.5 else word[:at] + word[at + 1 :]


def _is_held_out(a: int, b: int) -> bool:
    """About one pair of numbers in thirty is never trained on, in either operation.

    The first condition alone, on last digits, would keep whole digits apart and so never show 11 - 6.
    """
    return (a * 37 + b * 11) % 10 == 3 and (a + 3 * b) % 11 < 4


def _fact_turn(fact: dict[str, Any], ask: str) -> Turn:
    return Turn("facts", ask, fact["answer"], tuple(fact["keys"]), name=fact["id"])


def _follow_up(fact: dict[str, Any], kind: str, ask: str, before: Turn) -> Turn:
    answer = fact[kind]
    return Turn("facts", ask, answer, (answer[: len(answer) // 2],), before=before, name=f"{fact['id']}:{kind}")


def _sum_turn(a: int, b: int, sign: str, form: str, rng: random.Random) -> Turn:
    result = f"{a} {sign} {b} = {a + b if sign == '+' else a - b}."
    question = form.format(rng.choice(WRITTEN[sign]).format(a, b))
    return Turn("sums", question, f"{_working(a, b, sign)}: {result}", (result,))


def _working(a: int, b: int, sign: str) -> str:
    """Ones, then tens, as at school: with it a small model needs to know single digits only."""
    if sign == "+":
        ones = a % 10 + b % 10
        carry = " + 1" if ones > 9 else ""
        return f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{carry} = {a // 10 + b // 10 + ones // 10}"
    if a < b:
        return f"{a} is less than {b}, {_working(b, a, sign)}"
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow - b // 10
    return f"{ones} - {b % 10} = {ones - b % 10}, {a // 10}{' - 1' if borrow else ''} - {b // 10} = {tens}"


def _code_turn(task: dict[str, Any], ask: str) -> Turn:
    return Turn("code", ask, f"```python\n{task['answer']}\n```", (task["answer"],))


def _completion_turn(entry: dict[str, Any], rng: random.Random) -> Turn:
    line, form = (
        entry["start"] + entry["end"],
        rng.choice(("complete: {}", "complete this line: {}", "finish: {}", "{}")),
    )
    return Turn("code", form.format(entry["start"].rstrip()), f"```python\n{line}\n```", (line,))


def _phrase_turn(phrase: dict[str, str], form: str, language: str) -> Turn:
    name = language.capitalize()
    question = form.format(english=phrase["english"], language=name)
    return Turn("phrases", question, f'"{phrase["english"]}" in {name}: {phrase[language]}', (phrase[language],))


def _both(forms: list[str], rng: random.Random) -> list[tuple[str, str]]:
    return [(rng.choice(forms), language) for language in ("french", "spanish")]


def _talk_turn(entry: dict[str, Any], ask: str, rng: random.Random) -> Turn:
    return Turn("talk", ask, rng.choice(entry["answers"]), tuple(entry["keys"]), any_key=True)


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
