"""Progress: what long work calls to say how far it is."""

from collections.abc import Callable
from typing import Protocol


class Advance(Protocol):
    """What counts the units of a stage."""

    def __call__(self, unit: str | None = None) -> None:
        """Count one more unit, which is done, or begins and is named."""


#: Told of every stage and the number of its units, 0 where that is not known; returns what to call for each unit.
Progress = Callable[[str, int], Advance]
