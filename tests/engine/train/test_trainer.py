"""Distilling a draft head: losses and gradients against plain formulas, learning, resuming, and the block replay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from draft.errors import CheckpointMismatch, ExitLayerError, TrainingDataError, TrainingError
from engine.model.config import LayerShape
from engine.model.layers import LayerWeights
from engine.train.documents import TokenDocuments, coverage, epoch_order, make_batch, reduced_vocabulary
from engine.train.loss import TeacherHead, distil, score
from engine.train.measure import measure, replay
from engine.train.model import Student, Teacher
from engine.train.trainer import Trainer, TrainOptions

V, E, D, INNER = 40, 32, 8, 48
SHAPE = LayerShape(num_heads=4, num_kv_heads=2, head_dim=D, eps=1e-5, scale=D**-0.5)


def random_layer(generator: torch.Generator, scale: float = 0.2) -> LayerWeights:
    """Random tensors of one layer."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    input_norm, post_norm = 1 + normal(E), 1 + normal(E)
    qkv, o = normal((4 + 2 * 2) * D, E), normal(E, 4 * D)
    qkv_bias, qk_norm = normal((4 + 2 * 2) * D), 1 + normal(2, D)
    return LayerWeights(input_norm, qkv, qkv_bias, qk_norm, o, None, post_norm, normal(2 * INNER, E), normal(E, INNER))


def angles(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    angle = torch.arange(length)[:, None] * 0.3 ** torch.arange(D // 2)
    return [(angle.cos(), angle.sin())]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(generator) for _ in range(4)]
    embed = torch.randn(V, E, generator=generator)
    return Teacher(embed, layers, torch.ones(E), embed * 0.6, [SHAPE] * 4, angles)


@pytest.fixture(scope="module")
def documents(teacher: Teacher) -> TokenDocuments:
    """Samples of the teacher at temperature 1: what it is trained on in earnest."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (96, 1), generator=generator)
    for _ in range(23):
        _, final = teacher.run(ids, 2)
        ids = torch.cat([ids, torch.multinomial((final[:, -1] @ teacher.head.T).softmax(-1), 1, generator=generator)], 1)
    return TokenDocuments.of([row[: 12 + i % 12] for i, row in enumerate(ids.tolist())], [1] * 96, [3] * 96, {"seed": 1})


OPTIONS = TrainOptions(2, 1, steps=40, batch_tokens=512, learning_rate=3e-3, warmup_steps=5, chunk=100, averaging=0.9)


def test_student_starts_as_the_teachers_last_layers(teacher: Teacher):
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(2))
    at_exit, final = teacher.run(ids, 2)
    student = Student(teacher, 2, torch.arange(V), own_head=True)
    # the early exit's layers and the student's are all of the teacher: two implementations, one result
    assert torch.allclose(student(at_exit, angles(9)), final, atol=1e-4)
    first, _ = teacher.run(ids[:, :5], 2)
    assert torch.allclose(first, at_exit[:, :5], atol=1e-5)  # causal


def test_tensors_round_trip_under_hugging_face_names(teacher: Teacher):
    student = Student(teacher, 2, torch.arange(0, V, 2), own_head=True)
    named = student.tensors()
    assert named["model.layers.1.self_attn.k_proj.weight"].shape == (2 * D, E) and named["lm_head.weight"].shape == (V // 2, E)
    other = Student(teacher, 2, torch.arange(0, V, 2), own_head=True)
    other.load_tensors({name: torch.full_like(tensor, 0.5) for name, tensor in named.items()})
    assert all(bool((p == 0.5).all()) for p in other.parameters())


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_autograd(mix: float):
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([1, 4, 5, 17, 30, 31])
    head = torch.randn(len(ids), E, generator=generator, dtype=torch.float64) * 0.4
    wide = torch.randn(V, E, generator=generator, dtype=torch.float64) * 0.4
    states, final = (torch.randn(11, E, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = TeacherHead.of(wide, ids)
    sums, gradients = distil(states, head, final, teacher, mix, head_gradient=True, chunk=4)
    s, h = states.clone().requires_grad_(), head.clone().requires_grad_()
    p, log_q = (final @ wide.T).softmax(-1)[:, ids], (s @ h.T).log_softmax(-1)
    divergence, overlap = (p * (p.log() - log_q)).sum(-1), torch.minimum(p, log_q.exp()).sum(-1)
    ((1 - mix) * divergence + mix * (1 - overlap)).mean().backward()
    assert torch.allclose(gradients.states, s.grad, atol=1e-6) and torch.allclose(gradients.head.double(), h.grad, atol=1e-6)
    expected = torch.stack([overlap.sum(), divergence.sum(), p.sum()]).float()
    assert torch.allclose(torch.stack([sums.accepted, sums.divergence, sums.covered]), expected, atol=1e-4)
    best = (final @ wide.T).argmax(-1)
    assert int(sums.agreed) == int((ids[log_q.argmax(-1)] == best).sum())
    labels = torch.randint(V, (11,), generator=generator)
    scores = score(states, head, final, teacher, labels, chunk=5)
    q_full = torch.zeros(11, V, dtype=torch.float64)
    q_full[:, ids] = log_q.detach().exp()
    p_full = (final @ wide.T).softmax(-1)
    kept = (q_full / p_full).gather(1, labels[:, None])[:, 0].clamp_max(1)
    assert torch.allclose(scores.kept.double(), kept, atol=1e-5) and torch.allclose(scores.accepted.sum(), sums.accepted, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_acceptance_rises_with_training(teacher: Teacher, documents: TokenDocuments, optimizer: str):
    train, held = documents.split(16, seed=0)
    ids = reduced_vocabulary(train, V, 32, always=[0])
    trainer = Trainer(teacher, ids, train, replace(OPTIONS, steps=150, optimizer=optimizer))
    before = measure(teacher, trainer.averaged, trainer.teacher_head, 2, held, greedy=False)
    reports = []
    assert trainer.run(report=reports.append, report_every=30)
    after = measure(teacher, trainer.averaged, trainer.teacher_head, 2, held, greedy=False)
    assert after.acceptance > before.acceptance + 0.1 and after.tokens_per_step > before.tokens_per_step
    assert after.divergence < before.divergence and after.acceptance <= after.covered
    assert [r.step for r in reports] == [30, 60, 90, 120, 150] and reports[0].mix == 0 and reports[-1].mix == 1
    assert trainer.student.head.shape == (32, E)


def test_a_tied_head_stays_the_targets(teacher: Teacher, documents: TokenDocuments):
    ids = reduced_vocabulary(documents, V, 20, always=[])
    trainer = Trainer(teacher, ids, documents, replace(OPTIONS, head="tied", steps=3))
    trainer.run()
    assert torch.equal(trainer.student.head, teacher.head[ids]) and "lm_head.weight" not in trainer.averaged.tensors()
    assert not torch.equal(trainer.student.norm, teacher.norm)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_changes_no_bit_and_seeds_decide(teacher: Teacher, documents: TokenDocuments, tmp_path, optimizer: str):
    ids = reduced_vocabulary(documents, V, 24, always=[])
    options = replace(OPTIONS, optimizer=optimizer)
    straight = Trainer(teacher, ids, documents, options)
    straight.run()
    first = Trainer(teacher, ids, documents, options)
    assert not first.run(until=lambda: first.step == 23)
    first.save(tmp_path / "c.pt", {"curve": [1, 2]})
    second = Trainer(teacher, ids, documents, options)
    assert second.restore(tmp_path / "c.pt") == {"curve": [1, 2]} and second.step == 23
    second.run()
    for one, other in ((straight.student, second.student), (straight.averaged, second.averaged)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    shuffled = Trainer(teacher, ids, documents, replace(options, seed=1))
    shuffled.run()
    assert not torch.equal(shuffled.student.norm, straight.student.norm)
    with pytest.raises(CheckpointMismatch, match="seed"):
        shuffled.restore(tmp_path / "c.pt")
    with pytest.raises(CheckpointMismatch, match="other data"):
        Trainer(teacher, ids, documents.take(np.arange(50)), options).restore(tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointMismatch, match="no checkpoint"):
        second.restore(tmp_path / "c.pt")


def test_a_training_by_the_clock_ends_in_time(teacher: Teacher, documents: TokenDocuments):
    trainer = Trainer(teacher, reduced_vocabulary(documents, V, 24, always=[]), documents, replace(OPTIONS, steps=None, seconds=0.5))
    assert trainer.run() and 0.5 <= trainer.seconds < 5 and trainer.schedule()[0] < 0.03 * OPTIONS.learning_rate


def test_options_are_checked(teacher: Teacher, documents: TokenDocuments):
    ids = torch.arange(V)
    with pytest.raises(ExitLayerError):
        Trainer(teacher, ids, documents, replace(OPTIONS, exit_layer=4))
    with pytest.raises(TrainingError, match="end"):
        Trainer(teacher, ids, documents, replace(OPTIONS, seconds=3.0))
    with pytest.raises(TrainingError, match="head"):
        Trainer(teacher, ids, documents, replace(OPTIONS, head="free"))


def test_reduced_vocabulary_keeps_the_frequent_and_the_special():
    docs = TokenDocuments.of([[7, 7, 7, 3], [3, 9, 7]], [0, 0], [0, 0], {})
    ids = reduced_vocabulary(docs, 12, 3, always=[11])
    assert ids.tolist() == [3, 7, 11] and coverage(docs, ids) == pytest.approx(6 / 7)
    assert reduced_vocabulary(docs, 12, 5, always=[]).tolist() == [0, 1, 3, 7, 9]  # ties: the lower id
    with pytest.raises(TrainingDataError):
        reduced_vocabulary(docs, 12, 13, always=[])


def test_batches_hold_every_document_once_and_point_at_its_own_text(documents: TokenDocuments):
    order = epoch_order(documents, 128, seed=4, epoch=0)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(documents)))
    assert [b.tolist() for b in epoch_order(documents, 128, 4, 0)] == [b.tolist() for b in order]
    assert [b.tolist() for b in epoch_order(documents, 128, 4, 1)] != [b.tolist() for b in order]
    batch = make_batch(documents, np.array([5, 0]), torch.device("cpu"))
    first, second = documents.document(5).tolist(), documents.document(0).tolist()
    assert batch.token_ids.shape == (2, 64) and batch.token_ids[0, : len(first)].tolist() == first
    assert batch.labels.tolist() == first[1:] + second[1:]
    assert torch.equal(batch.token_ids.flatten()[batch.positions + 1], batch.labels)
    assert batch.answer.tolist() == [i >= 3 for i in range(1, len(first))] + [i >= 3 for i in range(1, len(second))]
    answers = make_batch(documents, np.array([5, 0]), torch.device("cpu"), answers_only=True)
    assert answers.answer.all() and torch.equal(answers.labels, batch.labels[batch.answer])
    assert torch.equal(answers.positions, batch.positions[batch.answer])
    without = replace(documents, answers=documents.lengths.astype(np.int32))
    assert torch.equal(make_batch(without, np.array([5, 0]), torch.device("cpu"), answers_only=True).labels, batch.labels)


def test_documents_survive_the_disk(documents: TokenDocuments, tmp_path):
    documents.save(tmp_path / "d.npz")
    loaded = TokenDocuments.load(tmp_path / "d.npz")
    assert loaded.digest == documents.digest and loaded.facts == {"seed": 1} and loaded.tokens.dtype == np.uint16
    (tmp_path / "d.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-200])
    with pytest.raises(TrainingDataError, match="training documents"):
        TokenDocuments.load(tmp_path / "d.npz")
    with pytest.raises(TrainingDataError, match="held out"):
        documents.split(96, 0)


def test_replayed_blocks_are_counted_as_decoding_counts_them():
    # certain tokens: three accepted, one refused, then two accepted and a refusal at the third place
    line = np.array([1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0], float)
    per_step, places = replay([line], 4)
    # blocks: 1110 -> 4 tokens; 110 -> 3; 1111 (+1) -> 5; then 0 at index 12 lies in an unfinished block
    assert per_step == pytest.approx(4.0) and places == [1.0, 1.0, pytest.approx(2 / 3), 0.5]
    chance = 0.6
    per_step, places = replay([np.full(4000, chance)] * 10, 4)
    assert per_step == pytest.approx(sum(chance**i for i in range(5)), rel=0.02) and max(abs(p - chance) for p in places) < 0.02


@torch.no_grad()
def test_replayed_blocks_are_what_speculative_decoding_does(teacher: Teacher, documents: TokenDocuments):
    """Real rejection sampling with an untrained draft of two of the teacher's layers, token by token, against the replay of sampled text."""
    generator = torch.Generator().manual_seed(5)
    student = Student(teacher, 2, torch.arange(V), own_head=True)
    student.head.mul_(0.7)  # else it is the teacher itself
    steps = tokens = 0
    for first in range(60):
        ids = [first % V]
        while len(ids) < 20:
            drafts: list[int] = []
            for _ in range(3):
                at_exit, _ = teacher.run(torch.tensor([ids + drafts]), 2)
                q = (student(at_exit, angles(len(ids) + len(drafts)))[0] @ student.head.T).softmax(-1)
                drafts.append(int(torch.multinomial(q[-1], 1, generator=generator)))
            _, final = teacher.run(torch.tensor([ids + drafts]), 2)
            p = (final[0] @ teacher.head.T).softmax(-1)[len(ids) - 1 :]
            q = q[len(ids) - 1 :]
            kept = 0
            while kept < 3 and float(torch.rand((), generator=generator)) < float(p[kept, drafts[kept]] / q[kept, drafts[kept]]):
                kept += 1
            rest = p[kept] if kept == 3 else (p[kept] - q[kept]).clamp_min(0)
            ids = ids + drafts[:kept] + [int(torch.multinomial(rest, 1, generator=generator))]
            steps, tokens = steps + 1, tokens + kept + 1
    found = measure(teacher, student, TeacherHead.of(teacher.head, torch.arange(V)), 2, documents, greedy=False, proposals=3)
    assert 1.5 < tokens / steps < 3.5 and found.tokens_per_step == pytest.approx(tokens / steps, rel=0.08)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_on_a_gpu_follows_the_cpu(teacher: Teacher, documents: TokenDocuments, optimizer: str, tmp_path):
    def cuda(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to("cuda", torch.bfloat16)

    layers = [LayerWeights(*(cuda(part) for part in layer)) for layer in teacher.layers]
    there = Teacher(
        *(cuda(t) if isinstance(t, torch.Tensor) else layers for t in (teacher.embed, None, teacher.norm, teacher.head)),
        [SHAPE] * 4,
        lambda length: [tuple(part.cuda() for part in pair) for pair in angles(length)],
    )
    train, held = documents.split(16, seed=0)
    ids, options = reduced_vocabulary(train, V, 32, always=[0]), replace(OPTIONS, steps=100, optimizer=optimizer)
    found = []
    for model in (teacher, there):
        trainer = Trainer(model, ids, train, options)
        reports = []
        trainer.run(report=reports.append, report_every=20)
        trainer.save(tmp_path / "c.pt")
        again = Trainer(model, ids, train, options)
        again.restore(tmp_path / "c.pt")
        assert torch.equal(again.averaged.head, trainer.averaged.head)
        found.append(measure(model, trainer.averaged, trainer.teacher_head, 2, held, greedy=False))
    assert found[1].acceptance == pytest.approx(found[0].acceptance, abs=0.03) and found[1].covered == pytest.approx(
        found[0].covered, abs=0.01
    )
