"""A process that fits the codec pack of an engine's pair beside the engine: pieces of that work take seconds, which no request should wait for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from engine.config import LoadedAs
from engine.hub.cache import CacheFolder
from engine.runtime.core import EngineCore

_COMMAND = "engine.cli.fit_pack"
_MOST_SAID = 2000


class PackFitting:
    """The process: started at once, ended with this object. What it fits lies in the cache afterwards (`engine.sessions.codec_params.known_pack`).

    It computes with one thread, at a low priority, and loads the models once more: their files' pages are shared. Beside a prompt it
    still takes half of a core whose two threads share its arithmetic units, so `pause` stops it where the system can.

    Args:
        models: to load. Raises OSError where no process can be started.
    """

    def __init__(self, models: LoadedAs) -> None:
        home = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join([str(home), *(path for path in sys.path if path)])
        self._process = subprocess.Popen(
            [sys.executable or "python", "-P", "-m", _COMMAND, json.dumps(asdict(models))],
            stdin=subprocess.PIPE,  # its end tells the process that this one is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C at the terminal is for this process alone; and should that be killed, a stopped one is woken, and ends
        )
        self.paused = False
        self.end = weakref.finalize(self, _end, self._process)

    @property
    def running(self) -> bool:
        """Whether it fits still."""
        return self._process.poll() is None

    def failure(self) -> str | None:
        """Why there is no pack, once it runs no more; None where it has done its work. Asked once."""
        if self._process.returncode == 0:
            return None
        said = b"" if self._process.stdout is None else self._process.stdout.read(_MOST_SAID)
        return said.decode(errors="replace").strip() or f"the process that fits them ended with status {self._process.returncode}"

    def pause(self, paused: bool) -> None:
        """Stop the process, or let it go on."""
        if paused != self.paused and hasattr(signal, "SIGSTOP"):
            with suppress(OSError):
                self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)
            self.paused = paused


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def fitting_beside(core: EngineCore) -> PackFitting | None:
    """The process for an engine's pair; None where its pack has to be fitted here: the models came from no folder, they lie on a GPU, which has no room
    for them twice, there is no tokenizer, no cache folder to find the pack in, or no process can be started."""
    models = core.config.loaded_as
    if models is None or core.device.type != "cpu" or core.tokenizer is None or not CacheFolder("packs").keeps():
        return None
    with suppress(OSError):
        return PackFitting(models)
    return None
