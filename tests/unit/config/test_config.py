"""Settings: published schedules, refusal of wrong values, derived values that are never stale."""

import argparse
import dataclasses
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from config.arguments import PAGE, _comments, table
from config.config import Config
from config.published import scaled_milestones
from config.readers import CHANGES_NO_NUMBER, READ_BY, reads
from tests.runs import ROOT
from utils.errors import InputError
from utils.prepare.work import groups_of, path_of
from utils.process import command, run

# Exponent of ten by which the learning rate of each epoch is divided: milestone m takes effect after m - 1 epochs.
PUBLISHED_52 = [0] * 15 + [1] * 12 + [2] * 12 + [3] * 10 + [4] * 3
PUBLISHED_26 = [0] * 7 + [1] * 6 + [2] * 6 + [3] * 5 + [4] * 2


@pytest.mark.parametrize(("epochs", "drops"), [(52, PUBLISHED_52), (26, PUBLISHED_26)])
def test_published_schedules_for_every_epoch(epochs, drops):
    teacher = Config(num_epoch=epochs).schedule("teacher")
    adaptor = Config(num_epoch_fc=epochs).schedule("SL")
    assert [teacher.lr(epoch, 128) for epoch in range(epochs)] == pytest.approx([0.025 * 0.1**d for d in drops])
    assert [adaptor.lr(epoch, 128) for epoch in range(epochs)] == pytest.approx([0.25 * 0.1**d for d in drops])


@pytest.mark.parametrize(
    ("kind", "settings", "epochs", "milestones"),
    [
        ("teacher", {}, 52, (16, 28, 40, 50)),  # paper 4.6
        ("teacher", {"is_teacher_baseline": True}, 52, (16, 28, 40, 50)),
        ("a-KD", {}, 26, (8, 14, 20, 25)),
        ("EAF-KD", {"is_teacher_baseline": True}, 26, (8, 14, 20, 25)),
        ("AdaArcDistill-alpha", {}, 26, (8, 14, 20, 25)),
        ("SL", {}, 26, (8, 14, 20, 25)),
        ("teacher", {"is_standalone": True}, 26, (8, 14, 20, 25)),
        ("teacher", {"ethnicities": ()}, 26, (8, 14, 20, 25)),
        ("a method of one's own", {}, 26, (8, 14, 20, 25)),
        ("teacher", {"num_epoch": 60}, 60, (40, 48, 52)),
        ("EAF-KD", {"num_epoch": 60, "milestones": ()}, 60, ()),
        ("DuL", {"num_epoch": 60, "num_epoch_fc": 13, "milestones_fc": (2,)}, 13, (2,)),
    ],
)
def test_epochs_are_as_published_for_each_kind_of_run(kind, settings, epochs, milestones):
    schedule = Config(**settings).schedule(kind)
    assert (schedule.epochs, schedule.milestones) == (epochs, milestones)


@pytest.mark.parametrize(
    ("kind", "settings", "margin"),
    [
        ("teacher", {}, (0.5, 0.05)),
        ("teacher", {"loss": "ElasticArcFace+"}, (0.5, 0.0175)),
        ("teacher", {"loss": "ElasticCosFace"}, (0.35, 0.05)),
        ("teacher", {"loss": "ElasticCosFace+"}, (0.35, 0.02)),
        ("teacher", {"loss": "ArcFace"}, (0.5, 0.0)),
        ("teacher", {"loss": "CosFace"}, (0.35, 0.0)),
        ("teacher", {"loss": "CurricularFace"}, (0.5, 0.0)),
        ("teacher", {"loss": "CosFace", "m": 0.4, "std": 0.3}, (0.4, 0.0)),
        ("SL", {"loss": "CosFace"}, (0.5, 0.0125)),
        ("DLDPO", {"std": 0.1, "m": 0.2}, (0.2, 0.0125)),
        ("DuL", {"std_fc": 0.05}, (0.5, 0.05)),
        ("EAF-KD", {"loss": "ElasticCosFace+"}, (0.5, 0.05)),
        ("EAF-KD", {"std": 0.0}, (0.5, 0.0)),
        ("AdaArcDistill", {}, (0.45, 0.0)),
        ("AdaCosDistill-alpha", {"ada_loss": "AdaCosDistill"}, (0.35, 0.0)),
        ("ArcDistill", {"ada_loss": "ArcDistill", "ada_m": 0.3, "m": 0.2}, (0.3, 0.0)),
    ],
)
def test_no_loss_trains_with_the_margin_of_another(kind, settings, margin):
    assert Config(**settings).margin(kind) == margin


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (
            "teacher",
            {"loss": "ElasticArcFace+", "m": 0.3},
            "num_epoch 52 (published), milestones 16,28,40,50 (published), m 0.3, std 0.0175 (published)",
        ),
        (
            "SL",
            {"num_epoch_fc": 13},
            "num_epoch_fc 13, milestones_fc 4,7,10,13 (scaled from the published ones), m 0.5 (published), "
            "std_fc 0.0125 (published)",
        ),
        ("a-KD", {"num_epoch": 52, "milestones": ()}, "num_epoch 52, milestones none"),
        (
            "teacher",
            {"loss": "ArcFace", "std": 0.3},
            "num_epoch 52 (published), milestones 16,28,40,50 (published), m 0.5 (published), "
            "std 0.3 is not used, since ArcFace has none",
        ),
        (
            "AdaCosDistill",
            {"ada_loss": "AdaCosDistill"},
            "num_epoch 26 (published), milestones 8,14,20,25 (published), ada_m 0.35 (published)",
        ),
    ],
)
def test_values_in_use_are_printed_for_each_kind_of_run(kind, settings, line):
    assert Config(**settings).described(kind) == f"In use for {kind}: {line}."


def test_a_setting_is_compared_at_resume_unless_it_is_listed():
    @dataclasses.dataclass(frozen=True)
    class Extended(Config):
        label_smoothing: float = 0.0

    script = {"teacher": "train.py", "SL": "fc_EArc.py", "a-KD": "KD_alone.py"}
    for kind in script:
        decisive = Extended(label_smoothing=0.1).decisive(kind)
        assert decisive["label_smoothing"] == 0.1
        read = {field.name for field in dataclasses.fields(Config) if reads(script[kind], field.name)}
        assert read - decisive.keys() <= CHANGES_NO_NUMBER
    assert "m" not in Config().decisive("a-KD")
    assert Config().decisive("teacher") == Config(m=0.5, std=0.05, num_epoch=52, data="elsewhere").decisive("teacher")
    assert {field.name for field in dataclasses.fields(Config)} >= CHANGES_NO_NUMBER
    assert READ_BY.keys() <= {field.name for field in dataclasses.fields(Config)}


def test_settings_that_a_script_does_not_read_are_named_with_the_scripts_that_read_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["some/where/train.py"])
    Config.from_args(["--lr_fc", "3", "--lr", "0.2", "--num_epoch_fc=2", "--loss_lambda", "1", "--report"])
    assert capsys.readouterr().out == (
        "not read by train.py: lr_fc and num_epoch_fc, which fc_EArc.py and dual_layer_EAF-Fusion.py read; "
        "loss_lambda, which KD_alone.py and KD_CEL.py read; report, which eval.evaluation reads.\n"
    )
    monkeypatch.setattr("sys.argv", ["eval/evaluation.py"])
    Config.from_args(["--report", "--embedding_size", "32"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.argv", ["fc_EArc.py"])
    with pytest.raises(SystemExit):
        Config.from_args(["--help"])
    assert "(not read by fc_EArc.py, but by train.py)" in " ".join(capsys.readouterr().out.split())


def test_the_page_of_all_settings_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == PAGE + table(Config), "write it anew: python -m config.arguments > docs/configuration.md"


def test_a_baseline_teacher_is_assigned_to_a_group():
    baseline = Config(is_teacher_baseline=True)
    assert [*map(baseline.group_of, baseline.teachers)] == ["African", "Asian", "Caucasian", "Indian"]
    other = Config(is_teacher_baseline=True, ethnicities=("X", "Indian", "African"))
    assert [*map(other.group_of, other.teachers)] == ["African", "Indian", "X"]
    assert Config().group_of("Indian") == "Indian"
    assert Config(is_standalone=True).group_of("All") == ""
    assert Config(pairs_sets=("lfw",)).group_of("Indian") == ""


def test_learning_rate_follows_the_batch_size():
    assert Config().schedule("teacher").lr(0, 512) == pytest.approx(0.1)
    assert Config(lr_fc=2.0).schedule("SL").lr(0, 64) == pytest.approx(0.25)


def test_milestones_are_scaled_to_other_numbers_of_epochs():
    assert scaled_milestones(13) == (4, 7, 10, 13)
    assert scaled_milestones(60) == (40, 48, 52)  # published for CASIA-WebFace
    assert scaled_milestones(65) == (20, 35, 50, 63)
    assert scaled_milestones(104) == (32, 56, 80, 100)
    assert scaled_milestones(2) == (2,)
    assert scaled_milestones(1) == ()
    for epochs in range(1, 120):
        milestones = scaled_milestones(epochs)
        assert all(1 < m <= epochs for m in milestones)
        assert list(milestones) == sorted(set(milestones))


def test_milestones_can_be_set():
    cfg = Config.from_args(["--num_epoch", "60", "--milestones", "40,48,52", "--milestones_fc", "16,28,40,50"])
    assert [cfg.schedule("a-KD").lr(e, 128) / 0.025 for e in (38, 39, 47, 51)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [cfg.schedule("DLDPO").lr(e, 128) / 0.25 for e in (14, 15, 25)] == pytest.approx([1, 0.1, 0.1])


def test_settings_are_read_from_the_command_line():
    cfg = Config.from_args(
        ["--ethnicities", "A, B", "--lr", "1", "--is_dual_layer", "--has_dropout", "true", "--flip_targets", "False"]
    )
    assert cfg.ethnicities == ("A", "B")
    assert cfg.lr == 1.0
    assert (cfg.is_dual_layer, cfg.has_dropout, cfg.flip_targets) == (True, True, False)
    assert cfg.adaptor == "DLDPO"


def test_changed_settings_reach_the_next_command_unchanged():
    cfg = Config(ethnicities=("A", "B"), lr=0.5, is_teacher_baseline=True, milestones=(3, 5), num_epoch=6)
    assert Config.from_args(cfg.changed) == cfg
    assert Config().changed == []
    constant = Config(milestones=(), m=0.2, pairs_sets=("lfw",))
    assert Config.from_args(constant.changed) == constant
    assert Config.from_args(["--m", "None", "--milestones", "None"]) == Config()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--etnicity", "African"], "unknown setting --etnicity: did you mean --ethnicity?"),
        (["--quux", "1"], "unknown setting --quux: --help lists all settings."),
        (["African"], "'African' is not understood: settings are given as --name value."),
        (["--ethnicity", "Martian"], "ethnicity = 'Martian' must be one of All, African"),
        (["--network", "resnet"], "network = 'resnet' must be one of iresnet18"),
        (["--loss", "Triplet"], "loss = 'Triplet' must be one of ElasticArcFace"),
        (["--device", "tpu"], "device = 'tpu' must be one of cpu, cuda"),
        (["--batch_size", "1"], "batch_size = 1 must be at least 2"),
        (["--num_epoch", "0"], "num_epoch = 0 must be at least 1"),
        (["--lr", "-1"], "lr = -1.0 must be a number above 0"),
        (["--lr", "nan"], "lr = nan must be a number above 0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--momentum", "1"], "momentum = 1.0 must be below 1"),
        (["--seed", "-3"], "seed = -3 must be 0 or more"),
        (["--seed", "9" * 20], "must be 0 or more, and below 2**63"),
        (["--ethnicities", "average,B"], "without average, which means something else"),
        (["--pairs_sets", ""], "pairs_sets = () must be names of <name>.bin files"),
        (["--device_cache_gb", "-1"], "device_cache_gb = -1.0 must be 0 or more"),
        (["--lr", "None"], "argument --lr: invalid float value: 'None'"),
        (["--checkpoint", ""], "checkpoint = '' must be a path"),
        (["--milestones", "5,3"], "milestones = (5, 3) must be increasing epoch numbers above 1"),
        (["--ethnicities", "A,A"], "ethnicities = ('A', 'A') must be different names"),
        (["--ethnicities", "A,../B"], "must be names of folders"),
        (["--ethnicities", "A,.B"], "must be names of folders"),
        (["--ethnicities", "A,B  C"], "must be names of folders"),
        (["--output", "~nobody-of-this-name/x"], "begins with ~ and no such user is there: write ./~nobody"),
        (["--ethnicities", "All,B"], "without All, which means something else"),
        (["--ethnicities", "A,A_flipped,students"], "without A_flipped, students, which means something else"),
        (["--has_dropout", "perhaps"], "argument --has_dropout: invalid bool value: 'perhaps'"),
        (["--data", ""], "data = '' must be a path"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        run(pytest.fail, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_the_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {
        "data": "~/d",
        "pairs": "~/p",
        "output": "~",
        "cache": "~/c",
        "leave_out": "~/l.txt",
        "checkpoint": "~/w.pth",
    }
    cfg = Config(**given, teacher=("~/a.pth", "b~/~.pth"))
    for name, value in given.items():
        assert getattr(cfg, name) == value.replace("~", str(tmp_path)), name
    assert cfg.teacher == (f"{tmp_path}/a.pth", "b~/~.pth")
    assert Config.from_args(["--output=~/runs"]).output == f"{tmp_path}/runs"
    assert command(cfg, "train.py").count(str(tmp_path)) == 7
    assert path_of("~/faces") == tmp_path / "faces"
    with pytest.raises(argparse.ArgumentTypeError, match="no such user"):
        path_of("~nobody-of-this-name/faces")


def test_names_of_groups_may_hold_blanks():
    cfg = Config.from_args(
        ["--ethnicities", "East Asian, Latino_Hispanic,St. Helena (UK)", "--ethnicity", "East Asian"]
    )
    assert cfg.ethnicities == ("East Asian", "Latino_Hispanic", "St. Helena (UK)")
    assert cfg.pairs_file("East Asian").name == "East Asian_test.bin"
    assert cfg.teacher_dir("East Asian").name == "East Asian"
    line = command(cfg, "train.py")
    assert Config.from_args(shlex.split(line)[2:]).ethnicities == cfg.ethnicities
    assert groups_of("East Asian, B") == ("East Asian", "B")


def test_wrong_types_are_refused_by_the_constructor_too():
    with pytest.raises(InputError, match="batch_size = 1.5 must be of type int"):
        Config(batch_size=1.5)
    with pytest.raises(InputError, match="has_dropout = 1 must be of type bool"):
        Config(has_dropout=1)
    with pytest.raises(InputError, match="num_epoch = '5' must be of type int or None"):
        Config(num_epoch="5")
    with pytest.raises(InputError, match="lr = None must be of type float"):
        Config(lr=None)


def test_a_config_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().network = "iresnet50"


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        Config.from_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text
    comments = _comments(Config)
    assert set(comments) == {field.name for field in dataclasses.fields(Config)}
    assert all(len(explanation) > 10 for _, explanation in comments.values())


def test_teachers_are_concatenated_in_the_published_order():
    assert Config().teachers == ("Asian", "African", "Caucasian", "Indian")
    assert Config(ethnicities=("Indian", "X", "African")).teachers == ("African", "Indian", "X")
    assert Config(ethnicities=("D", "A")).teachers == ("D", "A")
    assert Config(is_teacher_baseline=True).teachers == ("quarter1", "quarter2", "quarter3", "quarter4")


def test_teachers_and_groups_are_selected_by_ethnicity():
    assert Config(ethnicity="Asian").selected_teachers == ("Asian",)
    assert Config(ethnicity="quarter2", is_teacher_baseline=True).selected_teachers == ("quarter2",)
    with pytest.raises(InputError, match="must be a baseline teacher: All, quarter1"):
        _ = Config(ethnicity="Asian", is_teacher_baseline=True).selected_teachers
    with pytest.raises(InputError, match="must be a group: All, African"):
        _ = Config(ethnicity="quarter1").selected_ethnicities


def test_dropout_needs_the_dual_layer_adaptor():
    assert Config(is_dual_layer=True, has_dropout=True).adaptor == "DLDPO"
    with pytest.raises(InputError, match="has_dropout = True must be False for the single-layer adaptor"):
        _ = Config(has_dropout=True).adaptor


def test_the_groups_that_are_verified_on_are_a_setting_of_their_own():
    cfg = Config(ethnicities=("A", "B"), evaluation_groups=("B", "x"), pairs="pairs", output="out")
    assert cfg.of_groups
    assert cfg.pairs_files == {"B": Path("pairs/B_test.bin"), "x": Path("pairs/x_test.bin")}
    assert [cfg.group_of("A"), cfg.group_of("B")] == ["", "B"]
    assert cfg.evaluation_dir == Path("out/evaluation/B+x")
    assert replace(cfg, evaluation_groups=("A", "B")).evaluation_dir == Path("out/evaluation")
    assert replace(cfg, ethnicities=()).of_groups
    baseline = replace(cfg, is_teacher_baseline=True)
    assert [baseline.group_of(name) for name in baseline.quarters] == ["", "B"]
    many = replace(cfg, evaluation_groups=tuple(f"group{k}" for k in range(99))).evaluation_dir.name
    assert many.startswith("group0+98-")
    for names in ((), ("A", "A")):
        with pytest.raises(InputError, match="evaluation_groups"):
            replace(cfg, evaluation_groups=names)
    with pytest.raises(InputError, match="None where pairs_sets names the sets"):
        replace(cfg, pairs_sets=("lfw",))


def test_run_folders():
    cfg = Config(is_teacher_baseline=True, network="iresnet50", is_dual_layer=True)
    assert cfg.teacher_dir("quarter1").as_posix() == "output/baseline/iresnet50/teachers/quarter1"
    assert cfg.teacher_embeddings("quarter1").as_posix() == "output/baseline/iresnet50/embeddings/quarter1.npy"
    assert cfg.adaptor_embeddings("SL", flipped=True).name == "embeddings_flipped.npy"
    assert cfg.student_dir("a-KD").as_posix() == "output/baseline/iresnet50/students/iresnet34/DuL-a-KD"
