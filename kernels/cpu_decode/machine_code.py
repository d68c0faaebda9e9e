"""Machine code of the decode step: compiled by LLVM (llvmlite) at a machine's first start, in about a second, kept in the cache folder, and from then
on read as it is, without any compiler.

A kept file holds one block of position-independent code without any symbol of another library, for one processor, compiler and program. One that is
damaged, a link, another user's, or writable by others counts as none. That needs Linux on x86-64: elsewhere every process compiles for itself.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import platform
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kernels.cpu_decode import arguments
from kernels.files import cache_home, write_bytes

_HERE = Path(__file__).parent
_SOURCES = (
    "arguments.py",
    "attention.py",
    "blocks.py",
    "coding.py",
    "drafting.py",
    "emit.py",
    "machine_code.py",
    "matrices.py",
    "meeting.py",
    "numbers.py",
    "prefill.py",
    "program.py",
    "tiles.py",
    "tiling.py",
)
_MOST_BYTES = 1 << 22
_MOST_KEPT = 8
_PC32, _PLT32 = 2, 4  # x86-64's relocations: 32 bits, relative to the place
_ALLOCATED, _PROGBITS, _SYMBOLS, _RELA = 2, 1, 2, 4
_PAGE_BYTES = mmap.PAGESIZE
_ARCH_PRCTL, _ASK_FOR_STATE, _TILES = 158, 0x1023, 18  # the call's number; ARCH_REQ_XCOMP_PERM; XTILEDATA


class NotLinkable(Exception):
    """The object file needs more than is done here: another library's symbol, or another kind of relocation."""


def keeps_code() -> bool:
    """Whether this system's machine code can be kept: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 1 << 32


@functools.cache
def functions() -> dict[str, Callable[..., None]]:
    """`load_functions`, once a process."""
    return load_functions()


def load_functions() -> dict[str, Callable[..., None]]:
    """The program's functions by name; they release the interpreter's lock while they run.

    Raises:
        OSError: memory cannot be made executable here.
        ImportError: nothing is kept, and llvmlite cannot be loaded.
    """
    if not keeps_code():
        return _functions(*_compiled_here())
    path = _kept_path()
    found = None if path is None else _read(path)
    if found is None:
        try:
            found = link(compile_object())
        except NotLinkable:
            return _functions(*_compiled_here())
        if path is not None:
            with suppress(OSError):  # the next start compiles again
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, _with_header(*found), private=True, synced=False)
                _remove_old(path.parent)
    code, entries = found
    base, kept = _executable(code)
    return _functions({name: base + offset for name, offset in entries.items()}, kept)


def _functions(addresses: dict[str, int], kept: Any) -> dict[str, Callable[..., None]]:
    found: dict[str, Callable[..., None]] = {}
    for name, names in arguments.ARGUMENTS.items():
        kinds = [ctypes.c_float if argument in arguments.REAL else ctypes.c_int64 for argument in names]
        function = ctypes.CFUNCTYPE(None, *kinds)(addresses[name])
        function.memory = kept  # type: ignore[attr-defined]
        found[name] = function
    return found


# --- kept code -------------------------------------------------------------------------------------------------------------


def _kept_path() -> Path | None:
    """Where this machine's code lies; None where there is no cache folder."""
    digest = blake2b(digest_size=12)
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes())
    digest.update(repr((_processor(), version("llvmlite"), allows_tiles())).encode())
    with suppress(RuntimeError, OSError):
        return cache_home() / "products" / f"step-{digest.hexdigest()}.code"
    return None


def _processor() -> list[str]:
    """Model and features of the first processor, as the system tells them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(1 << 16).partition("\n\n")[0]
    except OSError:
        return []
    return [line for line in first.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags"))]


def has_flag(name: str) -> bool:
    """Whether the system names a feature of the processor."""
    return any(name in line.split() for line in _processor() if line.startswith("flags"))


@functools.cache
def allows_tiles() -> bool:
    """Whether the system lets this process use a processor's tile registers (AMX): Linux has to be asked, once a process."""
    if not keeps_code() or not has_flag("amx_bf16"):
        return False
    return ctypes.CDLL(None).syscall(*(ctypes.c_long(number) for number in (_ARCH_PRCTL, _ASK_FOR_STATE, _TILES))) == 0


def _remove_old(folder: Path) -> None:
    """Keep the newest files alone: of this version, and of other processors that share the folder. Raises OSError."""
    for path in sorted(folder.glob("step-*.code"), key=lambda path: path.stat().st_mtime, reverse=True)[_MOST_KEPT:]:
        path.unlink()


def _with_header(code: bytes, entries: dict[str, int]) -> bytes:
    body = json.dumps(entries).encode() + b"\n" + code
    return blake2b(body, digest_size=32).digest() + body


def _read(path: Path) -> tuple[bytes, dict[str, int]] | None:
    """Code and where its functions begin, from a kept file; None where that is not as it was written, or not this user's own.

    A link is followed nowhere: in a folder that others can write to it would name any file of this user's, one that others have filled included.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            alone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if not alone or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            content = file.read(_MOST_BYTES + 1)
    except OSError:
        return None
    body = content[32:]
    if len(content) > _MOST_BYTES or blake2b(body, digest_size=32).digest() != content[:32]:
        return None
    names, _, code = body.partition(b"\n")
    return code, json.loads(names)


def _executable(code: bytes) -> tuple[int, mmap.mmap]:
    """Address of memory that holds the code, and what keeps it alive. It is never writable and executable at once."""
    memory = mmap.mmap(-1, -(-len(code) // _PAGE_BYTES) * _PAGE_BYTES)
    memory[: len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None, use_errno=True)
    if library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory cannot be made executable")
    return address, memory


# --- compiling -------------------------------------------------------------------------------------------------------------


def _optimised(write: Callable[[Callable[[str], bool]], Any], *, apart: bool = False) -> tuple[Any, Any]:
    """LLVM's machine and a program's module, optimised for this processor.

    write: gives the module; told whether a processor of x86-64 has a feature of a name. apart: code and its constants may lie further apart than 2 GiB,
    as where a process that has mapped much gets its memory: a distance of 32 bits ends the process then.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    features = llvm.get_host_cpu_features()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=features.flatten(),
        opt=3,
        reloc="default" if apart else "pic",
        codemodel="large" if apart else "small",
    )
    here = platform.machine() == "x86_64"
    module = llvm.parse_assembly(str(write(lambda feature: here and bool(features.get(feature)))))
    module.verify()
    module.triple, module.data_layout = llvm.get_default_triple(), str(machine.target_data)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return machine, module


def _step(has: Callable[[str], bool]) -> Any:
    from kernels.cpu_decode.program import write_program

    pairs, tiles = has("avx512bf16"), has("amx-tile") and has("amx-bf16") and allows_tiles()
    return write_program(pairs=pairs, quads=has("avx512vnni"), matrices=pairs and tiles, gives_way=keeps_code())


def compile_object() -> bytes:
    """The program as an object file of this machine."""
    machine, module = _optimised(_step)
    return machine.emit_object(module)


def _compiled_here() -> tuple[dict[str, int], Any]:
    return compiled_here(_step, arguments.ARGUMENTS)


def compiled_here(write: Callable[[Callable[[str], bool]], Any], names: Iterable[str]) -> tuple[dict[str, int], Any]:
    """Addresses of a program's functions by name, compiled for this process alone, and what keeps them alive. write: see `_optimised`.

    Raises:
        ImportError, OSError, RuntimeError: llvmlite cannot be loaded, or LLVM refuses.
    """
    machine, module = _optimised(write, apart=True)
    import llvmlite.binding as llvm

    compiler = llvm.create_mcjit_compiler(module, machine)
    compiler.finalize_object()
    return {name: compiler.get_function_address(name) for name in names}, compiler


def link(content: bytes) -> tuple[bytes, dict[str, int]]:
    """An x86-64 object file (ELF) as one block of code that runs wherever it lies at a page's begin, and the offsets of its functions.

    Raises:
        NotLinkable: it names a symbol that it does not hold, or asks for a relocation of another kind.
    """
    (at,), (size, count, _) = struct.unpack_from("<Q", content, 40), struct.unpack_from("<3H", content, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, at + number * size) for number in range(count)]
    code, bases = bytearray(), dict[int, int]()
    for number, (_, kind, flags, _, offset, length, _, _, align, _) in enumerate(sections):
        if kind == _PROGBITS and flags & _ALLOCATED:
            code += bytes(-len(code) % max(1, align))
            bases[number] = len(code)
            code += content[offset : offset + length]
    entries = dict[str, int]()
    for _, kind, _, _, offset, length, table, target, _, _ in sections:
        if kind != _RELA or target not in bases:
            continue
        symbols = sections[table]
        for place, info, addend in struct.iter_unpack("<QQq", content[offset : offset + length]):
            _, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", content, symbols[4] + (info >> 32) * symbols[9])
            if section not in bases or info & 0xFFFFFFFF not in (_PC32, _PLT32):
                raise NotLinkable(f"relocation {info & 0xFFFFFFFF} to section {section}")
            where = bases[target] + place
            struct.pack_into("<i", code, where, bases[section] + value + addend - where)
    for _, kind, _, _, offset, length, table, _, _, entry_bytes in sections:
        if kind != _SYMBOLS:
            continue
        names = sections[table]
        for start in range(offset, offset + length, entry_bytes):
            name_at, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", content, start)
            name = content[names[4] + name_at : content.index(b"\0", names[4] + name_at)].decode()
            if name in arguments.ARGUMENTS and section in bases:
                entries[name] = bases[section] + value
    if entries.keys() != arguments.ARGUMENTS.keys():
        raise NotLinkable("not all functions are there")
    return bytes(code), entries
