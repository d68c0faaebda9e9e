"""The evaluation of suspended sessions: right tasks, a strict judge, and a resume in memory that is the session's own."""

from __future__ import annotations

import json
import random

import pytest
import torch

import eval_report
from engine.calibrate.complete import complete
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams
from engine.sessions.file import SessionFile
from eval import agent_text
from eval.continuation import continuation_rows, continue_sessions, equal_tokens
from eval.domain_texts import plain, write_folders
from eval.fitted_baselines import FittedBaselines
from eval.long_tasks import make_long_sample
from eval.positions import long_windows, measure_positions, position_bins, position_edges, position_rows, token_nll
from eval.rows import by_depth, item, rows_of
from eval.runs import LONG, Plan, Runner
from eval.suspend import Suspender, ask, ask_aside, copied, open_with, run_tokens, step_name
from eval.tasks import NAMES, PLACES, Question, Sample, copied_fraction, judge, make_conversation, make_sample, plant, take_filler
from eval.text import domain_windows, named_paths
from eval_sessions import main

TEXTS = ["\n".join(f"Line {n} of text {t} says nothing of interest." for n in range(120)) for t in range(4)]


def count(lines):
    return [len(line.split()) for line in lines]


def test_every_answer_is_in_the_text_once():
    for seed in range(20):
        sample = make_sample(random.Random(seed), TEXTS, 900, count, facts=6, identifiers=2, sums=2)
        assert [q.task for q in sample.questions] == ["retrieval"] * 6 + ["copy"] * 2 + ["arithmetic"] * 2
        for question in sample.questions:
            if question.task == "arithmetic":
                places = question.text.split("depots in ")[1].split(" hold")[0].split(" and ")
                amounts = [int(sample.document.split(f"The depot in {place} holds ")[1].split()[0]) for place in places]
                assert [sample.document.count(f"depot in {place} ") for place in places] == [1, 1]
                assert sum(amounts) == int(question.expected)
            else:
                assert sample.document.count(question.expected) == 1
        retrieved = [q for q in sample.questions if q.task == "retrieval"]
        assert len({q.expected for q in retrieved}) == 6
        for n, question in enumerate(retrieved):
            assert n / 6 <= question.depth < (n + 1) / 6 and len(question.expected) == 6
            line = next(line for line in sample.document.splitlines() if question.expected in line)
            assert line == f"The access code of {question.text.split('code of ')[1].split('?')[0]} is {question.expected}."
        copies = [q for q in sample.questions if q.task == "copy"]
        assert all(32 <= len(q.expected) <= 64 and q.depth <= 0.1 for q in copies)
        assert 700 < sum(count(sample.document.splitlines())) <= 900
    assert make_sample(random.Random(3), TEXTS, 900, count) == make_sample(random.Random(3), TEXTS, 900, count)


def test_sentences_stand_where_their_depth_says():
    lines = [f"line {n}" for n in range(100)]
    document = plant(lines, [2] * 100, [(0.0, "first"), (0.255, "later"), (0.999, "last")]).splitlines()
    assert document[0] == "first" and document[27] == "later" and document[-1] == "last" and len(document) == 103
    assert [line for line in document if line.startswith("line")] == lines


def test_filler_keeps_to_its_budget():
    lines, sizes = take_filler(random.Random(0), TEXTS, 300, count)
    assert sum(sizes) <= 300 < sum(sizes) + 12 and sizes == count(lines)
    with pytest.raises(InvalidOption, match="filler text has only"):
        take_filler(random.Random(0), ["one line"], 1000, count)
    with pytest.raises(InvalidOption, match="leave no room"):
        make_sample(random.Random(0), TEXTS, 100, count)


@pytest.mark.parametrize(
    ("task", "expected", "answer", "right"),
    [
        ("retrieval", "482913", "482913", True),
        ("retrieval", "482913", "The access code of Elena is 482913.", True),
        ("retrieval", "482913", "482,913", True),
        ("retrieval", "482913", "4829131", False),
        ("retrieval", "482913", "48291", False),
        ("retrieval", "482913", "111111 or 482913", False),
        ("retrieval", "482913", "", False),
        ("arithmetic", "42", "12 + 30 = 42", True),
        ("arithmetic", "42", "42 crates.", True),
        ("arithmetic", "42", "42, that is 12 and 30", False),
        ("arithmetic", "42", "forty-two", False),
        ("copy", "abc123" * 6, "The identifier is " + "abc123" * 6 + ".", True),
        ("copy", "abc123" * 6, "abc123" * 5 + "abc124", False),
        ("copy", "abc123" * 6, "abc123" * 7, False),
        ("copy", "abc123" * 6, "I do not know.", False),
        ("several", "111111,222222", "222222, 111111.", True),
        ("several", "111111,222222", "111111", False),
        ("several", "111111,222222", "111111, 222222, 333333", False),
        ("several", "111111,222222", "", False),
        ("variables", "48213", "The value is 48213.", True),
        ("variables", "48213", "quartz", False),
        ("aggregation", "Oslo", "It is Oslo, not Lima.", True),
        ("aggregation", "Oslo", "Lima", False),
        ("aggregation", "Oslo", "I cannot say.", False),
        ("completion", "a,b", "result = f(a=a, b=b)", True),
        ("completion", "a,b", "a=1, b = 2)", True),
        ("completion", "a,b", "result = f(b=b, a=a)", False),
        ("completion", "a,b", "result = f(a, b)", True),
        ("completion", "a,b", "result = f(a)", False),
    ],
)
def test_the_judge_is_exact(task, expected, answer, right):
    assert judge(Question(task, "", expected, 0.0), answer) is right


def test_copied_fraction():
    question = Question("copy", "", "abcdefgh" * 4, 0.0)
    assert copied_fraction(question, "abcdefgh" * 4) == 1
    assert copied_fraction(question, "It is abcdefgh" + "x" * 24) == 8 / 32
    assert copied_fraction(question, "?") == 0


def test_conversations_ask_for_what_was_told():
    turns = make_conversation(random.Random(1), TEXTS, 20, 40, count)
    assert len(turns) == 20 and all(t.question is None for t in turns[:10])
    told = "\n".join(t.message for t in turns[:10])
    asked = [t.question for t in turns[10:] if t.question is not None]
    assert len(asked) == 10 == len({q.expected for q in asked})
    for question in asked:
        name = next(name for name in NAMES if name in question.text)
        assert told.count(question.expected) == 1 and f"badge number of {name} is {question.expected}." in told
    assert all(question.expected not in "".join(t.message for t in turns[10:]) for question in asked)


def test_positions_add_up():
    assert position_edges(8192) == [0, 256, 512, 1024, 2048, 4096, 8192]
    assert position_edges(200) == [0, 200] and position_edges(300) == [0, 256, 300]
    bins = position_bins(1000, ((n, 1, 2.0) for n in range(4, 1000)))
    assert [(b["from"], b["to"], b["count"]) for b in bins] == [(0, 256, 252), (256, 512, 256), (512, 1000, 488)]
    assert sum(b["amount"] for b in bins) == 2 * 996


def test_depth_bins_hold_every_answer():
    items = [{"depth": d / 10, "right": d >= 5} for d in range(11)]
    bins = by_depth(items)
    assert sum(b["questions"] for b in bins) == 11
    assert [b["accuracy"] for b in bins] == [0, 0, 0.5, 1, 1]


def test_rows_count_what_was_lost_and_gained():
    question = Question("retrieval", "", "482913", 0.5)
    answers = [
        ("482913", "482913"),
        ("111111", "482913"),
        ("482913", "none"),
        ("none", "482913"),
        ("none", "nothing"),
    ]  # (coded, untouched)
    parts = {
        "planted/64/0-5/untouched": {"items": [item(question, old, old) for _, old in answers], "stored_bytes": None, "tokens": 320},
        "planted/64/0-5/tiny": {"items": [item(question, new, old) for new, old in answers], "stored_bytes": 400, "tokens": 320},
    }
    untouched, tiny = rows_of(parts, 10)
    assert (untouched["accuracy"], untouched["lost"], untouched["gained"], untouched["agreement"]) == (0.6, 0, 0, 1)
    assert (tiny["accuracy"], tiny["lost"], tiny["gained"], tiny["agreement"]) == (0.4, 2, 1, 0.2)
    assert tiny["bits_per_element"] == 8 * 400 / 3200
    more = parts | {"planted/128/0-5/tiny": parts["planted/64/0-5/tiny"] | {"tokens": 640}}
    both = next(r for r in rows_of(more, 10) if r["context"] == "all" and r["method"] == "tiny")
    assert both["questions"] == 10 and both["accuracy"] == 0.4 and both["bits_per_element"] == 8 * 800 / 9600
    assert tiny["difference_standard_error"] == pytest.approx((3 - 1 / 5) ** 0.5 / 5)


def test_long_windows_come_from_the_beginning_of_texts():
    texts = ["short", "abcdefghij" * 100, "klmno" * 30]
    found = long_windows(texts, 100, 9, lambda text: [ord(c) for c in text])
    assert ["".join(map(chr, ids)) for ids in found] == ["abcdefghij" * 10] * 2 + ["klmno" * 20]
    assert len(long_windows(texts, 100, 2, lambda text: list(map(ord, text)))) == 2
    with pytest.raises(InvalidOption, match="no text has 2000 tokens"):
        long_windows(texts, 2000, 1, lambda text: list(map(ord, text)))


def test_short_texts_make_windows_together(tmp_path):
    """As a chat's answers do, where no file fills one; and not where files do."""

    def encode(text):
        return list(text.encode())

    for n in range(5):
        (tmp_path / f"{n}.txt").write_text(f"{n}" * 30)
    found = domain_windows(str(tmp_path), 50, 1000, encode)
    joined = "\n\n".join(f"{n}" * 30 for n in range(5))
    assert sorted(map(bytes, found)) == sorted(joined[at : at + 50].encode() for at in (0, 50, 100))
    (tmp_path / "9.txt").write_text("9" * 60)
    assert domain_windows(str(tmp_path), 50, 1000, encode) == [[ord("9")] * 50]
    with pytest.raises(InvalidOption, match="fewer than 5000 tokens"):
        domain_windows(str(tmp_path), 5000, 10_000, encode)


def test_long_samples_hold_what_they_ask_for():
    for seed in range(10):
        sample = make_long_sample(random.Random(seed), TEXTS, 1500, count, each=2)
        assert [q.task for q in sample.questions] == ["several"] * 2 + ["variables"] * 2 + ["aggregation"] * 2 + ["completion"] * 2
        assert sum(count(sample.document.splitlines())) <= 1500
        for question in sample.questions:
            if question.task == "several":
                name = question.text.split("codes of ")[1].split("?")[0]
                told = [
                    line.split(" is ")[1][:-1]
                    for line in sample.document.splitlines()
                    if line.startswith(f"One of the access codes of {name} ")
                ]
                assert told == question.expected.split(",") and len(told) == 4
            elif question.task == "variables":
                name, hops = question.text.split("the variable ")[1].split(" have")[0], 0
                while (sentence := f"the variable {name} takes the value of the variable ") in sample.document:
                    name, hops = sample.document.split(sentence)[1].split(".")[0], hops + 1
                assert hops == 3 and f"variable {name} is set to {question.expected}." in sample.document
            elif question.task == "aggregation":
                start = f"Logbook of the {question.text.split('the ')[1].split(' stop')[0]}: it stopped at "
                stops = [line.removeprefix(start)[:-1] for line in sample.document.splitlines() if line.startswith(start)]
                assert len(stops) == 15 and max(PLACES, key=stops.count) == question.expected and stops.count(question.expected) == 9
            else:
                name = question.text.rsplit("result = ", 1)[1][:-1]
                assert f"def {name}({', '.join(question.expected.split(','))}):" in sample.document
                assert judge(question, f"result = {name}({', '.join(f'{p}={p}' for p in question.expected.split(','))})")
    assert make_long_sample(random.Random(3), TEXTS, 1500, count) == make_long_sample(random.Random(3), TEXTS, 1500, count)
    assert copied_fraction(Question("several", "", "111111,222222", 0.0), "222222 and 333333") == 0.5
    for tokens, each, said in ((1500, 6, "1 to 5"), (1500, 0, "1 to 5"), (100, 2, "no room")):
        with pytest.raises(InvalidOption, match=said):
            make_long_sample(random.Random(0), TEXTS, tokens, count, each=each)


def test_an_agents_session_repeats_itself(tmp_path, capsys):
    for n, text in enumerate(TEXTS):
        (tmp_path / f"{n}.py").write_text(text)
    for out in ("a", "b"):
        command = [
            "--text",
            *(str(tmp_path / f"{n}.py") for n in range(4)),
            "--out",
            str(tmp_path / out),
            "--sessions",
            "2",
            "--characters",
            "20000",
        ]
        assert agent_text.main(command) == 0
    one, other = ((tmp_path / "a" / f"session-{n}.txt").read_text() for n in range(2))
    assert one == (tmp_path / "b/session-0.txt").read_text() and one != other and 20_000 <= len(one) < 40_000
    lines = [line for line in one.splitlines() if "says nothing of interest" in line]
    assert len(set(lines)) < 0.8 * len(lines)
    assert agent_text.main([*command[:-1], "0"]) == 2 and agent_text.main(["--text", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    (tmp_path / "short.py").write_text("one line")
    assert agent_text.main(["--text", str(tmp_path / "short.py"), "--out", str(tmp_path)]) == 2
    assert "no file has 40 lines" in capsys.readouterr().err


def test_folders_of_texts_repeat(tmp_path):
    (tmp_path / "packages/usr/share/games/fortunes/de").mkdir(parents=True)
    (tmp_path / "packages/usr/share/games/fortunes/de/witze").write_text("Ein Witz.\n%\nNoch einer, länger.\n")
    sizes = write_folders(tmp_path / "a", tmp_path / "packages")
    assert sizes["german"] > 20 and sizes["prose"] == 0 and not (tmp_path / "a/prose").exists()
    assert all(100_000 < sizes[name] < 450_000 for name in ("logs", "json", "code"))
    write_folders(tmp_path / "b", None)
    for name in ("logs/syslog.log", "logs/access.log", "json/records.json", "json/unicode.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "länger" in (tmp_path / "a/german/fortunes.txt").read_text(encoding="utf-8")
    write_folders(tmp_path / "c", None, apart=0.25)
    whole, parts = (
        (tmp_path / "b/logs/syslog.log").read_text(),
        [(tmp_path / "c" / part / "logs/syslog.log").read_text() for part in ("train", "test")],
    )
    assert "".join(parts) == whole and parts[0].endswith("\n") and 0.7 < len(parts[0]) / len(whole) < 0.76
    page = '<html><p class="x">A paragraph of <b>more</b> than forty characters &amp; a tag.</p><pre>left out</pre></html>'
    assert plain(page) == "A paragraph of more than forty characters & a tag.\n"


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine("draft")


@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_an_untouched_cache_answers_as_plain_generation(chat_engine, draft):
    engine = chat_engine(draft)
    prompts = [engine.encode("A text that is read first, number one."), engine.encode("Another one, a little longer than the first.")]
    questions = [engine.encode(" And then?"), engine.encode(" What comes next?")]
    conversations = open_with(engine.core, prompts)
    free = engine.core.pool.num_free_pages
    before = [engine.core.target.read_kv(c.sequence, 0, c.sequence.length) for c in conversations]
    aside = ask_aside(
        engine.core, conversations * 2, [*questions, *questions[::-1]], [12, 12, 12, 3]
    )  # leaves no trace, so asking again gives the same
    for conversation, prompt, kv in zip(conversations, prompts, before, strict=True):
        assert conversation.token_ids == prompt and conversation.sequence.length == len(prompt)
        assert torch.equal(engine.core.target.read_kv(conversation.sequence, 0, len(prompt)), kv)
    assert engine.core.pool.num_free_pages == free
    engine.core.pool.check_integrity()
    answers = ask(engine.core, conversations, questions, [12, 12])
    assert aside[:2] == answers and len(aside[3]) <= 3
    assert all(c.sequence.length == len(c.token_ids) - 1 for c in conversations)
    plain = engine.generate(
        [a + b for a, b in zip(prompts, questions, strict=True)], SamplingParams(max_new_tokens=12, temperature=0, draft_length=0)
    )
    ends = engine.core.eos_token_ids
    assert answers == [[t for t in result.token_ids if t not in ends] for result in plain]


@pytest.mark.parametrize("draft", ["draft", "trunk", "none"])
def test_a_resume_in_memory_is_the_sessions_own(chat_engine, tmp_path, draft):
    engine = chat_engine(draft)
    suspender = Suspender(engine.core, None)
    session = engine.session(quality="compact")
    session.generate("Some text to remember. " * 8, SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True))
    session.suspend(tmp_path / "first")
    data = suspender.suspend(session.conversation, "compact")
    assert SessionFile.from_bytes(data).spans == SessionFile.load(tmp_path / "first").spans
    ours, spans = suspender.resume(data)
    resumed = engine.session(tmp_path / "first")  # held: a session that is dropped gives its pages back
    theirs = resumed.conversation
    length = theirs.sequence.length
    assert ours.token_ids == theirs.token_ids and ours.sequence.length == length > 150
    assert torch.equal(engine.core.target.read_kv(ours.sequence, 0, length), engine.core.target.read_kv(theirs.sequence, 0, length))
    ask(engine.core, [ours], [engine.encode(" More.")], [8])
    again = SessionFile.from_bytes(suspender.suspend(ours, "compact", spans))
    assert again.spans[: len(spans)] == spans and again.num_cached == len(again.token_ids) - 1 == again.spans[-1].end


@pytest.mark.parametrize("draft", ["draft", "trunk"])
def test_in_place_is_what_a_resume_gives(chat_engine, draft):
    engine = chat_engine(draft)
    suspender = Suspender(engine.core, None)
    conversation = open_with(engine.core, [engine.encode("Some text that is coded twice, in two ways. " * 6)])[0]
    ask(engine.core, [conversation], [engine.encode(" And then?")], [5])
    length = conversation.sequence.length
    exact = engine.core.target.read_kv(conversation.sequence, 0, length)
    resumed, spans, num_bytes = suspender.through_file(conversation, "compact")
    assert suspender.in_place(conversation, "compact") == spans
    assert suspender.file_bytes(conversation, "compact", spans) == num_bytes
    here, there = (engine.core.target.read_kv(c.sequence, 0, length) for c in (conversation, resumed))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(here, exact, atol=1e-2)
    assert suspender.in_place(conversation, "compact", spans) == spans, "coded once"


def test_prediction_keeps_no_residual(engine):
    suspender = Suspender(engine.core, None)
    conversation = open_with(engine.core, [engine.encode("".join(random.Random(3).choices("abcdefghijklmnop ", k=240)))])[0]
    small, large = (suspender.suspend(conversation, quality) for quality in ("prediction", "near-lossless"))
    assert len(small) < len(large) / 2
    assert all(len(s.data) < 0.35 * (s.end - s.start) + 64 for s in SessionFile.from_bytes(small).spans)
    restored, _ = suspender.resume(small)
    assert torch.isfinite(engine.core.target.read_kv(restored.sequence, 0, restored.sequence.length)).all()
    assert step_name("step2.5") == 2.5
    for wrong in ("best", "step0", "stepx"):
        with pytest.raises(InvalidOption, match="unknown quality"):
            step_name(wrong)


def test_nll_is_the_models_own(engine):
    ids = engine.encode("The same text, scored at once and in pieces.")
    with torch.inference_mode():
        sequence = engine.core.pool.new_sequence()
        logits = forward_reserved(engine.core.target, torch.tensor(ids), [sequence], [len(ids)]).logits
    expected = -logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(token_nll(engine.core, ids)), expected, rtol=1e-4, atol=1e-4)


def test_the_untouched_row_agrees_with_itself_and_costs_no_pages(engine):
    plan = Plan(("balanced",), TEXTS, 2, 2, 0, facts=2, identifiers=1, sums=1, conversations=2, turns=4, turn_tokens=0)
    parts: dict = {}
    saves = []
    free = engine.core.pool.num_free_pages
    runner = Runner(engine, Suspender(engine.core, None), plan, parts, lambda: saves.append(len(parts)), lambda _: None)
    runner.planted(900)
    runner.conversations()
    assert saves == [1, 2, 3, 4] and engine.core.pool.num_free_pages >= free
    rows = rows_of(parts, 100)
    assert {(r["task"], r["context"]) for r in rows} == {("retrieval", 900), ("copy", 900), ("arithmetic", 900), ("conversation", None)}
    assert {r["questions"] for r in rows if r["task"] == "retrieval"} == {4}
    assert {r["questions"] for r in rows if r["task"] == "conversation"} == {4}, "half of the turns ask"
    for row in rows:
        assert (row["bits_per_element"] is None) == (row["method"] == "untouched")
        if row["method"] == "untouched":
            assert row["agreement"] == 1 == row.get("agreement_all_turns", 1)
    runner.planted(900)
    runner.conversations()
    assert len(saves) == 4, "nothing runs twice"
    with pytest.raises(InvalidOption, match="the model has 1024"):
        runner.planted(2000)


def test_long_tasks_are_asked_of_baselines_too(engine, monkeypatch):
    plan = Plan(("compact",), TEXTS, 1, 1, 0, baselines=("fp8", "kvtc-1bit"))
    windows = [engine.encode(text)[:256] for text in TEXTS]
    parts: dict = {}
    free = engine.core.pool.num_free_pages
    runner = Runner(engine, Suspender(engine.core, None), plan, parts, lambda: None, lambda _: None, FittedBaselines(engine.core, windows))
    tasks = ("several", "variables", "aggregation", "completion")
    sample = Sample("A text that is read first. " * 10, [Question(task, f"What of {task}?", "111111", 0.5) for task in tasks])
    monkeypatch.setattr(runner, "sample", lambda context, number, kind: sample)  # the model has too short a context for a real one
    runner.planted(900, LONG)
    assert engine.core.pool.num_free_pages >= free
    rows = {(r["task"], r["method"]): r for r in rows_of(parts, 100)}
    assert {task for task, _ in rows} == set(tasks) and {r["context"] for r in rows.values()} == {900}
    config = engine.core.target.config
    raw_bits = 8 * 2 * config.num_layers * config.kv_width / 100
    for task in tasks:
        assert {m for t, m in rows if t == task} == {"untouched", "compact", "fp8", "kvtc-1bit"}
        assert rows[task, "kvtc-1bit"]["bits_per_element"] < rows[task, "fp8"]["bits_per_element"] < 1.2 * raw_bits
    with pytest.raises(InvalidOption, match="no calibration text for the baselines"):
        FittedBaselines(engine.core, []).baseline("kvtc-1bit")


def test_a_baselines_kv_is_what_its_bytes_say(engine):
    conversation = open_with(engine.core, [engine.encode("Some text for a baseline to code. " * 4)])[0]
    length = conversation.sequence.length
    exact = engine.core.target.read_kv(conversation.sequence, 0, length)
    baselines = FittedBaselines(engine.core, [])
    copy = copied(conversation.sequence, shared=True)
    num_bytes = baselines.in_place("fp8", [copy])
    code = baselines.baseline("fp8").encode(exact)
    assert num_bytes == len(code)
    torch.testing.assert_close(engine.core.target.read_kv(copy, 0, length), baselines.baseline("fp8").decode(code), rtol=1e-4, atol=1e-4)
    assert torch.equal(engine.core.target.read_kv(conversation.sequence, 0, length), exact), "the original keeps its own pages"
    copy.free()


def test_sessions_go_on_alike_where_little_is_lost(engine, chat_engine, tmp_path):
    # a quick pack's rows alone leave a sixth of the cache out at any step; a promise is kept with a basis for the rest
    texts = [engine.encode(f"{number}. " + "What a basis is fitted to, and a curve measured on. " * 6)[:300] for number in range(12)]
    pack = complete(
        engine.core.target, engine.core.draft_model, Suspender(engine.core, None).codec.pack, texts, curve_tokens=900, log=lambda _: None
    )
    pack.save(tmp_path / "pack")
    engine = chat_engine("draft")
    suspender = Suspender(engine.core, str(tmp_path / "pack"))
    prompts = {"one": [engine.encode("A text that is read first. " * 5), engine.encode("Another prompt of its own. " * 6)]}
    parts = {}
    free = engine.core.pool.num_free_pages
    continue_sessions(
        engine,
        suspender,
        prompts,
        ["step0.001", "kl0.00001", "prediction"],
        8,
        lambda name, part: parts.update({f"continuation/{name}/x": part}),
    )
    assert engine.core.pool.num_free_pages >= free
    rows = {(r["group"], r["method"]): r for r in continuation_rows(parts, 10)}
    untouched, fine, promised, coarse = (rows["one", method] for method in ("untouched", "step0.001", "kl0.00001", "prediction"))
    assert fine["bits_per_element"] > promised["bits_per_element"] > coarse["bits_per_element"]
    assert promised["mean_equal_tokens"] > coarse["mean_equal_tokens"]
    assert untouched["equal_share"] == promised["equal_share"] == rows["one", "recomputed"]["equal_share"] == 1
    assert fine["bits_per_element"] > coarse["bits_per_element"] > 0 and untouched["bits_per_element"] is None
    assert coarse["mean_equal_tokens"] < 8 and coarse["equal_share"] < 1
    assert rows["all", "step0.001"] == fine | {"group": "all"} and fine["prompts"] == len(
        parts["continuation/one/x"]["methods"]["untouched"]["equal"]
    )
    assert (equal_tokens([1, 2], [1, 2], 8), equal_tokens([1, 2], [1, 3], 8), equal_tokens([1], [1, 2], 8)) == (8, 1, 1)


def test_references_inside_a_session_take_bits_away(engine):
    suspender, found = Suspender(engine.core, None), {}
    ids = engine.encode("".join(random.Random(5).choices("abcdefghijklmnop ", k=300)))
    qualities = ["nll", "step0.5", "step0.5+alone"]
    measure_positions(
        suspender, (ids * 4)[:1092], qualities, lambda quality, bins: found.update({f"position/p/x/{quality}": {"bins": bins}})
    )
    rows = position_rows(found, 100)
    assert [(r["from"], r["to"], r["kind"]) for r in rows] == [(0, 256, "p"), (256, 512, "p"), (512, 836, "p")]
    last = rows[-1]["bits_per_element"]
    assert last["step0.5"] < 0.9 * last["step0.5+alone"]
    assert all(r["kl"][m] >= 0 and 0 <= r["agreement"][m] <= 1 for r in rows for m in r["kl"]) and rows[0]["nll"] > 0


def test_command(chat_folders, pack_home, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for n, text in enumerate(TEXTS):
            (tmp_path / name / f"{n}.txt").write_text(text.replace("nothing", name))
    out = tmp_path / "out.json"
    command = [
        "--target",
        str(chat_folders.target),
        "--draft",
        str(chat_folders.draft),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--qualities",
        "compact",
        "--samples",
        "1",
        "--contexts",
        "800",
        "--facts",
        "2",
        "--sums",
        "0",
        "--conversations",
        "1",
        "--turns",
        "2",
        "--turn-tokens",
        "0",
        "--text",
        str(tmp_path / "one"),
        "--domains",
        f"one={tmp_path / 'one'}",
        f"two={tmp_path / 'two'}",
        "--domain-context",
        "128",
        "--domain-tokens",
        "256",
        "--position-context",
        "856",
        "--position-texts",
        "2",
        "--json-out",
        str(out),
        "--plot",
        str(tmp_path / "position.png"),
    ]
    assert main(command) == 0
    document = json.loads(out.read_text())
    assert {"pair", "device", "command", "versions", "settings", "rows", "parts"} <= document.keys()
    rows = {
        task: [r for r in document["rows"] if r["task"] == task] for task in ("retrieval", "copy", "conversation", "domain", "position")
    }
    assert {r["method"] for r in rows["retrieval"]} == {"untouched", "compact"}
    assert {(r["domain"], r["method"]) for r in rows["domain"]} == {(name, m) for name in ("one", "two") for m in ("compact", "recomputed")}
    assert all(abs(r["kl"]) < 1e-4 and r["bits_per_element"] == 0 for r in rows["domain"] if r["method"] == "recomputed"), "in float32"
    assert all({"bits_per_element", "kl", "top1_agreement", "nll_untouched"} <= r.keys() for r in rows["domain"])
    assert [(r["from"], r["to"]) for r in rows["position"]] == [(0, 256), (256, 512), (512, 600)]
    assert sum(r["tokens"] for r in rows["position"]) == 2 * (600 - 4)
    assert all(0 <= r[name]["compact"] < 1 and r["kind"] == "text" for r in rows["position"] for name in ("kl", "kl_first"))
    assert (tmp_path / "position.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "retrieval" in printed and "bits per element by position" in printed
    assert main(command) == 0 and json.loads(out.read_text())["parts"] == document["parts"]
    assert main([*command, "--turns", "4"]) == 2
    assert "holds rows of other settings (turns)" in capsys.readouterr().err
    named = ["--tasks", "planted,continuation", "--baselines", "fp8", "--new-tokens", "2", "--continuation-prompts", "1"]
    assert main([*command, *named, "--json-out", str(tmp_path / "named")]) == 0
    answered = json.loads((tmp_path / "named").read_text())["rows"]
    assert {r["method"] for r in answered if r["task"] == "retrieval"} == {"untouched", "compact", "fp8"}
    assert main([*command, "--tasks", "long", "--json-out", str(tmp_path / "long")]) == 2
    assert "leave no room for text around the facts" in capsys.readouterr().err
    assert {r["group"] for r in answered if r["task"] == "continuation"} <= {"chat prompts", "code prompts", "one", "two", "all"}
    for name, tasks in (("a", "conversation"), ("b", "position")):
        assert main([*command, "--tasks", tasks, "--json-out", str(tmp_path / name)]) == 0
    assert eval_report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--json-out", str(tmp_path / "joined")]) == 0
    joined = json.loads((tmp_path / "joined").read_text())
    assert "parts" not in joined and joined["rows"] == [r for r in document["rows"] if r["task"] in ("conversation", "position")]
    assert eval_report.main([str(tmp_path / "a"), str(tmp_path / "a")]) == 2 == eval_report.main([str(tmp_path / "none")])


def test_bad_options_are_named(tmp_path, capsys):
    base = ["--pair", "smollm2", "--json-out", str(tmp_path / "out.json")]
    for extra, said in (
        (["--tasks", "speed"], "unknown task"),
        (["--tasks", "domains"], "needs texts"),
        (["--qualities", "best"], "unknown quality"),
        (["--samples", "many"], "--samples"),
        (["--samples", "3", "--batch", "2"], "batches of 2"),
        (["--contexts", "2k"], "--contexts 2k"),
        (["--turns", "0"], "--turns 0"),
        (["--tasks", "position", "--baselines", "fp8"], "--baselines answer"),
        (["--tasks", "continuation", "--new-tokens", "0"], "--new-tokens 0"),
    ):
        assert main([*base, *extra]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(InvalidOption, match="--domains logs"):
        named_paths("--domains", ["logs"])


def test_run_tokens_moves_the_cache(engine):
    conversation = engine.core.open_sequence_state()
    conversation.token_ids[:] = engine.encode("abc")
    logits = run_tokens(engine.core, [conversation], [conversation.token_ids], "last")
    assert logits is not None and logits.shape[0] == 1 and conversation.sequence.length == 3
