"""Short forms of the trials of tests/soak/trials.py; `make soak` runs the long forms."""

import copyreg
import pickle
import time

import pytest

from tests.soak import trials
from utils.data.synthetic import generate

GROUPS = ("African", "Asian")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "faces"
    generate(folder, GROUPS, identities=4, images=6, pairs=20, seed=5)
    return folder


def all_passed(result: trials.Result, cases: int) -> bool:
    assert result.failures == []
    assert (result.passed, result.of) == (cases, cases)
    return True


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(faces, tmp_path):
    assert all_passed(trials.kills_in_training(faces, tmp_path, at_random=1, in_save=4), 5)


def test_killed_decoding_extraction_and_evaluation_resume(faces, tmp_path):
    assert all_passed(trials.kills_of_other_stages(faces, tmp_path, instants=2), 2)


def test_a_run_stopped_at_any_step_and_resumed_equals_an_uninterrupted_one(cfg):
    assert all_passed(trials.stops(cfg, steps=10), 10)


def test_failing_writes_leave_the_old_checkpoint(cfg):
    assert all_passed(trials.failing_writes(cfg, sizes=8), 8)


def test_damaged_files_are_refused(cfg):
    assert all_passed(trials.damage(cfg, truncations=64, flips=200), 264)


def test_no_file_runs_code(tmp_path):
    assert all_passed(trials.hostile_files(tmp_path), 4 * len(trials.gadgets(tmp_path)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gadgets leave files open
def test_plain_pickle_runs_the_gadgets(tmp_path):
    """Otherwise `test_no_file_runs_code` would prove nothing."""
    marker = tmp_path / "executed"
    copyreg.add_extension("os", "system", 0xF0)
    try:
        for name, opcodes in trials.gadgets(marker).items():
            if name == "array of pointers":  # it would read arbitrary memory
                continue
            pickle.loads(b"\x80\x02" + opcodes + b".")
            deadline = time.monotonic() + 10
            while not marker.exists() and time.monotonic() < deadline:  # Popen does not wait
                time.sleep(0.01)
            assert marker.exists(), name
            marker.unlink()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_number_of_workers_and_listing_order_change_nothing(cfg):
    assert all_passed(trials.orders(cfg), 6)


def test_mistakes_that_would_give_wrong_numbers_are_refused(cfg):
    assert all_passed(trials.refusals(cfg), 9)


def test_training_leaves_no_thread_or_file_open(faces, tmp_path):
    _, threads, files = trials.endurance(faces, tmp_path, epochs=5).T
    assert set(threads[1:]) == {threads[1]}
    assert set(files) == {files[0]}
