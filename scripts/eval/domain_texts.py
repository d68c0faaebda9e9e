"""Folders of texts of several kinds, to test a pack on what it was not calibrated on.

logs/, json/, code/ are made on any machine; with --debian also prose/, german/, french/, japanese/.

    python scripts/eval/domain_texts.py --out D [--debian TEXTS] [--apart 0.25]

TEXTS is where Debian packages were unpacked (`/` when they are installed; eval_sessions.py shows the commands); packages that are not there are left
out, and said so. Logs and a part of the JSON come from a seeded generator, the rest of the JSON from the interpreter's tables, code from the
installed transformers and torch. Nothing is fetched; the same versions give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import html
import importlib.util
import inspect
import json
import mimetypes
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from html.entities import html5
from pathlib import Path

FOLDER_BYTES = 400_000
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_PATHS = (
    "/",
    "/login",
    "/api/v1/items",
    "/api/v1/items/%d",
    "/static/app.js",
    "/static/site.css",
    "/images/%d.png",
    "/search?q=%d",
    "/health",
)
_AGENTS = (
    "curl/7.88.1",
    "Mozilla/5.0 (X11; Linux x86_64; rv:115.0) Gecko/20100101 Firefox/115.0",
    "python-requests/2.31.0",
    "kube-probe/1.28",
)


def syslog(rng: random.Random, lines: int) -> str:
    """Lines as a Debian system writes them to /var/log/syslog, one host."""
    seconds, out = 0, []
    for _ in range(lines):
        seconds += rng.choice((0, 0, 0, 1, 1, 2, 5, 17, 60))
        pid, port, n = rng.randint(300, 65000), rng.randint(1024, 65535), rng.randint(1, 9999)
        address = f"10.{rng.randint(0, 3)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"
        message = rng.choice(
            (
                f"sshd[{pid}]: Accepted publickey for deploy from {address} port {port} ssh2: ED25519 SHA256:{rng.getrandbits(128):032x}",
                f"sshd[{pid}]: Failed password for invalid user admin{n} from {address} port {port} ssh2",
                f"systemd[1]: Started session-{n}.scope - Session {n} of User deploy.",
                f"systemd[1]: logrotate.service: Deactivated successfully, consumed {n / 100:.3f}s CPU time.",
                f"CRON[{pid}]: (root) CMD (cd / && run-parts --report /etc/cron.hourly)",
                f"kernel: [{seconds + 812.5:12.6f}] eth0: Link is Up - 1000Mbps/Full - flow control rx/tx",
                f"kernel: [{seconds + 812.5:12.6f}] EXT4-fs (sda{n % 4 + 1}): mounted filesystem with ordered data mode. Quota mode: none.",
                f"postgres[{pid}]: [{n}-1] LOG:  duration: {n / 7:.3f} ms  statement: SELECT id, total FROM orders WHERE customer = {n * 3}",
                f"dhclient[{pid}]: DHCPACK of {address} from 10.0.0.1 (xid=0x{rng.getrandbits(32):08x})",
            )
        )
        day, clock = seconds // 86_400, f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        out.append(f"{_MONTHS[3 + day // 28 % 9]} {day % 28 + 1:2d} {clock} node-7 {message}")
    return "\n".join(out) + "\n"


def access_log(rng: random.Random, lines: int) -> str:
    """Lines in the combined format of web servers."""
    out = []
    for n in range(lines):
        path = rng.choice(_PATHS)
        path = path % rng.randint(1, 5000) if "%d" in path else path
        status = rng.choices((200, 304, 404, 302, 500), (70, 12, 9, 7, 2))[0]
        time = f"{n // 28_800 % 28 + 1:02d}/May/2024:{n // 1200 % 24:02d}:{n // 20 % 60:02d}:{n * 3 % 60:02d}"
        verb, size, agent = rng.choices(("GET", "POST"), (9, 1))[0], rng.randint(90, 90_000), rng.choice(_AGENTS)
        out.append(
            f'192.168.{rng.randint(0, 9)}.{rng.randint(1, 254)} - - [{time} +0000] "{verb} {path} HTTP/1.1" {status} {size} "-" "{agent}"'
        )
    return "\n".join(out) + "\n"


def records(rng: random.Random, count: int) -> list[dict]:
    """Nested objects as a web API returns them."""
    words = sorted(html5)
    return [
        {
            "id": f"{rng.getrandbits(64):016x}",
            "active": rng.random() < 0.8,
            "score": round(rng.gauss(50, 12), 2),
            "owner": {
                "name": rng.choice(words).strip(";"),
                "roles": rng.sample(["admin", "editor", "reader", "billing"], rng.randint(1, 3)),
            },
            "items": [
                {
                    "sku": f"{rng.choice('ABCD')}-{rng.randint(100, 999)}",
                    "quantity": rng.randint(1, 12),
                    "price": rng.randint(99, 99_999) / 100,
                    "tags": rng.sample(words, 2),
                }
                for _ in range(rng.randint(1, 4))
            ],
            "updated": f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:00Z",
            "parent": None if rng.random() < 0.5 else rng.randint(1, 10**6),
        }
        for _ in range(count)
    ]


def interpreter_json() -> Iterator[tuple[str, object]]:
    """Tables that every interpreter has: Unicode, HTML entities, MIME types, signatures of the library."""
    letters = range(0xA0, 0x2000, 3)
    yield (
        "unicode",
        [
            {
                "code": f"U+{c:04X}",
                "name": unicodedata.name(chr(c), ""),
                "category": unicodedata.category(chr(c)),
                "decomposition": unicodedata.decomposition(chr(c)),
            }
            for c in letters
            if unicodedata.name(chr(c), "")
        ],
    )
    yield "entities", [{"entity": name, "codes": [ord(c) for c in text]} for name, text in sorted(html5.items())]
    yield "mime", {"types": dict(sorted(mimetypes.types_map.items())), "encodings": mimetypes.encodings_map}
    found = []
    for name in (
        "argparse",
        "asyncio",
        "collections",
        "csv",
        "datetime",
        "difflib",
        "email",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "random",
        "re",
        "shutil",
        "socket",
        "statistics",
        "string",
        "subprocess",
        "tarfile",
        "textwrap",
        "threading",
        "unittest",
        "urllib.parse",
        "zipfile",
    ):
        module = importlib.import_module(name)
        for member, value in sorted(vars(module).items()):
            if callable(value) and not member.startswith("_"):
                try:
                    signature = str(inspect.signature(value))
                except (ValueError, TypeError):
                    continue
                if " at 0x" not in signature:
                    found.append(
                        {
                            "module": name,
                            "name": member,
                            "kind": type(value).__name__,
                            "signature": signature,
                            "summary": (inspect.getdoc(value) or "").partition("\n")[0],
                        }
                    )
    yield "library", {"entries": found}


def code_texts() -> Iterator[tuple[str, str]]:
    """Sources of other hands than the standard library's: Python of transformers, C++ headers of torch."""
    for package, pattern in (("transformers", "models/*/modeling_*.py"), ("torch", "include/ATen/native/**/*.h")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin:
            continue
        files = sorted(p for p in Path(spec.origin).parent.glob(pattern) if p.stat().st_size > 12_000)
        for path in random.Random(0).sample(files, min(6, len(files))):
            yield path.stem + path.suffix, path.read_text(encoding="utf-8")[:40_000]


def plain(page: str) -> str:
    """The text of an HTML page's paragraphs (DocBook writes them as div)."""
    blocks = re.findall(r'(?s)<p\b[^>]*>(.*?)</p>|<div class="para">(.*?)</div>', page)
    texts = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", first or second)).strip() for first, second in blocks]
    return html.unescape("\n\n".join(text for text in texts if len(text) > 40)) + "\n"


def debian_texts(root: Path, language: str) -> Iterator[tuple[str, str]]:
    """(name, text) of one of prose, german, french, japanese from unpacked packages, as far as they are there."""
    code, locale = {"prose": ("", "en-US"), "german": ("de", ""), "french": ("fr", "fr-FR"), "japanese": ("ja", "ja-JP")}[language]
    bible = root / "usr/bin/bible"
    if language == "prose" and bible.is_file() and (root / "usr/lib/bible.data").is_file():
        command = [str(bible), "-l80", "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
        verses = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout.decode("latin-1")
        yield "bible.txt", verses[: FOLDER_BYTES // 2]
    book = root / f"usr/share/debian-reference/debian-reference.{code}.txt.gz"
    if code and book.is_file():
        text = gzip.decompress(book.read_bytes()).decode("utf-8")
        start = len(text) // 6  # behind the table of contents
        yield f"debian-reference.{code}.txt", _bytes_of(text[start:], FOLDER_BYTES // 2)
    if language == "german" and (root / "usr/share/games/fortunes/de").is_dir():
        files = [p for p in sorted((root / "usr/share/games/fortunes/de").iterdir()) if not p.is_symlink() and p.suffix == ""]
        yield (
            "fortunes.txt",
            _bytes_of(
                "\n".join(
                    p.read_text(encoding="utf-8", errors="replace").replace("\n%\n", "\n\n")
                    for p in files
                    if p.name not in ("asciiart", "huhn")
                ),
                FOLDER_BYTES // 2,
            ),
        )
    handbook = root / f"usr/share/doc/debian-handbook/html/{locale}"
    if locale and handbook.is_dir():
        pages = "\n".join(plain(p.read_text(encoding="utf-8")) for p in sorted(handbook.glob("*.html")))
        yield "handbook.txt", _bytes_of(pages, FOLDER_BYTES // 2)


def write_folders(out: Path, debian: Path | None, apart: float = 0.0) -> dict[str, int]:
    """Makes the folders; returns the bytes of each.

    apart: the last part of every text, as a fraction, that goes to out/test/NAME, the rest to out/train/NAME; 0: all of it to out/NAME.
    """
    rng = random.Random(0)
    made: dict[str, list[tuple[str, str]]] = {
        "logs": [("syslog.log", syslog(rng, 1800)), ("access.log", access_log(rng, 1400))],
        "json": [
            (f"{name}.json", json.dumps(value, indent=1 + n % 2, ensure_ascii=False)[: FOLDER_BYTES // 5])
            for n, (name, value) in enumerate([*interpreter_json(), ("records", records(rng, 300))])
        ],
        "code": list(code_texts()),
    }
    if debian is not None:
        made |= {language: list(debian_texts(debian, language)) for language in ("prose", "german", "french", "japanese")}
    sizes = {}
    for folder, texts in made.items():
        for name, text in texts:
            cut = text.rfind("\n", 0, round(len(text) * (1 - apart))) + 1 if apart else 0
            for place, part in (("train", text[:cut]), ("test", text[cut:])) if apart else ((".", text),):
                (out / place / folder).mkdir(parents=True, exist_ok=True)
                (out / place / folder / name).write_text(part, encoding="utf-8")
        sizes[folder] = sum(len(text.encode()) for _, text in texts)
    return sizes


def _bytes_of(text: str, size: int) -> str:
    """The beginning of a text that takes at most `size` bytes of UTF-8."""
    return text.encode()[:size].decode("utf-8", errors="ignore")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debian", type=Path, help="where Debian packages were unpacked, or /")
    parser.add_argument(
        "--apart", type=float, default=0.0, help="last part of every text, such as 0.25, to OUT/test, and the rest to OUT/train"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.apart < 1:
        print(f"error: --apart {options.apart} (give a fraction below 1)", file=sys.stderr)
        return 2
    try:
        for folder, size in write_folders(options.out, options.debian, options.apart).items():
            print(f"{folder}: {size:,} bytes" if size else f"{folder}: left out, its packages are not under {options.debian}")
    except OSError as error:
        print(f"error: {error} (choose another --out, or check --debian)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
