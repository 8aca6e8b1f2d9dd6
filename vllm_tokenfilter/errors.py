"""The errors meant for users: one family, each message a sentence naming setting, value and remedy.

Imports nothing, so that the command line and the configuration can raise them before vLLM loads.
"""

from collections.abc import Sequence


class TokenFilterError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TokenFilterError, ValueError):
    """A Token Filtering setting that cannot hold; the message lists every reason found."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("Token Filtering configuration refused: " + " ".join(self.reasons))


class UnsupportedError(TokenFilterError, ValueError):
    """A vLLM deployment Token Filtering cannot serve; the message lists every reason found."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("Token Filtering cannot run here: " + " ".join(self.reasons))


class ModelError(TokenFilterError):
    """The embedded default model could not be made ready."""


class EvaluationError(TokenFilterError):
    """A measurement was asked for that cannot be made; the message lists every reason found."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(" ".join(self.reasons))


class PlanError(TokenFilterError):
    """A deployment cannot be planned for; the message lists every reason found."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(" ".join(self.reasons))
