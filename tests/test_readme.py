"""The README's library example runs as printed, on the small pair and without fitting a codec pack."""

from __future__ import annotations

import re
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
