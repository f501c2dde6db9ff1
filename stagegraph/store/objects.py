"""The store: immutable objects by content digest, verified whenever they are used.

An object is a file ``objects/ab/abcd...`` of mode 0444. Its stat is remembered after it was verified; any later change
of the stat means digest again, and content that no longer matches its name is moved to ``quarantine/``: damage is
reported and rebuilt, never delivered.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from stagegraph.digest import digest_bytes, digest_file, stat_id
from stagegraph.errors import StoreError
from stagegraph.files import open_regular, remove_tree
from stagegraph.store.index import Index

HARDLINK_FROM = 256 << 10  # bytes; below that a copy takes next to nothing, and keeps careless editors off the object
SMALL = 32 << 10  # bytes that are written rather than cloned
FICLONE = 0x40049409


# What says that there are too few descriptors or too little memory, and nothing about the object.
SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class RottenError(StoreError):
    """An object is not what its name says, and is in quarantine now; ``digest`` names it."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"stored object {digest[:16]} was damaged; `pipeline run` makes again what needs it")
        self.digest = digest


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
        return Path(self.file(digest))

    def file(self, digest: str) -> str:
        """Return the same as a text: a run without news asks for every object."""
        return f"{self._root_of_objects}/{digest[:2]}/{digest}"

    def adopt(self, file: str | Path, digest: str) -> None:
        """Move a finished, synced file with this digest into the store; a no-op if an intact object is there."""
        target, source = self.file(digest), os.fspath(file)
        if self.is_object(digest, file):
            os.unlink(source)
            self.relink(digest)
            return
        if self.check(digest) is None:  # whatever its stat says: what is at hand is known to be right
            os.unlink(source)
            return
        os.chmod(source, 0o444)
        try:
            _move(source, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _move(source, target)
        self.remember(digest)

    def share(self, file: Path, digest: str) -> bool:
        """Make a finished file with this digest an object too; True if the two are one file now.

        The file becomes read-only. Nothing is synced, so the object's stat is not remembered yet.
        """
        target = self.path(digest)
        file.chmod(0o444)
        for again in (True, False):  # a second time in place of a damaged object, which is in quarantine then
            try:
                linked = self._link(file, target)
                break
            except FileExistsError:
                if self.is_object(digest, file):
                    return True
                if self.check(digest) is None:
                    return False
                if not again:
                    raise
        if not linked and self.verify(digest) is not None:
            _copy_beside(file, target)
        return linked

    def _link(self, file: Path, target: Path) -> bool:
        """Give a file a second name among the objects; False where that cannot be."""
        try:
            return _hardlink(file, target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _hardlink(file, target)

    def verify(self, digest: str) -> str | None:
        """Return None for an intact object, else what is wrong with it; a damaged one is quarantined."""
        try:
            now = stat_id(self.file(digest))
        except OSError:
            return "damaged" if digest in self.damaged else "missing"
        if self.index.get(f"obj:{digest}") == list(now):
            return None
        return self.check(digest)

    def check(self, digest: str) -> str | None:
        """Digest an object whatever is remembered about it; as :meth:`verify` otherwise."""
        path = self.file(digest)
        wrong = "damaged"
        try:
            if digest_file(path) == digest:
                if self.index.get(f"obj:{digest}") != list(stat_id(path)):
                    self.remember(digest)
                return None
        except FileNotFoundError:
            return "damaged" if digest in self.damaged else "missing"
        except OSError as error:
            if error.errno in SHORT:
                raise
            wrong = f"unreadable ({error.strerror})"
        with contextlib.suppress(OSError):  # whoever only looks at another user's store moves nothing
            self.quarantine.mkdir(parents=True, exist_ok=True)
            _move(path, f"{self.quarantine}/{digest}-{time.time_ns()}")
            self.index.delete(f"obj:{digest}")
        self.damaged.append(digest)
        return wrong

    def read(self, digest: str) -> bytes:
        """Return the content of an object; :class:`RottenError` if it is not what its name says, or is not there."""
        try:
            with open_regular(self.file(digest)) as file:
                content = file.readall()
        except OSError:
            content = b""
        if digest_bytes(content) != digest:
            self.check(digest)
            raise RottenError(digest)
        return content

    def digests(self) -> Iterator[str]:
        """Yield the digest of every object there is."""
        if self.objects.is_dir():
            for folder in sorted(self.objects.iterdir()):
                yield from sorted(name for name in os.listdir(folder) if not name.startswith("."))  # a copy under way

    def is_object(self, digest: str, path: str | Path) -> bool:
        """Say whether ``path`` is the object itself under another name."""
        try:
            return os.path.samefile(path, self.file(digest))
        except OSError:
            return False

    def remember(self, digest: str) -> None:
        """Record the stat of an object whose content was just verified or written."""
        self.index.set(f"obj:{digest}", list(stat_id(self.file(digest))))

    def relink(self, digest: str) -> None:
        """Remember an object after a link to it was made or removed, which moves its ctime and nothing else."""
        known = self.index.get(f"obj:{digest}")
        now = list(stat_id(self.file(digest)))
        if known is not None and known[:4] == now[:4]:
            self.remember(digest)
        else:
            self.check(digest)

    def place(self, digest: str, target: str | Path, *, known: bool = False) -> bool:
        """Put a read-only file with this content at ``target``, replacing what is there; True if it is a hard link.

        Reflink, copy or, for a large file, hard link. The directory must exist. What was placed is digested, as an
        object can rot without a change of its stat (:class:`RottenError`), unless its content is ``known``.
        """
        source, shown = self.file(digest), os.fspath(target)
        folder, name = os.path.split(shown)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}")
        _unlink(temporary)
        linked = False
        try:
            try:
                size = os.stat(source).st_size
            except FileNotFoundError:  # it went to quarantine when another node read it
                raise RottenError(digest) from None
            if size < min(SMALL, HARDLINK_FROM):
                content = _write_small(source, temporary)
                right = len(content) == size and (known or digest_bytes(content) == digest)
            else:
                if not _reflink(source, temporary):
                    linked = size >= HARDLINK_FROM and _hardlink(source, temporary)
                    if not linked:
                        _copy(source, temporary)
                        os.chmod(temporary, 0o444)
                right = known or digest_file(temporary) == digest
            if not right:
                self._refuse(digest, temporary)
            try:
                os.replace(temporary, shown)
            except IsADirectoryError:
                remove_tree(Path(target))
                os.replace(temporary, shown)
        except BaseException:
            _unlink(temporary)  # a half copy must not keep a full disk full
            raise
        if linked:
            self.relink(digest)
        return linked

    def _refuse(self, digest: str, copy: str) -> NoReturn:
        os.unlink(copy)
        if self.check(digest) is not None:
            raise RottenError(digest)
        raise OSError(errno.EIO, "the copy of an intact object is not what was copied", copy)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _write_small(source: str, target: str) -> bytes:
    """Copy a file that takes less to write than to ask for anything better; return its content."""
    with open_regular(source) as file:
        content = file.readall()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        os.fchmod(descriptor, 0o444)
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
    finally:
        os.close(descriptor)
    return content


def _reflink(source: str, target: str) -> bool:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:
            cloned = False
        else:
            cloned = True
    if cloned:
        os.chmod(target, 0o444)
    else:
        os.unlink(target)
    return cloned


def _move(source: str, target: str) -> None:
    """Rename a file, also where objects or work directories are linked to another disk."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_beside(Path(source), Path(target))
        os.unlink(source)


def _copy_beside(file: Path, target: Path) -> None:
    # Beside the object: the file may be on another file system, and a rename stays on one.
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f".{target.name[:16]}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        _copy(file, copy)
        copy.chmod(0o444)
        fsync_file(copy)
        copy.rename(target)
    finally:
        copy.unlink(missing_ok=True)


def _copy(source: str | Path, target: str | Path) -> None:
    import shutil  # with every archive format there is; a run without news copies nothing

    shutil.copyfile(source, target)


def _hardlink(source: str | Path, target: str | Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.ENOSYS}:
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
