"""The exception for what a user can put right."""


class InputError(ValueError):
    """A setting, file or folder is not as it must be. The message is one sentence that names it and says what to do."""
