"""Messages as people write to an assistant: forms of questions, each filled with what it may be about, some with a wish about
the answer, in an order that the seed decides.

A small model left to itself asks about few things, and a draft trained on its answers to these knows little else. These messages are for
`scripts/train_draft.py --prompts`. What scripts/bench_throughput.py asks is about other things. everyday_prompts.txt holds forms and fillings, and
code_prompts.txt those of messages about programs alone, for models that write these.

    python scripts/everyday_prompts.py --count 5000 > messages.txt
    python scripts/everyday_prompts.py --count 10000 --code-share 0.6 > messages.txt
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
ENDED_SHARE = 0.3  # of the everyday messages
EVERYDAY, CODE = "everyday_prompts.txt", "code_prompts.txt"
_SLOT = re.compile(r"{(\w+)}")


def read_forms(name: str = EVERYDAY) -> tuple[dict[str, list[str]], list[list[str]]]:
    """(fillings by the name of their slot, groups of forms) of a file. A slot `compared` takes two things, parted by a | in its fillings."""
    fillings: dict[str, list[str]] = {}
    groups: list[list[str]] = []
    for line in (Path(__file__).parent / "train" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            groups.append(line.removeprefix("= ").split("|"))
        elif line and not line.startswith("#"):
            name, _, values = line.partition(": ")
            fillings[name] = values.split("; ")
    return fillings, groups


def filled(form: str, fillings: dict[str, list[str]]) -> Iterator[str]:
    """A form with everything that fits into its slots, twice the same into none."""
    names = _SLOT.findall(form)
    joint = " or " if form.startswith("Which") else " and "
    for words in product(*(fillings[name] for name in names)):
        if len(set(zip(names, words, strict=True))) == len(words):
            left = iter(words)
            yield re.sub(_SLOT, lambda _, left=left: next(left).replace("|", joint), form)  # type: ignore[misc]


def messages(count: int, seed: int = 0, *, code_share: float = 0.0) -> list[str]:
    """`count` different messages (fewer when there are no more), of every group of forms about equally many as long as it lasts; `code_share` of them
    from the forms about programs."""
    rng = random.Random(seed)
    num_code = round(code_share * count)
    chosen = _chosen(EVERYDAY, count - num_code, rng, ENDED_SHARE) + _chosen(CODE, num_code, rng, 0.0)
    rng.shuffle(chosen)
    return list(dict.fromkeys(chosen))[:count]


def _chosen(name: str, count: int, rng: random.Random, ended_share: float) -> list[str]:
    """At least `count` messages of a file's forms, if there are so many."""
    fillings, forms = read_forms(name)
    groups = []
    for group in forms:
        found = [text for form in group for text in filled(form, fillings)]
        rng.shuffle(found)
        groups.append(found)
    chosen: list[str] = []
    while len(chosen) < count and any(groups):
        for group in groups:
            if group:
                ending = " " + rng.choice(ENDINGS) if rng.random() < ended_share else ""
                chosen.append(rng.choice(OPENINGS) + group.pop() + ending)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument(
        "--code-share", type=float, default=0.0, help="of them about programs, 0 to 1 (everyday messages have some besides)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write them here instead of printing them")
    args = parser.parse_args()
    if not 0 <= args.code_share <= 1:
        parser.error(f"--code-share cannot be {args.code_share:g}: give a number from 0 to 1")
    text = "\n".join(messages(args.count, args.seed, code_share=args.code_share)) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
