"""`--store` on the command line: two runs share what the first computed, figures in the JSON, mistakes in one line."""

from __future__ import annotations

import json

import pytest

from engine.generate import main
from engine.store.__main__ import main as store_main
from engine.store.store import RunStore

PROMPT = "".join(f"line {i} of a long text that two processes read\n" for i in range(16))
OPTIONS = ["--raw", "--max-new-tokens", "4", "--quality", "near-lossless"]


@pytest.fixture
def generate(capsys, model_options, tmp_path):
    """`generate(*options)` -> exit status, the JSON object or None, standard error; over the tiny pair, with a store."""

    def call(*options: str, store: bool = True):
        status = main([*model_options, *OPTIONS, *(["--store", str(tmp_path / "store")] if store else []), "--json", *options])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return call


def test_the_second_run_restores_what_the_first_kept(generate, tmp_path, capsys) -> None:
    status, first, err = generate(PROMPT)
    assert status == 0 and first["restored_tokens"] == 0 and first["kv"]["reused_from"] is None
    pages = len(PROMPT) // 64
    assert first["store"]["kept_tokens"] == 64 * pages and first["store"]["bytes"] > 0 and "nothing restored" in err
    status, second, err = generate(PROMPT)
    assert status == 0 and second["restored_tokens"] == second["reused_tokens"] == 64 * pages and second["kv"]["reused_from"] == "coded"
    store = second["store"]
    assert (store["hits"], store["hit_tokens"], store["kept_runs"], store["namespace"]) == (1, 64 * pages, 0, "default")
    assert 0 < second["restore_s"] < second["ttft_s"] and f"{64 * pages} tokens restored" in err
    assert generate(PROMPT, "--namespace", "other")[1]["restored_tokens"] == 0
    assert "store" not in generate(PROMPT, "--session", str(tmp_path / "a.kv"), store=False)[1]
    assert store_main([str(tmp_path / "store"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["roots"]
    assert {row["namespace"]: row["tokens"] for row in rows} == {"default": 64 * pages, "other": 64 * pages}
    assert store_main([str(tmp_path / "store"), "verify"]) == 0


def test_a_conversation_at_a_terminal_is_kept(generate, model_options, tmp_path, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"say it once\nand once more\n"), "utf-8"))
    options = ["--chat", "--store", str(tmp_path / "store"), "--quality", "tiny", "--max-new-tokens", "40", "--store-bytes", "1M"]
    assert main([*model_options, *options]) == 0
    assert "kept" in capsys.readouterr().err
    store = RunStore(tmp_path / "store")
    assert store.totals[0] >= 1 and store.totals[1] <= 1 << 20
    store.close()


def test_mistakes_end_in_one_line_before_models_are_loaded(generate, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("engine.cli.command.load", lambda *args, **options: pytest.fail("models were loaded"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("x")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "store.json").write_text('{"format": 99}')
    for options, what in (
        (["--store", str(tmp_path / "other")], "is no store"),
        (["--store", str(tmp_path / "newer")], "newer version"),
        (["--store", "/proc/nowhere/store"], "cannot be opened"),
        (["--store", str(tmp_path / "s"), "--store-bytes", "many"], "no number of bytes"),
        (["--store-bytes", "1G"], "--store-bytes only matters to a store"),
        (["--store-memory", "1G"], "--store-memory only matters to a store"),
        (["--store", str(tmp_path / "s"), "--store-memory", "-1"], "no number of bytes"),
        (["--namespace", "a"], "--namespace only matters to a store"),
    ):
        status, out, err = generate(
            "hi", *(options if "--store" in options else [*options, "--session", str(tmp_path / "a.kv")]), store=False
        )
        assert (status, out) == (2, None) and err.startswith("error: ") and what in err and err.count("\n") == 1


def test_foretold_store_is_the_same_command(tmp_path, capsys) -> None:
    from engine.cli.main import main as foretold

    RunStore(tmp_path / "store").close()
    assert foretold(["store", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 0
