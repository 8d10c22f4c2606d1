"""The scripts, run in order as a user runs them, on a few generated faces."""

import csv
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval.scores
from backbones import DualLayerAdaptor, MultiTeacher, build_adaptor, build_backbone
from config.config import Config
from config.readers import SCRIPTS, reads
from eval.scores import fuse
from eval.verification import ten_fold, views
from tests.runs import GROUPS, ROOT, arguments, run_script
from tests.unit.eval.test_verification import plain_loop_of
from utils.data.columns import to_network
from utils.data.faces import Faces
from utils.data.identities import sidecar_of
from utils.data.pairs import load_bin
from utils.storage.tensors import load, save
from utils.training.engine import infer
from utils.weights import load_weights


def test_every_stage_writes_what_the_next_one_reads(trained):
    cfg, _ = trained
    found = {str(p.relative_to(cfg.output)) for p in Path(cfg.output).rglob("best_backbone.pth")}
    base = "specialized/iresnet_tiny"
    assert found == {
        *(f"{base}/teachers/{name}/best_backbone.pth" for name in GROUPS),
        *(f"{base}/adaptors/{name}/best_backbone.pth" for name in ("SL", "DuL", "DLDPO")),
        f"{base}/students/iresnet_tiny/SL-a-KD/best_backbone.pth",
        f"{base}/students/iresnet_tiny/DLDPO-EAF-KD/best_backbone.pth",
        f"{base}/students/iresnet_tiny/SL-AdaArcDistill/best_backbone.pth",
        "baseline/iresnet_tiny/teachers/quarter2/best_backbone.pth",
    }
    for run_folder in {path.parent for path in Path(cfg.output).rglob("best_backbone.pth")}:
        has_header = run_folder.name != "SL-a-KD"
        assert (run_folder / "best_header.pth").exists() == has_header
        assert len((run_folder / "log.jsonl").read_text().splitlines()) == 2
        sessions = json.loads((run_folder / "config.json").read_text())["sessions"]
        assert [session["epochs done"] for session in sessions] == [0]
        assert sessions[0]["versions"]["torch"] == torch.__version__


def test_each_script_reads_only_the_settings_that_are_documented_for_it(trained_and_reads):
    *_, found = trained_and_reads
    # The evaluation sets these itself, for each student that it finds.
    found["eval.evaluation"] -= {"ethnicity", "ada_source", "has_dropout", "student_network", "ada_student_network"}
    assert {*found} >= {*SCRIPTS} - {"eval.ijb"}
    wrong = {
        script: {name for name in found[script] if not reads(script, name)} for script in found if script in SCRIPTS
    }
    assert not any(wrong.values()), wrong


def test_a_run_records_the_values_used_for_none(trained):
    cfg, _ = trained

    def kept(folder):
        return json.loads((folder / "config.json").read_text())["settings"]

    assert kept(cfg.teacher_dir("Asian"))["std"] == 0.05
    assert kept(cfg.teacher_dir("Asian"))["milestones"] == [2]
    assert kept(cfg.adaptor_dir("DuL"))["std_fc"] == 0.0125
    assert kept(cfg.student_dir("AdaArcDistill"))["ada_m"] == 0.45


def test_the_best_epoch_of_a_baseline_teacher_is_the_best_for_its_group(trained):
    cfg, _ = trained
    log = Path(cfg.output) / "baseline/iresnet_tiny/teachers/quarter2/log.jsonl"
    first, second = [json.loads(line) for line in log.read_text().splitlines()]
    assert second["best"] == (second["scores"]["Asian"] > first["scores"]["Asian"])


def test_a_baseline_teacher_is_not_resumed_with_the_best_epoch_of_another_group(trained, faces, tmp_path, capsys):
    given = arguments(faces, tmp_path / "output")
    shutil.copytree(trained[0].output, tmp_path / "output")
    quarter = [*given, "--is_teacher_baseline", "--ethnicity", "quarter2"]
    run_script("train.py", quarter)
    assert "is already trained" in capsys.readouterr().out
    path = tmp_path / "output/baseline/iresnet_tiny/teachers/quarter2/checkpoint.pth"
    state = load(path)
    del state["decided_by"]["sources"]["group that decides the best epoch"]  # as written by an earlier version
    save(path, state)
    run_script("train.py", quarter, expect=2)
    assert "(group that decides the best epoch changed)" in capsys.readouterr().err


def test_headers_have_a_class_for_each_identity_of_their_stage(trained):
    cfg, _ = trained

    def classes(folder):
        return torch.load(folder / "best_header.pth", weights_only=True)["kernel"].shape

    assert classes(cfg.teacher_dir("Asian")) == (32, 4)
    assert classes(cfg.adaptor_dir("DuL")) == (32, 16)
    assert classes(Path(cfg.output) / "baseline/iresnet_tiny/teachers/quarter2") == (32, 4)
    names = (cfg.teacher_dir("Asian") / "identities.txt").read_text().split()
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {"Asian"}


def test_embeddings_equal_the_teachers_outputs_at_unit_length(trained):
    cfg, _ = trained
    store = Faces(cfg).store
    teacher = build_backbone("iresnet_tiny", 32)
    load_weights(teacher, cfg.teacher_dir("Indian") / "best_backbone.pth")
    with torch.no_grad():
        for flipped in (False, True):
            image = to_network(torch.from_numpy(store.images[:, :, ::-1].copy() if flipped else np.array(store.images)))
            wanted = F.normalize(teacher.eval()(image)).numpy()
            written = np.load(cfg.teacher_embeddings("Indian", flipped))
            assert np.allclose(written, wanted, atol=1e-5)
            assert np.allclose(np.linalg.norm(written, axis=1), 1, atol=1e-5)


def test_both_views_are_extracted_in_one_pass_and_existing_ones_are_kept(trained, tmp_path, monkeypatch):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    moved = replace(cfg, output=str(output), ethnicities=cfg.ethnicities)
    both = [moved.teacher_embeddings("Asian", flipped) for flipped in (False, True)]
    before = [np.load(path) for path in both]
    passes = []
    monkeypatch.setattr(
        "utils.training.extract.infer", lambda *given: passes.append(given[-1].__self__.fillings) or infer(*given)
    )
    for lost in (both, both[1:]):
        for path in lost:
            path.unlink()
        stamp = both[0].stat().st_mtime_ns if both[0].exists() else 0
        run_script("extract_all.py", [*given, "--output", str(output), "--flip_targets"])
        assert [filling.path for filling in passes.pop()] == lost
        assert passes == []
        assert not stamp or both[0].stat().st_mtime_ns == stamp
        assert all(np.array_equal(np.load(path), whole) for path, whole in zip(both, before, strict=True))


def test_targets_are_the_adaptors_outputs_for_teachers_in_published_order(trained):
    cfg, _ = trained
    order = ("Asian", "African", "Caucasian", "Indian")
    for name, views_written in (("SL", (False, True)), ("DLDPO", (False,))):
        adaptor = build_adaptor(name, cfg)
        load_weights(adaptor, cfg.adaptor_dir(name) / "best_backbone.pth")
        for flipped in views_written:
            rows = np.concatenate([np.load(cfg.teacher_embeddings(teacher, flipped)) for teacher in order], 1)
            with torch.no_grad():
                wanted = F.normalize(adaptor.eval()(torch.from_numpy(rows))).numpy()
            assert np.allclose(np.load(cfg.adaptor_embeddings(name, flipped)), wanted, atol=1e-5)
    assert isinstance(adaptor, DualLayerAdaptor)
    assert adaptor.dropout.p == 0.2


def test_the_best_adaptor_has_the_lowest_training_loss(trained):
    cfg, _ = trained
    log = [json.loads(line) for line in (cfg.adaptor_dir("SL") / "log.jsonl").read_text().splitlines()]
    assert log[0]["scores"] == {}
    assert [line["best"] for line in log] == [True, log[1]["loss"]["eaf"] < log[0]["loss"]["eaf"]]


def test_the_table_equals_a_recomputation_from_the_checkpoints(trained):
    """Recomputes every number of the CSV from the weights with whole networks, one set of pairs at a time."""
    cfg, _ = trained
    text = (Path(cfg.output) / "evaluation" / "accuracy.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["Setting"], row["Kind"], row["Model"]) for row in rows] == [
        *(("specialized", "teacher", name) for name in GROUPS),
        *(("specialized", "adaptor", name) for name in ("SL", "DuL", "DLDPO")),
        ("specialized", "a-KD", "SL iresnet_tiny"),
        ("specialized", "EAF-KD", "DLDPO iresnet_tiny"),
        ("specialized", "AdaArcDistill", "SL iresnet_tiny"),
        ("baseline", "teacher", "quarter2"),
    ]

    def network(folder):
        backbone = build_backbone("iresnet_tiny", 32)
        load_weights(backbone, folder / "best_backbone.pth")
        return backbone

    def adaptor(name):
        module = build_adaptor(name, cfg)
        load_weights(module, cfg.adaptor_dir(name) / "best_backbone.pth")
        return module

    teachers = [network(cfg.teacher_dir(name)) for name in cfg.teachers]
    students = cfg.network_dir / "students" / "iresnet_tiny"
    models = [
        *(teachers[cfg.teachers.index(name)] for name in GROUPS),
        *(MultiTeacher(teachers, adaptor(name)) for name in ("SL", "DuL", "DLDPO")),
        network(students / "SL-a-KD"),
        network(students / "DLDPO-EAF-KD"),
        network(students / "SL-AdaArcDistill"),
        network(Path(cfg.output) / "baseline/iresnet_tiny/teachers/quarter2"),
    ]
    for row, model in zip(rows, models, strict=True):
        accuracies = []
        for name in GROUPS:
            pairs = load_bin(cfg.pairs_file(name))
            image = to_network(torch.from_numpy(pairs.images))
            with torch.no_grad():
                embedding = F.normalize(model.eval()(image) + model(image.flip(-1))).numpy()
            accuracies.append(100 * ten_fold(embedding, pairs.same).accuracy.mean())
        assert [float(row[name]) for name in GROUPS] == pytest.approx(accuracies)
        assert float(row["Average"]) == pytest.approx(np.mean(accuracies))
        assert float(row["STD"]) == pytest.approx(np.std(accuracies, ddof=1))
        ratio = (100 - min(accuracies)) / (100 - max(accuracies))
        assert float(row["SER"]) == pytest.approx(ratio)


@pytest.mark.usefixtures("blank_pictures")
def test_a_stopped_evaluation_resumes(trained, tmp_path, monkeypatch):
    cfg, given = trained
    output, seen = tmp_path / "output", []
    shutil.copytree(cfg.output, output)
    given = [*given, "--output", str(output)]
    table = output / "evaluation" / "accuracy.csv"
    whole = table.read_bytes()
    distances = output / "evaluation" / "distances"

    def watched(*arguments, **options):
        seen.append(arguments[-1])
        return plain(*arguments, **options)

    plain = eval.scores.views
    monkeypatch.setattr(eval.scores, "views", watched)
    table.unlink()
    run_script("eval.evaluation", given)
    assert seen == []
    shutil.rmtree(distances / "specialized-iresnet_tiny" / "teacher Asian")
    damaged = distances / "specialized-iresnet_tiny" / "a-KD SL iresnet_tiny" / "Indian.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    run_script("eval.evaluation", given)
    assert seen == [*(f"{group} pairs, teacher Asian" for group in GROUPS), "Indian pairs, a-KD SL iresnet_tiny"]
    assert table.read_bytes() == whole
    seen.clear()
    path = cfg.pairs_file("Asian")
    pairs = shutil.copytree(path.parent, tmp_path / "pairs")
    for file in (cfg.pairs_file("Indian"), sidecar_of(cfg.pairs_file("Indian"))):
        shutil.copy(file, pairs / file.name.replace("Indian", "Asian"))
    run_script("eval.evaluation", [*given, "--pairs", str(pairs)])
    assert {title.split()[0] for title in seen} == {"Asian"}


def test_tables_of_generated_faces_are_labelled_and_pictures_are_written(trained):
    cfg, _ = trained
    folder = Path(cfg.output) / "evaluation"
    for name in ("accuracy.md", "accuracy.tex", "intervals.md", "differences.md", "results.json"):
        assert "Generated faces, not photographs" in (folder / name).read_text()
    names = {
        *("accuracy", "trade_off", "training", "training_2"),
        *(f"curves/{p.stem}" for p in folder.glob("curves/*")),
    }
    assert len(names) == 4 + 11
    for name in names:
        for extension, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
            assert (folder / f"{name}.{extension}").read_bytes().startswith(start)
    assert b"/FontFile2" in (folder / "accuracy.pdf").read_bytes()  # TrueType fonts are embedded
    assert b"<text" not in (folder / "accuracy.svg").read_bytes()  # text is outlines


def test_the_table_equals_a_recomputation_from_the_written_scores(trained):
    """Recomputes the accuracies from the line of each pair, by the plain published loop."""
    cfg, _ = trained
    folder = Path(cfg.output) / "evaluation"
    found = list(csv.DictReader((folder / "accuracy.csv").read_text().splitlines()))
    for row in found:
        name = f"{row['Setting']}-{row['Teachers']}-{row['Kind']}-{row['Model']}.csv".replace(" ", "-")
        lines = list(csv.DictReader((folder / "scores" / name).read_text().splitlines()))
        for group in GROUPS:
            of_group = [line for line in lines if line["set"] == group]
            assert [int(line["pair"]) for line in of_group] == list(range(len(of_group)))
            distance = np.array([float(line["squared distance"]) for line in of_group])
            accuracy, *_ = plain_loop_of(distance, np.array([line["same"] == "1" for line in of_group]))
            assert float(row[group]) == pytest.approx(100 * np.mean(accuracy), abs=1e-9)


@pytest.mark.usefixtures("blank_pictures")
def test_named_checkpoints_score_as_in_their_run_folders(trained, tmp_path, capsys):
    """Evaluates a student by its file, and an adaptor by its file and those of its teachers, like released ones."""
    cfg, given = trained
    output = ["--output", str(tmp_path / "output")]
    table = csv.DictReader((Path(cfg.output) / "evaluation" / "accuracy.csv").read_text().splitlines())
    known = {(row["Setting"], row["Kind"], row["Model"]): [row[group] for group in GROUPS] for row in table}
    student = cfg.network_dir / "students" / "iresnet_tiny" / "SL-a-KD" / "best_backbone.pth"
    adaptor = cfg.adaptor_dir("DuL") / "best_backbone.pth"
    teachers = ["--teacher", ",".join(str(cfg.teacher_dir(name) / "best_backbone.pth") for name in cfg.teachers)]
    for options, model in (
        (["--checkpoint", str(student)], ("a-KD", "SL iresnet_tiny")),
        (["--checkpoint", str(adaptor), "--is_dual_layer", *teachers], ("adaptor", "DuL")),
    ):
        capsys.readouterr()
        run_script("eval.evaluation", [*given, *output, *options])
        folder = Path(capsys.readouterr().out.split("Written to ")[1].split(": accuracy.md")[0])
        (row,) = csv.DictReader((folder / "accuracy.csv").read_text().splitlines())
        assert [row[group] for group in GROUPS] == known["specialized", *model]
        assert row["Kind"] == "checkpoint"
    published = [*given, *output, "--checkpoint", str(adaptor), "--is_dual_layer", *teachers]
    run_script("eval.evaluation", [*published, "--published_adaptor_input"])
    other = tmp_path / "output" / "evaluation" / "published adaptor input" / folder.name
    lines = [(one / "scores" / next((one / "scores").iterdir()).name).read_text() for one in (folder, other)]
    assert lines[0] != lines[1]
    for options, sentence in (
        (
            ["--checkpoint", "nowhere.pth"],
            "There is no file nowhere.pth: set checkpoint and teacher to files of weights",
        ),
        (
            ["--checkpoint", str(student), "--network", "iresnet34"],
            "It looks like iresnet_tiny, embeddings of 32 numbers.",
        ),
        (["--checkpoint", str(adaptor), *teachers], "It looks like a dual-layer adaptor from 128 to 32 numbers."),
        (
            ["--checkpoint", str(adaptor), "--is_dual_layer", *teachers[:1], f"{student},{student}"],
            "(32, 128), not (32, 64). It looks like a dual-layer adaptor from 128 to 32 numbers.",
        ),
    ):
        run_script("eval.evaluation", [*given, *output, *options], expect=2)
        assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_constant_and_nan_models_give_half_accuracy_or_an_error(trained, tmp_path, capsys):
    """A constant embedding decides half of the pairs correctly; a model that gives NaN is refused with its name."""
    _, given = trained
    network = build_backbone("iresnet_tiny", 32)
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    for name, value in (("point", 1.0), ("nan", float("nan"))):
        torch.save({**state, "features.bias": torch.full((32,), value)}, tmp_path / f"{name}.pth")
    output = ["--output", str(tmp_path / "output")]
    run_script("eval.evaluation", [*given, *output, "--checkpoint", str(tmp_path / "point.pth"), "--report"])
    folder = next((tmp_path / "output" / "evaluation").glob("point-*"))
    (row,) = csv.DictReader((folder / "accuracy.csv").read_text().splitlines())
    assert [float(row[group]) for group in GROUPS] == [50.0] * 4
    assert capsys.readouterr().err == ""
    run_script("eval.evaluation", [*given, *output, "--checkpoint", str(tmp_path / "nan.pth")], expect=2)
    sentence = "nan.pth holds numbers in features.bias that are not finite: its training has failed."
    assert sentence in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_other_verification_sets_have_an_average_and_no_std(trained, tmp_path, capsys):
    cfg, given = trained
    for name, source in (("lfw", "Asian"), ("cfp_fp", "Indian")):
        shutil.copy(cfg.pairs_file(source), tmp_path / f"{name}.bin")
    student = str(cfg.network_dir / "students" / "iresnet_tiny" / "SL-a-KD" / "best_backbone.pth")
    options = ["--pairs", str(tmp_path), "--pairs_sets", "lfw,cfp_fp", "--output", str(tmp_path / "output")]
    run_script("eval.evaluation", [*given, *options, "--checkpoint", student])
    page = capsys.readouterr().out
    assert f"Written to {tmp_path}/output/evaluation/lfw+cfp_fp/best_backbone-" in page
    header = next(line for line in page.splitlines() if line.startswith("| Setting"))
    assert [cell.strip() for cell in header.split("|")[5:-1]] == ["lfw", "cfp_fp", "Average"]
    assert "No error rates: they are given for groups, or for a single set, and these sets are not groups." in page
    run_script("eval.evaluation", [*given, *options, "--checkpoint", student, "--pairs_sets", "lfw,agedb_30"], expect=2)
    advice = "Set pairs to the folder of these files, or verify on those that are there: --pairs_sets lfw"
    assert f"Missing: {tmp_path}/agedb_30.bin. {advice}" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_models_are_verified_on_other_groups_than_they_were_trained_on(trained, tmp_path, capsys):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    shutil.copytree(cfg.pairs, tmp_path / "pairs")
    shutil.copy(cfg.pairs_file("Asian"), tmp_path / "pairs" / "asian_females_test.bin")
    table = csv.DictReader((output / "evaluation" / "accuracy.csv").read_text().splitlines())
    known = {(row["Kind"], row["Model"]): row for row in table if row["Setting"] == "specialized"}
    given = [*given, "--output", str(output), "--pairs", str(tmp_path / "pairs")]
    run_script("eval.evaluation", [*given, "--evaluation_groups", "Indian,asian_females"])
    rows = [*csv.DictReader((output / "evaluation" / "Indian+asian_females" / "accuracy.csv").read_text().splitlines())]
    found = {(row["Kind"], row["Model"]): row for row in rows if row["Setting"] == "specialized"}
    assert found.keys() == known.keys()
    for model, row in found.items():
        assert (row["Indian"], row["asian_females"]) == (known[model]["Indian"], known[model]["Asian"])
        both = [float(row["Indian"]), float(row["asian_females"])]
        assert float(row["STD"]) == pytest.approx(np.std(both, ddof=1))
    assert (output / "evaluation" / "Indian+asian_females" / "rates_best_accuracy.md").exists()
    assert "Not in the tables" not in capsys.readouterr().out

    run_script("eval.evaluation", [*given, "--ethnicities", "Asian,African", "--evaluation_groups", "Indian"])
    base = "specialized/iresnet_tiny"
    left = [*(f"adaptors/{name}" for name in ("DLDPO", "DuL", "SL")), "teachers/Caucasian", "teachers/Indian"]
    note = f"Not in the tables, though in {output}: {', '.join(f'{base}/{name}' for name in left)}; ethnicities names"
    assert note in (output / "evaluation" / "Indian" / "accuracy.md").read_text()
    said = capsys.readouterr().out
    assert "There is one set of pairs and nothing to compare it with" in said and "not groups" not in said
    shutil.rmtree(output / base / "students")
    shutil.rmtree(output / "baseline")
    run_script("eval.evaluation", [*given, "--ethnicities", "asian_females"], expect=2)
    assert f"holds {base}/adaptors/DLDPO, {base}/adaptors/DuL" in capsys.readouterr().err


def test_the_report_is_one_page_without_external_files(trained, tmp_path):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    run_script("eval.evaluation", [*given, "--output", str(output), "--report"])
    page = (output / "evaluation" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4 + 11
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len({*ids})
    assert {*re.findall(r'href="#([^"]+)"', page)} <= {*ids}
    assert str(tmp_path) not in page
    assert cfg.data not in page
    for title in ("Accuracy", "95 % intervals", "Differences", "Impostors across groups", "Training"):
        assert f"<h2>{title}</h2>" in page
        anchor = "".join(c if c.isalnum() else "-" for c in title.lower())
        assert f'href="#{anchor}"' in page
        assert f'id="{anchor}"' in page
    assert "Generated faces, not photographs" in page


def test_fused_features_equal_the_whole_model(trained):
    cfg, _ = trained
    torch.manual_seed(0)
    teachers = [build_backbone("iresnet_tiny", 32).eval() for _ in cfg.teachers]
    adaptor = build_adaptor("DuL", cfg).eval()
    images = load_bin(cfg.pairs_file("Asian")).images
    apart = fuse(adaptor, [views(teacher, images, cfg, "test") for teacher in teachers], cfg)
    assert np.allclose(apart, views(MultiTeacher(teachers, adaptor), images, cfg, "test"), atol=1e-5)


def test_flipped_targets_change_the_student(trained, tmp_path):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    shutil.rmtree(output / "specialized/iresnet_tiny/students")
    run_script("KD_alone.py", [*given, "--output", str(output), "--flip_targets"])
    student = Path("specialized/iresnet_tiny/students/iresnet_tiny/SL-a-KD/best_backbone.pth")
    one, other = (torch.load(Path(base) / student, weights_only=True) for base in (cfg.output, output))
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    run_script("KD_alone.py", [*given, "--output", str(output)], expect=2)


def test_a_student_without_header_reads_no_label(trained, tmp_path, monkeypatch, capsys):
    """Invalid labels change nothing in a-KD, and are refused by EAF-KD."""
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    shutil.rmtree(output / "specialized/iresnet_tiny/students")
    plain = Faces.__init__

    def poisoned(self, *arguments, **options):
        plain(self, *arguments, **options)
        self.columns["label"].arrays[0][:] = 10**6

    monkeypatch.setattr(Faces, "__init__", poisoned)
    run_script("KD_alone.py", [*given, "--output", str(output)])
    student = Path("specialized/iresnet_tiny/students/iresnet_tiny/SL-a-KD/last_backbone.pth")
    one, other = (torch.load(Path(base) / student, weights_only=True) for base in (cfg.output, output))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    run_script("KD_CEL.py", [*given, "--output", str(output)], expect=2)
    assert "The labels are 1000000 to 1000000, but the header has 16 classes" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures")
def test_another_order_of_teachers_is_refused_by_an_adaptor(trained, tmp_path, capsys):
    """Names beyond the published four are concatenated in the given order, which an adaptor must keep."""
    output = shutil.copytree(trained[0].output, tmp_path / "output")
    given = [*trained[1], "--output", str(output)]
    cfg = Config.from_args(given)
    for script, status in (("fc_EArc.py", 0), ("eval.evaluation", 0)):  # the published names have a fixed order
        run_script(script, [*given, "--flip_targets", "--ethnicities", "Indian,Caucasian,Asian,African"], status)
    assert "left out" not in capsys.readouterr().out
    path = cfg.adaptor_dir("SL") / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    state["decided_by"]["settings"]["teachers"].reverse()
    save(path, state)
    run_script("fc_EArc.py", given, expect=2)
    assert "teachers was ['Indian', 'Caucasian', 'African', 'Asian']" in capsys.readouterr().err
    run_script("eval.evaluation", given)
    assert "SL is left out: it was trained on Indian, Caucasian, African, Asian" in capsys.readouterr().out


def test_a_refused_teacher_is_reported_before_another_is_trained(faces, tmp_path, capsys):
    given = arguments(faces, tmp_path / "output")
    run_script("train.py", [*given, "--ethnicity", "Indian", "--num_epoch", "3"])
    run_script("train.py", given, expect=2)
    assert (
        "teachers/Indian holds a run with other settings or data "
        "(milestones was [2, 3], now [2]; num_epoch was 3, now 2)" in capsys.readouterr().err
    )
    assert [path.name for path in (tmp_path / "output/specialized/iresnet_tiny/teachers").iterdir()] == ["Indian"]


@pytest.mark.usefixtures("blank_pictures")
def test_an_adaptor_is_scored_through_the_teachers_it_was_trained_on(trained, capsys, tmp_path):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    given = [*given, "--output", str(output)]

    def adaptor_rows(*folder):
        table = output.joinpath("evaluation", *folder, "accuracy.csv")
        return [line for line in table.read_text().splitlines() if ",adaptor," in line]

    run_script("eval.evaluation", [*given, "--weights", "last"])
    assert len(adaptor_rows("last")) == 3
    assert "Weights of the last epoch." in (output / "evaluation" / "last" / "accuracy.md").read_text()
    assert "left out" not in capsys.readouterr().out
    teachers = output / "specialized/iresnet_tiny/teachers"
    for which in ("best", "last"):  # as if trained again
        shutil.copy(teachers / "Asian" / "best_backbone.pth", teachers / "African" / f"{which}_backbone.pth")
    run_script("eval.evaluation", given)
    assert adaptor_rows() == []
    for kind in ("scores/*.csv", "curves/*.*"):  # files of models that are left out are removed
        assert not [path for path in output.glob(f"evaluation/{kind}") if "adaptor" in path.name]
    assert "SL is left out: the teachers it was trained on are not there any more: African" in capsys.readouterr().out
    run_script("KD_alone.py", given, expect=2)
    assert "was made by other weights than" in capsys.readouterr().err


def test_the_next_command_has_the_right_settings(trained, capsys):
    cfg, given = trained
    for script, extra, wanted in (
        ("baseline_data_split.py", ["--is_teacher_baseline"], replace(cfg, is_teacher_baseline=True)),
        ("train.py", ["--ethnicity", "Asian"], cfg),
        ("dual_layer_EAF-Fusion.py", ["--has_dropout"], replace(cfg, is_dual_layer=True, has_dropout=True)),
    ):
        run_script(script, [*given, *extra])
        command = shlex.split(capsys.readouterr().out.splitlines()[-1].split("Next: ")[1])
        assert (ROOT / command[1]).exists()
        assert Config.from_args(command[2:]) == wanted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_prints_the_command_that_resumes(faces, tmp_path, number):
    given = [*arguments(faces, tmp_path / "output"), "--ethnicity", "Asian", "--num_epoch", "10000"]
    command = [sys.executable, "-u", "train.py", *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "epoch 1/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"continue with: python train.py {shlex.join(given)}" in error
    assert (tmp_path / "output/specialized/iresnet_tiny/teachers/Asian/checkpoint.pth").exists()


def test_damaged_embeddings_are_made_again(trained, tmp_path):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    path = output / cfg.teacher_embeddings("Asian").relative_to(cfg.output)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    run_script("fc_EArc.py", [*given, "--output", str(output)], expect=2)
    run_script("extract_all.py", [*given, "--output", str(output)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "script",
    [
        "baseline_data_split.py",
        "train.py",
        "extract_all.py",
        "fc_EArc.py",
        "dual_layer_EAF-Fusion.py",
        "KD_alone.py",
        "KD_CEL.py",
        "KD_AdaDistill.py",
    ],
)
def test_scripts_fit_on_one_screen_and_import_no_script(script):
    lines = (ROOT / script).read_text().splitlines()
    assert len(lines) <= 50
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"backbones", "config", "dataclasses", "eval", "pathlib", "torch", "utils"}
    assert inspect.cleandoc(lines[0].strip('"')).startswith("Stage ")


def test_a_missing_stage_is_named_and_nothing_is_written(faces, tmp_path, capsys):
    given = [*arguments(faces, tmp_path / "output"), "--cache", str(tmp_path / "cache")]
    for script, extra, sentence in (
        ("train.py", ["--is_teacher_baseline"], "run first: python baseline_data_split.py --data"),
        ("extract_all.py", [], "teachers/Asian, "),
        ("fc_EArc.py", [], "Run first: python extract_all.py --data"),
        ("dual_layer_EAF-Fusion.py", [], "Run first: python extract_all.py --data"),
        ("KD_alone.py", [], "Run first: python fc_EArc.py --data"),
        ("KD_CEL.py", ["--is_dual_layer"], "Run first: python dual_layer_EAF-Fusion.py --data"),
        ("KD_AdaDistill.py", [], "Run first: python fc_EArc.py --data"),
        ("KD_alone.py", ["--ada_source", "teacher", "--ethnicity", "Asian"], "Run first: python extract_all.py --data"),
        (
            "KD_alone.py",
            ["--ada_source", "teacher"],
            "ethnicity = 'All' must be one of Asian, African",
        ),
        ("baseline_data_split.py", ["--ethnicities", ""], "ethnicities = () must be names of groups"),
        ("train.py", ["--ethnicities", ""], "Missing: "),
        ("eval.evaluation", [], "holds no trained model. Set output, or run first: python train.py --data"),
        ("train.py", ["--pairs", "nowhere"], "Missing: nowhere/African_test.bin, nowhere/Asian_test.bin"),
        ("train.py", ["--data", "nowhere"], "There is no folder nowhere"),
        *([] if torch.cuda.is_available() else [("train.py", ["--device", "cuda"], "finds no CUDA device")]),
    ):
        run_script(script, [*given, *extra], expect=2)
        assert sentence in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if "pairs" not in path.parts] == [tmp_path / "cache"]


def test_released_teachers_are_used_by_the_next_stages(faces, tmp_path, capsys):
    given = arguments(faces, tmp_path / "output")
    cfg = Config.from_args(given)
    for name in GROUPS:
        cfg.teacher_dir(name).mkdir(parents=True)
        torch.save(build_backbone("iresnet_tiny", 32).state_dict(), cfg.teacher_dir(name) / "30000backbone.pth")
    run_script("train.py", given)
    assert capsys.readouterr().out.count("30000backbone.pth and no checkpoint of a run: used as it is") == 4
    run_script("extract_all.py", given)
    run_script("fc_EArc.py", given)
    assert cfg.adaptor_embeddings("SL").exists()


def test_finished_stages_are_not_repeated(trained, capsys):
    cfg, given = trained
    before = {path: path.stat().st_mtime_ns for path in cfg.network_dir.rglob("*") if path.is_file()}
    for script in ("baseline_data_split.py", "train.py", "extract_all.py", "fc_EArc.py", "KD_alone.py"):
        run_script(script, [*given, "--flip_targets"] if script.startswith(("extract", "fc")) else given)
    assert "is up to date" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in cfg.network_dir.rglob("*") if path.is_file()}
    assert after == before
