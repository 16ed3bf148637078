"""What can stop a run of LLM calls. Every call that finished before is in the journal."""

from gubs.errors import ArtifactError, GubsError, PlatformError, SettingsError


class EndpointError(GubsError):
    """An endpoint answers nothing more. It is raised in a client actor and crosses Ray."""

    def __init__(self, message: str, endpoint: str = ""):
        super().__init__(message)
        self.endpoint = endpoint


class EndpointDownError(EndpointError, PlatformError):
    """An endpoint has not responded for too long."""


class EndpointRefusedError(EndpointError, SettingsError):
    """An endpoint refuses every call: wrong key, unknown model, exhausted quota."""


class BudgetReachedError(GubsError):
    """The next call does not fit the budget; raise it and run again."""

    exit_code = 6


class NotInJournalError(ArtifactError):
    """Replay: the journal lacks an answer."""


class JournalError(ArtifactError):
    """The journal cannot be written or read."""
