"""Settings: schedules as published, every wrong value refused in one sentence, nothing that can be stale."""

import dataclasses

import pytest

from config.arguments import _comments
from config.config import Config, scaled_milestones
from utils.errors import InputError

# Learning rate of each epoch as a power of ten below the first, from FACTS 1.2: a drop at m once m - 1 epochs are done.
PUBLISHED_52 = [0] * 15 + [1] * 12 + [2] * 12 + [3] * 10 + [4] * 3
PUBLISHED_26 = [0] * 7 + [1] * 6 + [2] * 6 + [3] * 5 + [4] * 2


@pytest.mark.parametrize(("epochs", "drops"), [(52, PUBLISHED_52), (26, PUBLISHED_26)])
def test_published_schedules_for_every_epoch(epochs, drops):
    teacher = Config(num_epoch=epochs).schedule
    adaptor = Config(num_epoch_fc=epochs).schedule_fc
    assert [teacher.lr(epoch) for epoch in range(epochs)] == pytest.approx([0.025 * 0.1**d for d in drops])
    assert [adaptor.lr(epoch) for epoch in range(epochs)] == pytest.approx([0.25 * 0.1**d for d in drops])


def test_learning_rate_follows_the_batch_size():
    assert Config(batch_size=512).schedule.lr(0) == pytest.approx(0.1)
    assert Config(batch_size=64, lr_fc=2.0).schedule_fc.lr(0) == pytest.approx(0.25)


def test_other_lengths_are_scaled():
    assert scaled_milestones(13) == (4, 7, 10, 13)
    assert scaled_milestones(60) == (40, 48, 52)  # published, of CASIA-WebFace
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
    assert [cfg.schedule.lr(e) / 0.025 for e in (38, 39, 47, 51)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [cfg.schedule_fc.lr(e) / 0.25 for e in (14, 15, 25)] == pytest.approx([1, 0.1, 0.1])


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


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--etnicity", "African"], "unknown setting --etnicity: did you mean --ethnicity?"),
        (["--quux", "1"], "unknown setting --quux: --help lists all settings."),
        (["African"], "'African' is not understood: settings are given as --name value."),
        (["--ethnicity", "Martian"], "ethnicity = 'Martian' must be one of All, African"),
        (["--network", "resnet"], "network = 'resnet' must be one of iresnet18"),
        (["--loss", "Triplet"], "loss = 'Triplet' must be one of ElasticArcFace"),
        (["--device", "tpu"], "device = 'tpu' must be one of auto, cpu, cuda"),
        (["--batch_size", "1"], "batch_size = 1 must be at least 2"),
        (["--num_epoch", "0"], "num_epoch = 0 must be at least 1"),
        (["--lr", "-1"], "lr = -1.0 must be a number above 0"),
        (["--lr", "nan"], "lr = nan must be a number above 0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--momentum", "1"], "momentum = 1.0 must be below 1"),
        (["--seed", "-3"], "seed = -3 must be 0 or more"),
        (["--seed", "9" * 20], "must be 0 or more, and below 2**63"),
        (["--ethnicities", "average,B"], "without average, which means something else"),
        (["--milestones", "5,3"], "milestones = (5, 3) must be increasing epoch numbers above 1"),
        (["--ethnicities", "A,A"], "ethnicities = ('A', 'A') must be different names"),
        (["--ethnicities", "A,../B"], "must be names of folders"),
        (["--ethnicities", "All,B"], "without All, which means something else"),
        (["--ethnicities", "A,A_flipped,students"], "without A_flipped, students, which means something else"),
        (["--has_dropout", "perhaps"], "argument --has_dropout: invalid bool value: 'perhaps'"),
        (["--data", ""], "data = '' must be a path"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        Config.from_args(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_wrong_types_are_refused_in_code_too():
    with pytest.raises(InputError, match="batch_size = 1.5 must be of type int"):
        Config(batch_size=1.5)
    with pytest.raises(InputError, match="has_dropout = 1 must be of type bool"):
        Config(has_dropout=1)


def test_a_config_cannot_be_changed_after_paths_were_built_from_it():
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


def test_dropout_without_a_dual_layer_names_no_adaptor():
    assert Config(is_dual_layer=True, has_dropout=True).adaptor == "DLDPO"
    with pytest.raises(InputError, match="has_dropout = True must be False for the single-layer adaptor"):
        _ = Config(has_dropout=True).adaptor


def test_run_folders():
    cfg = Config(is_teacher_baseline=True, network="iresnet50", is_dual_layer=True)
    assert cfg.teacher_dir("quarter1").as_posix() == "output/baseline/iresnet50/teachers/quarter1"
    assert cfg.teacher_embeddings("quarter1").as_posix() == "output/baseline/iresnet50/embeddings/quarter1.npy"
    assert cfg.adaptor_embeddings("SL", flipped=True).name == "embeddings_flipped.npy"
    assert cfg.student_dir("a-KD").as_posix() == "output/baseline/iresnet50/students/iresnet34/DuL-a-KD"
