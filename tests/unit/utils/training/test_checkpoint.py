"""Runs that are continued with more epochs than they were started with."""

import json
import os
import signal
from dataclasses import replace

import pytest

from tests.runs import checkpoint, equal, train
from utils.errors import InputError
from utils.process import Interrupted


def states(*runs):
    return [{**checkpoint(run), "sessions": []} for run in runs]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_with_more_epochs_ends_as_if_it_had_had_them_from_the_start(cfg, tmp_path, capsys, stopped):
    """A finished run, and one that was stopped in its second epoch; the learning rate drops in the fourth."""
    whole, short = (replace(cfg, output=str(tmp_path / name), milestones=(4,)) for name in ("whole", "short"))
    train(whole, epochs=4)
    if stopped:
        with pytest.raises(Interrupted):
            train(short, epochs=2, before_step=lambda n: n == 7 and os.kill(os.getpid(), signal.SIGTERM))
    else:
        train(short, epochs=2)
    capsys.readouterr()
    train(short, epochs=4)
    assert "is continued with more epochs: num_epoch was 2, now 4." in capsys.readouterr().out
    assert equal(*states(whole, short))
    about = json.loads((short.teacher_dir("T") / "config.json").read_text())
    assert about["settings"]["num_epoch"] == 4
    assert [session.get("changed") for session in about["sessions"]] == [None, {"num_epoch": [2, 4]}]
    train(short, epochs=4, before_step=lambda _: pytest.fail("trained again"))


def test_milestones_may_change_only_after_the_epochs_done(cfg):
    train(replace(cfg, milestones=(2,)), epochs=3)
    with pytest.raises(InputError, match=r"\(milestones was \[2\], now \[3\]; num_epoch was 3, now 5\)"):
        train(replace(cfg, milestones=(3,)), epochs=5)
    with pytest.raises(InputError, match=r"\(milestones was \[2\], now \[2, 3\]; num_epoch was 3, now 5\)"):
        train(replace(cfg, milestones=(2, 3)), epochs=5)
    with pytest.raises(InputError, match=r"\(num_epoch was 3, now 2\)"):
        train(replace(cfg, milestones=(2,)), epochs=2)
    with pytest.raises(InputError, match=r"\(lr was 0.1, now 0.2\)"):
        train(replace(cfg, milestones=(2,), lr=0.2), epochs=5)
    train(replace(cfg, milestones=(2, 4)), epochs=5)
    log = (cfg.teacher_dir("T") / "log.jsonl").read_text().splitlines()
    factors = [json.loads(line)["lr"] / (0.1 * 4 / 512) for line in log]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_a_smaller_batch_that_makes_the_same_steps_is_advised_and_resumes_the_run(cfg, capsys):
    with pytest.raises(Interrupted):
        train(cfg, before_step=lambda n: n == 3 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InputError, match=r"\(batch_size was 4, now 2\): accumulate 2 with batch_size 2 makes the same"):
        train(replace(cfg, batch_size=2))
    with pytest.raises(InputError, match=r"\(batch_size was 4, now 3\): set them as they were"):
        train(replace(cfg, batch_size=3))
    capsys.readouterr()
    train(replace(cfg, batch_size=2, accumulate=2))
    assert "under other conditions, last bits may differ: accumulate 1 -> 2." in capsys.readouterr().out
