"""Lists folders without the hidden entries and the system entries of desktops, network drives and archives."""

import os
from collections import Counter
from collections.abc import Iterable

SYSTEM = {
    # Synology, QNAP, NetApp
    *("@eadir", "@tmp", "@sharebin", "@synoeastream", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("@transcode", "~snapshot"),
    # Windows
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "thumbs.db", "ehthumbs.db"),
    *("desktop.ini", "$windows.~bt"),
    # macOS, Linux, Android, Python
    *("__macosx", "network trash folder", "temporary items", "icon\r", "lost+found", "lost.dir", "__pycache__"),
}
"""Names, in lower case, of folders and files that systems and archive programs leave among a user's own."""


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder is hidden or of a system: its name begins with a dot or is one of SYSTEM."""
    return name.startswith(".") or name.lower() in SYSTEM


def entries(folder: str | os.PathLike[str], hidden: list[str] | None = None) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder that are not hidden, unsorted; appends the paths of the others to `hidden`.

    Raises OSError if the folder cannot be listed.
    """
    with os.scandir(folder) as found:
        if hidden is None:
            return [entry for entry in found if not is_hidden(entry.name)]
        shown = []
        for entry in found:
            if is_hidden(entry.name):
                hidden.append(entry.path)
            else:
                shown.append(entry)
        return shown


def described(hidden: Iterable[str], folder: str | os.PathLike) -> str:
    """Returns one line that counts hidden entries of `folder` by name, or "" if there are none."""
    names = Counter(os.path.basename(path) for path in hidden)
    if not names:
        return ""
    # Files such as ._1.jpg, which macOS writes beside every other file, have as many names as there are files.
    kinds = Counter()
    for name, count in names.items():
        kinds["._*" if name.startswith("._") else name] += count
    shown = ", ".join(f"{count:,} {name}" for name, count in kinds.most_common(3)) + ", ..." * (len(kinds) > 3)
    return f"{names.total():,} hidden or system entries in {os.fspath(folder)} are passed over ({shown})."
