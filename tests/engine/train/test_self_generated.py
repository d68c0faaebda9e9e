"""Conversations drawn from a model: the distribution is the engine's, turns follow the template, rows start anew, seeds decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.text.chat_opening import ChatOpening, chat_opening
from engine.train import self_generated as self_generation
from engine.train.self_generated import SelfGenerationOptions, assemble, draw

CHAT = ChatOpening(opening=(3, 4, 6), closing=(2, 7, 8), ends=(2, 5))


def test_turns_follow_the_template_and_rows_start_anew(random_decoder):
    decoder = random_decoder(1, scale=0.1, vocab_size=12)
    docs = draw(decoder, CHAT, SelfGenerationOptions(rows=6, context=64, temperatures=(1.0, 1.0)), tokens=6 * 128)
    assert len(docs) > 12 and docs.facts["drawn_tokens"] == 6 * 128
    whole = 0
    for i in range(len(docs)):
        tokens, answer = docs.document(i).tolist(), int(docs.answers[i])
        assert tokens[:3] == [3, 4, 6] and docs.starts[i] == 3 and len(tokens) <= 64
        if answer == len(tokens):
            continue  # cut off in the question, or right behind it
        question, closing = tokens[3 : answer - 3], tokens[answer - 3 : answer]
        assert closing == [2, 7, 8] and not {2, 5} & set(question)
        # an answer's end is kept, and ends the conversation
        assert not {2, 5} & set(tokens[answer:-1])
        whole += tokens[-1] in (2, 5)
    assert whole > 6


@torch.no_grad()
def test_the_distribution_is_the_engines(random_decoder, monkeypatch):
    monkeypatch.setattr(self_generation, "ROUND_STEPS", 3)
    decoder = random_decoder(2, vocab_size=12)
    chat = ChatOpening((3, 4), (10, 7), (9,))  # this model often says 10 at once, which ends the question here, and hardly ever 9
    torch.manual_seed(0)
    sampler = self_generation.SelfGenerationSampler(
        decoder, chat, SelfGenerationOptions(rows=2000, context=64, temperatures=(0.7, 0.7), answer_temperature=1.3)
    )
    said, flags = sampler.round()
    empty = said[0] == 10
    for drawn, before, temperature in (
        (said[0], [3, 4], 0.7),
        (said[1][said[0] == 5], [3, 4, 5], 0.7),
        (said[2][empty], [3, 4, 10, 7], 1.3),
    ):
        logits = forward_reserved(decoder, torch.tensor(before), [decoder.new_pool(1).new_sequence()], [len(before)], logits="last").logits[
            0
        ]
        expected = (logits / temperature).softmax(-1).numpy().astype(float)
        assert len(drawn) > 300
        assert stats.chisquare(np.bincount(drawn, minlength=12), len(drawn) * expected / expected.sum()).pvalue > 1e-3
    assert (said[1][empty] == 7).all() and (flags[2][empty] & 1).all() and not flags[:2].any()


def test_greedy_answers_are_the_engines(random_decoder):
    decoder = random_decoder(3, scale=0.1, vocab_size=12)
    docs = draw(decoder, CHAT, SelfGenerationOptions(rows=4, context=64, answer_temperature=0.0), tokens=4 * 128)
    checked = 0
    for i in range(len(docs)):
        tokens, answer = docs.document(i).tolist(), int(docs.answers[i])
        logits = forward_reserved(decoder, torch.tensor(tokens), [decoder.new_pool(8).new_sequence()], [len(tokens)]).logits
        assert logits.argmax(-1)[answer - 1 : -1].tolist() == tokens[answer:]
        checked += len(tokens) - answer
    assert checked > 20


def test_the_same_seed_draws_the_same(random_decoder):
    decoder = random_decoder(1, scale=0.1, vocab_size=12)
    state = torch.get_rng_state()
    one, two, other = (draw(decoder, CHAT, SelfGenerationOptions(rows=3, context=64, seed=seed), tokens=300).digest for seed in (5, 5, 6))
    assert one == two != other and torch.equal(state, torch.get_rng_state())


def test_conversations_begin_with_given_messages(random_decoder):
    decoder = random_decoder(1, scale=0.1, vocab_size=12)
    given = [[9, 10], [11], [5, 2, 9]]  # ends within a message do not end it

    def begun(share, chat=CHAT):
        docs = draw(decoder, chat, SelfGenerationOptions(rows=24, context=64, given_share=share), given=given, tokens=24 * 160)
        scripts = [(*message, *chat.closing) for message in given]
        found = []
        for i in range(len(docs)):
            rest, answer = tuple(docs.document(i).tolist()[3:]), int(docs.answers[i]) - 3
            found.append(next((n for n, script in enumerate(scripts) if rest[: len(script)] == script and answer == len(script)), None))
            assert found[-1] is not None or share < 1 or len(rest) < max(map(len, scripts))
        return found

    counts = np.bincount([n for n in begun(1.0) if n is not None], minlength=3)
    assert counts.sum() > 60 and counts.min() > 0.15 * counts.sum()
    some = begun(0.3)
    assert 0.1 < sum(n is not None for n in some) / len(some) < 0.6
    assert 2 not in begun(0.0), "the model itself never writes an end into a message"
    assert {0, 1, 2} <= set(begun(1.0, ChatOpening((3, 4, 6), (7,), (2, 5)))), "a closing of one token"
    long = draw(decoder, CHAT, SelfGenerationOptions(rows=2, context=64, given_share=1.0), given=[[9] * 99, [10]], tokens=2 * 256)
    assert {int(a) for a in long.answers} <= {7, 32, *long.lengths.tolist()}, "half of the context is the answer's"


def test_a_model_without_a_template_writes_text(random_decoder):
    decoder = random_decoder(4, scale=0.1, vocab_size=12)
    docs = draw(decoder, ChatOpening((1,), (), (5,)), SelfGenerationOptions(rows=3, context=64), tokens=200)
    assert (docs.answers == 1).all() and all(docs.document(i)[0] == 1 for i in range(len(docs)))


def test_unfinished_pieces_are_kept_when_long_enough():
    said = np.full((40, 2), 9, np.int32)
    flags = np.zeros((40, 2), np.uint8)
    said[29, 0], flags[25:30, 0], flags[29, 0] = 2, 1, 3
    docs = assemble(CHAT, said, flags, {})
    # row 0: a whole one of 30, then 10 tokens too few; row 1: 40 without an end
    assert docs.lengths.tolist() == [33, 43] and docs.answers.tolist() == [28, 43]


class _Tokenizer:
    """Characters as tokens, with a template."""

    chat_template: str | None = "given"
    bos_token_id, eos_token_id = None, 5

    def __init__(self, text: str) -> None:
        self.text = text

    def apply_chat_template(self, messages, **_options):
        return self.text.replace("MESSAGE", messages[0]["content"])

    def __call__(self, text, **_options):
        return {"input_ids": [ord(c) for c in text]}


def test_the_opening_comes_from_the_template():
    chat = chat_opening(_Tokenizer("<uMESSAGE>a"), [9])
    assert (chat.opening, chat.closing, chat.ends) == ((60, 117), (62, 97), (9,)) and chat.special == (9, 60, 62, 97, 117)
    with pytest.raises(InvalidOption, match="leaves out"):
        chat_opening(_Tokenizer("nothing"), [9])
    plain = _Tokenizer("")
    plain.chat_template = None
    assert chat_opening(plain, [9]).opening == (5,)
    with pytest.raises(InvalidOption, match="before a text"):
        ChatOpening((), (), ())


def test_options_are_checked(random_decoder):
    decoder = random_decoder(1, vocab_size=12)
    with pytest.raises(InvalidOption, match="end"):
        draw(decoder, CHAT, SelfGenerationOptions())
    with pytest.raises(InvalidOption, match="temperatures"):
        draw(decoder, CHAT, SelfGenerationOptions(temperatures=(1.0, 0.5)), tokens=1)
    with pytest.raises(InvalidOption, match="share"):
        draw(decoder, CHAT, SelfGenerationOptions(given_share=1.5), tokens=1)
    with pytest.raises(InvalidOption, match="template"):
        draw(decoder, ChatOpening((1,), (), (5,)), SelfGenerationOptions(context=64), given=[[1]], tokens=1)
    with pytest.raises(InvalidOption, match="room"):
        draw(decoder, CHAT, SelfGenerationOptions(context=63), tokens=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_draws_what_the_model_says(random_decoder):
    decoder = random_decoder(2, vocab_size=64, hidden_size=128, head_dim=32, num_attention_heads=4).to("cuda", torch.bfloat16)
    options = SelfGenerationOptions(rows=512, context=64, answer_temperature=0.0)
    docs = draw(decoder, CHAT, options, tokens=512 * 256)
    assert docs.facts["cuda_graph"] and docs.digest == draw(decoder, CHAT, options, tokens=512 * 256).digest
    torch.manual_seed(0)
    sampler = self_generation.SelfGenerationSampler(decoder, CHAT, SelfGenerationOptions(rows=4000, context=64, temperatures=(0.7, 0.7)))
    with torch.no_grad():
        said, _ = sampler.round()  # its first step is run, the others are replayed
    for drawn, before in ((said[0], [3, 4, 6]), (said[1][said[0] == said[0][0]], [3, 4, 6, int(said[0][0])])):
        token_ids = torch.tensor(before, device="cuda")
        logits = forward_reserved(decoder, token_ids, [decoder.new_pool(1).new_sequence()], [len(before)], logits="last").logits[0]
        expected = (logits / 0.7).softmax(-1).double().cpu().numpy()
        assert np.abs(np.bincount(drawn, minlength=64) / len(drawn) - expected).max() < 3 / len(drawn) ** 0.5
