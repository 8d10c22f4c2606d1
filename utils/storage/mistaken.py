"""Recognises what downloads leave in place of a file: a web page, a pointer of Git LFS or git-annex, an archive."""


def mistaken(content: bytes) -> str:
    """Returns what a file is instead of what its name says, as the rest of a sentence; "" if it is none of these."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content:
        return "is empty: get it again"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<script", b"<!-- ")):
        return "is a web page instead, perhaps one that asks to log in or to confirm: open its address in a browser"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a pointer of Git LFS, not the file itself: git lfs pull"
    if start.startswith((b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/")):
        return "is a pointer of git-annex, not the file itself: git annex get"
    archives = {b"PK\3\4": "a zip archive", b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive"}
    archives |= {b"Rar!\x1a\7": "a rar archive", b"\xfd7zXZ\0": "an xz archive", b"BZh": "a bzip2 archive"}
    for magic, name in archives.items():
        if content.startswith(magic):
            return f"is {name}: unpack it"
    if content[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    return ""
