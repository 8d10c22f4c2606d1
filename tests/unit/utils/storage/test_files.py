"""Atomic writes, checksums in files, and locks."""

import os
import subprocess
import sys

import pytest
import torch

from tests.soak.trials import ROOT, another_process_holding
from utils.errors import Damaged, InputError
from utils.storage.files import _keep_as, replaced, sha256
from utils.storage.locks import locked, refuse_if_locked
from utils.storage.seals import SEAL, check_seal, read_sealed_json, seal, write_sealed_json
from utils.storage.tensors import on_cpu, save


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), replaced(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(InputError, match=r"folder/x could not be written \(.+\)\.$"):
        replaced(tmp_path / "folder" / "x").__enter__()


def test_temporary_files_of_killed_processes_are_removed_but_not_those_of_running_ones(tmp_path):
    dead, living = tmp_path / "x.999999999.partial", tmp_path / f"x.{os.getppid()}.partial"
    for path in (dead, living):
        path.write_text("half")
    with replaced(tmp_path / "x") as partial:
        partial.write_text("whole")
    assert not dead.exists()
    assert living.exists()


def test_pytorch_can_read_a_sealed_file(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.arange(3)}, path)

    def broken():
        with open(path, "rb") as file:
            return check_seal(file)[0]

    assert broken() == "it has no SHA-256 at its end"
    digest = seal(path)
    assert digest == sha256(path)
    with open(path, "rb") as file:
        assert check_seal(file) == ("", digest)
    for mapped in (False, True):
        assert torch.load(path, weights_only=True, mmap=mapped)["weight"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes() + b"x")
    assert broken() != ""
    path.write_bytes(b"")
    assert broken() == "it ends too early"


def state_of_a_run(device: str) -> dict:
    """Returns the state dicts of a network, channels-last, and of its optimizer after a step."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    with torch.no_grad():
        for k, value in enumerate(network.state_dict().values()):
            value.copy_(torch.arange(value.numel()).view(value.shape) + k)
    network.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, fused=True)
    for value in network.parameters():
        value.grad = torch.full_like(value, 0.5)
    optimizer.step()
    return {"epoch": 1, "log": [{"a": 1.0}], "backbone": network.state_dict(), "optimizer": optimizer.state_dict()}


def test_a_state_on_the_cpu_is_written_as_it_is(tmp_path):
    state = state_of_a_run("cpu")
    with open(tmp_path / "plain.pth", "wb") as file:
        torch.save(state, file)
    save(tmp_path / "checkpoint.pth", state)
    plain, written = (tmp_path / "plain.pth").read_bytes(), (tmp_path / "checkpoint.pth").read_bytes()
    assert written[: -SEAL - 2] == plain[:-2]
    assert on_cpu(state)["backbone"]._metadata == state["backbone"]._metadata


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_written_with_the_bytes_of_one_on_the_cpu(tmp_path):
    digests = [save(tmp_path / f"{device}.pth", state_of_a_run(device)) for device in ("cuda", "cpu")]
    assert digests[0] == digests[1]
    state = torch.load(tmp_path / "cuda.pth", weights_only=True)  # the devices are those that were saved
    assert {value.device.type for value in state["backbone"].values()} == {"cpu"}


def test_a_sealed_json_is_read_back_and_refused_when_changed(tmp_path):
    path = tmp_path / "x.json"
    value = {"b": [1, 2.5, None, {"name": "\udcff"}], "a": "text"}
    write_sealed_json(path, value)
    assert read_sealed_json(path) == value
    whole = path.read_text()
    for changed in (whole.replace("2.5", "2.6"), whole[:-1], whole + " ", whole.replace('"sha256"', '"sha257"'), "{}"):
        path.write_text(changed)
        with pytest.raises(Damaged, match=r"x.json is damaged"):
            read_sealed_json(path)


@pytest.mark.parametrize("has_links", [True, False])
def test_the_previous_file_is_kept(tmp_path, monkeypatch, has_links):
    path, kept = tmp_path / "new", tmp_path / "kept"
    if not has_links:

        def no_links(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", no_links)
    for content in ("one", "two", "three"):
        with replaced(path, kept) as partial:
            partial.write_text(content)
    assert (path.read_text(), kept.read_text()) == ("three", "two")
    _keep_as(path, kept)  # as if a kill came before the new file was renamed
    with replaced(path, kept) as partial:
        partial.write_text("four")
    assert (path.read_text(), kept.read_text()) == ("four", "three")
    assert {file.name for file in tmp_path.iterdir()} <= {"new", "kept"}


def test_the_message_names_the_process_that_holds_the_folder(tmp_path):
    folder = tmp_path / "run"
    with another_process_holding(folder) as process:
        for attempt in (lambda: refuse_if_locked(folder), lambda: locked(folder).__enter__()):
            with pytest.raises(InputError, match=rf"run is in use by process {process} on .*: wait for it, or stop it"):
                attempt()
    # The process was killed: its lock file remains, but the lock is free.
    assert (tmp_path / "run.lock").exists()
    refuse_if_locked(folder)
    with locked(folder), pytest.raises(InputError, match=f"in use by process {os.getpid()} on"), locked(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_paths_to_one_folder_have_one_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(InputError, match="link is in use by process"):
        refuse_if_locked(tmp_path / "link")


def test_a_failed_fsync_keeps_both_files(tmp_path, monkeypatch):
    path, kept = tmp_path / "new", tmp_path / "kept"
    for content in ("one", "two"):
        with replaced(path, kept) as partial:
            partial.write_text(content)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(InputError, match=r"new could not be written \(No space left on device\)"),
        replaced(path, kept) as p,
    ):
        p.write_text("three")
    assert (path.read_text(), kept.read_text()) == ("two", "one")


def test_a_waiting_process_gets_the_lock_next(tmp_path):
    code = f"""
import sys; from pathlib import Path; from utils.storage.locks import locked
with locked(Path({str(tmp_path / "x")!r}), wait=True):
    print("second", flush=True)
"""
    with locked(tmp_path / "x"):
        command = [sys.executable, "-uc", code]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert f"in use by process {os.getpid()} on" in process.stdout.readline()
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "second\n"
    assert list(tmp_path.iterdir()) == []
