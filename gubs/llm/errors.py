"""What can stop a run of LLM calls. Everything that was finished before stands in the journal."""

from gubs.errors import ArtifactError, GubsError, PlatformError, SettingsError


class EndpointDownError(PlatformError):
    """An endpoint gave no sign of life for too long."""


class EndpointRefusedError(SettingsError):
    """An endpoint refuses every call: wrong key, unknown model, used-up quota."""


class BudgetReachedError(GubsError):
    """The next call does not fit into the budget; raise it and run again to go on."""

    exit_code = 6


class NotInJournalError(ArtifactError):
    """Replay: the journal lacks an answer."""


class JournalError(ArtifactError):
    """The journal cannot be written or read."""


STOPS: dict[str, type[GubsError]] = {
    "down": EndpointDownError,
    "refused": EndpointRefusedError,
    "journal": JournalError,
}
"""Error that stops the run, by the name under which an actor reports it (exceptions of other libraries stay inside)."""
