"""Exceptions for errors that the user can fix."""

from config.errors import InputError


class NotWritten(InputError):
    """A file cannot be written: the disk is full or the folder is read-only."""


class Damaged(InputError):
    """A file is corrupted. The caller may make it again if it can be derived from other files."""
