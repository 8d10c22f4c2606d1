"""The exceptions for what a user can put right."""

from config.errors import InputError


class NotWritten(InputError):
    """A disk is full, or a folder must not be written to."""


class Damaged(InputError):
    """A file is not as it was written; what can be made again from others may be."""
