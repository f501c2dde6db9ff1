"""The key with which a store digests secrets: a file of its own that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

KEY_BYTES = 32


def load_key(path: Path, new: bytes | None) -> bytes | None:
    """Return the key of a store, or None if it has none (yet); ``new`` becomes it then, for the user alone to read."""
    from stagegraph.errors import StoreError
    from stagegraph.files import open_regular

    try:
        with open_regular(path) as file:
            found = file.read(KEY_BYTES + 1)
    except FileNotFoundError:
        if new is None:
            return None
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, new)
            os.fsync(descriptor)
            if not path.exists():
                temporary.rename(path)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
        return load_key(path, None)
    if len(found) != KEY_BYTES:
        raise StoreError(f"{path} is damaged; remove it: what has a secret among its parameters is then made again")
    return found


def mac(key: bytes, text: str) -> str:
    """Return the keyed digest of a secret."""
    import hmac

    return hmac.new(key, text.encode(errors="surrogateescape"), "sha256").hexdigest()
