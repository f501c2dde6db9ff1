"""The store: immutable objects by content digest, verified whenever they are used.

An object is a file ``objects/ab/abcd...`` of mode 0444. Its stat is remembered after it was verified; any later change
of the stat means digest again, and content that no longer matches its name is moved to ``quarantine/``: damage is
reported and rebuilt, never delivered.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from stagegraph.digest import digest_file, stat_id
from stagegraph.index import Index

HARDLINK_FROM = 16 << 20  # bytes; below that a copy is as cheap and keeps a careless editor away from the object
FICLONE = 0x40049409


class Store:
    """Objects under ``root/objects``, with what is known about them in the index."""

    def __init__(self, root: Path, index: Index) -> None:
        self.objects = root / "objects"
        self._root_of_objects = str(self.objects)
        self.quarantine = root / "quarantine"
        self.index = index
        self.damaged: list[str] = []

    def path(self, digest: str) -> Path:
        """Return where the object of this digest lives, whether or not it exists."""
        return Path(f"{self._root_of_objects}/{digest[:2]}/{digest}")

    def adopt(self, file: Path, digest: str) -> None:
        """Move a finished, synced file with this digest into the store; a no-op if an intact object is there."""
        target = self.path(digest)
        if self.is_object(digest, file):
            file.unlink()
            self.relink(digest)
            return
        if self.verify(digest) is None:
            file.unlink()
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o444)
        file.rename(target)
        self.remember(digest)

    def share(self, file: Path, digest: str) -> bool:
        """Make a finished file with this digest an object too; True if the two are one file now.

        The file becomes read-only. Nothing is synced, so the object's stat is not remembered yet.
        """
        target = self.path(digest)
        file.chmod(0o444)
        while True:  # a second time in place of a damaged object, which is in quarantine then
            try:
                linked = self._link(file, target)
            except FileExistsError:
                if self.is_object(digest, file):
                    return True
                if self.verify(digest) is None:
                    return False
            else:
                break
        if not linked and self.verify(digest) is not None:
            self._copy_beside(file, target, digest)
        return linked

    def _link(self, file: Path, target: Path) -> bool:
        """Give a file a second name among the objects; False where that cannot be."""
        try:
            return _hardlink(file, target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _hardlink(file, target)

    def _copy_beside(self, file: Path, target: Path, digest: str) -> None:
        # Beside the object: the file may be on another file system, and a rename stays on one.
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = target.with_name(f".{digest[:16]}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            _copy(file, copy)
            copy.chmod(0o444)
            copy.rename(target)
        finally:
            copy.unlink(missing_ok=True)

    def verify(self, digest: str) -> str | None:
        """Return None for an intact object, else what is wrong with it; a damaged one is quarantined."""
        path = self.path(digest)
        try:
            now = stat_id(path)
        except OSError:
            return "missing"
        if self.index.get(f"obj:{digest}") == list(now):
            return None
        return self.check(digest)

    def check(self, digest: str) -> str | None:
        """Digest an object whatever is remembered about it; as :meth:`verify` otherwise."""
        path = self.path(digest)
        try:
            found = digest_file(path)
        except OSError as error:
            return f"unreadable ({error.strerror})" if path.exists() else "missing"
        if found == digest:
            self.remember(digest)
            return None
        self.quarantine.mkdir(parents=True, exist_ok=True)
        path.rename(self.quarantine / f"{digest}-{int(time.time())}")
        self.index.delete(f"obj:{digest}")
        self.damaged.append(digest)
        return "damaged"

    def digests(self) -> Iterator[str]:
        """Yield the digest of every object there is."""
        if self.objects.is_dir():
            for folder in sorted(self.objects.iterdir()):
                yield from sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))  # a copy under way

    def is_object(self, digest: str, path: Path) -> bool:
        """Say whether ``path`` is the object itself under another name."""
        try:
            return path.samefile(self.path(digest))
        except OSError:
            return False

    def remember(self, digest: str) -> None:
        """Take the stat of an object, just verified or written, for that of its content."""
        self.index.set(f"obj:{digest}", list(stat_id(self.path(digest))))

    def relink(self, digest: str) -> None:
        """Remember an object after a link to it was made or removed, which moves its ctime and nothing else."""
        known = self.index.get(f"obj:{digest}")
        now = list(stat_id(self.path(digest)))
        if known is not None and known[:4] == now[:4]:
            self.remember(digest)
        else:
            self.check(digest)

    def place(self, digest: str, target: Path) -> bool:
        """Put a read-only file with this content at ``target``, replacing what is there; True if it is a hard link.

        Reflink, copy or, for a large file, hard link. The directory must exist.
        """
        source = self.path(digest)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        linked = False
        try:
            if not _reflink(source, temporary):
                linked = source.stat().st_size >= HARDLINK_FROM and _hardlink(source, temporary)
                if not linked:
                    _copy(source, temporary)
                    temporary.chmod(0o444)
            if target.is_dir() and not target.is_symlink():
                remove_tree(target)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)  # a half copy must not keep a full disk full
            raise
        if linked:
            self.relink(digest)
        return linked


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:
            cloned = False
        else:
            cloned = True
    if cloned:
        target.chmod(0o444)
    else:
        target.unlink()
    return cloned


def _copy(source: Path, target: Path) -> None:
    import shutil  # with every archive format there is; a run without news copies nothing

    shutil.copyfile(source, target)


def _hardlink(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP}:
            return False
        raise
    return True


def fsync_file(path: Path) -> None:
    """Push a file's content to the disk, so that a record never points to content that a crash loses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a file or directory, read-only parts too; no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path):
            Path(folder).chmod(stat.S_IRWXU)
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
