"""Questions that need several facts of a long text, planted in filler: after RULER (arXiv 2404.06654), made anew, judged by exact match.

several      four codes of one name in four quarters of the text, all asked for
variables    a chain of assignments over the whole text ("b takes the value of a"), the last variable's number asked for, beside other chains
aggregation  a logbook whose entries name three places 9, 4 and 2 times all over the text; the most frequent one asked for
completion   functions defined anywhere in the text; a call of one in another file is to be completed, all parameters in their order
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from engine.errors import InvalidOption
from eval.tasks import NAMES, PLACES, Question, Sample, distinct_numbers, line_tokens, plant, take_filler

LONG_INTRODUCTION = "Read these notes and files carefully. I will ask you about them.\n\n"
MOST = 5  # of each task
_CODES, _CHAIN = 4, 4
_COUNTS = (9, 4, 2)
_VEHICLES = ("ferry", "tram", "barge", "courier", "glider")
_VARIABLES = ("quartz", "willow", "copper", "lantern", "meadow", "harbor", "velvet", "pepper", "cobalt", "saffron", "thistle", "walnut",
              "ginger", "marble", "falcon", "juniper", "onyx", "poppy", "raven", "sienna", "topaz", "umber", "violet", "zephyr",
              "acorn", "bramble", "cedar", "daisy")  # fmt: skip
_VERBS = ("merge", "settle", "rebuild", "throttle", "annotate", "reconcile", "dispatch")
_THINGS = ("ledgers", "cabins", "turnouts", "parcels", "beacons", "vouchers", "sluices")
_PARAMETERS = ("cutoff", "branch", "tolerance", "carrier", "window", "retries", "origin", "weight", "label", "depth", "season", "margin",
               "ticket", "region", "quota", "offset")  # fmt: skip


def make_long_sample(
    rng: random.Random, texts: Sequence[str], num_tokens: int, count: Callable[[list[str]], list[int]], *, each: int = 2
) -> Sample:
    """A text of at most num_tokens tokens and `each` questions of every task.

    count: tokens of each of some texts. Raises InvalidOption for a number of questions that there are no words for, or no room.
    """
    if not 1 <= each <= MOST:
        raise InvalidOption(f"{each} questions of each task", f"ask 1 to {MOST}")
    planted: list[tuple[float, str]] = []
    questions: list[Question] = []
    for make in (_several, _variables, _aggregation, _completion):
        facts, asked = make(rng, each)
        planted += facts
        questions += asked
    rng.shuffle(planted)  # so that facts of one depth do not stand task by task
    room = num_tokens - sum(line_tokens([line for _, line in planted], count))
    if room < 64:
        raise InvalidOption(f"{num_tokens} tokens leave no room for text around the facts", "give a longer context or fewer questions")
    lines, sizes = take_filler(rng, texts, room, count)
    return Sample(plant(lines, sizes, planted), questions)


def _several(rng: random.Random, each: int) -> tuple[list[tuple[float, str]], list[Question]]:
    planted, questions = [], []
    codes = distinct_numbers(rng, each * _CODES, 6)
    for n, name in enumerate(rng.sample(NAMES, each)):
        own, depths = codes[n * _CODES : (n + 1) * _CODES], [(i + rng.random()) / _CODES for i in range(_CODES)]
        planted += [(depth, f"One of the access codes of {name} is {code}.") for depth, code in zip(depths, own, strict=True)]
        text = f"What are all {_CODES} access codes of {name}? Answer with the {_CODES} numbers only, separated by commas."
        questions.append(Question("several", text, ",".join(own), depths[-1]))
    return planted, questions


def _variables(rng: random.Random, each: int) -> tuple[list[tuple[float, str]], list[Question]]:
    planted, questions = [], []
    names, numbers = rng.sample(_VARIABLES, (each + 1) * _CHAIN), distinct_numbers(rng, each + 1, 5)
    for n, number in enumerate(numbers):  # one chain more than is asked about
        chain, depths = names[n * _CHAIN : (n + 1) * _CHAIN], [(i + rng.random()) / _CHAIN for i in range(_CHAIN)]
        planted.append((depths[0], f"Assignment: the variable {chain[0]} is set to {number}."))
        for depth, (before, after) in zip(depths[1:], pairwise(chain), strict=True):
            planted.append((depth, f"Assignment: the variable {after} takes the value of the variable {before}."))
        if n < each:
            text = f"Follow the assignments in the notes: which number does the variable {chain[-1]} have? Answer with the number only."
            questions.append(Question("variables", text, number, depths[-1]))
    return planted, questions


def _aggregation(rng: random.Random, each: int) -> tuple[list[tuple[float, str]], list[Question]]:
    planted, questions = [], []
    for vehicle in rng.sample(_VEHICLES, each):
        places = rng.sample(PLACES, len(_COUNTS))
        entries = [place for place, times in zip(places, _COUNTS, strict=True) for _ in range(times)]
        rng.shuffle(entries)
        planted += [
            ((n + rng.random()) / len(entries), f"Logbook of the {vehicle}: it stopped at {place}.") for n, place in enumerate(entries)
        ]
        text = f"At which place did the {vehicle} stop most often, by its logbook? Answer with the name of the place only."
        questions.append(Question("aggregation", text, places[0], 1.0))
    return planted, questions


def _completion(rng: random.Random, each: int) -> tuple[list[tuple[float, str]], list[Question]]:
    planted, questions = [], []
    for n, (verb, thing) in enumerate(zip(rng.sample(_VERBS, each), rng.sample(_THINGS, each), strict=True)):
        name, parameters, depth = f"{verb}_{thing}", rng.sample(_PARAMETERS, 4), (n + rng.random()) / each
        planted.append((depth, f"def {name}({', '.join(parameters)}):\n    return registry.run({name!r}, {', '.join(parameters)})"))
        text = (
            f"Complete this line of another file, which calls the function {name} that is defined above, with variables that are called like its "
            f"parameters, in the order of the definition. Write that line only.\nresult = {name}("
        )
        questions.append(Question("completion", text, ",".join(parameters), depth))
    return planted, questions
