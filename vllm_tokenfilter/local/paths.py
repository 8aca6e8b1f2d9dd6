"""Where files made on this machine are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for this package; may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-tokenfilter"
