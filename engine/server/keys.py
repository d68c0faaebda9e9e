"""API keys: who may ask, and whose stored prefixes a request may use."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidOption
from engine.inputs import read_bytes, shown
from engine.server.errors import ApiError

MAX_KEYS_BYTES = 1 << 20
MIN_KEY_CHARS = 8
OPEN_NAMESPACE = "default"
_REMEDY = "one key a line, or a name and a key; # begins a comment"


@dataclass(frozen=True)
class Keys:
    """Known keys by digest. Without any, everybody is the same caller.

    digests: SHA-256 of a key -> its namespace.
    """

    digests: dict[bytes, str]

    def namespace(self, authorization: str | None) -> str:
        """The namespace of a request by its `Authorization` header. The caller has no other say in it.

        Raises:
            ApiError: 401 where keys are needed and this is none.
        """
        if not self.digests:
            return OPEN_NAMESPACE
        scheme, _, key = (authorization or "").partition(" ")
        # headers are bytes, which arrive here as one character each; a key file is UTF-8
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = None
        for digest, name in self.digests.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, given):
                found = name
        if scheme.lower() != "bearer" or found is None:
            raise ApiError(401, "the API key is missing or unknown: send it as Authorization: Bearer KEY", code="invalid_api_key")
        return found


def read_keys(file: Path | None) -> Keys:
    """The keys of a file; none without a file.

    A namespace is named by its key's line, or by the key's digest where the line holds the key alone: the key itself is in no store and no log.

    Raises:
        InvalidOption: the file cannot be read, holds no key, a short one, or one twice.
    """
    if file is None:
        return Keys({})
    content = read_bytes(file, InvalidOption, _REMEDY, max_bytes=MAX_KEYS_BYTES)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidOption(f"the key file {shown(str(file), 200)} is not UTF-8", _REMEDY) from error
    digests: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < MIN_KEY_CHARS:
            raise InvalidOption(f"line {number} of the key file is no key of at least {MIN_KEY_CHARS} characters", _REMEDY)
        digest = hashlib.sha256(words[-1].encode()).digest()
        name = words[0] if len(words) == 2 else f"key-{digest.hex()[:16]}"
        if digest in digests:
            raise InvalidOption(f"line {number} of the key file repeats a key", _REMEDY)
        if name in digests.values() or name == OPEN_NAMESPACE:
            raise InvalidOption(f"line {number} of the key file repeats a name, or takes the name {OPEN_NAMESPACE!r}", _REMEDY)
        digests[digest] = name
    if not digests:
        raise InvalidOption(f"the key file {shown(str(file), 200)} holds no key", _REMEDY)
    return Keys(digests)
