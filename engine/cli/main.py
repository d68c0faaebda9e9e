"""The console script `foretold`: its subcommands."""

from __future__ import annotations

import sys

from engine.generate import main as generate

_USAGE = "usage: foretold generate [PROMPT] [options], foretold serve [options], or foretold store DIR [options]; each has --help"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, 2 when there is none of that name."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["serve"]:
        from engine.serve import main as serve

        return serve(given[1:])
    if given[:1] == ["generate"]:
        return generate(given[1:])
    if given[:1] == ["store"]:
        from engine.store.__main__ import main as store

        return store(given[1:])
    if given in (["--help"], ["-h"]):
        return _help()
    if given == ["--version"]:
        return generate(given)
    print(f"error: {'unknown subcommand ' + ascii(given[0]) if given else 'no subcommand'} ({_USAGE})", file=sys.stderr)
    return 2


def _help() -> int:
    from engine.cli.options import report
    from engine.cli.terminal import stream_text
    from engine.errors import ForetoldError

    try:
        stream_text(f"{_USAGE}\n")
    except ForetoldError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
