"""Delete the files that a run made, and nothing that a person put beside them.

A reader may be in a checkpoint that is deleted. The folder therefore gets another name first: the
reader finds the whole checkpoint or none.

Standard library only. This file does not know what the files hold.
"""

import re
from collections.abc import Callable
from pathlib import Path

# as save_model and the trainer name them
MODEL_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "manifest.json",
)
CHECKPOINT_FILES = {*MODEL_FILES, "state.json", "training.safetensors"}
GONE = ".gone.tmp"


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint's files, and its folder unless other files remain. A link stays.

    Raises OSError; the next `remove_unfinished` then deletes the rest. Raises PermissionError for a
    protected folder, which stays as it was.
    """
    if path.is_symlink() or not path.is_dir():
        return
    gone = path.rename(path.with_name(path.name + GONE))
    try:
        _remove(gone, _is_of_checkpoint)
    except PermissionError:
        # nothing can be deleted in a folder without write permission: it is still whole
        gone.rename(path)
        raise
    if gone.exists():
        gone.rename(path)


def remove_unfinished(folder: Path) -> None:
    """Delete the saves and removals in `folder` that a kill cut short."""
    for path in folder.iterdir():
        is_ours = re.fullmatch(rf"step-[0-9]+(\.tmp|{re.escape(GONE)})", path.name)
        if is_ours and path.is_dir() and not path.is_symlink():
            _remove(path, _is_of_checkpoint)


def _is_of_checkpoint(name: str) -> bool:
    # save_model writes .NAME.RANDOM.tmp first
    unfinished = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", name)
    return (unfinished[1] if unfinished else name) in CHECKPOINT_FILES


def _remove(folder: Path, is_made: Callable[[str], bool]) -> None:
    """Delete the files that the run made, then the folder if it is empty and no link."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if is_made(path.name) and not (path.is_dir() and not path.is_symlink()):
            path.unlink()
    if not (folder.is_symlink() or any(folder.iterdir())):
        folder.rmdir()
