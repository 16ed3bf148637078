"""The errors a user can cause or mend, each with the exit code the command line answers with.

Every message names the file, the record or the field, and the remedy. Anything that is not a `GubsError` is a bug.
"""


class GubsError(Exception):
    """Base of all errors that come with a remedy. `exit_code` is what `gubs` returns to the shell."""

    exit_code = 1


class SettingsError(GubsError):
    """A setting is unknown, has a wrong value, or does not fit with another."""

    exit_code = 2


class InputError(GubsError):
    """Input data (a log, a table, a video folder) cannot be used as it is."""

    exit_code = 3


class ArtifactError(GubsError):
    """An artifact is missing, incomplete, of another kind, or made with other settings."""

    exit_code = 4


class PlatformError(GubsError):
    """The machine or the cluster lacks something (a package, memory, disk, a GPU)."""

    exit_code = 5
