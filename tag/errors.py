"""Errors that are the user's to mend: the scripts print their message on one line and exit with code 2."""


class DataError(ValueError):
    """Bad input data; the message is one line that says what, where and what to do."""


class MissingImage(DataError):
    """A record's image is not where it should be."""


class UsageError(ValueError):
    """A wrong flag or folder; the message is one line that says what, where and what to do.

    everywhere: all ranks raise it together, so that the main process alone says it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class DiskError(UsageError):
    """What has to be written cannot be; the message is one line that says what, where and what to do."""
