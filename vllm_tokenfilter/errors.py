"""The errors meant for users: one family, each message a sentence naming setting, value and remedy.

Imports nothing, so that the command line and the configuration can raise them before vLLM loads.
"""

from collections.abc import Sequence


class TokenFilterError(Exception):
    """Base of every error this package raises on purpose; the message lists every reason found."""

    heading = ""

    def __init__(self, reasons: str | Sequence[str]) -> None:
        self.reasons = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        super().__init__(self.heading + " ".join(self.reasons))


class ConfigError(TokenFilterError, ValueError):
    """A Token Filtering setting that cannot hold."""

    heading = "Token Filtering configuration refused: "


class UnsupportedError(TokenFilterError, ValueError):
    """A vLLM deployment Token Filtering cannot serve."""

    heading = "Token Filtering cannot run here: "


class ModelError(TokenFilterError):
    """The embedded default model could not be made ready."""


class EvaluationError(TokenFilterError):
    """A measurement was asked for that cannot be made."""


class PlanError(TokenFilterError):
    """A deployment cannot be planned for."""
