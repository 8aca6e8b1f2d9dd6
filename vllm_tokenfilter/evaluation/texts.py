"""Running text to read: WikiText-2, a file of the user's, or the language reference that comes with Python."""

import os
from pathlib import Path

from vllm_tokenfilter.errors import EvaluationError

WIKITEXT_FILE = "wikitext2_test.raw"


def load_text(source: str | None, data_dir: Path | None) -> tuple[str, str]:
    """Name and content of the prose.

    Args:
        source: "wikitext2", "builtin", a file's path, or None: WikiText-2 from `data_dir` if it is there, else builtin.
        data_dir: folder with `wikitext2_test.raw`.

    Raises:
        EvaluationError: it cannot be read.
    """
    local = data_dir / WIKITEXT_FILE if data_dir is not None else None
    if source is None:
        source = "wikitext2" if local is not None and local.exists() else "builtin"
    if source == "builtin":
        return "Python language reference", _builtin()
    if source == "wikitext2":
        if local is not None and local.exists():
            return "WikiText-2 test", _read(local)
        return "WikiText-2 test", _wikitext_from_hub()
    return Path(source).name, _read(Path(source))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"text={path} cannot be read ({error}); pass a UTF-8 text file.") from None


def _builtin() -> str:
    """The language reference that comes with Python's own `pydoc`: about 100,000 words of technical prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _wikitext_from_hub() -> str:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise EvaluationError(
            f"text=wikitext2 is not in --data-dir and HF_HUB_OFFLINE=1; put {WIKITEXT_FILE} there, or use "
            "--text builtin."
        )
    try:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return "".join(rows["text"])
    except Exception as error:  # whatever datasets raises, the user needs one sentence
        raise EvaluationError(
            f"text=wikitext2 cannot be loaded ({error}); pass --data-dir with {WIKITEXT_FILE} or --text FILE."
        ) from None
