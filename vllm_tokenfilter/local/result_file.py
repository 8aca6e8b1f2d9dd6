"""Result files: JSON with a line for each thing measured, written whole or not at all, and resumed."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from vllm_tokenfilter.errors import EvaluationError
from vllm_tokenfilter.local.paths import write_text
from vllm_tokenfilter.local.provenance import now, provenance

File = TypeVar("File", bound="ResultFile")


class ResultFile(BaseModel):
    """What every result file begins with."""

    model_config = ConfigDict(extra="forbid")

    kind: str  #: what was measured, so that a reader knows the file.
    commit: str  #: of the package, "+changes" if files differed.
    command: str  #: how to run it again.
    machine: dict[str, Any]  #: processor, cores, memory.
    versions: dict[str, str]  #: of this package and what it stands on.
    time: str  #: when the last entry was measured, UTC.
    model: str  #: path's last part, Hugging Face id, or the name served.

    @classmethod
    def resume(cls: type[File], path: Path, **identity: Any) -> File:
        """A file with the provenance of this run and what an earlier one of the same identity measured; it is written.

        The file at `path` need not exist; `identity` is the fields that say what is measured.

        Raises:
            EvaluationError: the file is of another kind or identity, or cannot be read or written.
        """
        fresh = cls(**provenance(), **identity)
        if path.exists():
            old = cls.read(path)
            for name, value in identity.items():
                if (before := getattr(old, name)) != value:
                    raise EvaluationError(
                        f"json={path} was measured with {name}={before}, not {value}; choose another name."
                    )
            measured = cls.model_fields.keys() - ResultFile.model_fields.keys() - identity.keys()
            return fresh.model_copy(update={name: getattr(old, name) for name in measured})
        fresh.write(path)
        return fresh

    @classmethod
    def read(cls: type[File], path: Path, option: str = "json") -> File:
        """The file at `path`, which the flag `option` named.

        Raises:
            EvaluationError: it cannot be read, or is of another kind.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            kind = cls.model_fields["kind"].default
            first = str(error).splitlines()[0]
            raise EvaluationError(
                f"{option}={path} must be a result file of the kind {kind} ({first}); choose another name."
            ) from None

    def write(self, path: Path) -> None:
        """Write the file, now being its time; see `write_result`."""
        self.time = now()
        write_result(path, self.model_dump(mode="json"))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all.

    Raises:
        EvaluationError: it cannot be written.
    """
    write_text(path, as_text(result) + "\n", "json")


def as_text(value: Any, indent: str = "") -> str:
    """JSON in which every entry of a list of tables is one line, and every table of plain values."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        entries = [f"{json.dumps(key)}: {as_text(item, inner)}" for key, item in value.items()]
        opened, closed = "{}"
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        entries = [json.dumps(item) for item in value]
        opened, closed = "[]"
    else:
        return json.dumps(value)
    return f"{opened}\n{inner}" + f",\n{inner}".join(entries) + f"\n{indent}{closed}"
