"""Questions that only a faithful cache can answer, planted in filler text, and the judge of the answers.

retrieval    "The access code of NAME is <6 digits>.": one fact in every stratum of depth, each asked for by name
copy         a random identifier of 32 to 64 characters in the first tenth of the text, to be repeated exactly
arithmetic   two quantities in the first third of the text, their sum asked for (it stands nowhere in the text)
conversation facts told in the first half of the turns, asked for in the second half, in another order
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.errors import InvalidOption

VERSION = 3
"""Of the tasks: results of different ones must not be mixed."""

NAMES = (
    "Adela",
    "Boris",
    "Carmen",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hassan",
    "Ingrid",
    "Jorge",
    "Katya",
    "Lionel",
    "Marisol",
    "Nadia",
    "Otto",
    "Priya",
    "Quentin",
    "Rosalind",
    "Stefan",
    "Tamara",
    "Ulrich",
    "Valentina",
    "Wendell",
    "Ximena",
    "Yusuf",
    "Zelda",
    "Amadou",
    "Beatrix",
    "Casimir",
    "Dorothea",
    "Emil",
    "Fiona",
)
PLACES = (
    "Oslo",
    "Lima",
    "Kyoto",
    "Porto",
    "Quito",
    "Tunis",
    "Riga",
    "Hanoi",
    "Accra",
    "Turin",
    "Davos",
    "Cairo",
    "Perth",
    "Sofia",
    "Malmo",
    "Lagos",
)
OBJECTS = ("archive", "satellite", "turbine", "telescope", "reactor", "freighter", "printer", "gateway")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
INTRODUCTION = "Read these notes carefully. I will ask you about single facts in them.\n\n"
ACKNOWLEDGEMENT = "I have read the notes. What would you like to know?"
MAX_NEW_TOKENS = {"retrieval": 24, "copy": 96, "arithmetic": 64, "conversation": 24,
                  "several": 64, "variables": 24, "aggregation": 16, "completion": 64}  # fmt: skip
SUM_FORM = "Write it as A + B = C, with both numbers and their sum."  # asked for the sum alone, small models guess, whatever their cache
EARLY = {"copy": 0.1, "arithmetic": 0.33}


@dataclass(frozen=True)
class Question:
    """What is asked after the resume. depth: where the fact stands, as a fraction of the filler's tokens before it (the latest one of several)."""

    task: str
    text: str
    expected: str
    depth: float

    @property
    def max_new_tokens(self) -> int:
        """Tokens that a right answer never exceeds."""
        return MAX_NEW_TOKENS[self.task]


@dataclass(frozen=True)
class Sample:
    """One text with facts planted in it, and the questions about them, in a fixed order of tasks."""

    document: str
    questions: list[Question]


def judge(question: Question, answer: str) -> bool:
    """Exact match: the first number of a retrieved code, the last of a sum ("12 + 30 = 42"), the first long word of a copied identifier, all numbers of
    several codes whatever their order, the first place named, the names of a call's parameters in their order, as keywords or alone."""
    if question.task == "copy":
        words = re.findall(r"[0-9A-Za-z]{16,}", answer)
        return bool(words) and words[0] == question.expected
    if question.task == "aggregation":
        places = [word for word in re.findall(r"[A-Za-z]+", answer) if word in PLACES]
        return bool(places) and places[0] == question.expected
    if question.task == "completion":
        passed = answer.split("(", 1)[-1].split(")", 1)[0]
        return (re.findall(r"(\w+)\s*=", passed) or re.findall(r"\w+", passed)) == question.expected.split(",")
    numbers = re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer))
    if question.task == "several":
        return sorted(numbers) == sorted(question.expected.split(","))
    if not numbers:
        return False
    return numbers[-1 if question.task == "arithmetic" else 0] == question.expected


def copied_fraction(question: Question, answer: str) -> float:
    """Of a copy task: characters right before the first wrong one, over the identifier's length; of several codes: the share of them that is named.
    1 or 0 for other tasks."""
    if question.task == "several":
        wanted = question.expected.split(",")
        return sum(code in re.findall(r"\d+", answer) for code in wanted) / len(wanted)
    if question.task != "copy":
        return float(judge(question, answer))
    best = 0
    for word in re.findall(r"[0-9A-Za-z]+", answer):
        same = next(
            (n for n, (a, b) in enumerate(zip(word, question.expected, strict=False)) if a != b), min(len(word), len(question.expected))
        )
        best = max(best, same)
    return best / len(question.expected)


def take_filler(
    rng: random.Random, texts: Sequence[str], num_tokens: int, count: Callable[[list[str]], list[int]]
) -> tuple[list[str], list[int]]:
    """Lines of running text, and the tokens of each, about num_tokens in all and never more: texts in random order, each from a random line on.

    Raises InvalidOption when the texts are too short for that.
    """
    lines: list[str] = []
    sizes: list[int] = []
    room = num_tokens
    for text in rng.sample(list(texts), len(texts)):
        own = [line.rstrip()[:400] for line in text.splitlines() if line.strip()]
        own = own[rng.randrange(max(1, len(own) // 2)) :][: room + 1]  # a line has at least one token
        for line, size in zip(own, line_tokens(own, count), strict=True):
            if size > room:
                break
            lines.append(line)
            sizes.append(size)
            room -= size
        else:
            continue
        break
    if room > max(256, num_tokens // 8):
        raise InvalidOption(
            f"the filler text has only {num_tokens - room} of {num_tokens} tokens", "give more --text, or a smaller context"
        )
    return lines, sizes


def line_tokens(lines: list[str], count: Callable[[list[str]], list[int]]) -> list[int]:
    """Tokens of each line with its end, at least one."""
    return [max(1, size) for size in count([line + "\n" for line in lines])] if lines else []


def make_sample(
    rng: random.Random,
    texts: Sequence[str],
    num_tokens: int,
    count: Callable[[list[str]], list[int]],
    *,
    facts: int = 8,
    identifiers: int = 1,
    sums: int = 2,
) -> Sample:
    """A text of at most num_tokens tokens with all its facts, and one question for each.

    Args:
        count: tokens of each of some texts.
        facts: retrieval questions, one in each of as many equal strata of depth; at most len(NAMES).
        identifiers, sums: copy and arithmetic questions; at most len(OBJECTS), len(PLACES) // 2.
    """
    if (
        not 0 <= facts <= len(NAMES)
        or not 0 <= identifiers <= len(OBJECTS)
        or not 0 <= 2 * sums <= len(PLACES)
        or facts + identifiers + sums == 0
    ):
        raise InvalidOption(
            f"{facts} facts, {identifiers} identifiers, {sums} sums",
            f"ask for at most {len(NAMES)}, {len(OBJECTS)} and {len(PLACES) // 2}, and at least one in all",
        )
    planted: list[tuple[float, str]] = []
    questions: list[tuple[str, str, str, float]] = []
    for n, (name, code) in enumerate(zip(rng.sample(NAMES, facts), distinct_numbers(rng, facts, 6), strict=True)):
        depth = (n + rng.random()) / facts
        planted.append((depth, f"The access code of {name} is {code}."))
        questions.append(("retrieval", f"What is the access code of {name}? Answer with the 6 digits only.", code, depth))
    for thing in rng.sample(OBJECTS, identifiers):
        depth, word = EARLY["copy"] * rng.random(), "".join(rng.choices(ALPHABET, k=rng.randint(32, 64)))
        planted.append((depth, f"The serial identifier of the {thing} is {word}."))
        questions.append(("copy", f"Repeat the serial identifier of the {thing} exactly, and write nothing else.", word, depth))
    places = rng.sample(PLACES, 2 * sums)
    for a, b in zip(places[::2], places[1::2], strict=True):
        amounts, depths = [rng.randint(11, 99) for _ in range(2)], [EARLY["arithmetic"] * rng.random() for _ in range(2)]
        planted += [
            (depth, f"The depot in {place} holds {amount} crates.") for depth, place, amount in zip(depths, (a, b), amounts, strict=True)
        ]
        questions.append(
            ("arithmetic", f"How many crates do the depots in {a} and {b} hold together? {SUM_FORM}", str(sum(amounts)), max(depths))
        )
    room = num_tokens - sum(line_tokens([line for _, line in planted], count))
    if room < 64:
        raise InvalidOption(f"{num_tokens} tokens leave no room for text around the facts", "give a longer context or fewer facts")
    lines, sizes = take_filler(rng, texts, room, count)
    document = plant(lines, sizes, planted)
    if any(document.count(expected) != 1 for task, _, expected, _ in questions if task != "arithmetic"):
        return make_sample(
            rng, texts, num_tokens, count, facts=facts, identifiers=identifiers, sums=sums
        )  # the filler held a code by chance
    return Sample(document, [Question(*q) for q in questions])


def plant(lines: Sequence[str], sizes: Sequence[int], planted: Sequence[tuple[float, str]]) -> str:
    """The lines with each (depth, sentence) as a line of its own, before the first line that begins at or beyond depth * all tokens."""
    begins = [0, *accumulate(sizes)]
    at = [(min(bisect_left(begins, depth * begins[-1]), len(lines)), sentence) for depth, sentence in planted]
    out: list[str] = []
    for n in range(len(lines) + 1):
        out += [sentence for where, sentence in at if where == n]
        out += lines[n : n + 1]
    return "\n".join(out)


def distinct_numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """Different numbers of exactly `digits` digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


@dataclass(frozen=True)
class Turn:
    """What the user says; the question asked by it, or None for a turn that tells a fact."""

    message: str
    question: Question | None


def make_conversation(
    rng: random.Random, texts: Sequence[str], turns: int, turn_tokens: int, count: Callable[[list[str]], list[int]]
) -> list[Turn]:
    """`turns` user messages: the first half tell a fact each, beside about turn_tokens tokens of text; the others ask for them in random order."""
    told = turns // 2
    if not 1 <= told <= len(NAMES):
        raise InvalidOption(f"a conversation of {turns} turns", f"use 2 to {2 * len(NAMES)}")
    names, badges = rng.sample(NAMES, told), distinct_numbers(rng, told, 5)
    conversation: list[Turn] = []
    for name, badge in zip(names, badges, strict=True):
        note = "\n".join(take_filler(rng, texts, turn_tokens, count)[0]) if turn_tokens else ""
        told_here = f"Please remember: the badge number of {name} is {badge}. Answer only OK."
        conversation.append(Turn(f"{note}\n\n{told_here}" if note else told_here, None))
    order = rng.sample(range(told), told)
    for n in range(turns - told):
        fact = order[n % told]
        text = f"What is the badge number of {names[fact]}? Answer with the digits only."
        conversation.append(Turn(text, Question("conversation", text, badges[fact], fact / turns)))
    return conversation
