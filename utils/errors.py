"""The exceptions for what a user can put right."""


class InputError(ValueError):
    """A setting, file or folder is not as it must be. The message is one sentence that names it and says what to do."""


class NotWritten(InputError):
    """A disk is full, or a folder must not be written to."""


class UnexpectedAdaptor(InputError):
    """The weights are an adaptor's, where those of a face network were to be loaded."""


class Damaged(InputError):
    """A file is not as it was written; what can be made again from others may be."""
