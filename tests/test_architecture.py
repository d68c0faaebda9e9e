"""Rules of the tree: which package and which room may import which, and what must not be in the repository."""

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


def test_kernels_need_only_torch_triton_and_numpy() -> None:
    outside = {name for path in FILES["kernels"] for name in imported(path)} - {"torch", "triton", "numpy", "kernels"}
    compiled = ROOT / "kernels" / "cpu_decode"
    if not any(name == "llvmlite" for path in FILES["kernels"] if compiled not in path.parents for name in imported(path)):
        outside -= {"llvmlite"}  # optional: imported by that room alone, once somebody has asked whether it is there
    standard = {
        "__future__",
        "collections",
        "contextlib",
        "ctypes",
        "concurrent",
        "dataclasses",
        "errno",
        "fcntl",
        "functools",
        "hashlib",
        "importlib",
        "itertools",
        "json",
        "math",
        "mmap",
        "os",
        "pathlib",
        "platform",
        "queue",
        "re",
        "secrets",
        "stat",
        "struct",
        "sys",
        "threading",
        "time",
        "typing",
        "weakref",
    }
    assert outside <= standard


def test_no_file_is_called_utils() -> None:
    files = [p for name in (*ALLOWED, "scripts", "tests") for p in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    assert not [p for p in files if "utils" in p.name]


# --- rooms of the engine ------------------------------------------------------------------------------------------------

LIBRARIES = {"kernels", "codec", "draft"}
LEAVES = {"engine.errors", "engine.inputs", "engine.files"}
RUNTIME = {"kernels", "draft", "engine.kv", "engine.model", "engine.config", *LEAVES}
ABOVE = {*LIBRARIES, *RUNTIME, "engine.runtime", "engine.hub", "engine.text"}
FACADE = {*ABOVE, "engine.loading", "engine.calibrate", "engine.sessions", "engine.store", "engine.engine"}
ROOMS = {
    "kernels": set(),
    "codec": {"kernels"},
    "draft": {"kernels"},
    "engine.errors": LIBRARIES,  # one base for all; the libraries' errors under the engine's names
    "engine.inputs": {"engine.errors"},
    "engine.files": {"kernels", "engine.errors", "engine.inputs"},
    "engine.kv": {"kernels", "draft", *LEAVES},
    "engine.model": {"kernels", "draft", "engine.kv", *LEAVES},
    "engine.config": {"draft", "engine.kv", *LEAVES},
    "engine.runtime": RUNTIME,
    # model folders and what a decoder and a tokenizer read of them
    "engine.hub": {"kernels", "engine.model", "engine.text", *LEAVES},
    "engine.text": LEAVES,
    "engine.calibrate": ABOVE,
    "engine.train": {*ABOVE, "engine.calibrate"},
    "engine.sessions": {*ABOVE, "engine.calibrate"},
    "engine.store": {*ABOVE, "engine.sessions"},
    "engine.loading": ABOVE,
    "engine.engine": {*ABOVE, "engine.loading", "engine.calibrate", "engine.sessions", "engine.store"},
    "engine": FACADE,
    "engine.cli": {*FACADE, "engine.server", "engine.generate", "engine.serve"},  # the console script
    "engine.server": FACADE,
    "engine.connectors": FACADE,
    "engine.generate": {*FACADE, "engine.cli"},
    "engine.serve": {*FACADE, "engine.cli", "engine.server"},
}


def module_name(path: Path) -> str:
    """Dotted name of a file of the tree."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for files in FILES.values() for path in files}


def room_of(module: str) -> str:
    """The part of the tree that a module belongs to: a package, or a folder or file directly below engine/."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


def imports_of(module: str) -> set[str]:
    """Modules of the tree that a module imports, wherever in it: at the top, inside functions, and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names}
    return found & MODULES.keys()


def test_rooms_import_along_the_edges() -> None:
    assert len(MODULES) > 100 and {room_of(module) for module in MODULES} <= ROOMS.keys()
    wrong = [
        f"{module} -> {other}"
        for module in MODULES
        for other in sorted(imports_of(module))
        if room_of(other) not in (room_of(module), *ROOMS[room_of(module)])
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports_of(module) for module in MODULES}
    while leaves := {module for module, imports in graph.items() if not imports & graph.keys()}:
        for module in leaves:
            del graph[module]
    while roots := graph.keys() - {other for imports in graph.values() for other in imports}:
        for module in roots:  # these only lead into a circle
            del graph[module]
    assert not sorted(graph)


def test_no_machine_paths_or_registry_hosts() -> None:
    pattern = re.compile(r"/w[o]rk/|files\.pythonh[o]sted|pypi\.[o]rg|/r[o]ot/")
    texts = [p for name in (*ALLOWED, "scripts", "tests") for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".json", ".md")]
    texts += [ROOT / "README.md", ROOT / "pyproject.toml"]
    assert not [str(p.relative_to(ROOT)) for p in texts if pattern.search(p.read_text(encoding="utf-8"))]


def test_one_file_alone_renames_into_place() -> None:
    """Every other writer goes through `kernels.files`; folders are moved as a whole by the hub, stored runs by the store."""
    pattern = re.compile(r"\bos\.re(place|name)\(|NamedTemporaryFile|\.part\"")
    found = {
        path.relative_to(ROOT).as_posix() for files in FILES.values() for path in files if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"kernels/files.py", "engine/hub/converted.py", "engine/hub/fetch.py", "engine/store/store.py"}
