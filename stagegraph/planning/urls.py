"""Sources that are named by a URL: a run downloads each once, and from then on they are ordinary files.

Who brings the files of a scheme is a module that a provider names (:attr:`stagegraph.registry.Provider.sources`):
``check(url)`` raises :class:`ValueError` for one that is wrong or not pinned to its content; ``pinned(url)``, which it
may lack, asks a server what one without a pin names now; ``files(url)`` are the
names of what there is, each with a digest, and may ask a server; ``get(url, wanted)`` fetches those of them, holds them
against their digests and returns the folder or the one file; ``here(url, wanted)`` does without a server, and is None
if it cannot. What a server must be asked for and does not give is an :class:`OSError`. In the key is, as of every
source, the content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.errors import PlanError, nearest
from stagegraph.files import choose
from stagegraph.planning.sources import MARK
from stagegraph.registry import find, load_module, names
from stagegraph.stage import Source

if TYPE_CHECKING:
    from stagegraph.spec.model import NodeSpec
    from stagegraph.store.index import Index


def with_local_sources(spec: NodeSpec, index: Index, *, fetch: bool) -> Any:
    """Return a node's parameters with a path for every URL; :class:`PlanError` for a wrong URL or a missing download.

    Only if ``fetch``, a server is asked.
    """
    changed, problems = {}, []
    for field in dataclasses.fields(spec.params):
        url = getattr(spec.params, field.name)
        if "include" in field.metadata and isinstance(url, str) and MARK in url:
            place = f"{spec.places.get(field.name, spec.place)}: {spec.entry}.{field.name}: {url}"
            try:
                patterns = field.metadata["include"], field.metadata["alone"]
                changed[field.name] = Source(_local(url, *patterns, index, fetch=fetch))
            except (ValueError, OSError) as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise PlanError(*problems)
    return dataclasses.replace(spec.params, **changed) if changed else spec.params


def pinned(url: str) -> str:
    """Return a URL pinned to the digest of its present content, if its server gives one; asked only if necessary.

    :class:`ValueError` for one that names nothing, :class:`OSError` where the server does not say.
    """
    module = _module(url)
    pin = getattr(module, "pinned", None)
    found: str = pin(url) if pin else url
    module.check(found)
    return found


def fetch(url: str, include: Sequence[str], alone: Sequence[str]) -> Path:
    """Download the files of a pinned URL as a run would, and return their folder."""
    module = _module(url)
    known = module.files(url)
    wanted = {name: known[name] for name in choose(known, include, alone)}
    path: Path | None = module.here(url, wanted)
    return path or module.get(url, wanted)


def _module(url: str) -> Any:
    scheme = url.partition(MARK)[0]
    named = find("sources", scheme)
    if named is None:
        raise ValueError(f"nothing brings files of {scheme}{MARK}{nearest(scheme, names('sources'))}")
    return load_module(named)


def _local(url: str, include: Sequence[str], alone: Sequence[str], index: Index, *, fetch: bool) -> Path:
    module = _module(url)
    module.check(url)
    known = index.get(f"url:{url}")
    if known is None and fetch:
        known = module.files(url)
        index.set(f"url:{url}", known)
    wanted = {name: known[name] for name in choose(known, include, alone)} if known is not None else {}
    if known is not None and not wanted:
        raise OSError(f"has none of the files that are read: {', '.join((*include, *alone))}")
    path: Path | None = module.here(url, wanted) if wanted else None
    if path is None and fetch:
        path = module.get(url, wanted)
    if path is None:
        raise OSError("is not here yet; `pipeline run` fetches it")
    return path
