"""`python -m engine.generate`: text from a target and its draft, streamed, with the figures of the run; sessions that come back."""

from __future__ import annotations

import sys

from engine.errors import ForetoldError

# before anything that imports our `kernels`: another package of that name would break those imports without saying why
from engine.hub.environment import check_kernels_package


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    try:
        check_kernels_package()
        from engine.cli.command import run
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
