"""A name -> a file on disk: OpenAI's weights and tiny Shakespeare, downloaded once and checked.

Their SHA-256 are fixed here. Models lie in huggingface-hub's cache, by its settings (HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE), where transformers finds them too:

    models--USER--NAME/blobs/HASH                        a file, named after its hash
                       blobs/HASH.nanogpt2.incomplete    a download that broke off
                       snapshots/COMMIT/FILE             a link to a blob
                       refs/REVISION                     a commit

A file's hash is checked before the file appears there, and again when its size or modification time
has changed. This file does not interpret the bytes; repository.py chooses the files of a model.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.download import OF_DISK, download
from nanogpt2.filesystem import lock, open_regular, sync

CACHE = Path("~/.cache/nanogpt2")
WEIGHTS = "model.safetensors"
WAIT = 0.2  # seconds between two looks at another process's download


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository: its name, size and hash.

    digest: in hexadecimal, the SHA-256 or, with 40 digits, git's SHA-1 of a blob.
    """

    name: str
    size: int  # bytes
    digest: str


@dataclass(frozen=True)
class Release:
    """A model.safetensors of OpenAI's release, at a fixed revision."""

    repo: str
    revision: str
    size: int  # bytes
    sha256: str


# the sizes of large and xl are computed from the layout; the SHA-256 decides
RELEASES = {
    "gpt2": Release(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": Release(
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        1_519_984_962,
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": Release(
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        3_247_159_078,
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl": Release(
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        6_431_829_962,
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SIZE = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def expanded(folder: Path) -> Path:
    """Expand ~ to the home folder; where none is known, to a temporary one."""
    try:
        return folder.expanduser()
    except RuntimeError:
        home = tempfile.mkdtemp(prefix="nanogpt2-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        # for this process, huggingface-hub included
        os.environ["HOME"] = home
        terminal.note("note: HOME is not set: caches last as long as this process")
        return folder.expanduser()


def fetch_weights(name: str) -> Path:
    """Return the path of an official model.safetensors, downloading it the first time.

    Raises OSError for a file that is neither on disk nor downloadable, ValueError for bytes that
    are not OpenAI's. Both messages name the remedy.
    """
    # huggingface-hub would make a folder named ~ where no home is known
    expanded(CACHE)
    from huggingface_hub import constants

    release = RELEASES[name]
    file = StoredFile(WEIGHTS, release.size, release.sha256)
    snapshot = folder_of(release.repo) / "snapshots" / release.revision
    path = snapshot / WEIGHTS
    if path.exists():
        if not is_intact(path, file):
            line = f"{str(path)!r} is not OpenAI's {name} file: delete it and download again"
            raise ValueError(line)
        return path
    with one_line(name, release.revision):
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        try:
            return fetch_file(release.repo, file, snapshot)
        except ValueError as error:
            raise ValueError(
                f"the file downloaded for {name!r} is not OpenAI's ({error}): check HF_ENDPOINT"
            ) from None


# ---- huggingface-hub's cache


def cache() -> Path:
    """Return huggingface-hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(repo: str) -> Path:
    """Return the folder of a repository, USER/NAME, in huggingface-hub's cache."""
    from huggingface_hub.file_download import repo_folder_name

    return cache() / repo_folder_name(repo_id=repo, repo_type="model")


def fetch_file(repo: str, file: StoredFile, snapshot: Path) -> Path:
    """Return the path of a file in a snapshot's folder, downloading it unless it is there.

    The file's name and digest become paths: the caller checks them. Raises ValueError for other
    bytes, OSError or HTTPException for a failed download.
    huggingface-hub's own download (2.4) joins the server's ETag to a path without a check, so a
    mirror could write any file.
    """
    from huggingface_hub import hf_hub_url

    path, blob = snapshot / file.name, snapshot.parent.parent / "blobs" / file.digest
    if not path.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(blob) as partial:
            # another process may have been faster
            if not path.exists():
                if not (blob.exists() and is_intact(blob, file)):
                    _download(hf_hub_url(repo, file.name, revision=snapshot.name), partial, file)
                    sync(partial)
                    partial.replace(blob)
                _link(blob, path)
    if not is_intact(path, file):
        raise ValueError(f"{str(path)!r} is damaged: delete it and download again")
    return path


def _link(blob: Path, path: Path) -> None:
    """Make `path` a relative link to a blob; move the blob on a file system without links."""
    with whole_file(path) as link:
        try:
            link.symlink_to(Path("../..", "blobs", blob.name))
        except OSError:
            blob.replace(link)


def partial_of(blob: Path) -> Path:
    """Return the file that holds the start of a blob until the whole is there."""
    return blob.with_name(f"{blob.name}.nanogpt2.incomplete")


@contextmanager
def _held(blob: Path) -> Iterator[Path]:
    """Yield the file of a broken or new download, which no other process of ours writes meanwhile.

    Afterwards an empty one is deleted; a longer one is there for the next try.
    """
    partial = partial_of(blob)
    if partial.is_symlink():
        # never write through a link
        partial.unlink()
    while True:
        try:
            held = lock(partial)
            break
        except BlockingIOError:
            terminal.note_once("waiting for another process to download the model")
            time.sleep(WAIT)
    with held:
        if os.name == "nt":
            # there an open file cannot be renamed, and `lock` has no lock
            held.close()
        try:
            yield partial
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()


def _download(url: str, partial: Path, file: StoredFile) -> None:
    """Complete a file and check its hash.

    Raises ValueError for other bytes, which are deleted; OSError or HTTPException for a failed
    download.
    """
    token = token_for(url)
    for _ in range(2):
        with partial.open("r+b") as out:
            start = out.seek(0, os.SEEK_END)
            try:
                _transfer(url, out, file, token)
                error = ValueError("other bytes")
            except HTTPError as refused:
                # the server has less than was kept
                if not (start and refused.code == 416):
                    raise
            except ValueError as wrong:
                error = wrong
        if is_intact(partial, file):
            return
        with partial.open("wb"):
            pass
        if not start:
            # else the start was damaged: once more, from the first byte
            break
    raise error


def _transfer(url: str, out: IO[bytes], file: StoredFile, token: str | None) -> None:
    from tqdm import tqdm

    start = out.tell()
    # the other files take no time
    disable = None if file.name.endswith((".safetensors", ".bin")) else True
    with tqdm(
        total=file.size,
        initial=start,
        desc=file.name,
        unit="B",
        unit_scale=True,
        disable=disable,
    ) as bar:
        if start < file.size:
            download(url, out, file.size, token, bar.update)


def token_for(url: str) -> str | None:
    """Return the user's token for the hub; None for http, and where the user forbids to send it.

    Raises OSError for a token that no header can carry.
    """
    from huggingface_hub import constants, get_token

    # not build_hf_headers: it asks the mirror too, and keeps the answer on disk
    asks = url.startswith("https:") and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    token = get_token() if asks else None
    if token and not (token.isascii() and token.isprintable()):
        # http.client's own message would show it
        raise OSError("HF_TOKEN must be plain characters")
    return token


def is_intact(path: Path, file: StoredFile) -> bool:
    """Return True for the expected size and hash. Read the file once for each size and mtime."""
    state = path.stat()
    if state.st_size != file.size:
        return False
    marker = expanded(CACHE) / "verified" / f"{file.digest}-{state.st_size}-{state.st_mtime_ns}"
    if marker.exists():
        return True
    is_git = len(file.digest) == 40
    head = b"blob %d\0" % file.size if is_git else b""
    found = hashlib.new("sha1" if is_git else "sha256", head, usedforsecurity=False)
    with path.open("rb") as opened:
        hashlib.file_digest(opened, lambda: found)
    if found.hexdigest() != file.digest:
        return False
    with suppress(OSError):
        # without the marker, the next call reads the file again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return True


# ---- errors


def host() -> str:
    """Return the name of the server that HF_ENDPOINT states, without a password in it."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2] or constants.ENDPOINT


@contextmanager
def one_line(name: str, revision: str) -> Iterator[None]:
    """Turn an error of the network or the disk into an OSError whose message says what to do."""
    try:
        yield
    except HTTPError as error:
        raise OSError(_refusal(f"{name!r:.60}", revision, error)) from error
    except (OSError, HTTPException) as error:
        raise OSError(f"{name!r:.60} {_failure(error)}") from error


def _refusal(name: str, revision: str, error: HTTPError) -> str:
    """Say what a server's status means for the user."""
    asked, server, status = host(), urlsplit(error.url or "").netloc, error.code
    if status == 404:
        return (
            f"{name} is not a path, and {asked} has no repository of that name with the revision "
            f"{revision!r}"
        )
    if status in (401, 403) and server == asked:
        return (
            f"{name} is not a path, and on {asked} it is private, gated or missing: accept its "
            "terms there, then set HF_TOKEN or run hf auth login"
        )
    if status == 429:
        wait = error.headers.get("Retry-After") or ""
        when = f"in {wait} s" if wait.isdecimal() and len(wait) < 6 else "later"
        return f"{name} cannot be downloaded: too many requests to {asked}; try again {when}"
    if "infinite loop" in str(error.msg):
        return f"{name} cannot be downloaded: {server or asked} redirects without end"
    return f"{name} cannot be downloaded: {server or asked} answers {status}; try again later"


def _failure(error: OSError | HTTPException) -> str:
    """Say why no answer came, or why it could not be kept."""
    if isinstance(error, OSError) and (error.errno in OF_DISK or error.filename):
        place = str(error.filename or cache())
        return f"cannot be kept on disk: {error.strerror or error}: {place!r}"
    reason = error.reason if isinstance(error, URLError) else error
    # our own errors, and those of a proxy, have a text and no number
    has_text = isinstance(reason, str) or (type(reason) is OSError and reason.errno is None)
    why = f"{reason!s:.60}" if has_text else type(reason).__name__
    return (
        f"is not on this machine and cannot be downloaded ({why}); go online once, give a folder "
        "or .safetensors file, or use demo"
    )


# ---- tiny Shakespeare


def fetch_shakespeare() -> Path:
    """Return the path of tiny Shakespeare, downloading it the first time.

    Raises OSError for a failed download, ValueError for other bytes, downloaded or kept on disk.
    """
    path = expanded(CACHE) / "shakespeare.txt"
    if not path.exists():
        terminal.note("downloading tiny Shakespeare (1.1 MB)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            try:
                with partial.open("wb") as out:
                    download(SHAKESPEARE_URL, out, SHAKESPEARE_SIZE)
            except (OSError, HTTPException) as error:
                raise OSError(
                    "'shakespeare' is not on this machine and cannot be downloaded "
                    f"({type(error).__name__}); go online once, or give a text file"
                ) from error
            if hashlib.sha256(partial.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
                raise ValueError("the file downloaded for 'shakespeare' is not tiny Shakespeare")
        return path
    with open_regular(path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHAKESPEARE_SHA256:
            raise ValueError(f"{str(path)!r} is not tiny Shakespeare: delete it and download again")
    return path
