"""The exception for errors that the user can fix."""


class InputError(ValueError):
    """A setting, file or folder is unusable. The message is one sentence that names it and says what to do."""
