"""Messages for training a draft: many, different, complete, and about other things than what the benchmark asks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import everyday_prompts
from bench.throughput_runs import CODE_PROMPTS, PROMPTS
from everyday_prompts import CODE, ENDED_SHARE, ENDINGS, EVERYDAY, messages, read_forms


def test_messages_are_different_and_complete():
    found = messages(3000)
    assert len(found) == len(set(found)) == 3000 and found == messages(3000) != messages(3000, seed=1)
    assert not any("{" in text or "  " in text or text != text.strip() for text in found)
    everything = messages(10**6)
    assert 9000 < len(everything) < 10**6
    assert abs(sum(text.endswith(ENDINGS) for text in everything) / len(everything) - ENDED_SHARE) < 0.03
    for form in (form for group in read_forms()[1] for form in group):
        start = re.escape(form.split("{")[0])
        assert any(re.search(start, text) for text in everything), form
    assert len({text.split()[0] for text in found}) > 15


def test_a_share_is_about_programs():
    found = messages(4000, code_share=0.6)
    assert len(found) == len(set(found)) == 4000 and found == messages(4000, code_share=0.6)
    everyday = set(messages(10**6))
    code = [text for text in found if text not in everyday]
    assert len(code) == pytest.approx(2400, abs=200), "some everyday messages have another opening or ending"
    assert not any(re.search(r"{\w+}", text) or "  " in text or text != text.strip() for text in found)
    starts = [re.escape(form.split("{")[0]) for group in read_forms(CODE)[1] for form in group]
    everything = "\n".join(messages(10**6, code_share=1.0))
    assert all(re.search(start, everything) for start in starts)
    for language in ("Python", "Rust", "JavaScript"):
        assert f"differ from {language}?" in everything and f"How does {language} differ from {language}" not in everything


def everything() -> list[str]:
    return messages(10**6) + messages(10**6, code_share=1.0)


def test_nothing_is_what_the_benchmark_asks():
    found = everything()
    assert not set(found) & {*PROMPTS, *CODE_PROMPTS}
    chat = "hash table|fibonacci|pancake|landlord|tcp|lighthouse|whale|asleep|orders of each|french revolution|sky blue|rome\\b"
    code = r"bank account|roman\(|members, loans|f\(a, b=2\)|array of objects by a key|is_prime|\"servers\"|sum, mean and maximum"
    for subjects, prompts in ((re.compile(chat, re.I), PROMPTS[1:]), (re.compile(code, re.I), CODE_PROMPTS)):
        assert all(subjects.search(text) for text in prompts) and not [text for text in found if subjects.search(text)]
    for name in (EVERYDAY, CODE):
        assert all(len(values) == len(set(values)) > 5 for values in read_forms(name)[0].values())


def test_messages_of_other_kinds_are_no_messages_to_train_on():
    """50 messages of kinds that no form asks: none is a form's, and none shares a run of five words with one."""
    other = (Path(everyday_prompts.__file__).parent / "train" / "other_prompts.txt").read_text(encoding="utf-8").splitlines()

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    trained = {run for text in everything() for run in runs(text)}
    assert len(other) == len(set(other)) == 50 and all(text == text.strip() for text in other)
    assert {text: runs(text) & trained for text in other if runs(text) & trained} == {}
