"""Rules of the tree: which package may import which, how long a file may be, and what must not be in the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": set(),
    "codec": {"kernels"},
    "draft": {"kernels"},
    "engine": {"kernels", "codec", "draft"},
}
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ALLOWED}


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it; relative imports stay inside their package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", list(ALLOWED))
def test_imports_follow_the_one_direction(package: str) -> None:
    others = {*ALLOWED, "scripts", "tests"} - {package} - ALLOWED[package]
    assert len(FILES[package]) > 3
    wrong = {str(path.relative_to(ROOT)): sorted(imported(path) & others) for path in FILES[package] if imported(path) & others}
    assert not wrong


def test_kernels_need_only_torch_and_triton() -> None:
    outside = {name for path in FILES["kernels"] for name in imported(path)} - {"torch", "triton", "kernels"}
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "importlib",
        "itertools",
        "math",
        "os",
        "typing",
        "weakref",
    }
    assert outside <= standard


def test_files_are_short_and_none_is_called_utils() -> None:
    files = [p for name in (*ALLOWED, "scripts", "tests") for p in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    assert not {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not [p for p in files if "utils" in p.name]


def test_no_machine_paths_or_registry_hosts() -> None:
    pattern = re.compile(r"/w[o]rk/|files\.pythonh[o]sted|pypi\.[o]rg|/r[o]ot/")
    texts = [p for name in (*ALLOWED, "scripts", "tests") for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".json", ".md")]
    texts += [ROOT / "README.md", ROOT / "pyproject.toml"]
    assert not [str(p.relative_to(ROOT)) for p in texts if pattern.search(p.read_text(encoding="utf-8"))]
