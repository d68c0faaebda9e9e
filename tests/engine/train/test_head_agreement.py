"""The layers that are trained and the layers that draft are the same function."""

from __future__ import annotations

import pytest
import torch

from draft.head_file import DraftHeadConfig, target_digest, write_draft_head
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.train.model import Student
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
    wanted = student(states, teacher.angles(LENGTH))[0] @ student.head.T
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
