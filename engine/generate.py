"""`python -m engine.generate`: text from a target and its draft, streamed, with the figures of the run; sessions that come back."""

from __future__ import annotations

import sys

from engine.cli.starting import interrupts_end, occupy_streams

# before anything that imports our `kernels`: another package of that name would break those imports without saying why
from engine.hub.environment import kernels_package_clash, without_collection


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (docs/command.md lists them)."""
    occupy_streams()
    with interrupts_end():
        if clash := kernels_package_clash():
            what, remedy = clash
            print(f"error: {what} ({remedy})", file=sys.stderr)
            return 2
        with without_collection():
            from engine.cli.command import run

        return run(argv)


if __name__ == "__main__":
    sys.exit(main())
