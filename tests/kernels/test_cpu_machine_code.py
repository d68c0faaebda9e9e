"""Kept machine code of a CPU's decode step: compiled once, read again, and made anew where it is not as it was written."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from kernels import cpu_decode
from kernels.cpu_decode import machine_code
from kernels.cpu_decode.arguments import ARGUMENTS

pytestmark = pytest.mark.skipif(not machine_code.keeps_code(), reason="this system keeps no machine code")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of its own, and how often the program was compiled; the code that is compiled is that of the machine's folder."""
    object_file = machine_code.compile_object()
    compiled = []
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr(machine_code, "compile_object", lambda: compiled.append(1) or object_file)
    return tmp_path / "products", compiled


def works(functions):
    numbers = np.full(16, 1.00390625 + 2**-20, np.float32)
    functions["rounded"](numbers.ctypes.data, 1)
    return functions.keys() == ARGUMENTS.keys() and bool((numbers == 1.0078125).all())


def test_code_is_compiled_once_and_made_anew_where_it_is_damaged_or_others_could_have_written_it(home):
    folder, compiled = home
    assert works(machine_code.load_functions()) and works(machine_code.load_functions()) and len(compiled) == 1
    [path] = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    whole = path.read_bytes()
    turned = bytearray(whole)
    turned[len(whole) // 2] ^= 4
    for number, damaged in enumerate((b"", whole[:20], whole[:-1], whole + b"x", bytes(turned), bytes(1 << 23))):
        path.write_bytes(damaged)
        assert works(machine_code.load_functions()) and len(compiled) == number + 2
        assert path.read_bytes() == whole
    path.chmod(0o666)
    assert works(machine_code.load_functions()) and len(compiled) == 8, "others may write to it"
    other = folder.parent / "other"
    other.write_bytes(whole)
    other.chmod(0o600)
    path.unlink()
    path.symlink_to(other)
    assert works(machine_code.load_functions()) and len(compiled) == 9, "another file's content"
    path.unlink()
    os.link(other, path)
    assert works(machine_code.load_functions()) and len(compiled) == 10, "which has a name elsewhere"
    assert works(machine_code.load_functions()) and len(compiled) == 10, "and is a file of its own now"
    path.unlink()
    path.mkdir()
    assert works(machine_code.load_functions()) and len(compiled) == 11, "it cannot be kept"


def test_code_of_another_processor_compiler_or_program_is_not_taken(home, monkeypatch, tmp_path):
    folder, compiled = home
    machine_code.load_functions()
    monkeypatch.setattr(machine_code, "_processor", lambda: ["flags: fpu"])
    machine_code.load_functions()
    monkeypatch.setattr(machine_code, "version", lambda name: "0.0")
    machine_code.load_functions()
    for source in machine_code._SOURCES:
        (tmp_path / source).write_bytes((machine_code._HERE / source).read_bytes() + b"\n")
    monkeypatch.setattr(machine_code, "_HERE", tmp_path)
    machine_code.load_functions()
    assert len(compiled) == 4
    for number in range(machine_code._MOST_KEPT):
        monkeypatch.setattr(machine_code, "version", lambda name, number=number: f"1.{number}")
        machine_code.load_functions()
    assert len(list(folder.iterdir())) == machine_code._MOST_KEPT, "old ones go"
    machine_code.load_functions()
    assert len(compiled) == 4 + machine_code._MOST_KEPT, "and the newest stays"


@pytest.mark.parametrize(("found", "fits"), [("0.43.0", False), ("0.44.0rc1", True), ("1.0", True), ("unknown", False)])
def test_an_older_compiler_counts_as_none(found, fits, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert cpu_decode._importable.__wrapped__() == fits


def test_without_a_folder_code_is_compiled_and_runs(home, monkeypatch):
    _, compiled = home
    monkeypatch.setenv("FORETOLD_HOME", os.devnull)
    assert works(machine_code.load_functions()) and works(machine_code.load_functions()) and len(compiled) == 2
    monkeypatch.setenv("FORETOLD_HOME", "~nobody-of-this-name/cache")
    assert works(machine_code.load_functions())


def test_an_object_file_that_needs_another_library_is_compiled_in_the_process(home, monkeypatch):
    import llvmlite.binding as llvm

    machine, _ = machine_code._optimised(machine_code._step)
    needy = llvm.parse_assembly("declare void @other()\ndefine void @linear() {\n call void @other()\n ret void\n}")
    with pytest.raises(machine_code.NotLinkable):
        machine_code.link(machine.emit_object(needy))
    few = llvm.parse_assembly("define void @linear() {\n ret void\n}")
    with pytest.raises(machine_code.NotLinkable, match="not all functions"):
        machine_code.link(machine.emit_object(few))
    monkeypatch.setattr(machine_code, "compile_object", lambda: machine.emit_object(few))
    assert works(machine_code.load_functions())
