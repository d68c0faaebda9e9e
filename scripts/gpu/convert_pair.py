"""Converts the models of a known pair from their GGUF files, each in a process of its own: on a machine with a network it fetches them first.

    python scripts/gpu/convert_pair.py --pair qwen2.5-coder [--target-pieces FILE... --draft-pieces FILE...]

--target-pieces, --draft-pieces: a GGUF file in pieces, in order, for a machine without a network (GGUF files travel in pieces where transfers are
bounded); their bytes must be those that the pair names. The models lie in FORETOLD_HOME afterwards. Takes 10 to 30 s for the qwen2.5-coder pair.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from engine.cli.options import Parser
from engine.errors import ForetoldError, InvalidOption
from engine.hub.cache import cache_home
from engine.hub.pairs import PAIRS, ModelSource
from engine.hub.progress import StderrProgress
from engine.hub.resolve import resolve_source


def join_pieces(source: ModelSource, pieces: Sequence[Path]) -> None:
    """Put the pieces together where the conversion looks for the file. Raises InvalidOption."""
    size = sum(piece.stat().st_size for piece in pieces)
    if size != source.num_bytes:
        raise InvalidOption(f"the pieces of {source.name} have {size} bytes, the file {source.num_bytes}", "name all of them, in order")
    folder = cache_home() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{source.name}.gguf", "wb") as out:
        for piece in pieces:
            with open(piece, "rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)


def convert(source: ModelSource) -> tuple[str, float]:
    """(folder of the converted model, seconds)."""
    began = time.perf_counter()
    return str(resolve_source(source, StderrProgress())), time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=sorted(PAIRS), default="qwen2.5-coder")
    parser.add_argument("--target-pieces", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--draft-pieces", nargs="+", type=Path, default=[], metavar="FILE")
    try:
        args = parser.parse_args(arguments)
        pair = PAIRS[args.pair]
        draft = None if isinstance(pair.draft, str) else pair.draft
        if args.draft_pieces and draft is None:
            raise InvalidOption(f"the pair {args.pair} has no draft of its own file", "leave --draft-pieces out")
        for source, pieces in ((pair.target, args.target_pieces), (draft, args.draft_pieces)):
            if source is not None and pieces:
                join_pieces(source, pieces)
        sources = [source for source in (pair.target, draft) if source is not None]
        with ProcessPoolExecutor(len(sources)) as pool:
            for folder, seconds in pool.map(convert, sources):
                print(f"{folder}: {seconds:.1f} s")
    except (ForetoldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
