"""The locks of a store: ``flock`` on files under ``locks/``, which the kernel releases when a process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stagegraph.errors import StoreError


class Locks:
    """Locks by name: of a key, of a directory, and ``store``, which runs share and whoever removes things holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root = str(root)

    def try_lock(self, key: str) -> int | None:
        """Take the lock of a key: a descriptor to close, or None while another process holds it."""
        descriptor = self._lock_file(key)
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_running(self, key: str) -> bool:
        """Say whether a run is executing this key."""
        lock = self.try_lock(key) if (self.root / "locks" / key).exists() else None
        if lock is not None:
            os.close(lock)
        return lock is None and (self.root / "locks" / key).exists()

    def _lock_file(self, name: str) -> int:
        path, flags = f"{self._root}/locks/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            try:
                return os.open(path, flags, 0o666)
            except FileNotFoundError:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EROFS} and Path(path).exists():
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's: it can be locked all the same
            raise

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a lock meanwhile; yields whether it is held, which without ``wait`` another process may prevent."""
        descriptor = self._lock_file(name)
        try:
            _flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            acquired = True
        except BlockingIOError:
            acquired = False
        try:
            yield acquired
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Keep :meth:`alone` waiting meanwhile: what is looked up or written here stays until it is claimed."""
        yield from self._hold(fcntl.LOCK_SH)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no run is settling or committing a node, and keep them waiting meanwhile."""
        yield from self._hold(fcntl.LOCK_EX)

    def _hold(self, mode: int) -> Iterator[None]:
        try:
            descriptor = self._lock_file("store") if self.root.is_dir() else None
        except OSError as error:
            full = mode == fcntl.LOCK_SH and error.errno in {errno.ENOSPC, errno.EDQUOT}
            if not full and error.errno not in {errno.EACCES, errno.EROFS}:
                raise
            descriptor = None  # whoever may not, or cannot, write here only looks
        try:
            if descriptor is not None:
                _flock(descriptor, mode)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _flock(descriptor: int, mode: int) -> None:
    """Lock a file; :class:`BlockingIOError` if another process holds it, :class:`StoreError` where nothing can."""
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        raise
    except OSError as error:
        raise StoreError(
            f"the file system of artifacts/ has no file locks ({error.strerror}), and runs side by side need them; "
            "keep artifacts/ on one that has"
        ) from None
