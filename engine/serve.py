"""`python -m engine.serve`: OpenAI's protocol over an engine."""

from __future__ import annotations

import sys

from engine.cli.starting import interrupts_end, occupy_streams

# before anything that imports our `kernels`: another package of that name would break those imports without saying why
from engine.hub.environment import kernels_package_clash, without_collection


def main(argv: list[str] | None = None) -> int:
    """Run the server; returns the exit status (docs/server.md lists them)."""
    occupy_streams()
    with interrupts_end():
        if clash := kernels_package_clash():
            what, remedy = clash
            print(f"error: {what} ({remedy})", file=sys.stderr)
            return 2
        try:
            with without_collection():
                from engine.cli.serve import run
        except ModuleNotFoundError as missing:
            if missing.name not in ("uvicorn", "starlette", "prometheus_client", "httptools"):
                raise
            print(
                f"error: the server needs the package {missing.name} (install the extra: pip install 'foretold[server]')", file=sys.stderr
            )
            return 2
        return run(argv)


if __name__ == "__main__":
    sys.exit(main())
