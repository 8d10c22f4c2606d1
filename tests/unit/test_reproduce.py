"""reproduce.py: the list of stages, the plan, and the processes, including stops and kills."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import reproduce
from backbones import build_backbone
from config.config import Config
from config.readers import reads
from tests.runs import run_script
from tests.soak import reproduction
from utils.errors import InputError
from utils.process import Interrupted, guarded
from utils.stages import disk, rates
from utils.stages.paper import Stage, of_seeds, paper
from utils.stages.rates import ADAPT, INFER, TRAIN, measured_rates, operations, rates_from
from utils.stages.runner import Record, Runner
from utils.stages.work import IMAGE, counted, makespan, papers_counts, seconds, work_of_all

GROUPS = ("Asian", "African", "Caucasian", "Indian")
ROOT = Path(__file__).parents[2]


# The list -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["iresnet34", "iresnet50"])
def test_the_list_holds_every_row_of_the_papers_tables(network):
    stages = paper(Config(network=network))
    wanted = {
        *(("specialized", network, "teacher", name) for name in GROUPS),
        *(("baseline", network, "teacher", f"quarter{k}") for k in (1, 2, 3, 4)),
        *(
            (setting, "iresnet34", method, adaptor)
            for setting in ("specialized", "baseline")
            for method in ("a-KD", "EAF-KD")
            for adaptor in ("SL", "DuL", "DLDPO")
        ),
    }
    assert len(wanted) == 20
    trained = {}
    for stage in stages:
        cfg = stage.cfg
        if stage.kind == "teacher":
            trained[cfg.setting, cfg.network, "teacher", cfg.ethnicity] = cfg.teacher_dir(cfg.selected_teachers[0])
        elif stage.kind in ("a-KD", "EAF-KD"):
            trained[cfg.setting, cfg.student_network, stage.kind, cfg.adaptor] = cfg.student_dir(stage.kind)
            assert cfg.network == network
    alone = ("standalone", "iresnet34", "teacher", "All")  # a row that the paper does not have
    assert trained.keys() == wanted | {alone}
    assert {path for stage in stages if stage.kind in ("teacher", "a-KD", "EAF-KD") for path in stage.writes} == {
        *trained.values()
    }
    assert stages[0].script == "baseline_data_split.py"
    assert stages[-1].script == "-m eval.evaluation"
    assert len(stages) == 31


def test_commands_have_the_settings_of_their_stage(cfg):
    for stage in paper(replace(cfg, flip_targets=True)):
        given = stage.arguments[2:] if stage.arguments[0] == "-m" else stage.arguments[1:]
        parsed, script = Config.from_args(given), stage.script.removeprefix("-m ")
        for name, value in asdict(stage.cfg).items():
            assert getattr(parsed, name) == value or not reads(script, name)
        assert stage.arguments[0] == "-m" or (ROOT / stage.arguments[0]).exists()
        assert stage.command.startswith(f"python {stage.script} --data ")


@pytest.mark.parametrize("flip", [False, True])
def test_each_stage_reads_only_files_of_the_stages_that_it_needs(cfg, flip):
    before, below = {}, {}
    for stage in paper(replace(cfg, flip_targets=flip)):
        assert before.keys() >= set(stage.needs)
        below[stage.name] = {*stage.needs}.union(*(below[name] for name in stage.needs))
        written = {path for name in below[stage.name] for path in before[name].writes}
        assert {path for path in stage.reads if path.is_relative_to(cfg.output)} <= written
        before[stage.name] = stage
    assert len(before) == 31 - 4  # two groups instead of four; all names are different


def test_data_without_groups_are_refused():
    with pytest.raises(InputError, match="ethnicities = .* must be names of groups"):
        paper(Config(ethnicities=()))


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_number_of_images_equals_a_count_by_hand(cfg):
    """Groups A of 12 and B of 8 images (3 and 2 identities), 20 pairs of distinct images each, batch 4, 2 epochs."""
    counts = counted(cfg, {"A": 40, "B": 40})
    assert counts.images == {"All": 20, "A": 12, "B": 8, "quarter1": 12, "quarter2": 8}
    assert counts.identities == {"All": 5, "A": 3, "B": 2, "quarter1": 3, "quarter2": 2}
    net = "iresnet_tiny"
    work = work_of_all(paper(cfg), counts)
    verified = 2 * 40 * 2  # sets, images, views
    assert work["split"] == {}
    assert work["teacher-A"] == work["teacher-quarter1"] == {(TRAIN, net): 24, (INFER, net): 2 * verified}
    assert work["teacher-B"] == work["teacher-quarter2"] == {(TRAIN, net): 16, (INFER, net): 2 * verified}
    assert work["teacher-All"] == work["a-KD-SL-baseline"] == {(TRAIN, net): 40, (INFER, net): 2 * verified}
    assert work["embeddings-baseline"] == {(INFER, net): 2 * 20}
    assert work["DuL-specialized"] == {(ADAPT, ""): 2 * 20 + 20}
    assert work["evaluation"] == {(INFER, net): (2 + 2 + 1 + 12) * verified}

    odd = replace(cfg, batch_size=5, network="mobilefacenet", flip_targets=True)
    work = work_of_all(paper(odd), counts)
    assert work["teacher-A"] == {(TRAIN, "mobilefacenet"): 20, (INFER, "mobilefacenet"): 2 * verified}
    assert work["EAF-KD-SL-baseline"] == {(TRAIN, net): 40, (INFER, net): 2 * verified}
    assert work["embeddings-specialized"] == {(INFER, "mobilefacenet"): 2 * 2 * 20}
    assert work["SL-baseline"] == {(ADAPT, ""): 2 * 20 + 2 * 20}
    assert work["evaluation"] == {(INFER, "mobilefacenet"): 4 * verified, (INFER, net): 13 * verified}


def test_images_that_are_left_out_are_not_counted(cfg, tmp_path):
    listed = tmp_path / "listed.txt"
    listed.write_text("A/a1\nB/b1/0.jpg\n")
    counts = counted(replace(cfg, leave_out=str(listed)), {})
    assert (counts.images["A"], counts.images["B"], counts.images["All"]) == (8, 7, 15)
    assert (counts.identities["A"], counts.identities["B"]) == (2, 2)


def test_the_papers_numbers_and_epochs():
    cfg = Config()
    counts = papers_counts(cfg, dict.fromkeys(GROUPS, 12_000))
    assert (counts.images["All"], counts.identities["All"]) == (1_248_932, 27_997)
    assert sum(counts.images[f"quarter{k}"] for k in (1, 2, 3, 4)) == 1_248_932
    work = work_of_all(paper(cfg), counts)
    trained = {name: own[TRAIN, "iresnet34"] for name, own in work.items()}
    assert trained["teacher-Caucasian"] == 52 * 2547 * 128  # the steps of the published checkpoints
    assert trained["teacher-Indian"] == 52 * 2144 * 128
    assert trained["teacher-African"] == trained["teacher-Asian"] == 52 * 2532 * 128
    assert trained["teacher-All"] == trained["EAF-KD-SL-baseline"] == 26 * 9757 * 128
    assert papers_counts(replace(cfg, ethnicities=("A", "B")), {}) is None


def test_all_rates_follow_from_one_rate(cfg):
    found = rates_from(100.0, replace(cfg, network="iresnet50", student_network="iresnet34"))
    slower = operations("iresnet50") / operations("iresnet34")
    assert 1.3 < slower < 1.5
    assert found[TRAIN, "iresnet50"] == 100
    assert found[INFER, "iresnet50"] == pytest.approx(394.4, abs=0.1)
    assert found[TRAIN, "iresnet34"] == pytest.approx(100 * slower)
    assert found[ADAPT, ""] == pytest.approx(3962.5, abs=0.1)
    assert seconds({(TRAIN, "iresnet50"): 50, (TRAIN, "iresnet34"): found[TRAIN, "iresnet34"]}, found) == 1.5
    lower = rates_from(100.0, replace(cfg, network="iresnet50", precision="bf16", infer_precision="fp32"))
    assert (lower[INFER, "iresnet50"], lower[ADAPT, ""]) == pytest.approx((104.8, 3114.6), abs=0.1)
    assert operations("iresnet34") == 8_919_285_760


def test_rates_are_measured_and_no_file_is_left(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = [*tmp_path.rglob("*")]
    found = measured_rates(replace(cfg, student_network="mobilefacenet"), classes=5)
    kinds = {(kind, network) for kind in (TRAIN, INFER) for network in ("iresnet_tiny", "mobilefacenet")}
    assert found.keys() == {*kinds, (ADAPT, "")}
    assert all(rate > 0 for rate in found.values())
    assert [*tmp_path.rglob("*")] == before


def test_the_time_on_several_devices_respects_dependencies():
    needs = {"a": (), "b": (), "c": ("a",), "d": ("a", "b"), "e": ("c", "d")}
    stages = [Stage(name, "", Config(), own) for name, own in needs.items()]
    times = {"a": 1.0, "b": 3.0, "c": 4.0, "d": 1.0, "e": 1.0}
    assert makespan(times, stages, 1) == 10
    assert makespan(times, stages, 2) == 6  # a and then c; b and then d; e
    assert makespan({"d": 1.0, "e": 1.0}, stages, 2) == 2  # stages that are finished take no time
    assert makespan({}, stages, 2) == 0


def test_disk_space_equals_a_count_by_hand(cfg):
    counts = counted(cfg, {"A": 40, "B": 40})
    found = {item.what: item for item in disk.items(paper(cfg), cfg, counts, slots=2)}
    network = 4 * sum(value.numel() for value in build_backbone("iresnet_tiny", 16).state_dict().values())
    network += 4 * sum(value.dtype.itemsize == 8 for value in build_backbone("iresnet_tiny").state_dict().values())
    single, dual = 4 * (2 * 16 * 16 + 16), 4 * (2 * 16 * 16 + 16 + 16 * 16 + 16)
    of_class = 4 * 16
    teachers = 5 * network + (3 + 2 + 3 + 2 + 5) * of_class
    adaptors = 2 * (single + 2 * dual + 3 * 5 * of_class)
    students = 12 * network + 6 * 5 * of_class  # a-KD has no header
    assert found["decoded images"].needed == 20 * IMAGE
    assert found["decoded pairs"].needed == 2 * 40 * IMAGE
    assert found["embeddings"].needed == (2 + 3) * 2 * 20 * 16 * 4
    assert found["weights and checkpoints"].needed == 6 * (teachers + adaptors + students)
    assert found["checkpoints while they are written"].needed == 2 * 2 * (network + 5 * of_class)
    assert all(item.there == 0 for item in found.values())

    path = cfg.adaptor_embeddings("SL")
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(5000))
    (path.parent / "checkpoint.pth").write_bytes(bytes(100))
    found = {item.what: item for item in disk.items(paper(cfg), cfg, counts, slots=1)}
    assert found["embeddings"].there == 20 * 16 * 4  # a larger file counts as the needed size
    assert found["weights and checkpoints"].there == 100


def test_disk_space_is_added_up_per_file_system(cfg, monkeypatch, tmp_path):
    Path(cfg.cache).mkdir()
    found = [disk.Item("one", "cache", 100, 30), disk.Item("two", "output", 50, 0), disk.Item("three", "output", 7, 0)]
    free = {Path(cfg.cache): 70, tmp_path: 56}
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    (both,) = disk.rooms(found, cfg)  # the output folder does not exist yet: tmp_path holds both
    assert (both.settings, both.needed, both.there) == (("cache", "output"), 157, 30)
    monkeypatch.setattr(disk, "_file_system", lambda folder: len(str(folder)))
    cache, output = disk.rooms(found, cfg)
    assert (cache.settings, cache.folder, cache.needed, cache.there) == (("cache",), Path(cfg.cache), 100, 30)
    assert (output.settings, output.folder, output.needed, output.there) == (("output",), tmp_path, 57, 0)
    assert cache.suffices
    assert not output.suffices
    with pytest.raises(InputError, match=r"disk does not suffice for output \(.*: free .*, or set output to a larger"):
        disk.require_room([cache, output])


# The script -----------------------------------------------------------------------------------------------------------


def test_a_plan_runs_and_writes_nothing(cfg, capsys):
    reproduce.main(["--plan", "--rate", "10", "--devices", "0,1", *cfg.changed])
    text = capsys.readouterr().out
    assert text.count("   $ python ") == 27
    assert " 2 teacher-A  0.2 min" in text  # (24 + 320 / 3.94) / 10 seconds
    assert (
        "   sees    24 images in training of iresnet_tiny; 320 images in inference of iresnet_tiny (2 epochs)" in text
    )
    assert f"writes  {cfg.output}/baseline/split/{{A.json,B.json}}" in text
    assert "Rates  training of iresnet_tiny 10.0 images/s; inference of iresnet_tiny 39.4 images/s" in text
    assert "on 2 devices" in text
    assert "is not there" not in text
    assert not Path(cfg.output).exists()
    assert not Path(cfg.cache).exists()


def test_a_plan_without_data_uses_the_papers_counts(cfg, monkeypatch, capsys):
    monkeypatch.setattr(disk, "require_room", lambda rooms: None)
    monkeypatch.setattr(reproduce, "require_room", lambda rooms: None)
    given = ["--data", f"{cfg.data}/none", "--pairs", f"{cfg.pairs}/none", "--output", cfg.output, "--cache", cfg.cache]
    reproduce.main(["--plan", "--rate", "4000", *given])
    text = capsys.readouterr().out
    assert "16,952,832 images in training of iresnet34; 4,992,000 images in inference of iresnet34" in text
    assert f"{cfg.data}/none is not there: counted with the paper's 1,248,932 images." in text
    assert f"{cfg.pairs}/none lacks African_test.bin: sets that are not there count as 12,000 images." in text
    with pytest.raises(InputError, match="There is no folder .*none"):
        reproduce.main(["--plan", "--rate", "4000", *given, "--ethnicities", "A,B"])
    with pytest.raises(InputError, match="Missing: .*African_test.bin, .*Set pairs"):
        reproduce.main(given)


def test_seeds_repeat_the_plan_in_folders_of_their_own(cfg, capsys):
    stages = of_seeds(cfg, (3, 5))
    once = paper(cfg)
    assert [stage.name for stage in stages] == [f"seed{k}-{stage.name}" for k in (3, 5) for stage in once]
    assert {(stage.cfg.seed, stage.cfg.output) for stage in stages} == {(k, f"{cfg.output}/seed{k}") for k in (3, 5)}
    written = [path for stage in stages for path in stage.writes]
    assert len(written) == len({*written}) == 2 * sum(len(stage.writes) for stage in once)
    assert all(name.split("-")[0] == stage.name.split("-")[0] for stage in stages for name in stage.needs)
    reproduce.main(["--plan", "--rate", "10", "--seeds", "3,5", *cfg.changed])
    text = capsys.readouterr().out
    assert text.count("   $ python ") == 2 * 27
    assert f"--output {cfg.output}/seed5" in text
    assert not Path(cfg.output).exists()


def test_the_tables_over_seeds_are_written_at_the_end(cfg, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Runner, "run", lambda self: True)
    monkeypatch.setattr(reproduce, "write_tables", lambda *given: seen.append(given))
    Path(cfg.output).mkdir()
    reproduce.main(["--seeds", "0,1", *cfg.changed])
    folders = [Path(cfg.output, f"seed{k}", "evaluation") for k in (0, 1)]
    assert seen == [(folders, Path(cfg.output) / "seeds")]
    assert f"All stages are finished: {folders[0]}/report.html, {folders[1]}/report.html" in capsys.readouterr().out


@pytest.mark.parametrize("plan", [["--plan", "--rate", "10"], []])
def test_too_little_disk_space_is_refused_before_anything_starts(cfg, plan, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a stage was started"))
    with pytest.raises(InputError, match="disk does not suffice for cache and output .* MB needed, .* 1.0 MB free: "):
        reproduce.main([*plan, *cfg.changed])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ethnicity", "African"], "reproduce.py: ethnicity cannot be given: reproduce.py runs all stages."),
        (["--is_standalone"], "is_standalone cannot be given"),
        (["--checkpoint=a.pth"], "checkpoint cannot be given"),
        (["--etnicities", "A"], "unknown setting --etnicities: did you mean --ethnicities?"),
        (["--pla"], "unknown setting --pla"),
        (["--batch_size", "0"], "batch_size = 0 must be at least 2"),
        (["--rate", "10"], "rate must be a number above 0, and belongs to --plan"),
        (["--plan", "--rate", "-1"], "rate must be a number above 0"),
        (["--plan", "--rate", "0"], "rate must be a number above 0"),
        (["--plan", "--rate", "nan"], "rate must be a number above 0"),
        (["--plan", "--rate", "fast"], "rate must be a number above 0"),
        (["--devices", "0,1,0"], "devices 0,1,0 must be different"),
        (["--seeds", "0,0"], "seeds 0,0 must be two or more different numbers"),
        (["--seeds", "7"], "seeds 7 must be two or more different numbers"),
        (["--seeds", "0,a"], "seeds 0,a must be two or more different numbers"),
        (["--seeds", "0,1", "--seed", "2"], "seeds 0,1 must be two or more different numbers, without seed"),
    ],
)
def test_settings_that_distinguish_stages_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: reproduce.main(given))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text.splitlines()) == 1


def test_missing_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reproduce.require_devices(("0", "1"), Config())
    with pytest.raises(InputError, match="devices names 2, which is none of the GPUs here: choose from 0,1"):
        reproduce.require_devices(("0", "2"), Config())
    reproduce.require_devices(("0", "2"), Config(device="cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    reproduce.require_devices(("2",), Config())
    with pytest.raises(InputError, match="choose from 2,3"):
        reproduce.require_devices(("0",), Config())


# The runner -----------------------------------------------------------------------------------------------------------


def stage(tmp_path: Path, name: str, code: str = "", needs: tuple[str, ...] = (), **settings) -> Stage:
    """Returns a stage with a script that runs `code` in `tmp_path`, then writes a file with the name of the stage."""
    script = tmp_path / f"{name}.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"with open('runs', 'a') as file: file.write({name!r} + ' ')\n"
        f"{code}\n"
        f"pathlib.Path({name!r}).write_text('done')\n"
    )
    return Stage(name, str(script), Config(**settings), needs, writes=(tmp_path / name,))


def runs(tmp_path: Path) -> list[str]:
    """Returns the names of the stages that were started since the last call."""
    log = tmp_path / "runs"
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


WAIT_FOR = """
deadline = time.time() + 60
while not os.path.exists({!r}):
    assert time.time() < deadline
    time.sleep(0.01)
"""


def test_stages_run_in_order_after_those_that_they_need(tmp_path, capfd):
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", "print('from b')", ("a",)), stage(tmp_path, "c", "", ("b",))]
    runner = Runner(stages, work={"a": 1.0, "b": 2.0, "c": 1.0})
    assert runner.run()
    assert runs(tmp_path) == ["a", "b", "c"]
    assert runner.seconds.keys() == {"a", "b", "c"}
    text = capfd.readouterr().out
    assert f"$ python {tmp_path}/a.py\n" in text
    assert "\nfrom b\n" in text
    assert "a took 0 min 0" in text
    assert "25.0% of the whole is done; the rest takes about 0 min 0" in text
    assert "100.0% of the whole is done.\n" in text


def test_work_of_an_earlier_attempt_does_not_count_in_the_rate(tmp_path, monkeypatch, capsys):
    """Half of b was done before: 1 + 2 / 2 units in the time of both stages, and 4 units are left."""
    clock = iter([0.0, 10.0, 20.0, 40.0, 50.0, 60.0])
    stub = SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep)
    monkeypatch.setattr("utils.stages.runner.time", stub)
    stages = [stage(tmp_path, "a"), stage(tmp_path, "b", "", ("a",)), stage(tmp_path, "c", "", ("b",))]
    shares = {"a": 0.0, "b": 0.5, "c": 0.0}
    Runner(stages, work={"a": 1.0, "b": 2.0, "c": 4.0}, share_done=lambda one: shares[one.name]).run()
    # b took 20 - 40 seconds: (10 + 20) / 2 seconds a unit.
    assert "42.9% of the whole is done; the rest takes about 1 min 00 s at the rates seen" in capsys.readouterr().out


def test_independent_stages_run_in_parallel_with_a_device_and_a_log_each(tmp_path, capfd):
    device = "print('on', os.environ['CUDA_VISIBLE_DEVICES'])\n"
    meet = [
        device + "open('a started', 'w')\n" + WAIT_FOR.format("b started"),
        device + "open('b started', 'w')\n" + WAIT_FOR.format("a started"),
    ]
    stages = [stage(tmp_path, "a", meet[0]), stage(tmp_path, "b", meet[1]), stage(tmp_path, "c", device, ("a", "b"))]
    assert Runner(stages, ("4", "7"), logs=tmp_path / "logs").run()
    assert (tmp_path / "logs" / "a.log").read_text() == f"$ python {tmp_path}/a.py\non 4\n"
    assert (tmp_path / "logs" / "b.log").read_text().endswith("on 7\n")
    assert "on 4" not in capfd.readouterr().out


def test_a_stage_that_fails_stops_only_those_that_need_it(tmp_path, capfd):
    stages = [
        stage(tmp_path, "a"),
        stage(tmp_path, "bad", "print('line one')\nsys.exit('what was wrong')", ("a",)),
        stage(tmp_path, "killed", "os.kill(os.getpid(), signal.SIGKILL)"),
        stage(tmp_path, "after-bad", "", ("bad",)),
        stage(tmp_path, "last", "", ("after-bad", "b")),
        stage(tmp_path, "b", "", ("a",)),
    ]
    record = Record(tmp_path / "record.json", {})
    runner = Runner(stages, ("0", "1"), record, tmp_path / "logs")
    assert not runner.run()
    assert {*runs(tmp_path)} == {"a", "bad", "killed", "b"}
    text = capfd.readouterr().out
    assert "\nbad failed: it ended with status 1.\n" in text
    end = f"\nbad failed: it ended with status 1; the last lines of {tmp_path}/logs/bad.log:\n"
    assert f"{end}    $ python {tmp_path}/bad.py\n    line one\n    what was wrong\n" in text
    assert "\nkilled failed: it was ended by signal 9; the last lines of " in text
    assert text.endswith("Not started, since they need what failed: after-bad, last.\n2 of 6 stages are finished.\n")

    (tmp_path / "bad.py").write_text((tmp_path / "bad.py").read_text().replace("sys.exit", "print"))
    (tmp_path / "killed.py").write_text((tmp_path / "killed.py").read_text().replace("SIGKILL", "SIGCONT"))
    assert Runner(stages, ("0", "1"), Record(tmp_path / "record.json", {})).run()
    assert {*runs(tmp_path)} == {"bad", "killed", "after-bad", "last"}


def test_the_summary_names_what_failed_and_what_was_not_started(tmp_path, capfd):
    stages = [
        stage(tmp_path, "bad", "sys.exit(3)"),
        stage(tmp_path, "x", "", ("bad",)),
        stage(tmp_path, "y", "", ("x",)),
    ]
    assert not Runner(stages).run()
    text = capfd.readouterr().out
    assert text.endswith(
        "\nbad failed: it ended with status 3.\nNot started, since they need what failed: x, y.\n"
        "0 of 3 stages are finished.\n"
    )


def test_finished_stages_are_skipped_until_settings_or_files_change(tmp_path, capfd):
    def run(sources=1, **settings) -> list[str]:
        stages = [stage(tmp_path, "a", "", (), **settings), stage(tmp_path, "b", "", ("a",))]
        assert Runner(stages, record=Record(tmp_path / "record.json", {"data": sources})).run()
        return runs(tmp_path)

    assert run() == ["a", "b"]
    assert run() == []
    assert "a is finished: passed over.\nb is finished: passed over.\n" in capfd.readouterr().out
    assert run(lr=0.2) == ["a", "b"]  # b reads the file that a has written again
    assert run(lr=0.2) == []
    assert run(lr=0.1) == ["a", "b"]
    os.replace(tmp_path / "a", tmp_path / "kept")
    assert run(network="iresnet50") == ["a", "b"]  # another entry of the record
    os.replace(tmp_path / "kept", tmp_path / "a")
    assert run(lr=0.1) == ["b"]
    (tmp_path / "b").write_text("other")
    assert run() == ["b"]
    (tmp_path / "b").unlink()
    assert run() == ["b"]
    os.utime(tmp_path / "a", ns=(1, 1))
    assert run() == ["a", "b"]
    assert run(sources=2) == ["a", "b"]
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(InputError, match="record.json cannot be read"):
        run()


def test_a_run_folder_is_identified_by_its_weights(tmp_path):
    for name in ("run/best_backbone.pth", "run/12backbone.pth", "run/checkpoint.pth", "run/best_header.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    writes = tuple(tmp_path / name for name in ("run", "results.json"))
    found = [path.relative_to(tmp_path).as_posix() for path in Stage("", "", Config(), writes=writes).results]
    assert found == ["run/12backbone.pth", "run/best_backbone.pth", "results.json"]


def test_a_command_has_the_settings_that_its_script_reads(cfg):
    stages = {stage.name: stage for stage in paper(replace(cfg, weights="last", lr_fc=2.0))}
    assert "--lr_fc" in stages["SL-specialized"].command
    assert "--lr_fc" not in stages["teacher-A"].command
    evaluation = stages["evaluation"]
    assert evaluation.writes[1] == Path(cfg.output) / "evaluation" / "last" / "report.html"
    assert "--num_epoch" not in evaluation.command


SAVES = "signal.signal(signal.SIGTERM, lambda *_: (open({0!r}, 'w'), sys.exit(1)))\nopen({1!r}, 'w')\ntime.sleep(60)"


def when_there(paths: list[Path], action) -> threading.Thread:
    def wait() -> None:
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_signal_is_forwarded_to_all_stages_which_save_before_they_end(tmp_path):
    stages = [stage(tmp_path, name, SAVES.format(f"{name} saved", f"{name} began")) for name in ("a", "b")]
    stages.append(stage(tmp_path, "c"))
    began = [tmp_path / "a began", tmp_path / "b began"]
    when_there(began, lambda: os.kill(os.getpid(), signal.SIGTERM))
    runner = Runner(stages, ("0", "1"), logs=tmp_path / "logs")
    with pytest.raises(Interrupted, match="stopped, what was finished or saved is kept; continue with: ") as stop:
        runner.run()
    assert stop.value.signal == signal.SIGTERM
    assert (tmp_path / "a saved").exists()
    assert (tmp_path / "b saved").exists()
    assert {*runs(tmp_path)} == {"a", "b"}
    assert not runner.failed


HOLD = "import sys, time; from pathlib import Path; from utils.storage.locks import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


def test_a_stage_waits_for_another_process_in_its_run_folder(tmp_path, capfd):
    one = stage(tmp_path, "a")
    command = [sys.executable, "-c", HOLD, str(one.writes[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        holder.stdout.readline()
        waits = threading.Timer(0.5, holder.stdin.close)
        waits.start()
        started = time.monotonic()
        assert Runner([one]).run()
        assert time.monotonic() - started >= 0.5
    text = capfd.readouterr().out
    assert text.count(f"a waits: {one.writes[0]} is in use by process {holder.pid}") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems leave the stages running")
def test_stages_save_and_end_when_their_parent_is_killed(tmp_path):
    one = stage(tmp_path, "a", SAVES.format("saved", "began"))
    code = "import sys; from config.config import Config; from utils.stages.paper import Stage\n"
    code += "from utils.stages.runner import Runner; Runner([Stage('a', sys.argv[1], Config())]).run()"
    parent = subprocess.Popen([sys.executable, "-c", code, one.script], cwd=ROOT)
    when_there([tmp_path / "began"], parent.kill).join(60)
    assert parent.wait() == -signal.SIGKILL
    when_there([tmp_path / "saved"], lambda: None).join(60)
    assert (tmp_path / "saved").exists()


# All stages -----------------------------------------------------------------------------------------------------------


KEPT = (
    *(f"teacher-{group}" for group in GROUPS),
    *("embeddings-specialized", "SL-specialized", "a-KD-SL-specialized", "EAF-KD-SL-specialized"),
    *("split", "teacher-quarter1", "teacher-All", "evaluation"),
)
"""A stage of every kind, and of every setting; `make soak` runs all 31."""


def test_stages_end_with_the_papers_tables_after_two_kills(tmp_path, printed_for_tiny):
    """Verifies on sets of 6,000 generated pairs; a last evaluation treats these as RFW."""
    result = reproduction.kills(tmp_path, {signal.SIGTERM: 3, signal.SIGKILL: 7}, ",".join(KEPT), pairs=6000)
    assert result.failures == []
    assert result.of == 4
    assert not [*(tmp_path / "output" / "evaluation").glob("paper.*")]  # never on generated faces
    run_script("eval.evaluation", reproduction.settings(tmp_path))
    rows = csv.DictReader((tmp_path / "output" / "evaluation" / "paper.csv").read_text().splitlines())
    assert {row["Row"] for row in rows if row["Figure"] == "here"} == {
        *(f"teacher {group} iresnet_tiny specialized" for group in GROUPS),
        "teacher BT-1 iresnet_tiny baseline",
        *(f"{method} SL iresnet_tiny specialized" for method in ("a-KD", "EAF-KD")),
    }
