"""A repository of the hub -> a folder with the files of a GPT-2, downloaded once and checked.

    GET ENDPOINT/api/models/USER/NAME/revision/REVISION?blobs=true
    {"sha": COMMIT, "siblings": [{"rfilename", "size", "blobId", "lfs": {"sha256", "size"}}]}

The hub states each file's size and hash: SHA-256 in lfs, else git's SHA-1. Files are taken from the
repository's root and under the names below only; no code is downloaded. config.json comes first, so
that another model is refused before its weights are downloaded. This file does not know GPT-2.

Source: huggingface.co/docs/hub/api and huggingface-hub's RepoSibling.
"""

import errno
import io
import json
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

from nanogpt2 import hub, terminal
from nanogpt2.atomic import whole_file
from nanogpt2.download import download
from nanogpt2.filesystem import open_regular
from nanogpt2.hub import StoredFile

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
# the first of these that a repository has holds its weights, or names their files
WEIGHTS = (
    *("model.safetensors", "model.int8.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
INDEX = ".index.json"
LARGEST_ANSWER = 2**24  # bytes
LARGEST_TEXT = 2**25  # bytes
LARGEST_MODEL = 2**38  # bytes
LONGEST_NAME = 200  # characters of a file's name
COMMIT = re.compile("[0-9a-f]{40}")
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
# a name in the root that is a file's on every system
PLAIN = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Listing:
    """A commit of a repository: what the hub states of each file."""

    commit: str
    entries: dict[str, dict[str, Any]]

    def file(self, name: str, largest: int = LARGEST_MODEL) -> StoredFile:
        """Return a file's size and hash. Raises ValueError for an invalid entry, or a large file.

        `name` must be in `entries`.
        """
        entry = self.entries[name]
        lfs = entry.get("lfs") or {}
        is_lfs = isinstance(lfs, dict) and bool(lfs)
        digest = lfs.get("sha256") if is_lfs else entry.get("blobId")
        size = entry.get("size", lfs.get("size") if is_lfs else None)
        digits = 64 if is_lfs else 40
        if not (isinstance(digest, str) and HASH.fullmatch(digest) and len(digest) == digits):
            raise ValueError(f"{hub.host()} states no hash of {name}")
        if type(size) is not int or size < 0 or (is_lfs and lfs.get("size", size) != size):
            raise ValueError(f"{hub.host()} states no size of {name}")
        if size > largest:
            raise ValueError(f"{name} has {size:,} bytes; {largest:,} are allowed")
        return StoredFile(name, size, digest)


def fetch_repository(
    repo: str, revision: str, accept: Callable[[Path], object], name: str = ""
) -> Path:
    """Return the folder of a GPT-2's files, which may be a copy of an earlier call.

    repo: USER/NAME. revision: a branch, a tag or a commit. accept: called with the folder once it
    has the files of CONFIGS; a ValueError of it ends the download. name: for messages, the user's
    words for the model.

    With a commit whose files are here, or with HF_HUB_OFFLINE, no request is sent. Where the hub
    gives no answer, the copy of the last call is used, with a note. Raises OSError for a failed
    download, ValueError for a repository without a GPT-2 and for an answer that cannot be true,
    each in one line.
    """
    hub.expanded(hub.CACHE)
    name = name or repo
    kept = _kept(hub.folder_of(repo), _asked.get((repo, revision), revision))
    if kept is not None and ((repo, revision) in _asked or _is_whole(kept, revision)):
        return kept
    try:
        with hub.one_line(name, revision):
            snapshot = _current(repo, revision, kept, accept)
    except ValueError as error:
        raise ValueError(f"{name!r:.60}: {error}") from None
    _asked[repo, revision] = snapshot.name
    return snapshot


# the commits of this process: a branch that moves meanwhile must not mix two models
_asked: dict[tuple[str, str], str] = {}


def _current(repo: str, revision: str, kept: Path | None, accept: Callable[[Path], object]) -> Path:
    """Return the folder of the revision's present commit; `kept` where the hub cannot be asked."""
    from huggingface_hub import constants

    try:
        listing = _ask(repo, revision)
    except (OSError, HTTPException) as error:
        refused = isinstance(error, HTTPError) and error.code in (401, 403, 404)
        if kept is None or refused:
            raise
        if not constants.HF_HUB_OFFLINE:
            terminal.note_once(f"note: {hub.host()} gives no answer: using the copy of {repo} here")
        return kept
    snapshot = _fetch(repo, listing, accept)
    _keep_ref(hub.folder_of(repo), revision, listing.commit)
    return snapshot


def _ask(repo: str, revision: str) -> Listing:
    """Ask the hub for a revision's commit and files.

    Raises OSError or HTTPException for an answer that is none, ValueError for an invalid one.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    path = f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    url, answer = constants.ENDPOINT + path, io.BytesIO()
    download(url, answer, LARGEST_ANSWER, hub.token_for(url))
    try:
        stated = json.loads(answer.getvalue())
    except (ValueError, RecursionError):
        stated = None
    if not isinstance(stated, dict):
        # perhaps a network's page to log in
        raise OSError("the answer is not JSON")
    commit, siblings = stated.get("sha"), stated.get("siblings")
    if not (isinstance(commit, str) and COMMIT.fullmatch(commit)):
        raise ValueError(f"{hub.host()} states no commit")
    if COMMIT.fullmatch(revision) and commit != revision:
        raise ValueError(f"{hub.host()} states another commit, {commit}")
    if not isinstance(siblings, list):
        raise ValueError(f"{hub.host()} states no files")
    entries: dict[str, dict[str, Any]] = {}
    for entry in siblings:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not (isinstance(name, str) and _is_inside(name)) or name in entries:
            raise ValueError(f"{hub.host()} states a wrong file name: {name!r:.60}")
        entries[name] = entry
    return Listing(commit, entries)


def _is_inside(name: str) -> bool:
    """Return False for a name that would lead out of the repository's folder."""
    has_control = any(character < " " or character == "\x7f" for character in name)
    return not has_control and not {"", ".", ".."} & {*name.split("/")}


def _fetch(repo: str, listing: Listing, accept: Callable[[Path], object]) -> Path:
    """Download what the snapshot's folder lacks, and return it. Errors: see fetch_repository."""
    snapshot = hub.folder_of(repo) / "snapshots" / listing.commit

    def fetch(name: str, largest: int = LARGEST_TEXT) -> Path:
        try:
            return hub.fetch_file(repo, listing.file(name, largest), snapshot)
        except ValueError as error:
            if name in str(error):
                raise
            line = f"{name} is not as {hub.host()} states it: {error}"
            raise ValueError(line) from None

    if CONFIGS[0] not in listing.entries:
        raise ValueError(f"the repository has no {CONFIGS[0]}: it does not hold a GPT-2")
    weights = _choose(listing.entries)
    for name in CONFIGS:
        if name in listing.entries:
            fetch(name)
    accept(snapshot)
    for name in TOKENIZER:
        if name in listing.entries:
            fetch(name)
    if weights.endswith(INDEX):
        fetch(weights)
    files = [listing.file(name) for name in _parts(snapshot, weights, listing.entries)]
    _check_space(snapshot, files)
    for file in files:
        fetch(file.name, LARGEST_MODEL)
    return snapshot


def _choose(names: Collection[str]) -> str:
    """Return the file that holds the weights or names their files."""
    found = next((name for name in WEIGHTS if name in names), None)
    if found is None:
        raise ValueError(f"the repository has neither {WEIGHTS[0]} nor {WEIGHTS[3]}")
    return found


def _parts(folder: Path, weights: str, names: Collection[str]) -> list[str]:
    """Return the names of the weights' files, which an index in the folder may list.

    Raises ValueError for an index of other files than those of the repository's root.
    """
    if not weights.endswith(INDEX):
        return [weights]
    try:
        with open_regular(folder / weights, LARGEST_TEXT) as file:
            stated = json.loads(file.read())["weight_map"]
        parts = sorted({*stated.values()})
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        parts = []
    suffix = Path(weights.removesuffix(INDEX)).suffix
    for part in parts:
        plain = isinstance(part, str) and PLAIN.fullmatch(part) and part.endswith(suffix)
        if not plain or len(part) > LONGEST_NAME or part not in names:
            raise ValueError(f"{weights} names {part!r:.60}, which is not a file of the repository")
    if not parts:
        raise ValueError(f"{weights} has no weight_map of tensors to files beside it")
    return parts


def _check_space(snapshot: Path, files: list[StoredFile]) -> None:
    """Raise ValueError for weights that are too large, OSError for a disk that is too full."""
    total = sum(file.size for file in files)
    if total > LARGEST_MODEL:
        raise ValueError(f"the weights have {total:,} bytes; {LARGEST_MODEL:,} are allowed")
    blobs = snapshot.parent.parent / "blobs"
    missing = 0
    for file in files:
        blob = blobs / file.digest
        places = (snapshot / file.name, blob, hub.partial_of(blob))
        here = max(place.stat().st_size if place.exists() else 0 for place in places)
        missing += max(0, file.size - here)
    free = shutil.disk_usage(snapshot).free
    if missing > free:
        line = f"{missing / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free"
        raise OSError(errno.ENOSPC, line, str(hub.cache()))


# ---- the copy here


def _kept(place: Path, revision: str) -> Path | None:
    """Return the folder of a revision's files if config and weights are here; else None."""
    commit: str | None = revision
    if not COMMIT.fullmatch(revision):
        commit = _read_ref(place, revision)
    if commit is None:
        return None
    folder = place / "snapshots" / commit
    try:
        names = {path.name for path in folder.iterdir() if path.is_file()}
        complete = CONFIGS[0] in names and names.issuperset(_parts(folder, _choose(names), names))
    except (OSError, ValueError):
        return None
    return folder if complete else None


def _is_whole(folder: Path, revision: str) -> bool:
    """Return True for a commit's files with a vocabulary: another program may have left it out."""
    names = {path.name for path in folder.iterdir()}
    vocabulary = "tokenizer.json" in names or names.issuperset({"vocab.json", "merges.txt"})
    return vocabulary and COMMIT.fullmatch(revision) is not None


def _read_ref(place: Path, revision: str) -> str | None:
    """Return the commit that a branch or tag had when it was last asked for; None if never."""
    try:
        with open_regular(place / "refs" / revision, LONGEST_NAME) as file:
            commit = file.read().decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _keep_ref(place: Path, revision: str, commit: str) -> None:
    if revision == commit or _read_ref(place, revision) == commit:
        return
    path = place / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(commit, encoding="ascii")
