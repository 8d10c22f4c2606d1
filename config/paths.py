"""Paths as users write them in settings and on the command line."""

import os
from typing import Any

from config.errors import InputError


def expanded(path: Any) -> Any:
    """Replaces a leading ~ or ~user by that user's home folder, as a shell does; in a tuple of paths in each.

    Values other than texts and tuples are returned unchanged. Raises InputError if there is no such user, since a
    folder of that name would be made otherwise.
    """
    if isinstance(path, tuple):
        return tuple(map(expanded, path))
    found = os.path.expanduser(path) if isinstance(path, str) else path
    if isinstance(found, str) and found.startswith("~"):
        raise InputError(f"{path} begins with ~ and no such user is there: write ./{path} if the name is meant.")
    return found
