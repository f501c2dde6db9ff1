"""Results of other machines: fetched before a node would run, and given to them after it ran.

In a remote an object is ``objects/ab/<digest>`` and a record ``records/ab/<key>/<signer>``, the record last, so that
whatever is named is there. What comes is believed only if it is signed by the user's own key or one that the user
trusts, its document has the key that was asked for, and every object is what its digest says; else it is as if it were
not there, and a warning says why. A remote that fails once is not asked again in this run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from stagegraph.errors import warn
from stagegraph.remote.errors import MismatchError, RemoteError, StoppedError
from stagegraph.remote.settings import UserSettings, config_path
from stagegraph.remote.signing import Signer, is_signed
from stagegraph.remote.storage import Storage
from stagegraph.store.partial import partial_file
from stagegraph.store.record import Record, is_record_of, record_files

if TYPE_CHECKING:
    from stagegraph.spec.model import Remote
    from stagegraph.store.workspace import Workspace

AT_ONCE = 8  # objects
SIGNER_DIGITS = 16
KEY_FILE = "signing.key"


class Fetched(NamedTuple):
    """A result of another machine: its record, and where the objects lie that the store lacks."""

    record: Record
    objects: dict[str, Path]  # digest -> synced file
    remote: str


class Shared:
    """The remotes that a user configured; thread-safe. What it fetches lies in the store's work directory meanwhile."""

    def __init__(self, settings: UserSettings, workspace: Workspace) -> None:
        self._workspace = workspace
        self.signer = Signer(config_path().with_name(KEY_FILE))
        self._believed = list(dict.fromkeys([self.signer.public, *settings.trusted.values()]))
        self._readers = [remote for remote in settings.remotes if remote.reads]
        self._writers = [remote for remote in settings.remotes if remote.writes]
        self._storages: dict[str, Storage] = {}
        self._dead: set[str] = set()
        self._stop = Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "remote")
        self._transfers = ThreadPoolExecutor(AT_ONCE, "transfer")
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._pushes: list[Future[int]] = []

    @property
    def reads(self) -> bool:
        """Whether there is a remote to ask."""
        return bool(self._readers)

    # -- fetching ----------------------------------------------------------------------------------------------------

    def fetch(self, key: str) -> Future[Fetched | None]:
        """Begin to look for the result of a key."""
        if self._folder is None:
            self._folder = self._stack.enter_context(self._workspace.scratch("fetched"))
        return self._pool.submit(self._fetch, key)

    def _fetch(self, key: str) -> Fetched | None:
        for remote in self._readers:
            found: Fetched | None = self._ask(remote, partial(self._fetch_from, key))
            if found is not None:
                return found
        return None

    def _fetch_from(self, key: str, storage: Storage) -> Fetched | None:
        name = storage.remote.name
        for public in self._believed:
            path = record_path(key, public)
            text = storage.read(path)
            if text is None:
                continue
            record = _believed(text, key, public)
            if record is None:
                warn(f"remote '{name}': {path} is damaged, or signed by a key that is not trusted; ignored")
                continue
            return Fetched(record, self._objects(storage, record), name)
        return None

    def _objects(self, storage: Storage, record: Record) -> dict[str, Path]:
        """Fetch what the store lacks of a record, side by side."""
        assert self._folder is not None
        wanted = dict(record_files(record).values())
        lacking = {digest: size for digest, size in wanted.items() if not self._workspace.store.path(digest).exists()}
        targets = {digest: self._folder / f"{record['key'][:16]}-{digest}" for digest in lacking}

        def transfer(digest: str) -> None:
            with partial_file(self._workspace.root, digest, targets[digest]) as file:
                storage.take(digest, lacking[digest], file)

        try:
            list(self._transfers.map(transfer, lacking))
        except BaseException:
            for target in targets.values():
                target.unlink(missing_ok=True)
            raise
        return targets

    # -- giving ------------------------------------------------------------------------------------------------------

    def push(self, record: Record) -> None:
        """Begin to give a result to the remotes that take results."""
        self._pushes += [self._pool.submit(self._push, remote, record) for remote in self._writers]

    def _push(self, remote: Remote, record: Record) -> int:
        """Return how many objects were sent."""
        return self._ask(remote, partial(self._push_to, record)) or 0

    def _push_to(self, record: Record, storage: Storage) -> int:
        def transfer(digest: str) -> bool:
            return storage.give(digest, self._workspace.store.path(digest))

        sent = sum(self._transfers.map(transfer, {digest for digest, _ in record_files(record).values()}))
        document = self.signer.sign({**record, "host": ""})
        storage.write(record_path(record["key"], self.signer.public), json.dumps(document).encode())
        return sent

    # -- both --------------------------------------------------------------------------------------------------------

    def _ask(self, remote: Remote, what: Callable[[Storage], Any]) -> Any:
        """Do something with a remote; None, and a warning, where it fails. One that cannot be reached is left alone."""
        if remote.name in self._dead:
            return None
        try:
            if remote.name not in self._storages:
                self._storages[remote.name] = Storage(remote, self._stop)
            return what(self._storages[remote.name])
        except StoppedError:
            pass
        except MismatchError as error:
            warn(f"remote '{remote.name}': {error}; ignored")
        except (RemoteError, OSError) as error:
            if remote.name not in self._dead:
                self._dead.add(remote.name)
                warn(f"remote '{remote.name}' ({remote.url}): {error}; not used again in this run")
        return None

    def finish(self) -> int:
        """Wait for what is under way, remove what was fetched and not taken; return how many objects were sent."""
        sent = sum(push.result() for push in self._pushes)
        self.close()
        return sent

    @property
    def failed(self) -> frozenset[str]:
        """The names of remotes that did not do what was asked of them."""
        return frozenset(self._dead)

    def close(self) -> None:
        """End what is under way, downloads at once."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._transfers.shutdown(cancel_futures=True)
        self._stack.close()


def reach(remote: Remote) -> str:
    """Return what is wrong with a remote, nothing if it answers."""
    try:
        Storage(remote, Event()).has("records/none")
    except (RemoteError, OSError) as error:
        return str(error)
    return ""


def record_path(key: str, public: str) -> str:
    """Return where the record of a key is that a signer made, by its public key."""
    return f"records/{key[:2]}/{key}/{public[:SIGNER_DIGITS]}"


def _believed(text: bytes, key: str, public: str) -> Record | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not is_signed(document, public) or not is_record_of(document["record"], key):
        return None
    record: Record = document["record"]
    record["host"] = f"another machine ({public[:SIGNER_DIGITS]})"
    return record
