"""Repositories of the Hugging Face hub as sources: ``hf://ORG/NAME@COMMIT``, or one file, with ``/FILE`` behind it.

huggingface_hub transfers, resumes and keeps the files where it keeps all of them (``HF_HOME``), with the user's token
if there is one; it is imported where something is missing. What came is compared with what the hub says of the commit:
the SHA-256 of a large file, git's own digest of others. The interface is that of :mod:`stagegraph.planning.urls`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

URL = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]+)(?:/(?P<file>.+))?)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOCK = 1 << 20
THREADS = 4


def check(url: str) -> None:
    """Raise :class:`ValueError` for a URL that is not valid, or not pinned to a commit."""
    _parts(url)


def pinned(url: str) -> str:
    """Return ``hf://ORG/NAME`` or ``hf://ORG/NAME@BRANCH`` with the commit that this is now; asks the hub."""
    match = URL.fullmatch(url)
    if match is None or COMMIT.fullmatch(match["commit"] or ""):
        return url
    with _Advice(url):
        from huggingface_hub import HfApi

        commit = HfApi().model_info(match["repository"], revision=match["commit"]).sha
    return f"hf://{match['repository']}@{commit}" + (f"/{match['file']}" if match["file"] else "")


def files(url: str) -> dict[str, str]:
    """Return the files of a commit by name, with the digest of each; asks the hub. :class:`OSError` if it does not say.

    Of a URL that names one file only that.
    """
    repository, commit, one = _parts(url)
    with _Advice(url):
        from huggingface_hub import HfApi

        found = HfApi().model_info(repository, revision=commit, files_metadata=True)
        digests = {
            each.rfilename: f"sha256:{each.lfs.sha256}" if each.lfs else f"git:{each.blob_id}"
            for each in found.siblings or ()
        }
    if one and one not in digests:
        raise OSError(f"there is no file {one} in {repository} at that commit")
    return {one: digests[one]} if one else digests


def here(url: str, wanted: Mapping[str, str]) -> Path | None:
    """Return the folder, or the one file, if everything ``wanted`` is in the hub's cache; uses no network."""
    repository, commit, one = _parts(url)
    folder = _cache() / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    return (folder / one if one else folder) if all((folder / name).is_file() for name in wanted) else None


def get(url: str, wanted: Mapping[str, str]) -> Path:
    """Download ``wanted`` and return where it is; :class:`OSError` if it cannot be downloaded or is damaged."""
    from concurrent.futures import ThreadPoolExecutor

    repository, commit, _ = _parts(url)

    def fetch(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, name, revision=commit, cache_dir=_cache()))

    with _Advice(url), ThreadPoolExecutor(THREADS) as pool:
        paths = dict(zip(wanted, pool.map(fetch, wanted), strict=True))
    for name, path in paths.items():
        if _digest(path, wanted[name].partition(":")[0]) != wanted[name]:
            path.resolve().unlink()  # what the name in the snapshot leads to
            path.unlink(missing_ok=True)
            raise OSError(f"{name} came damaged, and was removed; run again")
    found = here(url, wanted)
    assert found is not None, "all of it was just fetched"
    return found


def _parts(url: str) -> tuple[str, str, str]:
    match = URL.fullmatch(url)
    if match is None or ".." in (match["file"] or "").split("/"):
        raise ValueError("is no repository; expected hf://ORG/NAME@COMMIT")
    commit = match["commit"] or ""
    if not COMMIT.fullmatch(commit):
        named = f"'{commit}' may be other files tomorrow" if commit else "no commit is named"
        page = f"https://huggingface.co/{match['repository']}/commits/main"
        raise ValueError(f"{named}; expected the 40 digits of a commit, hf://{match['repository']}@COMMIT ({page})")
    return match["repository"], commit, match["file"] or ""


def _cache() -> Path:
    """Return where huggingface_hub keeps repositories, without its import of half a second."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(named)).expanduser()


def _digest(path: Path, kind: str) -> str:
    hasher = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind != "sha256":
        hasher.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    return f"{kind}:{hasher.hexdigest()}"


class _Advice:
    """Makes an :class:`OSError` with advice of what huggingface_hub raises."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if isinstance(error, ImportError):
            raise OSError("huggingface_hub is not installed; pip install huggingface_hub") from None
        from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

        first = str(error).strip().partition("\n")[0]
        if isinstance(error, GatedRepoError):
            raise OSError("the hub shows it to those who have asked for it; ask there, and `hf auth login`") from None
        if isinstance(error, RepositoryNotFoundError):
            raise OSError("the hub has no such repository, or not for you; `hf auth login` if it is private") from None
        if isinstance(error, OfflineModeIsEnabled):
            raise OSError("HF_HUB_OFFLINE forbids to fetch it") from None
        raise OSError(f"the hub cannot be asked: {first or type(error).__name__}; run again to resume") from None
