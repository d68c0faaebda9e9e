"""From a decoder to a trained draft head's folder, and the script that does it, on a tiny target."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import train_draft
from draft.head_file import read_draft_head
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from engine.text.chat_opening import ChatOpening
from engine.train.data import TrainingSets, add_text, draw_sets, read_messages, split_given
from engine.train.model_card import model_card
from engine.train.self_generated import SelfGenerationOptions
from engine.train.trainer import TrainOptions
from engine.train.training import Architecture, DraftHeadTraining, teacher_of
from train import plot as train_plot

CHAT = ChatOpening((3, 4, 6), (2, 7), (2,))
OPTIONS = TrainOptions(1, 1, steps=150, batch_tokens=2048, learning_rate=3e-3, warmup_steps=10, chunk=512, averaging=0.9)


@pytest.fixture(scope="module")
def target(random_decoder):
    """4 layers, sure enough of its tokens that there is something to learn."""
    return random_decoder(7, scale=0.1, vocab_size=40, num_hidden_layers=4)


@pytest.fixture(scope="module")
def sets(target) -> TrainingSets:
    options = SelfGenerationOptions(rows=24, context=64, temperatures=(0.8, 1.0))
    return draw_sets(target, CHAT, options, held_out=8, tokens=24 * 192, seconds=None, log=lambda line: None)


def test_the_teacher_says_what_the_decoder_says(target):
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    pool = target.new_pool(4)
    out = forward_reserved(target, ids.flatten(), [pool.new_sequence(), pool.new_sequence()], [20, 20], taps=(2,))
    teacher = teacher_of(target)
    at_exit, final = teacher.run(ids, 2)
    assert torch.allclose(at_exit.flatten(0, 1), out.taps[2], atol=1e-4)
    assert torch.allclose(final.flatten(0, 1) @ teacher.head.T, out.logits, atol=1e-3)


def test_training_measuring_and_storing(target, sets, tmp_path):
    architecture = Architecture.parse("2,1,32,own")
    training = DraftHeadTraining(target, teacher_of(target), sets, CHAT.special, architecture, OPTIONS)
    before = training.figures()
    lines: list[str] = []
    assert training.run(lines.append, checkpoint=tmp_path / "c.pt", report_every=10)
    figures = training.save(tmp_path / "head", "tiny", 8, training.figures())
    for group, key in (("temperature_1", "acceptance"), ("greedy", "agreement"), ("greedy", "tokens_per_step")):
        assert figures[group][key] > before[group][key] + 0.05
        assert figures["stored"][group][key] == pytest.approx(figures[group][key], abs=0.15)
    held = [entry["held_out"]["acceptance"] for entry in training.curve if "held_out" in entry]
    assert len(lines) == 15 and len(held) >= 10 and held[-1] == figures["temperature_1"]["acceptance"]
    assert set(CHAT.special) <= set(training.trainer.token_ids.tolist())
    config, tensors = read_draft_head(tmp_path / "head")
    assert config.training["stored"] == figures["stored"] and config.digest == figures["adapter_digest"]
    error = tensors["lm_head.weight"] - training.trainer.averaged.head
    assert 0 < float(error.abs().max()) < 0.02 * float(tensors["lm_head.weight"].abs().max())
    # the engine, drafting freely with the stored draft head, gets what was measured on held-out text
    engine = Engine(target, draft=load_draft_head(tmp_path / "head", target), page_size=16)
    for docs, group, temperature in ((sets.greedy, "greedy", 0.0), (sets.sampled, "temperature_1", 1.0)):
        prompts = [docs.document(i)[: docs.answers[i]].tolist() for i in range(len(docs)) if docs.answers[i] < docs.lengths[i]]
        params = [
            SamplingParams(max_new_tokens=40, temperature=temperature, seed=s, draft_length=4, stop_token_ids=(2,))
            for s in range(4 * len(prompts))
        ]
        made = [result.speculation for result in engine.generate(4 * prompts, params)]
        per_step = 1 + sum(m.accepted for m in made) / sum(m.steps for m in made)
        assert per_step == pytest.approx(figures["stored"][group]["tokens_per_step"], rel=0.2) and per_step > 1.3
    card = model_card("tiny", "Apache-2.0", "the command", figures)
    for value in (figures["stored"]["temperature_1"]["acceptance"], figures["greedy"]["tokens_per_step"]):
        assert f"{value:.3f}" in card
    assert "the command" in card and f"{figures['data']['drawn_tokens']:,} tokens" in card


def test_a_paused_training_goes_on_as_if_it_had_not_been(target, sets, tmp_path):
    def make() -> DraftHeadTraining:
        options = replace(OPTIONS, steps=40, batch_tokens=512)
        return DraftHeadTraining(target, teacher_of(target), sets, CHAT.special, Architecture(2, 1, 32, "tied"), options)

    straight, parts = make(), make()
    straight.run(lambda line: None, report_every=10)
    assert not parts.run(lambda line: None, checkpoint=tmp_path / "c.pt", pause_after=0.1, report_every=10)
    done_before = parts.trainer.step
    again = make()
    assert again.run(lambda line: None, checkpoint=tmp_path / "c.pt", resume=True, report_every=10) and 0 < done_before < 40
    assert all(torch.equal(a, b) for a, b in zip(straight.trainer.averaged.parameters(), again.trainer.averaged.parameters(), strict=True))
    timeless = [[{k: v for k, v in e.items() if "second" not in k and k != "tokens_per_s"} for e in t.curve] for t in (straight, again)]
    assert timeless[0] == timeless[1]
    with pytest.raises(InvalidOption, match="resume"):
        make().run(lambda line: None, resume=True)


def test_costs_count_the_weights_read(target):
    smol = dict(num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536, vocab_size=49_152)
    config = type("Config", (), smol)
    layer = 576 * (9 + 3 + 3) * 64 + 9 * 64 * 576 + 3 * 576 * 1536
    expected = (8 * layer + 16_384 * 576) / (30 * layer + 49_152 * 576)
    assert Architecture(6, 2, 16_384, "own").cost(config) == pytest.approx(expected) and 0.25 < expected < 0.3
    for text in ("6,2,16384", "6,2,many,own", "6,2,16384,free"):
        with pytest.raises(InvalidOption):
            Architecture.parse(text)


def test_sets_survive_the_disk_and_take_text(sets, tmp_path):
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [ord(c) % 40 for c in text]

    sets.save(tmp_path / "sets")
    loaded = TrainingSets.load(tmp_path / "sets")
    assert [d.digest for d in (loaded.train, loaded.sampled, loaded.greedy)] == [d.digest for d in (sets.train, sets.sampled, sets.greedy)]
    assert TrainingSets.load(tmp_path / "nothing") is None
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} words of the user's own. " * 200)
    mixed = add_text(sets, [tmp_path / "text"], Tokenizer(), 0.3, 64, 0)
    added = mixed.train.facts["text_tokens"]
    assert 0 < added <= 0.3 * len(mixed.train.tokens) and len(mixed.train.tokens) == len(sets.train.tokens) + added
    with pytest.raises(InvalidOption, match="share"):
        add_text(sets, [tmp_path / "text"], Tokenizer(), 1.0, 64, 0)


def test_given_messages_are_answered_and_some_held_out(target, tmp_path):
    class Tokenizer:
        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    file = tmp_path / "messages.txt"
    file.write_text("\n".join([f"{10 + i} {9 + i}" for i in range(29)] + ["", "  10 9 "]) + "\n")
    given = read_messages(file, Tokenizer())
    assert len(given) == 29 and given[0] == [10, 9]
    trained_on, held = split_given(given, 0)
    assert len(held) == 2 and sorted(trained_on + held) == given and split_given(given, 1)[1] != held
    options = SelfGenerationOptions(rows=24, context=64, temperatures=(0.8, 1.0), given_share=0.6)
    sets = draw_sets(target, CHAT, options, given=given, held_out=8, tokens=24 * 192, seconds=None, log=lambda line: None)

    def messages(docs):
        """First two tokens of each conversation."""
        return {tuple(docs.document(i)[3:5].tolist()) for i in range(len(docs)) if docs.lengths[i] > 8}

    assert len(messages(sets.train) & set(map(tuple, trained_on))) > 10 and not messages(sets.train) & set(map(tuple, held))
    assert all(messages(docs) == set(map(tuple, held)) for docs in sets.given) and sets.train.facts["given_messages"] == 27
    sets.save(tmp_path / "sets")
    assert [d.digest for d in TrainingSets.load(tmp_path / "sets").given] == [d.digest for d in sets.given]
    training = DraftHeadTraining(target, teacher_of(target), sets, CHAT.special, Architecture(2, 1, 32, "own"), replace(OPTIONS, steps=3))
    training.run(lambda line: None)
    figures = training.save(tmp_path / "head", "tiny", 8, training.figures())
    card = model_card("tiny", "Apache-2.0", "the command", figures)
    assert f"{figures['stored']['given_greedy']['tokens_per_step']:.3f}" in card and "60% of the conversations" in card
    replace(sets, given=None).save(tmp_path / "sets")
    assert TrainingSets.load(tmp_path / "sets").given is None
    with pytest.raises(InvalidOption, match="held out"):
        split_given([[1]], 0)
    file.write_text("\n \n")
    for path in (file, tmp_path / "nowhere.txt"):
        with pytest.raises(InvalidOption, match="one message a line"):
            read_messages(path, Tokenizer())


def test_the_script_trains_resumes_and_searches(tiny_model, tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "tiny"
    tiny_model("llama", tie_word_embeddings=True).reference.save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(97)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t5").save_pretrained(
        folder
    )
    common = [
        "--target",
        folder,
        "--data",
        tmp_path / "data",
        "--device",
        "cpu",
        "--context",
        64,
        "--rows",
        8,
        "--held-out",
        4,
        "--vocab",
        64,
        "--exit-layer",
        1,
        "--draft-layers",
        1,
        "--batch-tokens",
        512,
        "--report-every",
        5,
        "--sample-tokens",
        1024,
        "--mix",
        "0.1,0.3",
    ]

    def run(*more: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train_draft.py", *map(str, [*common, *more])])
        return train_draft.main(), capsys.readouterr().err

    status, said = run(
        "--out",
        tmp_path / "out",
        "--steps",
        20,
        "--checkpoint",
        tmp_path / "c.pt",
        "--json-out",
        tmp_path / "t.json",
        "--temperatures",
        "0.2,0.9",
    )
    assert status == 0, said
    figures = json.loads((tmp_path / "t.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from 10% to 30% of the training on" in card
    assert figures["data"]["temperatures"] == [0.2, 0.9] and "at temperatures 0.2 to 0.9" in card
    assert figures["done"] and figures["steps"] == 20 and f"{figures['stored']['greedy']['agreement']:.3f}" in card
    assert str(tmp_path) not in card and "--exit-layer 1" in card and str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    # a larger number of steps goes on from the end of the smaller
    status, said = run(
        "--out", tmp_path / "more", "--steps", 30, "--checkpoint", tmp_path / "c.pt", "--resume", "--json-out", tmp_path / "m.json"
    )
    assert status == 0 and "found" in said and "resumed at step 20" in said
    assert json.loads((tmp_path / "m.json").read_text())["steps"] == 30
    status, said = run("--out", tmp_path / "none", "--data", tmp_path / "other", "--temperatures", "0.6")
    assert status == 2 and "--temperatures cannot be '0.6'" in said
    status, said = run("--out", tmp_path / "none", "--data", tmp_path / "third", "--mix", "0.5,0.1")
    assert status == 2 and "--mix cannot be '0.5,0.1'" in said and not (tmp_path / "third").exists()
    shapes = "1,1,64,tied 2,1,64,own 9,1,64,own"
    status, said = run("--out", tmp_path / "none", "--search", shapes, "--search-seconds", 0.3, "--json-out", tmp_path / "s.json")
    # the last one does not fit: refused by name, after the results of the others were written
    assert status == 2 and said.strip().splitlines()[-1].startswith("error: an exit after layer 9")
    rows = json.loads((tmp_path / "s.json").read_text())["search"]
    assert [r["architecture"]["trunk_layers"] for r in rows] == [1, 2] and rows[0]["draft_step_cost"] < rows[1]["draft_step_cost"]
    # a head on the target's last states
    status, said = run("--out", tmp_path / "states", "--exit-layer", "1+last", "--steps", 6, "--json-out", tmp_path / "l.json")
    assert status == 0, said
    config, tensors = read_draft_head(tmp_path / "states")
    assert config.state_layers == (1, config.exit_layer) and tensors["fuse.weight"].shape[1] == 2 * tensors["join.weight"].shape[0]
    figures = json.loads((tmp_path / "l.json").read_text())
    assert len(figures["stored"]["temperature_1"]["by_depth"]) == 4 and figures["draft_step_cost"] < rows[0]["draft_step_cost"] + 0.2
    card = (tmp_path / "states" / "README.md").read_text()
    assert f"after layers 1, {config.exit_layer}" in card and "--exit-layer 1+last" in card
    for wrong in ("first", "2+1", "a+last"):
        status, said = run("--out", tmp_path / "none", "--exit-layer", wrong, "--steps", 1)
        assert status == 2 and "an exit layer" in said
    for name in ("t", "s"):
        train_plot.plot(json.loads((tmp_path / f"{name}.json").read_text()), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_training_goes_on_from_a_draft_head_and_is_measured_on_other_messages(target, sets, tmp_path):
    """The head's weights are where the training starts, with another vocabulary where its head is the target's; other shapes are refused."""
    options = replace(OPTIONS, steps=20)
    first = DraftHeadTraining(target, teacher_of(target), sets, CHAT.special, Architecture.parse("2,1,32,tied"), options)
    assert first.run(lambda line: None)
    first.save(tmp_path / "head", "tiny", 16, first.figures())
    drawn = SelfGenerationOptions(rows=24, context=64, temperatures=(0.8, 1.0), seed=1)
    given, other = [[8, 9, 10], [11, 12], [13, 14, 15]], [[20, 21], [22, 23, 24]]
    with pytest.raises(InvalidOption, match="both given and of the other kinds"):
        draw_sets(target, CHAT, drawn, given=given, other=[[11, 12]], held_out=4, tokens=1, seconds=None, log=lambda line: None)
    lines: list[str] = []
    more = draw_sets(target, CHAT, drawn, given=given, other=other, held_out=8, tokens=24 * 128, seconds=None, log=lines.append)
    assert more.given is not None and more.other is not None and sum("2 other messages" in line for line in lines) == 2
    begins = {tuple(docs.document(i)[3 : docs.answers[i] - 2].tolist()) for docs in more.other for i in range(len(docs))}
    assert begins == {(20, 21), (22, 23, 24)}, "every conversation begins with one of them"
    more.save(tmp_path / "data")
    loaded = TrainingSets.load(tmp_path / "data")
    assert loaded is not None and loaded.other is not None and loaded.other[1].digest == more.other[1].digest
    replace(more, other=None).save(tmp_path / "data")
    assert (found := TrainingSets.load(tmp_path / "data")) is not None and found.other is None and found.given is not None
    second = DraftHeadTraining(target, teacher_of(target), more, CHAT.special, Architecture.parse("2,1,24,tied"), options)
    fresh = second.all_measured()
    start = second.start_from(tmp_path / "head")
    assert set(start) == {f"{kind}{group}" for kind in ("", "given_", "other_") for group in ("temperature_1", "greedy")}
    assert start["temperature_1"]["acceptance"] > fresh["temperature_1"]["acceptance"] + 0.01
    assert start == second.all_measured(), "both the live and the averaged weights"
    figures = second.save(tmp_path / "second", "tiny", 16, second.figures())
    card = model_card("tiny", "Apache-2.0", "the command", figures | {"start": start})
    assert "kinds that are never trained on" in card and f"{figures['stored']['other_greedy']['agreement']:.3f}" in card
    assert f"{start['other_temperature_1']['acceptance']:.3f} on answers to messages of other kinds" in card
    assert "Begun with" not in model_card("tiny", "Apache-2.0", "the command", figures)
    assert all(torch.equal(a, b) for a, b in zip(second.trainer.student.parameters(), second.trainer.averaged.parameters(), strict=True))
    for other_shape in ("1,1,24,tied", "2,2,24,tied", "2,1,24,own"):
        training = DraftHeadTraining(target, teacher_of(target), more, CHAT.special, Architecture.parse(other_shape), options)
        with pytest.raises(InvalidOption, match="the draft head in"):
            training.start_from(tmp_path / "head")
