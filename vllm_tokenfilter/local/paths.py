"""Where files made on this machine are kept, and how files that the user named are checked and written."""

import os
from pathlib import Path

from vllm_tokenfilter.errors import EvaluationError


def cache_folder() -> Path:
    """The user's cache folder for this package; may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-tokenfilter"


def unwritable(**files: Path | None) -> list[str]:
    """Which of the files, by the names of their flags, cannot be written for want of a folder; a sentence each."""
    return [
        f"{flag}={path} cannot be written: {path.parent} must be a folder that exists; choose another place."
        for flag, path in files.items()
        if path is not None and not path.parent.is_dir()
    ]


def write_text(path: Path, text: str, flag: str) -> None:
    """Write a file, and the folder it lies in, whole or not at all: cut off, it would lose what stood there before.

    Raises:
        EvaluationError: it cannot be written; names the flag.
    """
    plain = path.is_file() or not path.exists()  # unlike a pipe or /dev/null
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part") if plain else path
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise EvaluationError(f"{flag}={path} cannot be written ({error}); choose another place.") from None
