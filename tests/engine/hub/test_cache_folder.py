"""Small files kept for the next start: private, read back, and no reason to fail."""

from __future__ import annotations

import pytest

from engine.hub.cache import CacheFolder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(CacheFolder, "_warned", False)
    return tmp_path / "home"


def test_what_is_written_is_read(home):
    cache = CacheFolder("things")
    assert cache.read("a") is None
    assert cache.write("a", b"content") and cache.read("a") == b"content"
    assert (home / "things" / "a").stat().st_mode & 0o777 == 0o600
    assert cache.read("a", most_bytes=3) is None and CacheFolder("others").read("a") is None
    assert cache.read("a\0b") is None


def test_a_cache_that_cannot_be_written_is_warned_of_once(home, capsys):
    home.write_text("no folder")
    for kind in ("one", "two"):
        assert not CacheFolder(kind).write("a", b"content") and CacheFolder(kind).read("a") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "FORETOLD_HOME" in lines[0]


def test_without_a_place_for_a_lock_the_work_goes_on(home):
    cache = CacheFolder("things")
    with cache.exclusive("a.x", "making it"):
        assert (home / "things" / "a.lock").exists() and cache.path("a.x") == home / "things" / "a.x"
    home.rename(home.with_name("other"))
    home.write_text("no folder")
    with cache.exclusive("a.x", "making it"):
        pass
    with pytest.raises(OSError, match="of the block"), cache.exclusive("a.x", "making it"):
        raise OSError("of the block")
