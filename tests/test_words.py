"""The field's words in every identifier: none of the names that the project used instead of them comes back (docs/glossary.md has the words)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "draft", "codec", "kernels", "scripts", "tests")

# name -> what to say instead; a name is found as a whole word of an identifier's parts between underscores, singular and plural
GONE = {
    "trunk": "early_exit, draft_head, exit_layer",
    "adapter": "draft_head",
    "sibling": "leaf of a draft tree",
    "placement": "tree_position",
    "hot pool": "quantised pool",
    "goes on": "should_continue",
    "look price": "draft_cost, verify_cost",
    "verify from": "exit_layer",
    "rerun layers": "recomputed_layers",
    "trunk layers": "exit_layer, recomputed_layers",
    "own layers": "draft_layers",
    "target layers": "recomputed_layers",
    "add run": "append_tokens",
    "num adapted": "num_draft_cached",
    "step octaves": "log2_step",
    "both sides": "whiten_covariance",
    "stable linear": "batch_invariant",
    "byte matrix": "Int8Weight",
    "in bytes": "int8",
    "choose product": "select_gemm",
    "peer": "baseline",
    "self text": "self-generated data",
    "open conversation": "open_sequence_state",
    "close conversation": "close_sequence_state",
}

PATTERNS = {word: re.compile(rf"\b{word}s?\b") for word in GONE}
# plain English inside a test's name: only the identifier itself is gone
PATTERNS["goes on"] = re.compile("^goes on$")
ANY = re.compile("|".join(GONE).replace(" ", "[-_]?"), re.IGNORECASE)


def parts(identifier: str) -> str:
    """An identifier's words in lower case, separated by blanks: "SelfTextOptions" and "self_text_options" agree."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", identifier).strip().lower()


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives or uses, with its line: variables, attributes, arguments, keywords, functions, classes and imports."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, ast.arg | ast.keyword) and node.arg is not None:
            yield node.arg, line
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, line
        elif isinstance(node, ast.alias):
            yield from ((part, line) for part in (node.asname or node.name).split("."))


@cache
def gone(identifier: str) -> str | None:
    """The word of `GONE` that an identifier holds, if any."""
    words = parts(identifier)
    return next((word for word, pattern in PATTERNS.items() if pattern.search(words)), None)


def findings(source: str) -> list[str]:
    """ "LINE NAME (say ...)" of every such identifier, and of options that show such a word in a command's help."""
    if not ANY.search(source):
        return []
    tree, found = ast.parse(source), []
    for name, line in identifiers(tree):
        if word := gone(name):
            found.append(f"{line} {name} (say {GONE[word]})")
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            hidden = any(k.arg == "help" and ast.unparse(k.value) == "argparse.SUPPRESS" for k in call.keywords)
            flags = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [f"{call.lineno} {flag} (hide it)" for flag in flags if not hidden and gone(flag.strip("-").replace("-", "_"))]
    return found


def test_no_identifier_holds_a_word_that_is_gone() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if path != Path(__file__)]
    assert len(files) > 300
    found = [f"{path.relative_to(ROOT)}:{each}" for path in files for each in findings(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_the_finder_finds() -> None:
    source = """
class TrunkDrafter:
    adapters: int
    def verify_from(self, siblings): return self.hot_pool(own_layers=1)
def add(p): p.add_argument("--trunk-layers", help="shown"); p.add_argument("--own-layers", help=argparse.SUPPRESS)
"""
    names = {each.split()[1] for each in findings(source)}
    assert names == {"TrunkDrafter", "adapters", "verify_from", "siblings", "hot_pool", "own_layers", "--trunk-layers"}
    assert findings("def replacements(truncated, runs): return again") == []
