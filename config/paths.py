"""Paths as users write them in settings and on the command line."""

import os

from config.errors import InputError


def expanded(path: str) -> str:
    """Replaces a leading ~ or ~user by that user's home folder, as a shell does for an unquoted word.

    Raises InputError if there is no such user, since a folder of that name would be made otherwise.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise InputError(f"{path} begins with ~ and no such user is there: write ./{path} if the name is meant.")
    return found
