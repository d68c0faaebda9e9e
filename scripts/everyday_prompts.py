"""Messages as people write to an assistant: forms of questions, each filled with what it may be about, some with a wish about
the answer, in an order that the seed decides.

A small model left to itself asks about few things, and a draft trained on its answers to these knows little else. These messages are for
`scripts/train_draft.py --prompts`. What scripts/bench_throughput.py asks is about other things. everyday_prompts.txt holds forms and fillings.

    python scripts/everyday_prompts.py --count 5000 > messages.txt
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

OPENINGS = ("", "", "", "", "", "", "Hi! ", "Please help me. ", "Quick question: ", "Hello, ")
ENDINGS = (
    "Keep it short.",
    "Please be detailed.",
    "Use bullet points.",
    "Answer in one paragraph.",
    "Give an example.",
    "Use simple words.",
    "Explain why.",
    "At most 100 words, please.",
    "I know nothing about it yet.",
    "Number the points.",
    "Thank you!",
    "Begin with the most important point.",
)
ENDED_SHARE = 0.3  # of the messages
_SLOT = re.compile(r"{(\w+)}")


def read_forms() -> tuple[dict[str, list[str]], list[list[str]]]:
    """(fillings by the name of their slot, groups of forms). A slot `compared` takes two things, parted by a | in its fillings."""
    fillings: dict[str, list[str]] = {}
    groups: list[list[str]] = []
    for line in (Path(__file__).parent / "train" / "everyday_prompts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            groups.append(line.removeprefix("= ").split("|"))
        elif line and not line.startswith("#"):
            name, _, values = line.partition(": ")
            fillings[name] = values.split("; ")
    return fillings, groups


def filled(form: str, fillings: dict[str, list[str]]) -> Iterator[str]:
    """A form with everything that fits into its slots."""
    names = _SLOT.findall(form)
    joint = " or " if form.startswith("Which") else " and "
    for words in product(*(fillings[name] for name in names)):
        left = iter(words)
        yield re.sub(_SLOT, lambda _, left=left: next(left).replace("|", joint), form)  # type: ignore[misc]


def messages(count: int, seed: int = 0) -> list[str]:
    """`count` different messages (fewer when there are no more), of every group of forms about equally many as long as it lasts."""
    rng = random.Random(seed)
    fillings, forms = read_forms()
    groups = []
    for group in forms:
        found = [text for form in group for text in filled(form, fillings)]
        rng.shuffle(found)
        groups.append(found)
    chosen: list[str] = []
    while len(chosen) < count and any(groups):
        for group in groups:
            if group:
                ending = " " + rng.choice(ENDINGS) if rng.random() < ENDED_SHARE else ""
                chosen.append(rng.choice(OPENINGS) + group.pop() + ending)
    rng.shuffle(chosen)
    return list(dict.fromkeys(chosen))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write them here instead of printing them")
    args = parser.parse_args()
    text = "\n".join(messages(args.count, args.seed)) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
