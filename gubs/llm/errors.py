"""What can stop a run of LLM calls. Every call that finished before is in the journal."""

from gubs.errors import ArtifactError, GubsError, PlatformError, SettingsError


class EndpointError(GubsError):
    """An endpoint answers nothing more. It is raised in a client actor and crosses Ray."""

    def __init__(self, message: str, endpoint: str = ""):
        super().__init__(message)
        self.endpoint = endpoint


class EndpointDownError(EndpointError, PlatformError):
    """An endpoint has answered nothing for too long."""


class EndpointRefusedError(EndpointError, SettingsError):
    """An endpoint refuses every call: wrong key, unknown model or parameter, exhausted quota."""


class BudgetReachedError(GubsError):
    """The next call does not fit the budget; raise it and run again."""

    exit_code = 6


class IncompleteError(GubsError):
    """Too many of a stage's calls have no usable answer; what is finished is kept. The message says whether the same
    command resumes or what has to be changed first.
    """

    exit_code = 6


class StoppedError(GubsError):
    """A signal (Ctrl-C, SIGTERM) ended the run after its calls in flight had finished."""

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


class NotInJournalError(ArtifactError):
    """Replay: the journal lacks an answer."""


class JournalError(ArtifactError):
    """The journal cannot be written or read."""
