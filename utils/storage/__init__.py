"""Files that survive a crash: atomic writes, locks, checksums, arrays that are filled block by block."""
