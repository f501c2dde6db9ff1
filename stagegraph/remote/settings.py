"""The user's own configuration: remotes, whose signatures are believed, and the cluster that nodes run in.

```yaml
remotes:
  team: {url: "s3://bucket/stagegraph", mode: both}   # mode: read (default), write or both
  disk: {url: /mnt/share/stagegraph}
trusted:
  build-server: 5a1c...                               # what `pipeline remote key` prints there
executor: {kind: dask, scheduler: "tls://head:8786", remote: team, tls: {ca: ca.pem, cert: me.pem, key: me.key}}
```

It is one file, ``$STAGEGRAPH_CONFIG`` or ``~/.config/stagegraph/config.yaml``. A pipeline file may list remotes too:
they are asked after the user's own, and the user's entry of a name takes the place of the file's. Whom to believe is
never the pipeline file's to say: who checks out a repository does not thereby believe whom it names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from stagegraph.errors import PlanError, SpecError
from stagegraph.remote import EXECUTORS
from stagegraph.spec.item import Item, Problems
from stagegraph.spec.model import Place, Remote
from stagegraph.spec.reader import parse
from stagegraph.spec.remotes import read_remotes

if TYPE_CHECKING:
    from stagegraph.stage import Json

PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")
SCHEDULER = re.compile(r"(?P<scheme>tls|tcp)://(?P<host>\[[0-9a-fA-F:]+\]|[\w.-]+):[0-9]+")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class ClusterSettings(NamedTuple):
    """A cluster: the address of its scheduler, the remote through which results pass, and certificates for TLS.

    ``tls`` has the files ``ca``, ``cert`` and ``key``; ``insecure``: its network may be used without.
    """

    scheduler: str
    remote: Remote
    tls: Mapping[str, str]
    insecure: bool


class ExecutorSettings(TypedDict, total=False):
    """Where nodes run: ``kind`` is one of :data:`EXECUTORS`; ``tls`` has the files ``ca``, ``cert`` and ``key``."""

    kind: str
    scheduler: str
    remote: str
    tls: Mapping[str, str]
    insecure: bool


class UserSettings(NamedTuple):
    """Remotes in the order in which they are asked, name -> public key (hexadecimal) of whom is believed, executor."""

    remotes: tuple[Remote, ...] = ()
    trusted: Mapping[str, str] = {}
    executor: ExecutorSettings = {}

    def cluster(self, kind: str = "", scheduler: str = "") -> ClusterSettings | None:
        """Return the cluster in which nodes run, None if that is this machine; the arguments come before the file.

        :class:`PlanError` where something that it takes is missing.
        """
        kind = kind or ("dask" if scheduler else self.executor.get("kind", "local"))
        if kind == "local":
            if scheduler:
                raise PlanError(f"--executor local runs nodes here, and --scheduler {scheduler} there; use one of them")
            return None
        scheduler = scheduler or self.executor.get("scheduler", "")
        if not scheduler:
            raise PlanError(f"--executor {kind} needs the address of its scheduler: --scheduler tls://HOST:8786")
        host = SCHEDULER.fullmatch(scheduler)
        if host is None:
            raise PlanError(f"--scheduler {scheduler}: expected tls://HOST:PORT, or tcp://HOST:PORT on this machine")
        insecure = bool(self.executor.get("insecure"))
        if host["scheme"] == "tcp" and host["host"] not in LOOPBACK and not insecure:
            raise PlanError(
                f"--scheduler {scheduler}: anyone who can reach a scheduler without TLS can run anything on its "
                f"workers; use tls:// with certificates, or allow it under executor in {config_path()}: insecure: true"
            )
        tls = self.executor.get("tls", {})
        return ClusterSettings(scheduler, self._through(self.executor.get("remote", "")), tls, insecure)

    def _through(self, name: str) -> Remote:
        """Return the remote of that name, else the first that takes and gives results."""
        fit = [remote for remote in self.remotes if remote.reads and remote.writes and name in {"", remote.name}]
        if not fit:
            what = f"remote '{name}' with mode both" if name else "remote with mode both"
            raise PlanError(
                f"a cluster passes results through a remote, and there is no {what} in {config_path()}; add one that "
                'its workers reach too: remotes: {team: {url: "s3://bucket/path", mode: both}}'
            )
        return fit[0]


def config_path() -> Path:
    """Return where the user's configuration is, whether or not it exists."""
    if named := os.environ.get("STAGEGRAPH_CONFIG"):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "stagegraph" / "config.yaml"


def load_settings(listed: Sequence[Remote] = ()) -> UserSettings:
    """Return what the user configured, with the remotes that a pipeline file ``listed`` after the user's own.

    Of two with one name the user's counts. :class:`SpecError` with all that is wrong in the user's file.
    """
    found = _load()
    own = {remote.name for remote in found.remotes}
    return found._replace(remotes=(*found.remotes, *(remote for remote in listed if remote.name not in own)))


def _load() -> UserSettings:
    path = config_path()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return UserSettings()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {error}") from None
    problems = Problems()
    top = parse(text, lambda line, column: Place(str(path), line, column), path.parent, problems)
    found = (
        problems.mapping(top, str(path), ("remotes", "trusted", "executor")) if top is not None and top.value else {}
    )
    remotes = list(read_remotes((found or {}).get("remotes"), problems))
    trusted = dict(_trusted((found or {}).get("trusted"), problems))
    executor = cast("ExecutorSettings", dict(_executor((found or {}).get("executor"), problems)))
    problems.check()
    return UserSettings(tuple(remotes), trusted, executor)


def _trusted(item: Item | None, problems: Problems) -> Iterator[tuple[str, str]]:
    for name, entry in (problems.mapping(item, "trusted") or {}).items() if item is not None else ():
        if isinstance(entry.value, str) and PUBLIC_KEY.fullmatch(entry.value):
            yield name, entry.value
        else:
            problems.unexpected(entry, "a public key of 64 hexadecimal digits, in quotes", f"trusted.{name}")


def _executor(item: Item | None, problems: Problems) -> Iterator[tuple[str, Json]]:
    names = ("kind", "scheduler", "remote", "tls", "insecure")
    for name, entry in (problems.mapping(item, "executor", names) or {}).items() if item is not None else ():
        if name == "tls":
            files = problems.mapping(entry, "executor.tls", ("ca", "cert", "key")) or {}
            yield name, {each: str(file.base / Path(str(file.value)).expanduser()) for each, file in files.items()}
        elif name == "insecure" and isinstance(entry.value, bool):
            yield name, entry.value
        elif name == "kind" and entry.value not in EXECUTORS:
            problems.unexpected(entry, " or ".join(EXECUTORS), "executor.kind")
        elif isinstance(entry.value, str):
            yield name, entry.value
        elif name in names:
            expected = "true or false" if name == "insecure" else "a text"
            problems.unexpected(entry, expected, f"executor.{name}")
