"""The store's index: what each run weighs, when it was used, and which pages lie inside it; which runs it
refers to, and by which n-grams texts that repeat some of it find it. SQLite; all of it can be made again from the run files."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INDEX_VERSION = 1
HALF_LIFE_S = 60.0
"""After so long a use counts half: nearly LRU. Longer ones lost replays of agents (docs/trie.md: an hour keeps what was busy once)."""

_BUSY_S = 5.0
_SCHEMA = """
CREATE TABLE roots(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, identity TEXT NOT NULL);
CREATE TABLE runs(
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, root INTEGER NOT NULL, parent BLOB NOT NULL, start_page INTEGER NOT NULL,
    num_pages INTEGER NOT NULL, num_bytes INTEGER NOT NULL, coded INTEGER NOT NULL, saved_s REAL NOT NULL, uses REAL NOT NULL,
    used_at REAL NOT NULL, value REAL NOT NULL);
CREATE INDEX runs_by_parent ON runs(parent);
CREATE INDEX runs_by_value ON runs(value);
CREATE INDEX runs_by_root ON runs(root);
CREATE TABLE pages(prefix INTEGER NOT NULL, run INTEGER NOT NULL, PRIMARY KEY(prefix, run)) WITHOUT ROWID;
CREATE INDEX pages_by_run ON pages(run);
CREATE TABLE totals(runs INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals VALUES(0, 0);
CREATE TRIGGER run_added AFTER INSERT ON runs BEGIN UPDATE totals SET runs = runs + 1, bytes = bytes + NEW.num_bytes; END;
CREATE TRIGGER run_removed AFTER DELETE ON runs BEGIN
    UPDATE totals SET runs = runs - 1, bytes = bytes - OLD.num_bytes;
    DELETE FROM pages WHERE run = OLD.id;
END;
"""

# made where an index of a version before references lacks them
_REFERENCES = """
CREATE TABLE IF NOT EXISTS donors(donor BLOB NOT NULL, run INTEGER NOT NULL, PRIMARY KEY(donor, run)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS donors_by_run ON donors(run);
CREATE TABLE IF NOT EXISTS anchors(anchor INTEGER NOT NULL, run INTEGER NOT NULL, PRIMARY KEY(anchor, run)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS anchors_by_run ON anchors(run);
CREATE TRIGGER IF NOT EXISTS run_left AFTER DELETE ON runs BEGIN
    DELETE FROM donors WHERE run = OLD.id;
    DELETE FROM anchors WHERE run = OLD.id;
END;
"""


@dataclass(frozen=True)
class Entry:
    """A run as the index knows it. num_bytes: on disk, in whole blocks. saved_s: seconds that restoring it takes less than computing it anew."""

    root: bytes
    key: bytes
    parent: bytes
    start_page: int
    num_pages: int
    num_bytes: int
    coded: bool
    saved_s: float = 0.0


def value_of(uses: float, used_at: float, saved_s: float, num_bytes: int) -> float:
    """log2 of P(reuse) x seconds saved / bytes, up to a term that all runs share at any time, so that the order stays as time passes.

    P(reuse) is proportional to the uses, each counting half after HALF_LIFE_S: log2(uses) - (now - used_at) / HALF_LIFE_S.
    """
    return math.log2(max(uses, 1e-9)) + math.log2(max(saved_s, 1e-6) / max(num_bytes, 1)) + used_at / HALF_LIFE_S


def decayed(uses: float, used_at: float, now: float) -> float:
    """What so many uses count now."""
    return float(uses * 2.0 ** (-max(0.0, now - used_at) / HALF_LIFE_S))


def prefix_of(key: bytes) -> int:
    """A page's key as the number under which the index knows it; equal numbers are told apart by comparing tokens."""
    return int.from_bytes(key[:8], "little", signed=True)


class RunIndex:
    """The index in one file. Not thread-safe: the store holds a lock around it.

    read_only: the file is there, and neither it nor its folder is written to.

    Raises:
        sqlite3.Error: the file cannot be opened, or is none of this version; `remove` and a scan make a new one.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only:
            self._db = _opened_to_read(path)
            try:
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version != INDEX_VERSION or not self._whole():
                    raise sqlite3.DatabaseError(f"an index of version {version}, or a damaged one")
            except BaseException:
                self._db.close()
                raise
            return
        # never opened and closed where it exists: that drops this process's POSIX locks on it, and another process, which then believes to be the
        # last to close it, deletes the log that we write to (sqlite.org/howtocorrupt.html, section 2.2)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600))
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            with self.writing():
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
                        raise sqlite3.DatabaseError("a database of something else")
                    for statement in _statements(_SCHEMA):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={INDEX_VERSION}")
                elif version != INDEX_VERSION:
                    raise sqlite3.DatabaseError(f"an index of version {version}")
            if not self._whole():
                raise sqlite3.DatabaseError("the index is damaged")
            if not self._refers():
                with self.writing():
                    for statement in _statements(_REFERENCES):
                        self._db.execute(statement)
        except BaseException:
            self._db.close()
            raise

    def _whole(self) -> bool:
        """Whether the file holds this index's tables; pages of theirs may still be damaged, and are noticed when they are read."""
        try:
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return {"roots", "runs", "pages", "totals"} <= tables and self.totals[0] >= 0
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise  # busy is not damaged: made anew, it would be taken from under those who use it
            return False
        except (sqlite3.DatabaseError, TypeError):
            return False

    def _refers(self) -> bool:
        """Whether it has the tables of references."""
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'run_left'").fetchone() is not None

    def close(self) -> None:
        self._db.close()

    @staticmethod
    def remove(path: Path) -> None:
        """Delete an index with its log."""
        for name in (path.name, path.name + "-wal", path.name + "-shm"):
            with suppress(FileNotFoundError):
                path.with_name(name).unlink()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: everything in it, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    # --- reading --------------------------------------------------------------------------------------------------------

    @property
    def totals(self) -> tuple[int, int]:
        """Runs and their bytes."""
        runs, num_bytes = self._db.execute("SELECT runs, bytes FROM totals").fetchone()
        return int(runs), int(num_bytes)

    def roots(self) -> dict[bytes, dict[str, str]]:
        """Identities by root key."""
        return {bytes(key): json.loads(text) for key, text in self._db.execute("SELECT key, identity FROM roots")}

    def holding(self, keys: Sequence[bytes]) -> list[tuple[int, bytes, bool]]:
        """Runs that begin with the pages of these keys, the longest of the keys first: (which key, the run's key, whether coded)."""
        numbers = {prefix_of(key): i for i, key in enumerate(keys)}
        places = ",".join("?" * len(numbers))
        rows = self._db.execute(
            f"SELECT pages.prefix, runs.key, runs.coded FROM pages JOIN runs ON runs.id = pages.run WHERE prefix IN ({places}) LIMIT 64",
            list(numbers),
        )
        return sorted(((numbers[prefix], bytes(key), bool(coded)) for prefix, key, coded in rows), reverse=True)

    def following(self, parent: bytes, limit: int) -> list[tuple[bytes, bool, float]]:
        """Runs that continue a run or begin a root's texts, those of most value first: (key, whether coded, uses when it was used last)."""
        rows = self._db.execute("SELECT key, coded, uses FROM runs WHERE parent = ? ORDER BY value DESC LIMIT ?", [parent, limit])
        return [(bytes(key), bool(coded), float(uses)) for key, coded, uses in rows]

    def lenders(self, anchors: Iterable[int], limit: int) -> list[bytes]:
        """Keys of the runs that have most of these anchors, of equal ones those used last."""
        numbers = list(anchors)
        counts: dict[bytes, tuple[int, float]] = {}
        for at in range(0, len(numbers), 500):
            some = numbers[at : at + 500]
            rows = self._db.execute(
                "SELECT runs.key, COUNT(*), runs.used_at FROM anchors JOIN runs ON runs.id = anchors.run "
                f"WHERE anchor IN ({','.join('?' * len(some))}) GROUP BY anchors.run ORDER BY 2 DESC, 3 DESC LIMIT ?",
                [*some, limit],
            )
            for key, count, used_at in rows:
                counts[bytes(key)] = counts.get(bytes(key), (0, 0.0))[0] + count, used_at
        return sorted(counts, key=lambda key: counts[key], reverse=True)[:limit]

    def is_needed(self, key: bytes) -> bool:
        """Whether other runs continue this one or refer to it."""
        query = "SELECT EXISTS(SELECT 1 FROM runs WHERE parent = ?) OR EXISTS(SELECT 1 FROM donors WHERE donor = ?)"
        return bool(self._db.execute(query, [key, key]).fetchone()[0])

    def known(self, keys: Sequence[bytes]) -> dict[bytes, bool]:
        """Which of the keys name runs, and whether these are coded."""
        found: dict[bytes, bool] = {}
        for at in range(0, len(keys), 500):
            some = list(keys[at : at + 500])
            rows = self._db.execute(f"SELECT key, coded FROM runs WHERE key IN ({','.join('?' * len(some))})", some)
            found |= {bytes(key): bool(coded) for key, coded in rows}
        return found

    def entries(self, root: bytes | None = None) -> Iterator[Entry]:
        """All runs, or those of a root."""
        query = "SELECT roots.key, runs.key, parent, start_page, num_pages, num_bytes, coded, saved_s FROM runs JOIN roots ON roots.id = runs.root"
        rows = self._db.execute(query) if root is None else self._db.execute(query + " WHERE roots.key = ?", [root])
        for root_key, key, parent, start, pages, num_bytes, coded, saved_s in rows.fetchall():
            yield Entry(bytes(root_key), bytes(key), bytes(parent), start, pages, num_bytes, bool(coded), saved_s)

    def uses(self) -> dict[bytes, tuple[float, float]]:
        """Of every run by its key: decayed uses, and when it was used last."""
        return {bytes(key): (uses, used_at) for key, uses, used_at in self._db.execute("SELECT key, uses, used_at FROM runs")}

    def by_root(self) -> list[tuple[bytes, int, int, int, int, float]]:
        """(root, runs, coded runs, tokens' pages, bytes, last use) of every root."""
        rows = self._db.execute(
            "SELECT roots.key, COUNT(runs.id), COALESCE(SUM(coded), 0), COALESCE(SUM(num_pages), 0), COALESCE(SUM(num_bytes), 0), "
            "COALESCE(MAX(used_at), 0) FROM roots LEFT JOIN runs ON runs.root = roots.id GROUP BY roots.id"
        )
        return [(bytes(key), *rest) for key, *rest in rows.fetchall()]  # type: ignore[misc]

    def worst(self, keep: set[bytes]) -> Entry | None:
        """The run of the least value that no other run continues or refers to and that is none of `keep`."""
        rows = self._db.execute(
            "SELECT roots.key, r.key, r.parent, r.start_page, r.num_pages, r.num_bytes, r.coded, r.saved_s "
            "FROM runs r INDEXED BY runs_by_value JOIN roots ON roots.id = r.root "
            "WHERE NOT EXISTS (SELECT 1 FROM runs c WHERE c.parent = r.key) "
            "AND NOT EXISTS (SELECT 1 FROM donors d WHERE d.donor = r.key) ORDER BY r.value LIMIT ?",
            [1 + len(keep)],
        )
        found = (Entry(bytes(a), bytes(b), bytes(c), d, e, f, bool(g), h) for a, b, c, d, e, f, g, h in rows.fetchall())
        return next((entry for entry in found if entry.key not in keep), None)

    # --- writing, inside `writing` --------------------------------------------------------------------------------------

    def add_root(self, key: bytes, identity: Mapping[str, str]) -> None:
        """Remember what a root stands for."""
        self._db.execute("INSERT OR IGNORE INTO roots(key, identity) VALUES(?, ?)", [key, json.dumps(dict(identity), sort_keys=True)])

    def add(
        self,
        entry: Entry,
        page_keys: Iterable[bytes],
        now: float,
        uses: float = 1.0,
        *,
        donors: Iterable[bytes] = (),
        anchors: Iterable[int] = (),
    ) -> None:
        """A run, the keys of its pages and of the runs it refers to, and its anchors. One of the same key is replaced, and its uses are counted on."""
        before = self._db.execute("SELECT uses, used_at FROM runs WHERE key = ?", [entry.key]).fetchone()
        if before is not None:
            uses += decayed(before[0], before[1], now)
            self._db.execute("DELETE FROM runs WHERE key = ?", [entry.key])
        value = value_of(uses, now, entry.saved_s, entry.num_bytes)
        cursor = self._db.execute(
            "INSERT INTO runs(key, root, parent, start_page, num_pages, num_bytes, coded, saved_s, uses, used_at, value) "
            "SELECT ?, roots.id, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM roots WHERE key = ?",
            [
                *(entry.key, entry.parent, entry.start_page, entry.num_pages, entry.num_bytes, int(entry.coded), entry.saved_s),
                *(uses, now, value, entry.root),
            ],
        )
        if cursor.rowcount != 1:
            raise sqlite3.IntegrityError("a run of an unknown root")
        self._db.executemany("INSERT OR IGNORE INTO pages VALUES(?, ?)", [(prefix_of(key), cursor.lastrowid) for key in page_keys])
        self._db.executemany("INSERT OR IGNORE INTO donors VALUES(?, ?)", [(key, cursor.lastrowid) for key in donors])
        self._db.executemany("INSERT OR IGNORE INTO anchors VALUES(?, ?)", [(number, cursor.lastrowid) for number in anchors])

    def touch(self, keys: Iterable[bytes], now: float) -> None:
        """Count a use of each."""
        for key in keys:
            row = self._db.execute("SELECT uses, used_at, saved_s, num_bytes FROM runs WHERE key = ?", [key]).fetchone()
            if row is not None:
                uses = decayed(row[0], row[1], now) + 1.0
                self._db.execute(
                    "UPDATE runs SET uses = ?, used_at = ?, value = ? WHERE key = ?", [uses, now, value_of(uses, now, row[2], row[3]), key]
                )

    def bring_back(self, now: float) -> None:
        """Count uses of a time that is still to come, by a clock that was wrong then or is now, as of now: their runs would stay before all others
        until that time. Looks at the run of most value alone, which such a use makes, and costs nothing where there is none."""
        first = self._db.execute("SELECT used_at FROM runs ORDER BY value DESC LIMIT 1").fetchone()
        if first is not None and first[0] > now:
            self._db.execute(
                "UPDATE runs SET used_at = ?, value = value - (used_at - ?) / ? WHERE used_at > ?", [now, now, HALF_LIFE_S, now]
            )

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget runs."""
        self._db.executemany("DELETE FROM runs WHERE key = ?", [(key,) for key in keys])

    def drop_root(self, key: bytes) -> None:
        """Forget a root and all its runs."""
        self._db.execute("DELETE FROM runs WHERE root = (SELECT id FROM roots WHERE key = ?)", [key])
        self._db.execute("DELETE FROM roots WHERE key = ?", [key])


def _opened_to_read(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing: with the log that a writer's connections have left, and where there is none, as the file is.

    Raises sqlite3.Error where there is a log and the memory that its readers share cannot be had."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    log = path.with_name(path.name + "-wal")
    for more in ("", "&immutable=1"):
        db = sqlite3.connect(uri + more, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("SELECT name FROM sqlite_master").fetchall()
            return db
        except sqlite3.OperationalError:
            db.close()
            if more or (log.exists() and log.stat().st_size):  # without its log a file may be old, or half written
                raise
        except BaseException:
            db.close()
            raise
    raise AssertionError("one of both ends above")


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one: `executescript` would commit the transaction around it."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
