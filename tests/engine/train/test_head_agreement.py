"""The layers that are trained and the layers that draft are the same function."""

from __future__ import annotations

import pytest
import torch

from draft.head_file import DraftHeadConfig, target_digest, write_draft_head
from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from engine.train.model import Student
from engine.train.state_model import StateStudent
from engine.train.training import teacher_of

EXIT_LAYER, LENGTH = 1, 19


@pytest.mark.parametrize("head", ["own", "tied"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_a_student_drafts_what_it_learnt(tiny_model, family, head, tmp_path):
    target = tiny_model(family).decoder
    teacher = teacher_of(target)
    ids, tokens = torch.arange(2, 90, 3), torch.arange(LENGTH) * 4
    student = Student(teacher, 2, ids, own_head=head == "own")
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    config = DraftHeadConfig(family, target_digest(target.config), EXIT_LAYER, 2, len(ids), head)  # type: ignore[arg-type]
    write_draft_head(tmp_path, config, {"token_ids": ids, **student.tensors()})
    trained = load_draft_head(tmp_path, target)
    stored = {name: tensor for name, tensor in trained.head_layers.hf_tensors().items() if name in student.tensors()}
    student.load_tensors(stored)

    states, _ = teacher.run(tokens[None], EXIT_LAYER)
    wanted = student(states, teacher.angles(LENGTH))[0] @ student.head.detach().T
    sequence = target.new_pool(1).new_sequence()
    tap = forward_reserved(target, tokens, [sequence], [LENGTH], taps=(EXIT_LAYER,), logits="none").taps[EXIT_LAYER]
    assert torch.allclose(tap, states[0], atol=1e-4)
    own = trained.head_layers.new_pool(1).new_sequence()
    parts = []
    for start, end in ((0, 7), (7, 8), (8, LENGTH)):
        parts.append(forward_reserved(trained.head_layers, None, [own], [end - start], hidden=tap[start:end]).logits)
        own.advance(end - start)
    assert torch.allclose(torch.cat(parts), wanted, atol=2e-3)
    assert wanted.std() > 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("lower", [(), (1,)], ids=["last state", "two states"])
def test_a_student_on_last_states_drafts_what_it_learnt(tiny_model, family, lower, tmp_path):
    """A block of three drafts in the engine, all of whose tokens are the text's own, against the student's chances at these places."""
    target = tiny_model(family).decoder
    depth, ids = target.config.num_layers, torch.arange(2, 90, 3)
    teacher = teacher_of(target)
    student = StateStudent(teacher, 2, ids, own_head=True, state_layers=(*lower, depth))
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    digest = target_digest(target.config)
    config = DraftHeadConfig(family, digest, depth, 2, len(ids), "own", 16, state_layers=student.state_layers)
    rounded = {name: tensor.bfloat16().float() if tensor.dim() > 1 else tensor for name, tensor in student.tensors().items()}
    student.load_tensors(rounded)
    write_draft_head(tmp_path, config, {"token_ids": ids, **rounded})
    engine = Engine(target, draft=load_draft_head(tmp_path, target), page_size=16, prefill_chunk=8)
    conversation, drawn = engine.core.open_sequence_state(), []

    class Told:
        """Draws the text's own tokens, and keeps the logits."""

        def draw(self, logits, rows, positions, *, token_ids=None):
            drawn.append(logits.clone())
            return torch.tensor([text[position] for position in positions]), [None] * len(rows)

    prompt = [int(t) for t in torch.arange(LENGTH) * 4 % 90]
    engine.core.run(conversation, prompt, SamplingParams(max_new_tokens=1, ignore_eos=True, draft_length=0))
    text = [*conversation.token_ids, 7, 33, 61, 12]
    state = conversation.draft_state
    state.own.reserve(LENGTH + 4)
    engine.core.drafter.propose([state], [text[LENGTH : LENGTH + 1]], [3], Told())
    ids = torch.tensor([text])
    found = student.at_depths(teacher, ids, teacher.run_taps(ids, student.taps(depth)), 3)
    for place, logits in enumerate(drawn):
        wanted = (found.drafts[place][0, LENGTH] @ student.head.T).detach()
        assert torch.allclose(logits[0], wanted, atol=2e-3 * float(wanted.abs().max())), place
    assert len(drawn) == 3 and float((drawn[0] - drawn[1]).abs().max()) > 0.1
