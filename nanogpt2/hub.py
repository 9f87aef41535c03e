"""A name -> a file on disk: OpenAI's weights and tiny Shakespeare, downloaded once and checked.

Weights lie in huggingface-hub's cache, by its settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
Each file's SHA-256 is fixed here. It is checked before the file appears there, and again whenever
the file's size or modification time changes. This file does not interpret the bytes.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.download import download
from nanogpt2.filesystem import open_regular

CACHE = Path("~/.cache/nanogpt2")
WEIGHTS = "model.safetensors"


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
    from huggingface_hub import try_to_load_from_cache

    release = RELEASES[name]
    cached = try_to_load_from_cache(release.repo, WEIGHTS, revision=release.revision)
    if not isinstance(cached, str):
        return _download_weights(name, release)
    path = Path(cached)
    if path.stat().st_size != release.size or not _verified(path, release.sha256):
        raise ValueError(f"{str(path)!r} is not OpenAI's {name} file: delete it and download again")
    return path


def _download_weights(name: str, release: Release) -> Path:
    """Put a release's file where huggingface-hub looks for it, once its SHA-256 is right.

    huggingface-hub's own download (2.4) joins the server's ETag to a path without a check, so a
    mirror could write any file. Here every name is a constant.
    """
    from huggingface_hub import constants, get_token, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from tqdm import tqdm

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=release.repo, repo_type="model"
    )
    blob = folder / "blobs" / release.sha256
    path = folder / "snapshots" / release.revision / WEIGHTS
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        url = hf_hub_url(release.repo, WEIGHTS, revision=release.revision)
        # not build_hf_headers: it asks the mirror too, and keeps the answer on disk
        asks = url.startswith("https:") and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
        token = get_token() if asks else None
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_file(blob) as partial,
            tqdm(total=release.size, desc=WEIGHTS, unit="B", unit_scale=True, disable=None) as bar,
        ):
            download(url, partial, release.size, token, bar.update)
            if partial.stat().st_size != release.size or not _verified(partial, release.sha256):
                raise ValueError("other bytes")
        with whole_file(path) as partial:
            _link(blob, partial)
    except ValueError as error:
        raise ValueError(
            f"the file downloaded for {name!r} is not OpenAI's ({error}): check HF_ENDPOINT"
        ) from None
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{name!r} is not on this machine and cannot be downloaded "
            f"({type(error).__name__}); go online once, give a folder or .safetensors file, "
            "or use demo"
        ) from error
    return path


def _link(blob: Path, path: Path) -> None:
    """Make `path` a relative link to a blob; move the blob on a file system without links."""
    try:
        path.symlink_to(Path("../..", "blobs", blob.name))
    except OSError:
        blob.replace(path)


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
                download(SHAKESPEARE_URL, partial, SHAKESPEARE_SIZE)
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


def _verified(path: Path, sha256: str) -> bool:
    """Return True for the expected SHA-256. Read the file once for each size and mtime."""
    state = path.stat()
    marker = expanded(CACHE) / "verified" / f"{sha256}-{state.st_size}-{state.st_mtime_ns}"
    if marker.exists():
        return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
    with suppress(OSError):
        # without the marker, the next call reads the file again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return True
