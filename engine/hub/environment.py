"""Checks of the Python environment that decide whether anything can work. Imports nothing of the project: another `kernels` would break that."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDY = (
    "in a fresh virtual environment, or here: pip uninstall kernels, then install foretold again with "
    "--force-reinstall --no-deps; transformers works without that package"
)


def kernels_package_clash(home: Path | None = None) -> tuple[str, str] | None:
    """What is wrong with the package that `import kernels` finds, and the remedy; None when it is ours, beside `engine`.

    Hugging Face publishes a package of that name, and transformers probes for it by import name and version: with it installed, transformers and
    this project would each import the other's files.

    Args:
        home: folder that holds our `kernels`; the one that holds `engine` when None.
    """
    home = home or Path(__file__).resolve().parents[2]
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        return f"the package `kernels` {version} is installed and takes the import name of foretold's own", _REMEDY
    spec = importlib.util.find_spec("kernels")
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if origin is None or origin.parents[1] != home.resolve():
        return f"`kernels` is imported from {origin or 'nowhere'}, not from {home}", _REMEDY
    return None


@contextmanager
def without_collection() -> Iterator[None]:
    """For a command's imports of PyTorch and of ours: no garbage is looked for meanwhile, nor in what they made afterwards. Some 280,000 objects stay
    for good, and each look at them takes a tenth of a second of a start, or of an answer. Nothing changes where PyTorch is imported already."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_kernels_package(home: Path | None = None) -> None:
    """Raises KernelsPackageClash where `kernels_package_clash` finds one."""
    if clash := kernels_package_clash(home):
        from engine.errors import KernelsPackageClash

        raise KernelsPackageClash(*clash)
