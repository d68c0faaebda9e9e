"""Checks of the Python environment that decide whether anything can work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from engine.errors import KernelsPackageClash

_REMEDY = (
    "in a fresh virtual environment, or here: pip uninstall kernels, then install foretold again with "
    "--force-reinstall --no-deps; transformers works without that package"
)


def check_kernels_package(home: Path | None = None) -> None:
    """Makes sure that `kernels` is ours, beside `engine`, and not the package of that name that Hugging Face publishes.

    transformers probes for that package by import name and version; with it installed, transformers and this project would each
    import the other's files.

    Args:
        home: folder that holds our `kernels`; the one that holds `engine` when None.

    Raises:
        KernelsPackageClash: `kernels` resolves elsewhere, or a distribution of that name is installed.
    """
    home = home or Path(__file__).resolve().parents[2]
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        raise KernelsPackageClash(f"the package `kernels` {version} is installed and takes the import name of foretold's own", _REMEDY)
    spec = importlib.util.find_spec("kernels")
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if origin is None or origin.parents[1] != home.resolve():
        raise KernelsPackageClash(f"`kernels` is imported from {origin or 'nowhere'}, not from {home}", _REMEDY)
