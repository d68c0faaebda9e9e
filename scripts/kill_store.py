"""Kill writers of a store at random moments, and at every system call, and check that each stored run is whole or missing.

    python scripts/kill_store.py --kills 1000 [--folder DIR] [--seed N] [--json-out FILE]

A writer is a forked process that stores texts under a limit that makes it evict; half of the texts repeat, behind another beginning, what others end
with, and their runs refer to those of the others. Half of the writers are killed by SIGKILL after a random time, half
kill themselves just before a random one of their renames, removals, syncs and commits. After each, the parent looks up every text that may have been
stored and compares what comes back, byte for byte, and that what a run refers to has the very bytes it was written against (a run that was evicted is
written with others the next time); every hundred kills it reads all files (`verify`).
Prints one JSON object; exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.store.index import RunIndex
from engine.store.runs import PAGE_TOKENS, RUN_PAGES, Donor, PageKeys, page_keys, root_key
from engine.store.store import RunStore, StoredPrefix

IDENTITY = {"target": "killed", "namespace": "default"}
LIMIT_BYTES = 24 * 4096
_TEXTS = 12
_SALT_BYTES = 4


def text(number: int) -> list[int]:
    """Token ids of a text; one half of them share their first pages, and then some share more; the others are those behind another beginning."""
    ids: list[int] = []
    other, same = divmod(number, _TEXTS // 2)
    for seed, pages in ((7 + other, 5), (1000 + same % 4, 3), (100 + same, 3)):
        generator = random.Random(seed)
        ids += [generator.randrange(49_152) for _ in range(pages * PAGE_TOKENS)]
    return ids


def spans(root: bytes, ids: list[int]) -> list[bytes]:
    """What is stored for every page begins with bytes that only this text has there."""
    return [key * 20 for key in page_keys(root, ids)]


def as_written(root: bytes, ids: list[int], found: StoredPrefix) -> bool:
    """Whether a stored prefix is that of the text, and what its spans refer to has the digest that they name."""
    for page, (data, expected) in enumerate(zip(found.spans, spans(root, ids)[: found.end_page], strict=True)):
        at = page - page % RUN_PAGES
        named = data[len(expected) + _SALT_BYTES :]
        if not data.startswith(expected) or bool(named) != found.borrows(page):
            return False
        if named and [run.digest for run in found.borrowed[at].runs.values()] != [named]:
            return False
    return True


def loans(store: RunStore, root: bytes, ids: list[int]) -> dict[int, tuple[tuple[Donor, ...], tuple[int, ...]]]:
    """For each run the donor that has most of its tokens: all pages but the first need it."""
    found: dict[int, tuple[tuple[Donor, ...], tuple[int, ...]]] = {}
    keys = PageKeys(root, ids)
    for at in range(0, len(keys), RUN_PAGES):
        end = min(at + RUN_PAGES, len(keys))
        donors = store.lenders(root, ids[at * PAGE_TOKENS : end * PAGE_TOKENS], 2)
        donors = [run for run in donors if run.coded and not run.donors and run.keys[-1] not in keys]
        if donors and store.can_refer(root, keys[end - 1]):
            found[at] = ((Donor(donors[0].keys[-1], donors[0].digest),), (0, *[1] * (end - at - 1)))
    return found


def write(folder: Path, seed: int, end_at: int | None) -> None:
    """Store texts until killed; with `end_at`, end before that many of the steps that change the folder."""
    steps = 0

    def count(real: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == end_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return counted

    if end_at is not None:
        os.replace, os.unlink, os.fsync = count(os.replace), count(os.unlink), count(os.fsync)  # type: ignore[assignment]
        RunIndex.add, RunIndex.drop = count(RunIndex.add), count(RunIndex.drop)  # type: ignore[method-assign]
        real_connect = sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> Any:
                return count(super().execute)(*args) if args[0] == "COMMIT" else super().execute(*args)

        sqlite3.connect = lambda *args, **options: real_connect(*args, factory=Connection, **options)  # type: ignore[assignment]
    generator = random.Random(seed)
    store, root = RunStore(folder, LIMIT_BYTES), root_key(IDENTITY)
    while True:
        ids = text(generator.randrange(_TEXTS))
        found = store.lookup(root, ids, referring=True)
        store.touch(found.keys)
        borrowed = loans(store, root, ids)
        salt, written = generator.randbytes(_SALT_BYTES), spans(root, ids)
        for page, data in enumerate(written):
            donors, needs = borrowed.get(page - page % RUN_PAGES, ((), ()))
            written[page] = data + salt + (donors[0].digest if donors and needs[page % RUN_PAGES] else b"")
        store.insert(IDENTITY, ids, written, 0, 1e-3, borrowed)
        if generator.random() < 0.1:
            store.shrink(LIMIT_BYTES // 2)


def kill_writers(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """See the module; returns the figures."""
    generator = random.Random(seed)
    root = root_key(IDENTITY)
    figures: dict[str, Any] = {
        "kills": 0,
        "wrong": [],
        "unindexed": 0,
        "missing_rows": 0,
        "pages_found": 0,
        "pages_referring": 0,
        "damaged": 0,
        "leftovers": 0,
    }
    for number in range(kills):
        end_at = None if number % 2 else generator.randrange(1, 60)
        child = os.fork()
        if not child:
            try:
                write(folder, generator.randrange(1 << 30), end_at)
            finally:
                os._exit(1)
        if end_at is None:
            time.sleep(generator.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            figures["wrong"].append(f"writer {number} ended by itself")
        figures["kills"] += 1
        store = RunStore(folder, LIMIT_BYTES)
        for which in range(_TEXTS):
            ids = text(which)
            found = store.lookup(root, ids, referring=True)
            figures["pages_found"] += found.end_page
            figures["pages_referring"] += sum(found.borrows(page) for page in range(found.end_page))
            if not as_written(root, ids, found):
                figures["wrong"].append(f"text {which} after kill {number}")
        figures["damaged"] += store.damaged
        if number % 100 == 99 or number == kills - 1:
            report = store.verify()
            figures["unindexed"] += report.unindexed
            figures["missing_rows"] += report.missing
            figures["damaged"] += len(report.damaged) + len(report.unreachable)
            on_disk = sum(-(-path.stat().st_size // 4096) * 4096 for path in (folder / "runs").rglob("*.run"))
            if on_disk > LIMIT_BYTES:
                figures["wrong"].append(f"{on_disk} bytes after kill {number}")
        store.close()
    figures["leftovers"] = len(list((folder / "tmp").iterdir()))
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill writers of a store and check what they leave.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to make the store; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        figures = kill_writers(args.folder or Path(temporary) / "store", args.kills, args.seed)
    line = json.dumps(figures | {"seed": args.seed})
    print(line)
    if args.json_out:
        args.json_out.write_text(line + "\n", encoding="utf-8")
    return 1 if figures["wrong"] or figures["damaged"] or figures["unindexed"] else 0


if __name__ == "__main__":
    sys.exit(main())
