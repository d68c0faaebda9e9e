"""The README's library example runs as printed, on the small pair and without fitting a codec pack."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    blocks = [b for b in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if "import Engine" in b]
    assert len(blocks) == 1
    code = blocks[0]
    for printed, here in (
        ('quality="balanced"', 'quality="tokens"'),
        ("max_new_tokens=64", "max_new_tokens=8"),
        (".chat(", ".chat(params=SamplingParams(max_new_tokens=8), message="),
        ('"What is a radix tree?"}])', '"What is a radix tree?"}], SamplingParams(max_new_tokens=8))'),
    ):
        assert printed in code
        code = code.replace(printed, here)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "sleep.kv").stat().st_size > 100
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_files_named_in_the_documents_exist() -> None:
    """Paths in backticks, and what they are said to hold: "`engine/runtime/step.py: decode_step`"."""
    root, found = Path(__file__).parent.parent, 0
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for name, inside in re.findall(r"`((?:engine|draft|codec|kernels|scripts|tests|docs)/[\w./-]*\w/?)(?:: ([\w.]+))?`", text):
            assert (root / name).exists(), f"{page.name} names {name}"
            assert not inside or inside.split(".")[-1] in (root / name).read_text(encoding="utf-8"), f"{page.name}: {name} has no {inside}"
            found += 1
    assert found > 60


def test_results_are_named_in_the_documents_and_named_results_exist() -> None:
    """In full, as `codec-h200-qwen2.5-coder.json`; a pattern, as `tasks-*`, says what several have in common and names none."""
    root = Path(__file__).parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "draft" / "pretrained").rglob("README.md"))]
    text = {page: page.read_text(encoding="utf-8") for page in pages}
    results = {path.name for path in (root / "scripts" / "results").iterdir()}
    assert len(results) > 100
    unnamed = [
        name for name in sorted(results) if not any(re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", body) for body in text.values())
    ]
    assert not unnamed, f"named in no document: {', '.join(unnamed)}"
    for page, body in text.items():
        # a result's name says where it was measured
        for name in re.findall(r"[\w.-]+-(?:cpu|h100|h200)(?:-[\w.-]*)?\.(?:json|png|txt)\b", body):
            assert name in results, f"{page.name} names {name}"
        for pattern in re.findall(r"`([a-z0-9.-]+\*[a-z0-9.*-]*)`", body):
            assert any(fnmatch(name, pattern) for name in results), f"{page.name}: no result is called {pattern}"
