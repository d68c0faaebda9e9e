"""Prefixes of another engine in our store, without that engine: its pages are those of a pool here, filled by the target's own forward pass."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from codec.errors import CorruptedCode
from codec.layouts import PagedKv
from codec.spec import NUM_SINKS
from engine.connectors.passes import CodedModel
from engine.connectors.prefixes import PrefixIndex, PrefixWorker, StoreOptions, sink_ids, sinks_from_bytes, sinks_to_bytes
from engine.errors import InvalidOption, PackMismatch
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams
from engine.sessions.kv_codec import session_codec
from engine.store.runs import PAGE_TOKENS, root_key

IDS = [(7 * n * n + 3 * n) % 250 for n in range(420)]
DRAFTS = ("draft", "head", "trunk", "none")


class OtherEngine:
    """Pages of a whole target: `compute` fills those of a text."""

    def __init__(self, target: Decoder) -> None:
        self.target, self.pool = target, target.new_pool(256, 16)
        self.pages = PagedKv.of_pool(self.pool.kv)

    def compute(self, token_ids) -> list[int]:
        sequence = self.pool.new_sequence(len(token_ids))
        with torch.inference_mode():
            self.target.forward(torch.tensor(token_ids), [sequence], [len(token_ids)], logits="none")
        return sequence.pages


@pytest.fixture(scope="module")
def target(chat_folders) -> Decoder:
    return Decoder.from_pretrained(chat_folders.target, dtype=torch.float32)


@pytest.fixture(scope="module")
def packs(chat_engine, tmp_path_factory):
    """`packs(draft)` -> the path of the tiny pair's codec parameters."""
    folder, made = tmp_path_factory.mktemp("packs"), {}

    def pack(draft: str) -> str:
        if draft not in made:
            made[draft] = str(folder / f"{draft}.safetensors")
            session_codec(chat_engine(draft).core, log=lambda _: None).pack.save(made[draft])
        return made[draft]

    return pack


@pytest.fixture
def open_worker(chat_folders, packs, tmp_path):
    """`open_worker(draft, **options)` -> a worker on the test's store; `said`: what they logged."""
    workers, said = [], []

    def make(draft: str = "none", **options) -> PrefixWorker:
        given = {"store": str(tmp_path / "store"), "draft": str(getattr(chat_folders, draft, draft)), "pack": packs(draft)}
        chosen = StoreOptions.from_mapping(given | {"quality": "near-lossless", "min_tokens": PAGE_TOKENS} | options)
        model = CodedModel.open(chat_folders.target, chosen.draft, chosen.pack)
        workers.append(PrefixWorker(PrefixIndex(chosen, model), dtype=torch.float32, device="cpu", log=said.append))
        return workers[-1]

    make.said = said
    yield make
    for worker in workers:
        worker.close()


def keep(worker: PrefixWorker, engine: OtherEngine, token_ids, name: str = "a", namespace: str = "default") -> None:
    pages = engine.compute(token_ids)
    worker.extend(name, namespace, token_ids)
    wanted = worker.wanted(name, len(token_ids))
    if wanted:
        worker.keep(name, engine.pages.read(pages, wanted.start * PAGE_TOKENS, wanted.stop * PAGE_TOKENS))
    if worker.lacks_sinks(name):
        worker.keep_sinks(name, engine.pages.read(pages, 0, NUM_SINKS))
    assert worker.wait(300)


def restore(worker: PrefixWorker, token_ids, end: int, start: int = 0, name: str = "b", namespace: str = "default") -> torch.Tensor:
    worker.extend(name, namespace, token_ids)
    found = worker.restore(name, start, end)
    if found is None:
        return torch.empty(0)
    assert found.start == start and found.num_layers == worker.token_shape[0]
    return torch.stack([found.layer(n) for n in range(found.num_layers)], 1)


def loss(kv: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of the variance that is lost."""
    return float((kv - truth).pow(2).sum() / (truth - truth.mean(0)).pow(2).sum())


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_one_keeps_another_restores(open_worker, target, draft: str) -> None:
    engine, first = OtherEngine(target), open_worker(draft)
    assert first.index.matched(IDS, "default", 0) == 0
    keep(first, engine, IDS)
    pages = len(IDS) // PAGE_TOKENS
    assert first.metrics.saved_tokens == pages * PAGE_TOKENS and first.metrics.saved_bytes > 0 and not open_worker.said
    second = open_worker(draft)
    assert second.index.matched(IDS, "default", 0) == pages * PAGE_TOKENS
    assert second.index.matched(IDS[:384], "default", 0) == 383 and second.index.matched(IDS, "default", 80) == 304
    truth = engine.pages.read(engine.compute(IDS), 0, 384)
    kv = restore(second, IDS, 384)
    m = second.first_layer
    assert torch.equal(kv[:NUM_SINKS, m:], truth[:NUM_SINKS, m:])
    if m:
        torch.testing.assert_close(kv[:, :m], truth[:, :m], rtol=1e-3, atol=1e-3)
    assert 0 < loss(kv[:, m:], truth[:, m:]) < 0.5
    # from the middle of a page, behind what the engine has already
    part = restore(second, IDS, 300, start=80, name="c")
    torch.testing.assert_close(part, kv[80:300], rtol=1e-3, atol=1e-3)
    assert second.metrics.restored_tokens == 384 + 220


@pytest.mark.parametrize("draft", ["draft", "head"])
def test_an_engine_of_ours_shares_the_store(open_worker, chat_engine, target, tmp_path, draft: str) -> None:
    """What our engine kept with references to other texts included."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    ours = chat_engine(draft, store=tmp_path / "store", quality="near-lossless", log=lambda _: None)
    try:
        keep(open_worker(draft), OtherEngine(target), IDS)
        assert ours.generate([IDS], params)[0].restored_tokens == 384
        other = [*IDS[:50], *IDS[100:]]
        ours.generate([other], params)
        ours.flush()
        worker = open_worker(draft)
        assert worker.index.matched(other, "default", 0) == 320  # it begins with the same sinks
        found = worker.index.store.lookup(root_key(worker.index.identity("default")), other, referring=True)
        assert found.borrowed and ours.prefix_cache.metrics.kept_referring
        truth = OtherEngine(target)
        pages, m = truth.compute(other), worker.first_layer
        kv = restore(worker, other, 320, start=64, name="referring")
        assert loss(kv[:, m:], truth.pages.read(pages, 64, 320)[:, m:]) < 0.5
        # a text that goes on behind a run that refers: stored anew with what it refers to, and the new page
        longer = [*other[:320], *range(100, 164)]
        keep(worker, truth, longer, name="longer")
        assert worker.metrics.saved_tokens == PAGE_TOKENS
        again = worker.index.store.lookup(root_key(worker.index.identity("default")), longer, referring=True)
        assert again.num_tokens == 384 and again.spans[:5] == found.spans[:5] and again.borrowed.keys() >= found.borrowed.keys()
        assert loss(restore(worker, longer, 320, start=64, name="again")[:, m:], truth.pages.read(pages, 64, 320)[:, m:]) < 0.5
        last = IDS[50:]
        ours.generate([last], params)
        ours.flush()
        assert worker.index.matched(last, "default", 0) == 0  # our engine keeps no sinks
        keep(worker, OtherEngine(target), last)
        assert worker.metrics.saved_tokens == PAGE_TOKENS and worker.index.matched(last, "default", 0) == 320
    finally:
        ours.close()


def test_a_text_that_grows_keeps_its_codes(open_worker, target) -> None:
    engine, worker = OtherEngine(target), open_worker("trunk")
    keep(worker, engine, IDS[:200], name="a")
    saved = worker.metrics.saved_tokens
    assert saved == 192
    keep(worker, engine, IDS[:200], name="again")
    assert worker.metrics.saved_tokens == saved
    keep(worker, engine, IDS, name="longer")
    assert worker.metrics.saved_tokens == 384
    worker.end("a")
    worker.end("again")
    worker.end("longer")
    assert all(sequence.num_free_pages for sequence in worker.passes._pools)


def test_a_text_that_comes_again_is_not_coded_again(open_worker, target) -> None:
    worker = open_worker("trunk")
    keep(worker, OtherEngine(target), IDS)
    worker.extend("again", "default", IDS)
    for computed in (200, 330, 420):  # step by step: the store is asked on
        assert not worker.wanted("again", computed)
    assert not worker.lacks_sinks("again")


def test_the_same_text_twice_in_the_queue_is_coded_once(open_worker, target) -> None:
    worker, engine = open_worker(), OtherEngine(target)
    pages = engine.compute(IDS)
    with worker._models:  # its thread cannot go on
        for name in ("a", "b"):
            worker.extend(name, "default", IDS)
            for page in worker.wanted(name, 256):
                worker.keep(name, engine.pages.read(pages, page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS))
    assert worker.wait(300) and worker.metrics.saved_tokens == 256
    for name in ("a", "b"):
        assert list(worker.wanted(name, len(IDS))) == [4, 5]


def test_what_was_restored_is_never_coded_again(open_worker, target) -> None:
    engine = OtherEngine(target)
    keep(open_worker(), engine, IDS)
    worker = open_worker()
    assert len(restore(worker, IDS, 320)) == 320
    worker.index.store.delete("default")  # evicted meanwhile
    assert list(worker.wanted("b", len(IDS))) == []


@pytest.mark.parametrize("draft", ["draft", "none"])
def test_the_same_text_after_another_beginning_takes_fewer_bytes(open_worker, target, draft: str) -> None:
    """It refers to what is stored, also where it grows; without that it is gone, and it is kept anew."""
    worker, engine, other = open_worker(draft), OtherEngine(target), [*IDS[:50], *IDS[100:]]
    keep(worker, engine, IDS)
    alone = worker.metrics.saved_bytes / worker.metrics.saved_tokens
    before = worker.metrics.saved_bytes
    keep(worker, engine, other[:200], name="other")
    keep(worker, engine, other, name="grown")
    assert worker.metrics.saved_tokens == 384 + 320 and (worker.metrics.saved_bytes - before) / 320 < 0.9 * alone
    root, m = root_key(worker.index.identity("default")), worker.first_layer
    found = worker.index.store.lookup(root, other, referring=True)
    assert found.num_tokens == 320 and sorted(found.borrowed) == [0, 4] and all(any(lent.needs) for lent in found.borrowed.values())
    fresh = open_worker(draft)
    truth = engine.pages.read(engine.compute(other), 0, 320)
    kv = restore(fresh, other, 320)
    assert torch.equal(kv[:NUM_SINKS, m:], truth[:NUM_SINKS, m:]) and loss(kv[:, m:], truth[:, m:]) < 0.5
    for path in (fresh.index.store.folder / "runs" / root.hex()).glob("*.run"):
        if path.stem in {key.hex() for key in fresh.index.store.keys_of(root, IDS)}:
            path.unlink()
    assert restore(open_worker(draft), other, 320).numel() == 0
    last = open_worker(draft)
    for name in ("a", "again"):  # of the second run it is found out when the first one stands again
        keep(last, engine, other, name=name)
    assert last.index.matched(other, "default", 0) == 320 and loss(restore(last, other, 320)[:, m:], truth[:, m:]) < 0.5


def test_namespaces_and_other_texts_find_nothing(open_worker, target) -> None:
    worker = open_worker()
    salted = worker.index.namespace("secret")
    assert salted != worker.index.namespace("other") != worker.index.namespace(None) == "default" and "secret" not in salted
    keep(worker, OtherEngine(target), IDS, namespace=salted)
    assert worker.index.matched(IDS, salted, 0) == 384
    assert worker.index.matched(IDS, "default", 0) == 0
    assert worker.index.matched([IDS[0] + 1, *IDS[1:]], salted, 0) == 0
    assert worker.index.matched([*IDS[:100], 251, *IDS[101:]], salted, 0) == 64
    assert worker.index.matched(IDS[:65], salted, 0) == 64 and worker.index.matched(IDS[:64], salted, 0) == 0
    assert open_worker(min_tokens=400).index.matched(IDS, salted, 0) == 0


def test_random_damage_gives_the_same_or_nothing(open_worker, target, tmp_path) -> None:
    keep(open_worker(), OtherEngine(target), IDS)
    reader = open_worker()
    whole = restore(reader, IDS, 384)
    files = sorted((tmp_path / "store" / "runs").rglob("*.run"))
    kept = {path: path.read_bytes() for path in files}
    assert len(files) == 3  # two runs and the sinks
    generator, met = random.Random(5), 0
    for trial in range(60):
        path = generator.choice(files)
        data = bytearray(kept[path])
        if trial % 3 == 0:
            del data[generator.randrange(len(data)) :]
        elif trial % 3 == 1:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        else:
            at = generator.randrange(len(data))
            data[at : at + 40] = generator.randbytes(len(data[at : at + 40]))
        path.write_bytes(bytes(data))
        found = restore(reader, IDS, 384, name=f"trial {trial}")
        assert not len(found) or torch.equal(found, whole[: len(found)])
        met += len(found) < 384
        reader.end(f"trial {trial}")
        for file, content in kept.items():
            file.write_bytes(content)
    assert met == 60


def test_a_request_that_ends_while_it_is_restored_is_forgotten_afterwards(open_worker, target) -> None:
    keep(open_worker("trunk"), OtherEngine(target), IDS)
    worker = open_worker("trunk")
    free = [pool.num_free_pages for pool in worker.passes._pools]
    worker.extend("b", "default", IDS)
    worker.hold("b")
    worker.end("b")
    assert worker.restore("b", 0, 384).end == 384 and [pool.num_free_pages for pool in worker.passes._pools] != free
    worker.release("b")
    assert "b" not in worker._texts and [pool.num_free_pages for pool in worker.passes._pools] == free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_come_back_to_the_bit(dtype: torch.dtype) -> None:
    """Of the layers that are asked for, from bytes that name none below them and from those of all layers, as they were kept before."""
    kv = torch.randn(NUM_SINKS, 5, 2, 3, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    kv.view(-1)[-7:] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-30, -65000.0]).to(dtype)
    data, old = sinks_to_bytes(kv[:, 2:]), bytes([(torch.float32, torch.bfloat16, torch.float16).index(dtype)]) + raw_bytes(kv)
    for given, first in ((data, 2), (old, 2), (old, 0)):
        found = sinks_from_bytes(given, kv.shape, first)
        assert found.dtype == dtype and raw_bytes(found) == raw_bytes(kv[:, first:])
    for wrong, first in ((b"", 2), (data, 1), (data[:-1], 2), (data + b"0", 2), (old[:-1], 2), (b"\x09" + old[1:], 2), (b"\x10\x00", 2)):
        with pytest.raises(CorruptedCode):
            sinks_from_bytes(wrong, kv.shape, first)


def raw_bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def test_packed_sinks_take_less() -> None:
    kv = torch.randn(NUM_SINKS, 30, 2, 3, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert len(sinks_to_bytes(kv)) < 0.75 * kv.nbytes


def test_sinks_of_all_layers_are_read_where_a_store_has_them(open_worker, target) -> None:
    """A store of before: the same text is restored with them, and they are not kept anew."""
    engine, worker = OtherEngine(target), open_worker("trunk")
    keep(worker, engine, IDS)
    kv, index = restore(worker, IDS, 384), worker.index
    shutil.rmtree(index.store.folder / "runs" / root_key(index.sink_identity("default")).hex())
    assert worker.index.matched(IDS, "default", 0) == 0
    old = b"\x00" + raw_bytes(engine.pages.read(engine.compute(IDS), 0, NUM_SINKS))
    index.store.insert(index._all_sinks_identity("default"), sink_ids(IDS), [old])
    assert index.matched(IDS, "default", 0) == 384 and torch.equal(restore(worker, IDS, 384, name="c"), kv)
    worker.extend("d", "default", IDS)
    assert not worker.wanted("d", len(IDS)) and not worker.lacks_sinks("d")


def test_sinks_of_a_text_that_was_given_up_are_not_kept(open_worker, target) -> None:
    worker = open_worker()
    worker.extend("a", "default", IDS)
    assert worker.wanted("a", len(IDS)) == range(6)
    worker.give_up("a")
    assert not worker.lacks_sinks("a") and worker.wanted("a", len(IDS)) == range(0)


@pytest.mark.parametrize("at_once", [1, 6])
def test_more_than_can_wait_is_not_kept(open_worker, target, at_once) -> None:
    worker = open_worker(queue_bytes=3 * PAGE_TOKENS * 4 * 2 * 2 * 8 * 4)
    engine = OtherEngine(target)
    pages = engine.compute(IDS)
    worker.extend("a", "default", IDS)
    with worker._models:  # its thread cannot go on
        wanted = worker.wanted("a", len(IDS))
        assert wanted == range(6)
        for page in wanted[::at_once]:
            worker.keep("a", engine.pages.read(pages, page * PAGE_TOKENS, (page + at_once) * PAGE_TOKENS))
        assert worker._waiting_bytes <= worker.options.queue_bytes
    assert worker.wait(300) and worker.metrics.saved_tokens < 384 and len(open_worker.said) == 1
    assert list(worker.wanted("a", len(IDS))) == []


def test_caches_of_old_texts_make_room(open_worker, target) -> None:
    worker = open_worker("trunk", feature_tokens=1024)
    engine = OtherEngine(target)
    for n in range(4):
        keep(worker, engine, [n, *IDS], name=str(n))
    assert worker.metrics.saved_tokens == 4 * 384 and not open_worker.said


@pytest.mark.parametrize(
    "given",
    [{}, {"store": ""}, {"store": "x", "qualty": "tiny"}, {"store": "x", "quality": "best"}, {"store": "x", "load": "later"},
     {"store": "x", "min_tokens": 0}, {"store": "x", "save": "yes"}, {"store": 3}, {"store": "x", "queue_bytes": -1}]
)  # fmt: skip
def test_bad_options_are_named(given) -> None:
    with pytest.raises(InvalidOption):
        StoreOptions.from_mapping(given)


def test_codec_parameters_of_other_models_are_refused(chat_folders, packs) -> None:
    with pytest.raises(PackMismatch):
        CodedModel.open(chat_folders.stranger, "none", packs("none"))
    with pytest.raises(InvalidOption):
        CodedModel.open(chat_folders.target, "none", None)
    with pytest.raises(InvalidOption):
        CodedModel.open(chat_folders.target, "none", "nowhere.safetensors")
    with pytest.raises(InvalidOption):
        Decoder.from_pretrained(chat_folders.target, dtype=torch.float32, num_layers=5)
