"""A draft head on the target's last states: trained rows are the rows that drafting runs, and measured chances those that it meets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from draft.errors import ExitLayerError
from engine.model.config import LayerShape
from engine.model.layers import DIFFERENTIABLE, dense_attention, differentiable_rope, layer_forward
from engine.train.documents import TokenDocuments, epoch_order, make_batch, reduced_vocabulary
from engine.train.loss import TeacherHead, distil
from engine.train.measure import measure, replay
from engine.train.model import Teacher
from engine.train.state_model import StateStudent, student_of
from engine.train.trainer import Trainer, TrainOptions
from tests.engine.train.test_trainer import SHAPE, D, E, V, angles, random_layer

OPTIONS = TrainOptions(
    4, 1, steps=40, batch_tokens=512, learning_rate=3e-3, warmup_steps=5, chunk=100, averaging=0.9, state_layers=(2, 4), unroll=3
)


@pytest.fixture(scope="module")
def model() -> Teacher:
    """One whose next token depends on the last two or more, and is no repetition."""
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(generator) for _ in range(4)]
    embed, head = (torch.randn(V, E, generator=generator) for _ in range(2))
    return Teacher(embed, layers, torch.ones(E), head * 0.6, [SHAPE] * 4, angles)


@pytest.fixture(scope="module")
def texts(model: Teacher) -> TokenDocuments:
    """Its samples at temperature 1."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (256, 1), generator=generator)
    for _ in range(23):
        _, final = model.run(ids, 2)
        ids = torch.cat([ids, torch.multinomial((final[:, -1] @ model.head.T).softmax(-1), 1, generator=generator)], 1)
    return TokenDocuments.of([row[: 12 + i % 12] for i, row in enumerate(ids.tolist())], [1] * 256, [3] * 256, {"seed": 1})


def varied(student: StateStudent) -> StateStudent:
    """With joins and norms that are no plain copies."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for own in (student.state_norm, student.embed_norm, student.join, student.fuse):
            if own is not None:
                own.add_(torch.randn(own.shape, generator=generator) * 0.2)
    return student


def drafted_rows(student: StateStudent, model: Teacher, ids: torch.Tensor, start: int, depths: int) -> list[torch.Tensor]:
    """What the head multiplies for each draft of a block that begins after token `start`, drafts being the document's own tokens: row by row, as
    drafting runs, with plain causal attention over all rows so far."""
    taken, _ = model.run_taps(ids[None], student.state_layers)
    true = student.fused(taken)[0]
    before = torch.cat([torch.zeros(1, E), true[:start]])
    rows = student.joined(before, model.embed[ids[: start + 1]])
    out = []
    for depth in range(depths):
        stream, update = rows[None], None
        for layer, shape in zip(student.layers, student.shapes, strict=True):
            rope = differentiable_rope(*angles(len(rows))[0], shape.num_heads)
            attend = partial(dense_attention, shape=shape)
            found = layer_forward(layer.weights(torch.float32), stream, rope, attend, shape, DIFFERENTIABLE, update)
            stream, update = found.stream, found.update
        last = (stream + update)[0, -1:]
        out.append(DIFFERENTIABLE.rms_norm(last, student.norm, SHAPE.eps, None)[0][0])
        if start + depth + 1 < len(ids):
            rows = torch.cat([rows, student.joined(last, model.embed[ids[start + depth + 1]][None])])
    return out


@pytest.mark.parametrize("state_layers", [(4,), (1, 2, 4)])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@torch.no_grad()
def test_unrolled_rows_are_those_that_drafting_runs(model: Teacher, state_layers, window, softcap):
    ids = torch.randint(V, (2, 13), generator=torch.Generator().manual_seed(2))
    shape = LayerShape(num_heads=4, num_kv_heads=2, head_dim=D, eps=1e-5, scale=D**-0.5, window=window, softcap=softcap)
    student = varied(StateStudent(model, 2, torch.arange(V), own_head=True, state_layers=state_layers))
    student.shapes = [SHAPE, shape]
    found = student.at_depths(model, ids, model.run_taps(ids, student.state_layers), 4)
    _, final = model.run(ids, 2)
    assert torch.equal(found.final, final)
    for row in range(2):
        for start in (0, 1, 4, 9):
            expected = drafted_rows(student, model, ids[row], start, 4)
            for depth in range(4):
                assert torch.allclose(found.drafts[depth][row, start], expected[depth], atol=2e-4), (row, start, depth)
                if start + depth < 13:
                    states, reached = found.rows(depth, torch.tensor([row * 13 + start + depth]))
                    assert torch.equal(states[0], found.drafts[depth][row, start]) and bool(reached)
    assert not bool(found.rows(2, torch.tensor([14]))[1])  # a block of two drafts that ended there would have begun before the document


def test_gradients_of_several_depths_add_up():
    generator = torch.Generator().manual_seed(4)
    head, wide = torch.randn(6, E, generator=generator), torch.randn(V, E, generator=generator)
    states, final = torch.randn(3, 11, E, generator=generator), torch.randn(11, E, generator=generator)
    weights = torch.rand(3, 11, generator=generator)
    teacher = TeacherHead.of(wide, torch.tensor([1, 4, 5, 17, 30, 31]))
    sums, deep = distil(states, head, final, teacher, 0.3, head_gradient=True, chunk=4, weights=weights)
    plain = [distil(own, head, final, teacher, 0.3, head_gradient=True, chunk=5) for own in states]
    assert torch.allclose(torch.stack(sums), torch.stack(plain[0][0]), rtol=1e-5)
    for own, weight, (_, alone) in zip(deep.states, weights, plain, strict=True):
        assert torch.allclose(own, alone.states * weight[:, None], atol=1e-6)
    ones = distil(states, head, final, teacher, 0.3, head_gradient=True, chunk=4)[1]
    assert ones.head is not None and torch.allclose(ones.head, sum(alone.head for _, alone in plain), atol=1e-6)


def test_acceptance_rises_at_every_place_of_a_block(model: Teacher, texts: TokenDocuments):
    train, held = texts.split(16, seed=0)
    ids = reduced_vocabulary(train, V, 32, always=[0])
    trainer = Trainer(model, ids, train, replace(OPTIONS, steps=200))

    def figures():
        return measure(model, trainer.averaged, trainer.teacher_head, 4, held, greedy=False)

    before = figures()
    assert trainer.run() and isinstance(trainer.averaged, StateStudent)
    after = figures()
    assert after.tokens_per_step > before.tokens_per_step and after.acceptance == pytest.approx(after.by_depth[0], abs=1e-6)
    assert len(after.by_depth) == 4 and all(late > early + 0.05 for early, late in zip(before.by_depth, after.by_depth, strict=True))
    assert "by_depth" in after.as_dict() and not torch.equal(trainer.student.join, trainer.averaged.join)


def test_unrolled_training_drafts_better_at_later_places(model: Teacher, texts: TokenDocuments):
    train, held = texts.split(16, seed=0)
    ids = reduced_vocabulary(train, V, 32, always=[0])
    found = []
    for unroll in (1, 3):
        trainer = Trainer(model, ids, train, replace(OPTIONS, steps=200, unroll=unroll))
        trainer.run()
        found.append(measure(model, trainer.averaged, trainer.teacher_head, 4, held, greedy=False).by_depth)
    assert found[1][1] > found[0][1] + 0.01 and found[1][2] > found[0][2] + 0.01


def test_a_resumed_training_is_the_same(model: Teacher, texts: TokenDocuments, tmp_path):
    ids = reduced_vocabulary(texts, V, 32, always=[0])
    straight, first, second = (Trainer(model, ids, texts, OPTIONS) for _ in range(3))
    straight.run()
    first.run(until=lambda: first.step == 23)
    first.save(tmp_path / "c.pt")
    second.restore(tmp_path / "c.pt")
    second.run()
    for name, tensor in straight.averaged.tensors().items():
        assert torch.equal(tensor, second.averaged.tensors()[name]), name


def test_rows_begin_as_large_as_the_stream_that_the_copied_layers_know(model: Teacher, texts: TokenDocuments):
    trainer = Trainer(model, torch.arange(V), texts, OPTIONS)
    batch = make_batch(texts, epoch_order(texts, OPTIONS.batch_tokens, OPTIONS.seed, 0)[0], torch.device("cpu"))
    stream, _ = model.run(batch.token_ids, 3)  # before the last layer
    sizes = stream.flatten(0, 1)[batch.positions].square().mean(-1).sqrt()
    assert isinstance(trainer.student, StateStudent) and isinstance(trainer.averaged, StateStudent)
    for student in (trainer.student, trainer.averaged):
        assert torch.allclose(student.state_norm, sizes.median().expand(E))
        assert torch.equal(student.state_norm, student.embed_norm)
        assert torch.equal(student.join.detach(), torch.cat([torch.eye(E), 0.1 * torch.eye(E)], 1))
    states, embeddings = torch.randn(2, 1, 50, E, generator=torch.Generator().manual_seed(8)).unbind()
    rows = trainer.student.joined(states, embeddings)[0].detach().square().mean(-1).sqrt()
    assert 0.7 < float(rows.median()) / float(sizes.median()) < 1.4


def test_wrong_layers_are_refused(model: Teacher, texts: TokenDocuments):
    ids = torch.arange(V)
    for wrong in ({"state_layers": (2,), "exit_layer": 2}, {"state_layers": (2, 4), "exit_layer": 2}, {"state_layers": (4, 2)}):
        with pytest.raises(ExitLayerError):
            Trainer(model, ids, texts, replace(OPTIONS, **wrong))
    with pytest.raises(ExitLayerError):
        Trainer(model, ids, texts, replace(OPTIONS, state_layers=()))
    assert isinstance(student_of(model, 1, ids, own_head=True, state_layers=(4,)), StateStudent)


def test_chances_by_place_are_replayed_at_their_places():
    line = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8]).numpy()
    # blocks begin at 0 (two drafts kept), 3 (none), 4 (one): the next would not have three places left
    steps = [3, 1, 2]
    per_step, by_position = replay([line], 3)
    assert per_step == sum(steps) / len(steps) and by_position == [2 / 3, 0.5, 0.0]
