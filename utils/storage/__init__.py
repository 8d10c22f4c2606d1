"""Files that survive a crash: atomic writes, locks, checksums, and arrays that are filled block by block."""
