"""Messages for training a draft: many, different, complete, and about other things than what the benchmark asks."""

from __future__ import annotations

import re

from bench.throughput_runs import PROMPTS
from everyday_prompts import messages, read_forms


def test_messages_are_different_and_complete():
    found = messages(3000)
    assert len(found) == len(set(found)) == 3000 and found == messages(3000) != messages(3000, seed=1)
    assert not any("{" in text or "  " in text or text != text.strip() for text in found)
    everything = messages(10**6)
    assert 4500 < len(everything) < 10**6
    for form in (form for group in read_forms()[1] for form in group):
        start = re.escape(form.split("{")[0])
        assert any(re.search(start, text) for text in everything), form
    assert len({text.split()[0] for text in found}) > 15


def test_nothing_is_what_the_benchmark_asks():
    everything = messages(10**6)
    assert not set(everything) & set(PROMPTS)
    subjects = re.compile(
        "hash table|fibonacci|pancake|landlord|tcp|lighthouse|whale|asleep|orders of each|french revolution|sky blue|rome\\b", re.I
    )
    assert all(subjects.search(text) for text in PROMPTS[1:]) and not [text for text in everything if subjects.search(text)]
    assert all(len(values) == len(set(values)) > 5 for values in read_forms()[0].values())
