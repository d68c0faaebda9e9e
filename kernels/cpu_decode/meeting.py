"""Threads that run one step together wait for each other, in `emit`'s language: whoever comes counts, and goes on once all have come.

They look at the count again and again, as they meet every few microseconds. One that has looked long gives its processor to others: where there are
fewer processors than threads, or others use them, whoever is waited for would else wait for the end of a time slice.
"""

from __future__ import annotations

from llvmlite import ir

from kernels.cpu_decode.emit import I64, VOID, Code, Number, Variable

_LOOKS = 1 << 11  # before a processor is given away: some 30 us
_SCHED_YIELD = 24  # Linux's call on x86-64


def write_meeting(c: Code, *, gives_way: bool) -> None:
    """`meet`. counter: address of int64 [2], how many have come, and whether nobody waits any more (not 0); both 0 at first. parts: threads.
    gives_way: on Linux and x86-64, else they only look."""
    with c.function("meet", [I64] * 2) as (counter, parts), c.when(parts.compare(">", 1)):
        place, end = (c.b.inttoptr((counter + at).value, I64.as_pointer()) for at in (0, 8))
        before = Number(c, c.b.atomic_rmw("add", place, c.of(I64, 1).value, "seq_cst"))
        wanted, looks = (before // parts + 1) * parts, Variable(c, c.of(I64, 0))
        look, wait, after = (c.b.append_basic_block(name) for name in ("look", "wait", "after"))
        c.b.branch(look)
        c.b.position_at_end(look)
        found, ended = (Number(c, c.b.load_atomic(at, "acquire", 8, typ=I64)) for at in (place, end))
        waits = ended.compare("==", 0).choose(found, wanted)
        c.b.cbranch(waits.compare("<", wanted).value, wait, after)
        c.b.position_at_end(wait)
        if gives_way:
            c.intrinsic("llvm.x86.sse2.pause", VOID)
            looks.set(looks.get() + 1)
            with c.when(looks.get().compare(">", _LOOKS)):
                call = ir.FunctionType(I64, [I64])
                c.b.asm(call, "syscall", "={rax},{rax},~{rcx},~{r11},~{memory}", [c.of(I64, _SCHED_YIELD).value], True)
        c.b.branch(look)
        c.b.position_at_end(after)
