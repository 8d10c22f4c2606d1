"""Arrays that are filled block by block: finished blocks are kept, damaged ones are detected and filled again."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import full_disk
from tests.runs import ROOT
from utils.errors import Damaged, InputError, NotWritten
from utils.storage.arrays import Filling, about, outdated, provide, read, sidecar, write

VALUES = np.arange(50, dtype=np.float32).reshape(25, 2)
FORM = ((25, 2), np.float32)
ORIGIN = {"weights": "abc"}


def fill(path, made_from=ORIGIN, stop_after=None, block_rows=4):
    """Fills the missing blocks with VALUES; returns the blocks that were missing."""
    with Filling(path, *FORM, made_from, block_rows) as filling:
        for k, block in enumerate(filling.missing):
            if k == stop_after:
                raise KeyboardInterrupt
            rows = filling.rows(block)
            filling.array[rows.start : rows.stop] = VALUES[rows.start : rows.stop]
            filling.finish(block, filling.digest(block), note=f"block {block}")
    return filling.missing


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.npy"


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def test_an_array_and_its_sidecar_are_written(path):
    assert about(path) is None
    assert outdated(path, *FORM, ORIGIN) == ""
    assert fill(path) == list(range(7))
    assert names(path) == ["x.json", "x.npy"]
    assert np.array_equal(np.load(path), VALUES)
    assert np.array_equal(read(path, *FORM), VALUES)
    assert about(path)["made from"] == ORIGIN
    assert [block["note"] for block in about(path)["blocks"]] == [f"block {k}" for k in range(7)]
    assert outdated(path, *FORM, ORIGIN) is None
    assert "made from something else" in outdated(path, *FORM, {"weights": "other"})
    assert "is damaged" in outdated(path, (25, 3), np.float32, ORIGIN)
    with pytest.raises(ValueError, match="read-only"):
        read(path, *FORM)[0] = 1


@pytest.mark.parametrize("pwrite", [True, False])
def test_a_block_can_be_written_in_one_call(path, tmp_path, pwrite, monkeypatch):
    if not pwrite:
        monkeypatch.delattr(os, "pwrite")  # as on Windows
    else:
        whole = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda handle, values, at: whole(handle, values[:5], at))
    with Filling(path, *FORM, ORIGIN, 4) as filling:
        for block in reversed(filling.missing):
            rows = filling.rows(block)
            filling.finish(block, filling.write(block, VALUES[rows.start : rows.stop]))
            assert filling.write(block, VALUES[rows.start : rows.stop]) == filling.digest(block)
    assert np.array_equal(read(path, *FORM), VALUES)


def test_a_block_on_a_full_disk_is_reported(path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full_disk, raising=False)
    with (
        pytest.raises(NotWritten, match=r"x\.npy could not be written \(No space left"),
        Filling(path, *FORM, ORIGIN, 4) as f,
    ):
        f.write(0, VALUES[:4])


def test_a_kill_while_an_array_is_renamed_leaves_no_file_behind(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from tests.unit.utils.storage.test_arrays import ORIGIN, VALUES
from utils.storage.arrays import write

def killed_before(number):
    calls = [0]
    def counted(call):
        def either(*given, **more):
            calls[0] += 1
            if calls[0] == number:
                os._exit(9)
            return call(*given, **more)
        return either
    for name in ("open", "replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))

number, code = 0, 9
while code == 9:
    number += 1
    path = Path({str(tmp_path)!r}) / str(number) / "x.npy"
    child = os.fork()
    if child == 0:
        killed_before(number)
        write(path, VALUES, ORIGIN, block_rows=4)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    killed = list(tmp_path.iterdir())
    assert len(killed) > 6
    for folder in killed:
        path = folder / "x.npy"
        array = provide(path, *FORM, ORIGIN, lambda path=path: fill(path))
        assert np.array_equal(array, VALUES)
        # A lock file may remain after its process has ended; the lock itself does not.
        assert set(names(path)) - {"x.npy.lock"} == {"x.json", "x.npy"}


def test_interrupted_filling_resumes(path):
    with pytest.raises(KeyboardInterrupt):
        fill(path, stop_after=3)
    assert names(path) == ["x.json.partial", "x.npy.partial"]
    assert about(path) is None
    assert fill(path) == [3, 4, 5, 6]
    assert np.array_equal(read(path, *FORM), VALUES)
    assert names(path) == ["x.json", "x.npy"]


def test_blocks_lost_in_a_power_cut_are_filled_again(path):
    """After a power cut the record of finished blocks may exist without their rows."""
    with pytest.raises(KeyboardInterrupt):
        fill(path, stop_after=5)
    partial = path.with_name("x.npy.partial")
    content = bytearray(partial.read_bytes())
    content[128 + 4 * 8 : 128 + 8 * 8] = bytes(32)
    partial.write_bytes(content)
    assert fill(path) == [1, 5, 6]
    assert np.array_equal(read(path, *FORM), VALUES)


def test_other_sources_or_blocks_start_again_and_keep_the_old_array_until_they_are_complete(path):
    fill(path)
    with pytest.raises(KeyboardInterrupt):
        fill(path, {"weights": "new"}, stop_after=3)
    assert outdated(path, *FORM, ORIGIN) is None
    assert fill(path, {"weights": "newer"}) == list(range(7))
    assert outdated(path, *FORM, {"weights": "newer"}) is None
    with pytest.raises(KeyboardInterrupt):
        fill(path, stop_after=3)
    assert fill(path, block_rows=5) == list(range(5))


@pytest.mark.parametrize("when", ["before the array", "before the sidecar"])
@pytest.mark.parametrize("old", [{"weights": "old"}, ORIGIN, None], ids=["other", "damaged", "none"])
def test_a_kill_between_array_and_sidecar_loses_no_block(path, monkeypatch, when, old):
    if old:
        fill(path, old)
        path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    target = path if when == "before the array" else sidecar(path)
    plain = os.replace

    def killed(source, to):
        if to == target:
            raise KeyboardInterrupt
        plain(source, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        fill(path)
    assert outdated(path, *FORM, ORIGIN) is not None
    assert fill(path) == []
    assert outdated(path, *FORM, ORIGIN) is None
    assert np.array_equal(read(path, *FORM), VALUES)


def test_an_array_that_cannot_be_opened_temporarily_is_not_changed(path, monkeypatch):
    fill(path)
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")

    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", too_many)
        with pytest.raises(InputError, match="Too many open files"):
            fill(path)
    assert fill(path) == [6]


def test_another_device_is_reported_and_recorded(path, capsys):
    def attempt(device, stop_after=None):
        with Filling(path, *FORM, ORIGIN, 4, {"device": device}) as filling:
            for block in filling.missing[:stop_after]:
                filling.array[:] = VALUES
                filling.finish(block, filling.digest(block))
            if stop_after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("one", 3)
    attempt("other")
    assert "is resumed under {'device': 'other'}, before {'device': 'one'}" in capsys.readouterr().out
    assert about(path)["conditions"] == [{"device": "one"}, {"device": "other"}]


@pytest.mark.parametrize("offset", [0, 20, 100, 128, 200, 327])
def test_only_damaged_blocks_are_filled_again(path, offset):
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
    with pytest.raises(Damaged, match=r"x.npy is damaged \(.+\)$"):
        read(path, *FORM)
    assert outdated(path, *FORM, ORIGIN) is not None
    if offset >= 128:
        read(path, *FORM, checked=False)
        assert fill(path) == [(offset - 128) // 32]
    else:  # the header: nothing is kept, or only the first block is filled again
        assert fill(path) in ([0], list(range(7)))
    assert path.read_bytes() == whole


def test_a_full_disk_is_reported_and_leaves_no_file(path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(InputError, match=r"x.npy could not be written \(No space left on device\)"):
        write(path, VALUES, ORIGIN)
    assert names(path) == []
