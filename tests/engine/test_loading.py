"""Costs of drafting: measured in the first answer that is long enough, remembered for the machine and the models' shapes, measured again when old."""

from __future__ import annotations

import json
import time

import pytest
import torch

from engine.engine import Engine
from engine.loading import COSTS_KEPT_S, _costs_key, _read_costs, remember_costs, remember_products
from engine.model import linear
from engine.runtime import core as core_module
from engine.runtime.sampling import SamplingParams

COSTS = {"draft": [[1, 0.001], [4, 0.002]], "verify": [[1, 0.01], [4, 0.011]], "runs_last_draft": True, "last": None}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "costs"


@pytest.fixture
def measured(monkeypatch):
    """A list with an item for each measurement, which come after the first token; the machine counts as free."""
    monkeypatch.setattr(core_module, "_FREE_SHARE", 0.0)
    monkeypatch.setattr(core_module, "MEASURED_AFTER", 1)
    real, calls = core_module.measure_costs, []

    def measure(*args, **options):
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(core_module, "measure_costs", measure)
    return calls


def make(target, folder, **options):
    return Engine(target, draft=1, target_dir=folder, **options)


def test_costs_are_measured_after_the_first_token_and_serve_the_next_engine(tiny_model, home, measured):
    model = tiny_model("llama")
    engine, params = make(model.decoder, model.folder), SamplingParams(max_new_tokens=6)
    events = engine.stream([4, 8, 15], params)
    assert next(events).token_ids and not measured, "the first token waits for nothing"
    rest = list(events)
    assert len(measured) == 1 and rest[-1].result.token_ids
    [file] = home.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600

    other = make(model.decoder, model.folder)
    assert other.core.cost_model == engine.core.cost_model and not other.core.costs_stale
    [again] = other.generate([[4, 8, 15]], params)
    assert again.token_ids == rest[-1].result.token_ids and len(measured) == 1
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


def test_a_short_answer_does_not_wait_for_a_measurement(tiny_model, home, measured, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(core_module, "MEASURED_AFTER", 5)
    engine = make(model.decoder, model.folder)
    [result] = engine.generate([[4, 8, 15]], SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert not measured and result.new_tokens == 5 and engine.core._without_costs == [] and not home.exists()
    engine.generate([[4, 8, 15], [3]], SamplingParams(max_new_tokens=6, ignore_eos=True))
    assert len(measured) == 1 and engine.core.cost_model is not None


def test_tokens_of_short_answers_add_up_until_costs_are_measured(tiny_model, home, measured, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(core_module, "MEASURED_AFTER", 9)
    engine = make(model.decoder, model.folder)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    for number in range(4):
        assert len(measured) == (number > 2), number
        engine.generate([[4, 8, 15]], params)
    assert len(measured) == 1 and engine.core._without_costs == []


def test_costs_measured_on_a_busy_machine_are_measured_again(tiny_model, home, measured, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(core_module, "_FREE_SHARE", 1e9)
    make(model.decoder, model.folder).generate([[4]], SamplingParams(max_new_tokens=4))
    again = make(model.decoder, model.folder)
    assert again.core.cost_model is not None and again.core.costs_stale


def test_one_token_or_a_cancelled_request_measures_nothing(tiny_model, home, measured):
    model = tiny_model("llama")
    engine = make(model.decoder, model.folder)
    engine.generate([[4], [5, 6]], SamplingParams(max_new_tokens=1))
    events = engine.stream([4, 8], SamplingParams(max_new_tokens=9))
    next(events)
    events.close()
    assert not measured and engine.core._without_costs == []
    engine.generate([[4], [5, 6]], SamplingParams(max_new_tokens=4))
    assert len(measured) == 1 and engine.core._without_costs == []


def test_old_costs_are_used_and_measured_again(tiny_model, home, measured):
    model = tiny_model("llama")
    engine = make(model.decoder, model.folder)
    home.mkdir(parents=True)
    file = home / f"{_costs_key(engine.core)}.json"
    for age_s in (2 * COSTS_KEPT_S, -1000.0):
        file.write_text(json.dumps({"costs": COSTS, "measured_unix_s": time.time() - age_s}))
        measured.clear()
        old = make(model.decoder, model.folder)
        assert old.core.costs_stale and old.core.cost_model.draft == ((1, 0.001), (4, 0.002))
        old.generate([[4]], SamplingParams(max_new_tokens=4))
        assert len(measured) == 1 and not old.core.costs_stale
        assert abs(json.loads(file.read_text())["measured_unix_s"] - time.time()) < 60


def test_given_costs_stay(tiny_model, home, measured):
    model = tiny_model("llama")
    found = _read_costs(json.dumps({"costs": COSTS, "measured_unix_s": 0.0}).encode())
    assert found is not None
    engine = make(model.decoder, model.folder, costs=found[0])
    engine.generate([[4]], SamplingParams(max_new_tokens=4))
    assert engine.core.cost_model is found[0] and not measured and not home.exists()


def test_what_costs_depend_on_is_in_their_name(tiny_model, home, monkeypatch):
    model = tiny_model("llama")
    names = {_costs_key(make(model.decoder, model.folder, **options).core) for options in ({}, {"deterministic": True}, {"page_size": 16})}
    names.add(_costs_key(Engine(model.decoder, draft=2, target_dir=model.folder).core))
    with monkeypatch.context() as patch:  # the same shapes, weights of other bytes: quantised ones multiply several rows at another price
        patch.setattr(type(model.decoder), "weight_bytes", model.decoder.weight_bytes // 3)
        names.add(_costs_key(make(model.decoder, model.folder).core))
    names.add(_costs_key(Engine(model.decoder, draft=tiny_model("llama", num_hidden_layers=1).decoder, target_dir=model.folder).core))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        names.add(_costs_key(make(model.decoder, model.folder).core))
    finally:
        torch.set_num_threads(before)
    assert len(names) == 7
    plain = Engine(model.decoder, target_dir=model.folder).core
    remember_costs(plain)
    assert plain.cost_model is None and plain.on_costs is None


@pytest.mark.parametrize(
    "change",
    [
        {"draft": []},
        {"draft": [[1, 0.0]]},
        {"draft": [[1, float("nan")]]},
        {"draft": [[1, float("inf")]]},
        {"draft": [[4, 0.1], [1, 0.2]]},
        {"draft": [[0, 0.1]]},
        {"verify": None},
        {"verify": [1, 2]},
        {"last": "x"},
        {"last": [["x", 1]]},
        {"draft": [[10**400, 1.0], [1e400, 1.0]]},
    ],
)
def test_files_that_hold_no_costs(change):
    assert _read_costs(json.dumps({"costs": COSTS, "measured_unix_s": 1.0}).encode()) is not None
    assert _read_costs(json.dumps({"costs": COSTS | change, "measured_unix_s": 1.0}).encode()) is None
    for content in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"costs": {}}', b'{"costs": 5, "measured_unix_s": 1}'):
        assert _read_costs(content) is None


@pytest.mark.parametrize(
    "damage", [None, b"{", b"[1]", b'{"compiled_share": "fast"}', b'{"compiled_share": -1}', b'{"compiled_share": NaN}']
)
def test_the_choice_of_products_is_measured_once_a_machine(tmp_path, monkeypatch, damage):
    """A second process takes what the first one measured, though its own times would say otherwise; a damaged file is made again."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr("engine.loading.times_choose", lambda *_: True)
    times, threads = iter([2.0, 0.5]), torch.get_num_threads()
    monkeypatch.setattr(linear, "_measured_share", lambda: next(times))
    monkeypatch.setattr(linear, "_shares", {})
    remember_products(torch.bfloat16, torch.device("cpu"))
    assert linear.compiled_share(threads) == 2.0
    (file,) = (tmp_path / "products").iterdir()
    if damage is not None:
        file.write_bytes(damage)
    monkeypatch.setattr(linear, "_shares", {})  # as a new process begins
    remember_products(torch.bfloat16, torch.device("cpu"))
    assert linear.compiled_share(threads) == (2.0 if damage is None else 0.5)
    assert json.loads(file.read_text()) == {"compiled_share": linear.compiled_share(threads)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_onednn_packs_nothing_no_product_is_measured(chat_folders, tmp_path, monkeypatch, dtype):
    """A processor without AVX-512: packing a matrix would be an error."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr(linear, "_packs_bf16", lambda *_: False)
    monkeypatch.setattr(linear, "_shares", {})
    monkeypatch.setattr(linear, "_measured_share", lambda: pytest.fail("there is nothing to compare"))
    engine = Engine.from_pretrained(chat_folders.target, "none", device="cpu", dtype=dtype)
    assert len(engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0].token_ids) == 4
    assert not list((tmp_path / "products").glob("*.json"))
