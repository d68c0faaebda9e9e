"""The scripts of GPU leases: every command that they would run has options that its script knows, and values that it takes."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts" / "gpu").glob("*.sh") if path.name != "common.sh")
ABOUT_TEXTS = ("cal/std", "cal/rst", "mix/std", "curve/css", "test/perl", "test/markdown", "long/code", "long/agent", "long/prose")


class Option(NamedTuple):
    """What a script's parser says of an option."""

    required: bool
    flag: bool
    choices: tuple[str, ...]


@cache
def options_of(script: Path) -> dict[str, Option]:
    """The options that a script adds to its parser, by all of their names; () for choices that are not written out."""
    found = {}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and str(arg.value).startswith("--")]
            said = {word.arg: word.value for word in node.keywords}
            required = isinstance(said.get("required"), ast.Constant) and said["required"].value
            flag = isinstance(said.get("action"), ast.Constant) and str(said["action"].value).startswith("store_")
            choices = said.get("choices")
            written = isinstance(choices, ast.Tuple | ast.List) and all(isinstance(own, ast.Constant) for own in choices.elts)
            values = tuple(str(own.value) for own in choices.elts) if written else ()
            found |= {name: Option(bool(required), flag, values) for name in names}
    return found


def wrong_in(command: list[str]) -> list[str]:
    """What a script does not know of a command, and what it asks for and does not get."""
    script, *given = command
    known, wrong, names = options_of(ROOT / script), [], []
    for word in given:
        if word.startswith("--"):
            names.append(word)
            wrong += [] if word in known else [f"{script} has no {word}"]
        elif not names:
            continue
        elif (option := known.get(names[-1])) is not None:
            wrong += [f"{script} {names[-1]} takes no value"] if option.flag else []
            wrong += [f"{script} {names[-1]} {word}"] if option.choices and word not in option.choices else []
    for name in names:
        if name in known and not known[name].flag and given[given.index(name) + 1 : given.index(name) + 2] in ([], ["--"]):
            wrong.append(f"{script} {name} has no value")
    wrong += [f"{script} needs {name}" for name, option in known.items() if option.required and name not in names]
    return wrong


def commands_of(script: Path, out: Path, *parts: str, **environment: str) -> list[list[str]]:
    """What a script would run."""
    said = subprocess.run(
        ["bash", str(script), *parts],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DRY": "1", "OUT": str(out), "PYTHON": "python3", "TARGET_PIECES": "a b", "DRAFT_PIECES": "c", **environment},
    )
    assert said.returncode == 0, said.stderr
    return [shlex.split(line) for line in said.stdout.splitlines()]


def test_wrong_commands_are_noticed() -> None:
    good = "scripts/bench_windows.py --shape gemma3-1b --tokens 64"
    assert wrong_in(good.split()) == []
    assert wrong_in(f"{good} --bacth 4".split()) == ["scripts/bench_windows.py has no --bacth"]
    assert wrong_in(["scripts/bench_codec.py", "--pair", "p", "--text", "t"]) == ["scripts/bench_codec.py needs --json-out"]
    assert wrong_in(["scripts/bench/speculation_costs.py", "--sources", "draft", "none"]) == [
        "scripts/bench/speculation_costs.py --sources none"
    ]
    assert wrong_in(["scripts/bench_vllm.py", "--together", "3"]) == ["scripts/bench_vllm.py --together takes no value"]
    assert wrong_in(["scripts/bench_windows.py", "--tokens"]) == ["scripts/bench_windows.py --tokens has no value"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_has_options_that_its_script_knows(script: Path, tmp_path: Path) -> None:
    for kind in ABOUT_TEXTS:
        (tmp_path / "texts" / kind).mkdir(parents=True)
    commands = commands_of(script, tmp_path, "all", VLLM_BENCH=str(tmp_path / "bench.py"))
    assert len(commands) >= 2 and all(command[0].startswith("scripts/") for command in commands)
    assert not [wrong for command in commands for wrong in wrong_in(command)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_its_parts(script: Path) -> None:
    said = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=300)
    *about, last = said.stdout.splitlines()
    names = last.removeprefix("parts: ").removesuffix(" (all: each of them)").split()
    assert said.returncode == 2 and names and not said.stderr
    described = [line.split()[0] for line in about if line.startswith("  ")]
    assert described == names, "every part is told of, in order"
    unknown = subprocess.run(["bash", str(script), names[0], "nothing"], capture_output=True, text=True, timeout=300)
    assert unknown.returncode == 2 and "nothing" in unknown.stderr and not unknown.stdout


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $1 $3"\n[ "$3" != gemma3-1b ]\n', encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "OUT": "results", "PYTHON": str(python)}
    said = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu" / "windows.sh"), "all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert said.returncode == 1 and said.stderr.strip() == "== failed: windows-gemma"
    logs = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "results").iterdir()}
    assert logs == {
        f"windows-{name}.log": f"ran scripts/bench_windows.py {shape}\n"
        for name, shape in (("gemma", "gemma3-1b"), ("mistral", "mistral-7b"))
    }


def test_without_its_pack_a_part_says_which_one_makes_it(tmp_path: Path) -> None:
    said = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu" / "codec.sh"), "resume"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OUT": str(tmp_path)},
    )
    assert said.returncode == 1 and "qwen2.5-coder.pack is missing (part calibrate)" in said.stderr


def test_no_profile_module_beside_another_engine_s_script(tmp_path: Path) -> None:
    (tmp_path / "profile.py").write_text("", encoding="utf-8")
    said = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu" / "throughput.sh"), "vllm"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OUT": str(tmp_path), "VLLM_BENCH": str(tmp_path / "bench.py")},
    )
    assert said.returncode == 1 and "hides Python's module" in said.stderr
