"""The store on disk: whole immutable run files under names that say what is in them, shared by every process of a host.

Layout of the folder: `store.json` (its format), `index.sqlite` (`engine.store.index`), `writer.lock`, `tmp/` (files being written), and in `runs/` a
folder a root with `root.json` (what the root stands for), `KEY.run` (coded) and `KEY.ids` (token ids alone).

Readers open files by name and take no lock; what they opened stays readable when another process evicts it. Writers take turns by the system's lock
on `writer.lock`, which is free when its holder is dead. A writer stages whole, synced files, and then, under the lock: removes what is evicted,
commits the index, renames the new files into place and syncs the folder. Killed anywhere, it leaves every run whole or missing, and no file that the
index does not count; a row without a file is a miss.

A run may refer to others of its root (`engine.store.runs`). Nothing evicts a run that another one refers to, and a reader that does not find such a run
as it was takes what refers to it for missing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from codec.errors import CodecError, NewerCode
from engine.errors import BadStore, CacheNotWritable, DiskFull, InvalidOption
from engine.files import stage_bytes, sweep, sync_folder, try_lock, write_bytes
from engine.hub.cache import is_disk_full
from engine.inputs import Fields, is_whole, named_path, read_json_object, shown
from engine.store.index import Entry, RunIndex
from engine.store.runs import (
    FORMAT,
    LABEL,
    MAX_DONORS,
    MAX_RUN_BYTES,
    PAGE_TOKENS,
    RUN_PAGES,
    RUN_TOKENS,
    Donor,
    PageKeys,
    Run,
    anchor_numbers,
    anchors_of,
    id_bytes,
    root_key,
)

DEFAULT_LIMIT_BYTES = 8 << 30
CODED, IDS = ".run", ".ids"

_MARKER, _INDEX, _LOCK, _TMP, _RUNS, _ROOT = "store.json", "index.sqlite", "writer.lock", "tmp", "runs", "root.json"
_BLOCK_BYTES = 4096  # what a file takes at least
_LOCK_WAIT_S, _LOCK_LOOK_S = 10.0, 0.005
MAX_CONTINUATIONS = 8
_MAX_TRIES = 4  # runs that begin with the same pages, looked into at a lookup
_Answer = TypeVar("_Answer")
_REMEDY = "name an empty folder, a new one, or a store of this version"


class Borrowed(NamedTuple):
    """What the pages of a run need of others. donors, needs: as of `Run`, with a number a page that there is. runs: the donors that were read, by their
    number; all that the pages asked for need are among them."""

    donors: tuple[Donor, ...]
    needs: tuple[int, ...]
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class StoredPrefix:
    """What a store holds of a text: coded pages [start_page, end_page), all there is before them taken for granted.

    spans: of these pages. keys: of the runs they lie in. borrowed: by a run's first page, of runs whose spans refer to others. first_pages: of
    the runs that hold the spans, by their keys. The bytes are the holder's own: no eviction takes them away.
    """

    start_page: int
    end_page: int
    spans: list[bytes]
    keys: list[bytes]
    borrowed: Mapping[int, Borrowed] = field(default_factory=dict)
    first_pages: Mapping[bytes, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens from the text's beginning to the last page's end."""
        return self.end_page * PAGE_TOKENS

    def borrows(self, page: int) -> bool:
        """Whether the span of a page of the text refers to other runs."""
        at = page - page % RUN_PAGES
        return at in self.borrowed and bool(self.borrowed[at].needs[page - at])


@dataclass(frozen=True)
class Continuation:
    """Tokens that followed a text in a stored one. key: of the run in which they begin. uses: how often that run was used, older uses counting less."""

    key: bytes
    token_ids: list[int]
    uses: float


@dataclass
class InsertReport:
    """What an insertion added: runs, their tokens and bytes, those that refer to other runs, and how many runs had to leave for them. whole: nothing
    was left out for want of room, or because what it continues or refers to left meanwhile."""

    runs: int = 0
    tokens: int = 0
    bytes: int = 0
    referring: int = 0
    evicted: int = 0
    whole: bool = True


@dataclass
class VerifyReport:
    """What a look at every file found. damaged: cannot be read as what their names say. unreachable: what they continue or refer to is gone. referring:
    runs that refer to others. unindexed: whole, but
    the index does not know them. missing: the index knows them, and there is no file. repaired: the first two were removed and the index made anew."""

    runs: int = 0
    tokens: int = 0
    bytes: int = 0
    referring: int = 0
    damaged: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    unindexed: int = 0
    missing: int = 0
    repaired: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.unreachable or self.unindexed or self.missing)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"sound": self.sound}


class RunStore:
    """A store folder, opened. Thread-safe.

    Args:
        folder: made if it does not exist; an existing one must be empty or a store.
        limit_bytes: what all runs together may take on disk; kept at every insertion, by evicting runs of the least value a byte.
        create: False takes existing stores only.
        to_look: for `describe` and `verify` without repair alone, so that a folder which may not be written to will do.

    Raises:
        BadStore: it is something else, or newer, or cannot be read. CacheNotWritable, DiskFull: as the names say.
    """

    def __init__(self, folder: str | Path, limit_bytes: int = DEFAULT_LIMIT_BYTES, *, create: bool = True, to_look: bool = False) -> None:
        if not is_whole(limit_bytes) or limit_bytes < 0:
            raise InvalidOption(f"a store cannot be limited to {shown(limit_bytes)} bytes", "give a whole number")
        self.folder, self.limit_bytes = named_path(folder, "store").absolute(), limit_bytes
        self._runs = str(self.folder / _RUNS)
        self.damaged = 0  # files that were met unreadable, and removed
        # two connections, so that a lookup never waits for this process's own writer
        self._mutex, self._write_mutex = threading.RLock(), threading.RLock()
        self._index: RunIndex | None = None
        self._write_index: RunIndex | None = None
        self._write_inode = 0
        self._index_damaged = False
        self.read_only = False
        """Whether the folder may not be written to. Whatever would, raises CacheNotWritable."""
        with self._disk_errors("be opened"):
            self._open(create and not to_look, to_look)

    def _open(self, create: bool, to_look: bool) -> None:
        folder, where = self.folder, f"the store {shown(str(self.folder), 200)[1:-1]}"
        if folder.exists() and not folder.is_dir():
            raise BadStore(f"{where} is no folder", _REMEDY)
        marker = folder / _MARKER
        if not marker.exists():
            if not create:
                raise BadStore(f"{where} is no store, or does not exist", "name the folder that was given as --store")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            strangers = [name for name in os.listdir(folder) if not name.startswith(".foretold-")]
            if strangers and not marker.exists():  # another process may be making it right now
                raise BadStore(f"{where} holds other files and is no store", _REMEDY)
            if not strangers:
                write_bytes(marker, json.dumps({"format": FORMAT}).encode() + b"\n", private=True)
        found = read_json_object(marker, BadStore, _REMEDY)
        version = Fields(found, f"{where}: {_MARKER}", BadStore, _REMEDY).integer("format", 1, 1 << 30)
        if version > FORMAT:
            raise BadStore(f"{where} was written by a newer version (format {version}, this program knows {FORMAT})", "update the program")
        if to_look and not self._may_write():
            self.read_only = True
            self._index = self._connected()
            return
        for name in (_TMP, _RUNS):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder / _TMP, os.W_OK) or not os.access(folder / _RUNS, os.W_OK):
            raise CacheNotWritable(f"{where} cannot be written to", "choose another folder, or mend its permissions")
        self._index = self._connected()

    def _may_write(self) -> bool:
        """Whether the folder, and what a writer changes in it, may be written to."""
        changed = [self.folder, *(self.folder / name for name in (_TMP, _RUNS, _INDEX, _LOCK))]
        return all(os.access(path, os.W_OK) for path in changed if path.exists())

    def _connected(self) -> RunIndex | None:
        """The index; None where it is damaged, and left for a writer to make anew."""
        path = self.folder / _INDEX
        if self.read_only and not path.exists():
            return None
        try:
            return RunIndex(path, read_only=self.read_only)
        except sqlite3.OperationalError as error:
            if self.read_only:
                remedy = "ask its owner for the right to read it, or copy the folder to where you may write"
                raise BadStore(f"the index {path} cannot be read: {error}", remedy) from error
            raise CacheNotWritable(
                f"the index {path} cannot be opened: {error}", "mend its permissions, free space, or try again"
            ) from error
        except sqlite3.DatabaseError:
            return None

    def close(self) -> None:
        """Give the index back. Lookups of whole runs go on without it."""
        with self._mutex:
            self._close_reader()
        with self._write_mutex:
            self._close_writer()

    def _close_reader(self) -> None:
        if self._index is not None:
            self._index.close()
        self._index = None

    def _close_writer(self) -> None:
        if self._write_index is not None:
            self._write_index.close()
        self._write_index = None

    # --- reading --------------------------------------------------------------------------------------------------------

    def roots(self) -> dict[bytes, dict[str, str]]:
        """Identities by root key, of all models and namespaces."""
        return self._ask(lambda index: index.roots()) or {}

    @property
    def totals(self) -> tuple[int, int]:
        """Runs and their bytes; zeros where the index is out of reach."""
        return self._ask(lambda index: index.totals) or (0, 0)

    def describe(self) -> dict[str, Any]:
        """Totals, and a row for every root, for reports."""
        runs, num_bytes = self.totals
        identities = self.roots()
        rows = []
        for root, count, coded, pages, size, used_at in self._ask(lambda index: index.by_root()) or []:
            identity = identities.get(root, {})
            rows.append(
                {
                    "root": root.hex(),
                    "namespace": identity.get("namespace", ""),
                    "label": identity.get(LABEL, ""),
                    "quality": identity.get("quality", ""),
                    "runs": count,
                    "coded_runs": coded,
                    "tokens": pages * PAGE_TOKENS,
                    "bytes": size,
                    "used_at": used_at,
                }
            )
        index_bytes = sum(file.stat().st_size for file in self.folder.glob(_INDEX + "*"))
        return {"folder": str(self.folder), "runs": runs, "bytes": num_bytes, "index_bytes": index_bytes, "roots": rows}

    def lookup(self, root: bytes, token_ids: Sequence[int], start_page: int = 0, *, referring: bool = False) -> StoredPrefix:
        """The longest stored prefix of a text, coded, its pages from `start_page` on.

        A run is taken only after its tokens were compared, to the page. A miss opens one file that is not there and asks the index once.
        referring: take spans that refer to other runs, too; else the prefix ends where the first of them begins.
        """
        keys = PageKeys(root, token_ids)
        at = start_page - start_page % RUN_PAGES
        spans: list[bytes] = []
        used: list[bytes] = []
        borrowed: dict[int, Borrowed] = {}
        read: dict[bytes, Run | None] = {}
        first_pages: dict[bytes, int] = {}
        while at < len(keys):
            run, key, pages = self._continuation(root, keys, at)
            if run is None or run.spans is None:
                break
            if run.donors:
                lent = self._borrowed(run, key, max(0, start_page - at), pages, read) if referring else None
                if lent is None:
                    pages = next((page for page in range(pages) if run.need(page)), pages)
                elif any(lent.needs):
                    borrowed[at] = lent
                    used += [donor.key for number, donor in enumerate(lent.donors) if number in lent.runs]
            if not pages:
                break
            spans += run.spans[:pages]
            used.append(key)
            read[key] = run
            first_pages[key] = at
            at += pages
            if pages < RUN_PAGES:
                break
        end = max(at, start_page)
        return StoredPrefix(start_page, end, spans[start_page % RUN_PAGES :], used, borrowed, first_pages)

    def _borrowed(self, run: Run, key: bytes, first: int, pages: int, read: dict[bytes, Run | None]) -> Borrowed | None:
        """What pages [first, pages) of a run need; None where some of it is not there as it was: the run is of no use then, and removed. read: donors
        by their keys, filled."""
        runs: dict[int, Run] = {}
        for number, donor in enumerate(run.donors):
            if not any(run.needs[page] >> number & 1 for page in range(first, pages)):
                continue
            if donor.key not in read:
                read[donor.key] = self._read(run.root, donor.key)
            found = read[donor.key]
            if found is None or found.digest != donor.digest:
                with suppress(OSError):
                    self._path(run.root, key, CODED).unlink()
                return None
            runs[number] = found
        return Borrowed(run.donors, run.needs[:pages], runs)

    def lenders(self, root: bytes, token_ids: Sequence[int], limit: int = MAX_DONORS) -> list[Run]:
        """Coded runs of a root that have stretches of a run's tokens, those that share most first, with the runs before and behind them where the
        stretch seems to go on there. Each has spans that refer to nothing; the caller compares tokens."""
        found: dict[bytes, Run] = {}
        for key in self._ask(lambda index: index.lenders(anchor_numbers(root, token_ids, every=True), limit // 2)) or []:
            run = self._read(root, key)
            if run is None:
                continue
            neighbours = [run.parent] if run.parent != root else []
            neighbours += [after for after, coded, _ in self._ask(lambda index, key=key: index.following(key, 2)) or [] if coded]  # type: ignore[misc]
            found.setdefault(key, run)
            for each in neighbours:
                if each not in found and (other := self._read(root, each)) is not None:
                    found[each] = other
        return list(found.values())

    def can_refer(self, root: bytes, key: bytes) -> bool:
        """Whether a run that is about to be stored under a name may refer to others: nothing hangs on it yet, so no two runs can hang on each other."""
        return not (self._ask(lambda index: index.is_needed(key)) or self._has(root, key, IDS))

    def continuations(self, root: bytes, token_ids: Sequence[int], limit: int = MAX_CONTINUATIONS) -> list[Continuation]:
        """What followed a text in the stored ones, to the end of the run in which it ends and of the one behind; the most valuable first.

        At most `limit` runs that continue the text's last whole run are looked into.
        """
        keys, at = PageKeys(root, token_ids), len(token_ids) // RUN_TOKENS * RUN_PAGES
        parent, tail = keys[at - 1] if at else root, id_bytes(token_ids[at * PAGE_TOKENS :])
        found = []
        for key, coded, uses in self._ask(lambda index: index.following(parent, limit)) or []:
            run = self._read(root, key, CODED if coded else IDS)
            if run is None or run.parent != parent or run.start_page != at or not run.ids.startswith(tail) or len(run.ids) == len(tail):
                continue
            ids = run.token_ids[len(tail) // 4 :]
            for after, after_coded, _ in self._ask(lambda index, key=key: index.following(key, 1)) or []:  # type: ignore[misc]
                behind = self._read(root, after, CODED if after_coded else IDS)
                ids += behind.token_ids if behind is not None and behind.parent == key else []
            found.append(Continuation(key, ids, uses))
        return found

    def keys_of(self, root: bytes, token_ids: Sequence[int]) -> list[bytes]:
        """The names of the runs that a text of whole runs lies in."""
        return PageKeys(root, token_ids)[RUN_PAGES - 1 :: RUN_PAGES]

    def known_pages(self, root: bytes, token_ids: Sequence[int], *, coded: bool = True) -> int:
        """How many whole runs' pages of a text are stored already (with or without KV), from its beginning; no file is read."""
        keys, pages = PageKeys(root, token_ids), 0
        for at in range(RUN_PAGES, len(keys) + 1, RUN_PAGES):
            suffixes = (CODED,) if coded else (CODED, IDS)
            if not any(self._has(root, keys[at - 1], suffix) for suffix in suffixes):
                break
            pages = at
        return pages

    def _continuation(self, root: bytes, keys: PageKeys, at: int) -> tuple[Run | None, bytes, int]:
        """The coded run that holds most pages of the text from page `at`, its name, and how many."""
        parent = keys[at - 1] if at else root
        if at + RUN_PAGES <= len(keys):
            key = keys[at + RUN_PAGES - 1]
            run = self._read(root, key)
            if run is not None:
                if run.parent == parent and run.ids == keys.ids(at, at + RUN_PAGES):
                    return run, key, RUN_PAGES
                self._doubt(run, key)
        some = keys[at : at + RUN_PAGES - 1]
        if not some:
            return None, b"", 0
        found = self._ask(lambda index: index.holding(some)) or []
        for number, key, coded in found[:_MAX_TRIES]:
            pages = number + 1
            run = self._read(root, key) if coded else None
            if run is not None:
                wanted = keys.ids(at, at + pages)
                if run.parent == parent and run.start_page == at and run.ids[: len(wanted)] == wanted:
                    return run, key, pages
                self._doubt(run, key)
        return None, b"", 0

    def _path(self, root: bytes, key: bytes, suffix: str) -> Path:
        return Path(self._name(root, key, suffix))

    def _name(self, root: bytes, key: bytes, suffix: str) -> str:
        """The same as text: a Path takes as long as reading the file does, and each run of a long text is asked for."""
        return f"{self._runs}/{root.hex()}/{key.hex()}{suffix}"

    def _has(self, root: bytes, key: bytes, suffix: str) -> bool:
        """Whether a file of that name is there; it is not looked into."""
        try:
            return stat.S_ISREG(os.lstat(self._name(root, key, suffix)).st_mode)
        except OSError:
            return False

    def _read(self, root: bytes, key: bytes, suffix: str = CODED) -> Run | None:
        """The run of a name; None where there is none, or only a damaged one, which is removed."""
        path = self._name(root, key, suffix)
        try:
            descriptor = os.open(
                path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
            )
        except OSError:
            return None
        try:
            run = _parsed(descriptor, digest=False)
            if run.root == root and run.coded == (suffix == CODED):
                return run
        except NewerCode:
            return None
        except (CodecError, OSError, ValueError, MemoryError):
            pass
        finally:
            os.close(descriptor)
        self.damaged += 1
        with suppress(OSError):
            os.unlink(path)
        return None

    def _doubt(self, run: Run, key: bytes) -> None:
        """A coded run was read under this name and is not what was looked for: remove the file if it has no right to the name."""
        if run.keys[-1] != key:
            self.damaged += 1
            with suppress(OSError):
                self._path(run.root, key, CODED).unlink()

    def _ask(self, question: Callable[[RunIndex], _Answer]) -> _Answer | None:
        """What the index answers; None where it cannot."""
        with self._mutex:
            if self._index is None:
                return None
            try:
                return question(self._index)
            except sqlite3.OperationalError:  # busy: it may answer again
                return None
            except sqlite3.DatabaseError:
                self._close_reader()
                return None

    # --- writing --------------------------------------------------------------------------------------------------------

    def insert(
        self,
        identity: Mapping[str, str],
        token_ids: Sequence[int],
        spans: Sequence[bytes | None],
        first_page: int = 0,
        saved_token_s: float = 0.0,
        borrowed: Mapping[int, tuple[tuple[Donor, ...], tuple[int, ...]]] | None = None,
    ) -> InsertReport:
        """Keep pages of a text: those from `first_page` on, a multiple of RUN_PAGES, what comes before being stored.

        identity: what the root stands for, its namespace included. spans: of each page; a run with a None among its pages keeps ids alone.
        saved_token_s: seconds a token that restoring takes less than computing, as measured on this machine. borrowed: by a run's first page, its
        donors and needs (`Run`), of runs whose spans refer to others.

        Runs that are stored already are left as they are; one
        whose ids alone are stored is replaced, and a shorter run that a new one contains is removed.

        Raises:
            DiskFull, CacheNotWritable, BadStore: as the names say; what was added is whole.
        """
        if first_page % RUN_PAGES or (first_page + len(spans)) * PAGE_TOKENS > len(token_ids):
            raise ValueError(f"{len(spans)} spans from page {first_page} on do not fit {len(token_ids)} tokens")
        root, keys = root_key(identity), PageKeys(root_key(identity), token_ids)
        runs = []
        for at in range(first_page, first_page + len(spans), RUN_PAGES):
            some = spans[at - first_page : at - first_page + RUN_PAGES]
            ids = keys.ids(at, at + len(some))
            coded = tuple(span for span in some if span is not None)
            whole = len(coded) == len(some)
            donors, needs = (borrowed or {}).get(at, ((), ())) if whole else ((), ())
            donors, needs = (donors, needs) if any(needs) else ((), ())
            run = Run(root, keys[at - 1] if at else root, at, ids, coded if whole else None, donors, needs)
            kept_as = (CODED,) if run.coded else (CODED, IDS)
            if not any(self._has(root, keys[at + len(some) - 1], suffix) for suffix in kept_as):
                runs.append(run)
        report = InsertReport()
        staged: list[tuple[Run, Path, Entry]] = []
        with self._disk_errors("be written to"):
            try:
                for run in runs:
                    data = run.to_bytes()
                    path = stage_bytes(self.folder / _TMP, data)
                    saved_s = saved_token_s * run.num_tokens if run.coded else 0.0
                    entry = Entry(root, run.keys[-1], run.parent, run.start_page, run.num_pages, _on_disk(len(data)), run.coded, saved_s)
                    staged.append((run, path, entry))
                if staged:
                    with self._writer() as index:
                        self._commit(index, identity, staged, saved_token_s, report)
                    sweep(self.folder / _TMP)
            finally:
                for _, path, _ in staged:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
        return report

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a request's use of runs. What cannot be counted now is not counted."""
        with self._write_mutex, suppress(sqlite3.Error):
            if keys and self._write_index is not None:
                with self._write_index.writing():
                    self._write_index.touch(keys, time.time())

    def shrink(self, limit_bytes: int) -> int:
        """Evict runs until all take at most so many bytes; returns how many left. Raises as `insert`."""
        with self._disk_errors("be written to"), self._writer() as index, index.writing():
            return self._evict(index, limit_bytes, set())

    def delete(self, namespace: str) -> int:
        """Remove all runs of a namespace, of whatever models; returns how many. Raises as `insert`."""
        removed = 0
        with self._disk_errors("be written to"), self._writer() as index:
            for root, identity in index.roots().items():
                if identity.get("namespace") == namespace:
                    removed += sum(1 for _ in index.entries(root))
                    shutil.rmtree(self.folder / _RUNS / root.hex(), ignore_errors=True)
                    with index.writing():
                        index.drop_root(root)
        return removed

    def _commit(
        self,
        index: RunIndex,
        identity: Mapping[str, str],
        staged: list[tuple[Run, Path, Entry]],
        saved_token_s: float,
        report: InsertReport,
    ) -> None:
        """Put staged files into place; see the module for the order."""
        root, folder = staged[0][2].root, self.folder / _RUNS / staged[0][2].root.hex()
        if not (folder / _ROOT).exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            described = {"identity": dict(identity), "saved_token_s": saved_token_s}
            write_bytes(folder / _ROOT, json.dumps(described).encode() + b"\n", private=True)
            sync_folder(folder.parent)
        parent = staged[0][0].parent
        if parent != root and not any(self._has(root, parent, suffix) for suffix in (CODED, IDS)):
            report.whole = False  # what they continue was evicted meanwhile
            return
        wanted = [(run, path, entry) for run, path, entry in staged if not self._has(root, entry.key, CODED)]
        keep = {parent} | {entry.parent for _, _, entry in wanted} | {entry.key for _, _, entry in wanted}
        keep |= {donor.key for run, _, _ in wanted for donor in run.donors}
        with index.writing():
            room = self.limit_bytes - sum(entry.num_bytes for _, _, entry in wanted)
            report.evicted = self._evict(index, max(0, room), keep)
            free = self.limit_bytes - index.totals[1]
            index.add_root(root, identity)
            now = time.time()
            placed = []
            for run, path, entry in wanted:
                if entry.num_bytes > free or (run.donors and not self._may_refer(index, run, entry.key)):
                    report.whole = False
                    break
                free -= entry.num_bytes
                shorter = [key for key, coded in index.known(run.keys[:-1]).items() if entry.coded or not coded]
                lent = {donor.key for donor in run.donors}
                shorter = [key for key in shorter if key not in lent and not index.is_needed(key)]  # runs refer to it
                for key in shorter:
                    self._unlink(root, key)
                index.drop(shorter)
                index.add(entry, run.keys, now, donors=[donor.key for donor in run.donors], anchors=anchors_of(run))
                report.referring += bool(run.donors)
                placed.append((path, entry))
        for path, entry in placed:
            os.replace(path, self._path(root, entry.key, CODED if entry.coded else IDS))
            if entry.coded:
                with suppress(OSError):
                    self._path(root, entry.key, IDS).unlink(missing_ok=True)
            report.runs += 1
            report.tokens += entry.num_pages * PAGE_TOKENS
            report.bytes += entry.num_bytes
        if placed:
            sync_folder(folder)

    def _may_refer(self, index: RunIndex, run: Run, key: bytes) -> bool:
        """Whether a run's donors are there as they were, and nothing hangs on the run; under the writer's lock."""
        if index.is_needed(key) or len(index.known([donor.key for donor in run.donors])) != len(run.donors):
            return False
        found = [self._read(run.root, donor.key) for donor in run.donors]
        return all(own is not None and own.digest == donor.digest for own, donor in zip(found, run.donors, strict=True))

    def _evict(self, index: RunIndex, limit_bytes: int, keep: set[bytes]) -> int:
        """Remove the runs of the least value until the rest takes at most so many bytes, or nothing more may leave; inside a transaction."""
        left = 0
        if index.totals[1] > limit_bytes:
            index.bring_back(time.time())
        while index.totals[1] > limit_bytes:
            worst = index.worst(keep)
            if worst is None:
                break
            self._unlink(worst.root, worst.key)
            index.drop([worst.key])
            left += 1
        return left

    def _unlink(self, root: bytes, key: bytes) -> None:
        for suffix in (CODED, IDS):
            with suppress(FileNotFoundError):
                self._path(root, key, suffix).unlink()

    @contextmanager
    def _writer(self) -> Iterator[RunIndex]:
        """Be the only writer, with an index that is the folder's own and whole."""
        if self.read_only:
            raise CacheNotWritable(
                f"the store {shown(str(self.folder), 200)[1:-1]} was opened to be read", "mend its permissions, or copy it"
            )
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with self._write_mutex:
            descriptor = os.open(self.folder / _LOCK, flags, 0o600)
            try:
                looks = 0
                while not try_lock(descriptor):
                    looks += 1  # not the clock: while the machine stands still, whoever holds the lock has no time either
                    if looks * _LOCK_LOOK_S > _LOCK_WAIT_S:
                        raise CacheNotWritable(f"another process has been writing to {self.folder} for {_LOCK_WAIT_S:.0f} s", "try again")
                    time.sleep(_LOCK_LOOK_S)
                yield self._sound_index()
            except sqlite3.OperationalError as error:
                raise DiskFull(
                    f"the store's index {self.folder / _INDEX} cannot be written: {error}", "free space, or try again"
                ) from error
            except sqlite3.DatabaseError as error:
                self._close_writer()
                raise BadStore(
                    f"the store's index {self.folder / _INDEX} is damaged: {error}", "it is made anew at the next use"
                ) from error
            finally:
                os.close(descriptor)

    def _sound_index(self) -> RunIndex:
        """The index, opened again where another process replaced it, made anew where it is damaged or gone; under the writer's lock."""
        path = self.folder / _INDEX
        if self._write_index is not None and (not path.exists() or path.stat().st_ino != self._write_inode):
            self._close_writer()
        if self._write_index is None:
            self._write_index = None if self._index_damaged else self._connected()
            if self._write_index is None:
                RunIndex.remove(path)
                self._write_index, self._index_damaged = self._connected(), False
            if self._write_index is None:
                raise BadStore(f"the store's index {path} cannot be opened", "try again")
            self._write_inode = path.stat().st_ino
            with self._mutex:
                self._close_reader()
                self._index = self._connected()
        if self._write_index.totals[0] == 0 and self._root_folders():
            self._rebuild(self._write_index, repair=True)
        return self._write_index

    # --- looking at everything ------------------------------------------------------------------------------------------

    def _root_folders(self) -> list[Path]:
        """A folder a root; what else lies between them, as file managers and file systems leave, is none of ours."""
        if self.read_only and not (self.folder / _RUNS).exists():
            return []
        with os.scandir(self.folder / _RUNS) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read every file. repair: remove what is damaged or unreachable, and make the index anew. Raises as `insert`.

        What another process writes meanwhile to a folder that this one may not write to may be counted among what the index does not know."""
        if self.read_only and not repair:
            with self._disk_errors("be verified"), self._mutex:
                return self._rebuild(self._index, repair=False)
        with self._disk_errors("be verified"), self._writer() as index:
            report = self._rebuild(index, repair=False)
            if repair and not report.sound:
                self._rebuild(index, repair=True)
                report.repaired = True
            return report

    def _rebuild(self, index: RunIndex | None, *, repair: bool) -> VerifyReport:
        """Look at every file; with `repair`, remove what is of no use and fill the index with the rest. What the index knew of uses is kept.

        index: None where it is damaged and only looked for."""
        report, now = VerifyReport(), time.time()
        indexed = {} if index is None else {entry.key: entry.num_bytes for entry in index.entries()}
        uses = index.uses() if repair and index is not None else {}
        found: list[_Found] = []
        for folder in sorted(self._root_folders()):
            self._check_readable(folder / _ROOT)
            described = _described(folder)
            good: list[_Found] = []
            for path in sorted(folder.iterdir()):
                if path.suffix not in (CODED, IDS):
                    continue
                name = f"{folder.name}/{path.name}"
                try:
                    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                    try:
                        run, num_bytes, written = _parsed(descriptor), os.fstat(descriptor).st_size, os.fstat(descriptor).st_mtime
                    finally:
                        os.close(descriptor)
                    keys = run.keys
                    whole = (run.root.hex(), keys[-1].hex(), run.coded) == (folder.name, path.stem, path.suffix == CODED)
                except NewerCode:
                    continue
                except (CodecError, OSError, ValueError, MemoryError):
                    self._check_readable(path)
                    whole = False
                if not whole or described is None:
                    report.damaged.append(name)
                    if repair:
                        _remove(path)
                    continue
                identity, saved_token_s = described
                saved_s = saved_token_s * run.num_tokens if run.coded else 0.0
                entry = Entry(run.root, keys[-1], run.parent, run.start_page, run.num_pages, _on_disk(num_bytes), run.coded, saved_s)
                good.append(_Found(entry, keys, written, identity, run.donors, run.digest, anchors_of(run)))
            reachable = _reachable(good, bytes.fromhex(folder.name) if described is not None else b"")
            for item in sorted(good, key=lambda item: (item.entry.start_page, item.entry.coded)):
                entry = item.entry
                if entry.key in reachable:
                    found.append(item)
                else:
                    name = f"{folder.name}/{entry.key.hex()}{CODED if entry.coded else IDS}"
                    report.unreachable.append(name)
                    if repair:
                        self._unlink(entry.root, entry.key)
        report.runs = len(found)
        report.tokens = sum(item.entry.num_pages * PAGE_TOKENS for item in found)
        report.bytes = sum(item.entry.num_bytes for item in found)
        report.referring = sum(bool(item.donors) for item in found)
        held = {item.entry.key for item in found}
        report.unindexed, report.missing = len(held - indexed.keys()), len(indexed.keys() - held)
        if repair:
            assert index is not None
            with index.writing():
                index.drop(list(indexed))
                for item in found:
                    index.add_root(item.entry.root, item.identity)
                    count, used_at = uses.get(item.entry.key, (1.0, min(item.written, now)))
                    donors = [donor.key for donor in item.donors]
                    index.add(item.entry, item.keys, used_at, count, donors=donors, anchors=item.anchors)
        return report

    def _check_readable(self, path: Path) -> None:
        """Raises PermissionError for a file of another user's store: not being read, it is not known to be damaged."""
        if self.read_only and path.exists() and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, f"{path.parent.name}/{path.name} may not be read")

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        """The system's errors under this package's names."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull(f"no room left for the store {self.folder}", "free space, or choose another folder") from error
            where = f"the store {shown(str(self.folder), 200)[1:-1]}"
            if self.read_only:
                raise BadStore(f"{where} cannot {what}: {error.strerror or error}", "ask its owner for the right to read it") from error
            raise CacheNotWritable(f"{where} cannot {what}: {error.strerror or error}", "choose another folder") from error
        except sqlite3.DatabaseError as error:
            if not self.read_only:
                raise
            raise BadStore(
                f"the store's index {self.folder / _INDEX} cannot be read: {error}", "verify it as its owner, with --repair"
            ) from error
        except ValueError as error:
            if "null" in str(error) or "embedded" in str(error):
                raise BadStore(f"{shown(str(self.folder), 200)} is no folder's name", _REMEDY) from error
            raise


class _Found(NamedTuple):
    """A whole file: what the index is told of it. written: seconds since the epoch."""

    entry: Entry
    keys: list[bytes]
    written: float
    identity: dict[str, str]
    donors: tuple[Donor, ...]
    digest: bytes
    anchors: list[int]


def _reachable(items: Sequence[_Found], root: bytes) -> set[bytes]:
    """Keys of the runs of a root all of whose ancestors and donors are there, the donors as they were."""
    digests = {item.entry.key: item.digest for item in items if item.entry.coded}
    known, left = {root}, list(items)
    while left:
        able = [
            item
            for item in left
            if item.entry.parent in known and all(d.key in known and digests.get(d.key) == d.digest for d in item.donors)
        ]
        if not able:
            break
        known |= {item.entry.key for item in able}
        chosen = {id(item) for item in able}
        left = [item for item in left if id(item) not in chosen]
    return known


def _remove(path: Path) -> None:
    """Remove a file, or a folder that has a file's name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def byte_count(text: str) -> int:
    """Bytes of "500M", "8G" or a plain number. Raises InvalidOption."""
    unit = text[-1:].upper()
    digits, factor = (text[:-1], 1 << 10 * ("KMGT".index(unit) + 1)) if unit and unit in "KMGT" else (text, 1)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 15:
        raise InvalidOption(f"{text!r} is no number of bytes", "give a whole number, or one with K, M, G or T")
    return int(digits) * factor


def _on_disk(num_bytes: int) -> int:
    """What a file of so many bytes takes, in whole blocks."""
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _parsed(descriptor: int, *, digest: bool = True) -> Run:
    """The run in an open file; digest: see `Run.from_bytes`.

    Raises the codec's errors, OSError, and ValueError when it is no regular file or too large."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RUN_BYTES:
        raise ValueError("no run")
    data = os.read(descriptor, status.st_size + 1)
    if len(data) != status.st_size:  # it grew, or the system gave less than all
        parts = [data]
        while part := os.read(descriptor, MAX_RUN_BYTES):
            parts.append(part)
            if sum(map(len, parts)) > MAX_RUN_BYTES:
                raise ValueError("no run")
        data = b"".join(parts)
    return Run.from_bytes(data, digest=digest)


def _described(folder: Path) -> tuple[dict[str, str], float] | None:
    """What a root folder's description says: its identity and the seconds a token saves; None where it is not that root's."""
    try:
        fields = Fields(read_json_object(folder / _ROOT, BadStore, _REMEDY), _ROOT, BadStore, _REMEDY)
        identity = {str(name): str(value) for name, value in fields.mapping("identity").items()}
        saved_token_s = fields.number("saved_token_s", 0.0, 1e6, 0.0)
        return (identity, saved_token_s) if root_key(identity).hex() == folder.name else None
    except (BadStore, TypeError, ValueError):
        return None
