"""The trials of tests/soak/trials.py, in the numbers that fit into the suite; `make soak` runs them in full."""

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


def held(result: trials.Result, cases: int) -> bool:
    assert result.failures == []
    assert (result.passed, result.of) == (cases, cases)
    return True


def test_a_killed_run_ends_as_if_it_had_not_been(faces, tmp_path):
    assert held(trials.kills_in_training(faces, tmp_path, at_random=1, in_save=4), 5)


def test_killed_preparation_extraction_and_evaluation_go_on(faces, tmp_path):
    assert held(trials.kills_of_other_stages(faces, tmp_path, instants=2), 2)


def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(cfg):
    assert held(trials.stops(cfg, steps=10), 10)


def test_writes_that_fail_leave_the_old_checkpoint(cfg):
    assert held(trials.failing_writes(cfg, sizes=8), 8)


def test_damaged_files_are_refused(cfg):
    assert held(trials.damage(cfg, truncations=64, flips=200), 264)


def test_no_file_runs_code(tmp_path):
    assert held(trials.hostile_files(tmp_path), 4 * len(trials.gadgets(tmp_path)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # they leave open what they opened
def test_the_gadgets_do_run_where_pickles_are_trusted(tmp_path):
    """Or it would prove nothing that they are not run here."""
    marker = tmp_path / "executed"
    copyreg.add_extension("os", "system", 0xF0)
    try:
        for name, opcodes in trials.gadgets(marker).items():
            if name == "array of pointers":  # to memory that is not there
                continue
            pickle.loads(b"\x80\x02" + opcodes + b".")
            deadline = time.monotonic() + 10
            while not marker.exists() and time.monotonic() < deadline:  # Popen does not wait
                time.sleep(0.01)
            assert marker.exists(), name
            marker.unlink()
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_workers_and_listing_change_nothing(cfg):
    assert held(trials.orders(cfg), 6)


def test_what_would_give_wrong_numbers_is_refused(cfg):
    assert held(trials.refusals(cfg), 9)


def test_nothing_is_left_open(faces, tmp_path):
    _, threads, files = trials.endurance(faces, tmp_path, epochs=5).T
    assert set(threads[1:]) == {threads[1]}
    assert set(files) == {files[0]}
