"""The errors that a user can cause or fix, each with its exit code on the command line.

Every message names the file, the record or the field, and the remedy. Any other exception is a bug.
"""


class GubsError(Exception):
    """Base of all errors that come with a remedy. `exit_code` is what `gubs` returns to the shell."""

    exit_code = 1


class SettingsError(GubsError):
    """A setting is unknown, has a wrong value, or contradicts another."""

    exit_code = 2


class InputError(GubsError):
    """Input data (a log, a table, a video folder) cannot be used as it is."""

    exit_code = 3


class ArtifactError(GubsError):
    """An artifact is missing, incomplete, of another kind, or was made with other settings."""

    exit_code = 4


class MissingArtifactError(ArtifactError):
    """An artifact does not exist or is unfinished. The command line adds which command makes it."""

    def __init__(self, stage: str, message: str):
        super().__init__(message)
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it crosses process boundaries
        return type(self), (self.stage, str(self))


class PlatformError(GubsError):
    """The machine or the cluster lacks something (a package, memory, disk, a GPU)."""

    exit_code = 5
