"""Whole commands where the cache folder cannot be written, or there is none: one warning, and the rest as ever."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
from pathlib import Path

import pytest

from engine.generate import main
from engine.hub.cache import CacheFolder
from engine.hub.pairs import PAIRS, ModelSource, Pair
from engine.sessions.codec_params import known_pack
from engine.sessions.file import SessionFile

SHA256 = "ab" * 32


@pytest.fixture(params=["no home folder", "a home that cannot be made"])
def homeless(request, model_options, tmp_path, monkeypatch):
    """Options of the tiny pair, in a process without a cache folder to write to."""
    monkeypatch.setattr(CacheFolder, "_warned", False)
    if request.param == "no home folder":

        def unknown(uid):
            raise KeyError("getpwuid(): uid not found")

        for name in ("FORETOLD_HOME", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "file" / "home"))
    return model_options


@pytest.fixture
def read_only(monkeypatch):
    """`read_only(folder)`: nothing below it can be opened for writing or made, as on a read-only disk."""

    def refuse(folder):
        real_open, real_mkdir = os.open, os.mkdir

        def refused(path):
            return isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(folder)

        def opened(path, flags, *given, **named):
            if refused(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_open(path, flags, *given, **named)

        def made(path, *given, **named):
            if refused(path) and not Path(path).exists():
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_mkdir(path, *given, **named)

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "mkdir", made)

    return refuse


def warnings(err):
    return [line for line in err.splitlines() if line.startswith("warning: ")]


def test_sessions_do_without_a_cache_folder(homeless, tmp_path, capsys):
    file = tmp_path / "a.kv"
    for turn in ("Hello", "And now?"):
        options = [turn, "--session", file, "--max-new-tokens", 8, "--quality", "compact"]
        status = main([*homeless, *map(str, options)])
        err = capsys.readouterr().err
        assert status == 0, err
        assert len(warnings(err)) == (1 if turn == "Hello" else 0), "once in a process"
        assert turn != "Hello" or "FORETOLD_HOME" in warnings(err)[0]
    assert "resumed" in err and SessionFile.load(file).quality == "compact"


def test_a_session_is_not_coded_with_parameters_that_nobody_keeps(homeless, tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.kv"
    monkeypatch.setattr("engine.sessions.kv_codec.known_pack", known_pack)
    monkeypatch.setattr("engine.sessions.codec_params.quick_pack", None)
    for turn in ("Hello", "And now?"):
        status = main([*homeless, turn, "--session", str(file), "--max-new-tokens", "8", "--quality", "compact", "--draft", "none"])
        err = capsys.readouterr().err
        assert status == 0 and "the session stays as ids" in err, err
        stored = SessionFile.load(file)
        assert not stored.spans and stored.quality == "compact" and f"suspended {len(stored.token_ids) - 1} tokens" in err


def test_a_pair_without_a_cache_folder_is_a_named_error(homeless, capsys):
    assert main(["Hello", "--pair", "smollm2", "--max-new-tokens", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and "FORETOLD_HOME" in err.splitlines()[-1]


def test_a_pair_in_a_read_only_cache_folder_is_used(chat_folders, pack_home, tmp_path, monkeypatch, capsys, read_only):
    home = tmp_path / "home"
    source = ModelSource("tiny", (), 1, SHA256)
    folder = home / "models" / f"tiny-{SHA256[:8]}"
    shutil.copytree(chat_folders.target, folder)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / "foretold.json").write_text(json.dumps({"format": 1, "source_sha256": SHA256, "files": files}))
    held = sorted(home.rglob("*"))
    monkeypatch.setenv("FORETOLD_HOME", str(home))
    monkeypatch.setitem(PAIRS, "tiny", Pair("tiny", target=source, draft="trunk"))
    monkeypatch.setattr(CacheFolder, "_warned", False)
    read_only(home)
    options = ["Hello", "--pair", "tiny", "--device", "cpu", "--max-new-tokens", "8", "--session", str(tmp_path / "a.kv")]
    for _ in range(2):
        assert main(options) == 0, capsys.readouterr().err
    assert len(warnings(capsys.readouterr().err)) == 1
    assert sorted(home.rglob("*")) == held and (tmp_path / "a.kv").exists()
