"""AdaDistill: the loss against frozen numbers, the script against a teacher on every batch, and refused centres."""

import csv
import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones import MultiTeacher, build_adaptor, build_backbone
from config.config import ADA_LOSSES, Config
from tests.make_golden import STEP_LABELS, S, inputs, steps_inputs
from tests.runs import GROUPS, difference, run_script
from utils.data.faces import Faces
from utils.data.index import GROUPS_OF_RECORDS, find_images
from utils.data.recordio import write_records
from utils.errors import InputError
from utils.losses import AdaDistill, ArcDistill, ArcFace, CosDistill, CosFace
from utils.process import setup
from utils.storage.files import sha256
from utils.storage.tensors import save
from utils.training.centres import build_distiller
from utils.training.engine import fit
from utils.weights import load_backbone, load_weights

GOLDEN = json.loads((Path(__file__).parents[3] / "golden_adadistill.json").read_text())


def header_in_float64(name: str) -> AdaDistill:
    margin = name.split()[0]
    header = AdaDistill(5, 6, S, 0.45 if margin == "arc" else 0.35, margin, name.endswith("weighted")).double()
    header.kernel.copy_(torch.from_numpy(inputs()[1]))
    return header


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_three_steps_equal_the_formula(name):
    header = header_in_float64(name)
    for student, teacher, label, golden in zip(*steps_inputs(), STEP_LABELS, GOLDEN[name], strict=True):
        student = torch.from_numpy(student).requires_grad_()
        logits = header(student, torch.from_numpy(teacher), torch.tensor(label))
        loss = F.cross_entropy(logits, torch.tensor(label))
        loss.backward()
        wanted = {key: torch.tensor(value, dtype=torch.float64) for key, value in golden.items()}
        found = {"alpha": header.alpha, "logits": logits, "loss": loss, "centres": header.kernel}
        for key, value in found.items():
            assert torch.allclose(value, wanted[key], rtol=0, atol=1e-8), key
        assert torch.allclose(student.grad, wanted["gradient"], rtol=0, atol=2e-6)


def test_the_golden_steps_have_alpha_0_1_and_between():
    student, teacher = (torch.from_numpy(np.concatenate(one)) for one in steps_inputs())
    agreement = F.cosine_similarity(student, teacher)
    assert (agreement < 0).sum() == 3
    assert ((agreement > 0) & (agreement < 1)).sum() == 9
    assert len(set(STEP_LABELS[1])) == 1 < len(set(STEP_LABELS[0])) < 4 == len(set(STEP_LABELS[2]))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("classes", [1, 3, 40])
def test_a_batch_equals_its_samples_one_after_another(weighted, classes):
    torch.manual_seed(classes)
    whole, single = (AdaDistill(8, classes, weighted=weighted).double() for _ in range(2))
    single.kernel.copy_(whole.kernel)
    teacher = torch.randn(32, 8, dtype=torch.float64)
    student, label = teacher + torch.randn(32, 8, dtype=torch.float64), torch.randint(classes, (32,))
    whole(student, teacher, label)
    for i in range(32):
        single(student[i : i + 1], teacher[i : i + 1], label[i : i + 1])
    assert torch.allclose(whole.kernel, single.kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_any_repeats_that_suffice_give_the_same_bits(weighted):
    torch.manual_seed(0)
    teacher, label = torch.randn(32, 8), torch.randint(6, (32,))
    student, most = teacher + torch.randn(32, 8), int(label.bincount().max())
    found = []
    for repeats in (None, most, most + 3):
        torch.manual_seed(1)
        header = AdaDistill(8, 6, weighted=weighted)
        loss = header.loss(student, teacher, label, repeats=repeats)
        found.append((loss, header.alpha, header.kernel))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_centres_change_in_training_only_and_get_no_gradient():
    torch.manual_seed(0)
    header = AdaDistill(8, 5)
    student, teacher, label = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.tensor([0, 1, 1, 4])
    before = header.kernel.clone()
    header.eval()(student, teacher, label)
    assert torch.equal(header.kernel, before)
    header.train()(student, teacher, label).sum().backward()
    moved = (header.kernel != before).any(0)
    assert moved.tolist() == [True, True, False, False, True]
    assert list(header.parameters()) == []
    assert header.state_dict().keys() == {"kernel"}
    assert student.grad.norm() > 0


def test_centres_stay_if_student_teacher_and_centre_are_equal():
    """alpha is 1 if student, teacher and centre are equal; alpha 0 moves the centre to the teacher (Eq. 6)."""
    teacher = F.normalize(torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    header, label = AdaDistill(8, 2).double(), torch.tensor([1])
    header.kernel[:, 1] = 3 * teacher[0]
    header(teacher, teacher, label)
    assert header.alpha.item() == pytest.approx(1)
    assert torch.allclose(header.kernel[:, 1], 3 * teacher[0])
    header(-teacher, teacher, label)
    assert header.alpha.item() == 0
    assert torch.allclose(header.kernel[:, 1], teacher[0])


@pytest.mark.parametrize(("frozen", "plain", "m"), [(ArcDistill, ArcFace, 0.45), (CosDistill, CosFace, 0.35)])
def test_frozen_centres_give_the_plain_margin_loss_and_do_not_change(frozen, plain, m):
    torch.manual_seed(2)
    header, other = frozen(8, 5), plain(8, 5, m=m)
    header.kernel.copy_(other.kernel.detach())
    student, label = torch.randn(6, 8), torch.randint(5, (6,))
    before = header.kernel.clone()
    assert torch.equal(header(student, torch.randn(6, 8), label), other(student, label))
    assert torch.equal(header.kernel, before)
    assert header.alpha.item() == 1


def means_of_targets(cfg: Config) -> torch.Tensor:
    """Returns centres (32, 16) like those of a well-trained teacher: the mean target of each identity."""
    faces = Faces(cfg, target=True)
    target, label = (faces.columns[name].gather(faces.rows, None) for name in ("target", "label"))
    return torch.stack([target[label == k].mean(0) for k in range(faces.num_classes)], 1)


def write_header(path: Path, kernel: torch.Tensor, identities: list[str]) -> None:
    """Writes a header with the identities of its classes, as ours, or without them, as a released one."""
    state = torch.nn.ParameterDict({"kernel": kernel}).state_dict()
    if identities:
        state._metadata[""]["identities"] = identities
    save(path, state)


# The script -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(trained, tmp_path) -> tuple[Config, list[str]]:
    """Copies the trained models except the students into the test's folder."""
    cfg, given = trained
    shutil.copytree(cfg.output, tmp_path / "output", ignore=shutil.ignore_patterns("students", "evaluation"))
    given = [*given, "--output", str(tmp_path / "output")]
    return Config.from_args(given), given


@pytest.mark.parametrize("source", ["adaptor", "teacher"])
def test_extracted_views_equal_a_teacher_on_every_batch(moved, source):
    """Compares the student, its centres and the log after two epochs, up to rounding."""
    given = moved[1] + (["--ada_source", "teacher", "--ethnicity", "Asian"] if source == "teacher" else [])
    cfg = Config.from_args(given).for_adadistill
    run_script("KD_AdaDistill.py", given)
    written = cfg.student_dir("AdaArcDistill")

    teachers = [
        load_backbone(cfg.network, cfg.teacher_dir(name) / "best_backbone.pth", cfg)[0] for name in cfg.teachers
    ]
    teacher = teachers[cfg.teachers.index("Asian")]
    if source == "adaptor":
        adaptor = build_adaptor("SL", cfg)
        load_weights(adaptor, cfg.adaptor_dir("SL") / "best_backbone.pth")
        teacher = MultiTeacher(teachers, adaptor).eval()
    setup(cfg)
    faces = Faces(cfg, flip=True)
    student = build_backbone(cfg.student_network, cfg.embedding_size)
    header = AdaDistill(cfg.embedding_size, faces.num_classes, cfg.s, 0.45)

    def losses(image, label):
        with torch.no_grad():
            target = teacher(image)
        logits = header(student(image), target, label)
        return {"ada": F.cross_entropy(logits, label), "alpha": header.alpha}

    online = Path(cfg.output, "online", "students", "SL-AdaArcDistill")
    fit(losses, faces, online, cfg, student, header, kind=cfg.ada_method, measures=("alpha",))
    for name in ("last_backbone.pth", "last_header.pth"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (written, online))
        assert all(
            torch.allclose(value.float(), other[key].float(), rtol=1e-3, atol=1e-4) for key, value in one.items()
        )
    texts = [(folder / "log.jsonl").read_text() for folder in (written, online)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["measures"] == pytest.approx(other["measures"], rel=1e-3)
        assert one["loss"].keys() == {"ada"}
        assert 0 < one["measures"]["alpha"] < 1


def test_a_stopped_student_resumes_with_its_centres(moved, monkeypatch):
    cfg, given = moved
    whole = [*given, "--output", cfg.output + "2"]
    shutil.copytree(cfg.output, cfg.output + "2")
    run_script("KD_AdaDistill.py", whole)
    plain, calls = AdaDistill.forward, []

    def interrupted(self, *inputs, **options):
        calls.append(1)
        if len(calls) == 11:  # in the second epoch; an epoch has eight steps
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AdaDistill, "forward", interrupted)
        run_script("KD_AdaDistill.py", given, expect=128 + signal.SIGTERM)
    run_script("KD_AdaDistill.py", given)
    folder = cfg.student_dir("AdaArcDistill")
    assert difference(Path(cfg.output + "2") / folder.relative_to(cfg.output), folder) == ""


@pytest.mark.usefixtures("blank_pictures")
def test_each_loss_has_a_run_folder_and_a_row(moved):
    _, given = moved
    short = [*given, "--num_epoch", "1"]
    run_script("KD_AdaDistill.py", [*short, "--ada_weighted", "False"])
    run_script("KD_AdaDistill.py", [*short, "--ada_loss", "CosDistill"])
    run_script(
        "KD_AdaDistill.py", [*short, "--ada_source", "teacher", "--ethnicity", "Indian", "--ada_loss", "AdaCosDistill"]
    )
    run_script("KD_alone.py", [*short, "--ada_source", "teacher", "--ethnicity", "Indian"])
    run_script("eval.evaluation", given)
    lines = (Path(Config.from_args(given).output) / "evaluation" / "accuracy.csv").read_text().splitlines()
    assert [(row["Kind"], row["Model"]) for row in csv.DictReader(lines)][7:] == [
        ("a-KD", "Indian iresnet_tiny"),
        ("AdaCosDistill", "Indian iresnet_tiny"),
        ("AdaArcDistill-alpha", "SL iresnet_tiny"),
        ("CosDistill", "SL iresnet_tiny"),
        ("teacher", "quarter2"),
    ]
    run_script("KD_AdaDistill.py", [*short, "--ada_loss", "CosDistill", "--ada_m", "0.3"], expect=2)


@pytest.mark.parametrize("loss", ADA_LOSSES)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_settings_choose_the_header(moved, loss, weighted):
    cfg = replace(moved[0], ada_loss=loss, ada_weighted=weighted).for_adadistill
    faces = Faces(cfg, target=True)
    header, sources = build_distiller(cfg, faces)
    assert header.s == 16
    assert header.margin == ("arc" if "Arc" in loss else "cos")
    assert header.m == (0.45 if "Arc" in loss else 0.35)
    assert build_distiller(replace(cfg, ada_m=0.1), faces)[0].m == 0.1
    assert header.kernel.shape == (32, 16)
    centres = cfg.adaptor_dir("SL") / "best_header.pth"
    if loss.startswith("Ada"):
        assert (type(header), header.weighted, sources) == (AdaDistill, weighted, {})
        assert header.kernel.std().item() == pytest.approx(0.01, rel=0.15)
    else:
        assert type(header).__name__ == loss
        assert sources == {"centres": sha256(centres)}
        assert torch.equal(header.kernel, torch.load(centres, weights_only=True)["kernel"])


def test_a_run_is_not_resumed_with_other_settings_or_another_source(moved, capsys):
    cfg, given = moved
    short = [*given, "--num_epoch", "1"]
    for options in (["--ada_weighted", "False"], ["--ada_loss", "ArcDistill"]):
        run_script("KD_AdaDistill.py", [*short, *options])
        run_script(
            "KD_AdaDistill.py", [*short, *options, "--std", "0.1", "--loss_lambda", "1"]
        )  # settings of other methods
        run_script("KD_AdaDistill.py", [*short, *options, "--ada_m", "0.3"], expect=2)
        assert "ada_m was 0.45, now 0.3" in capsys.readouterr().err
    path = cfg.adaptor_dir("SL") / "best_header.pth"
    state = torch.load(path, weights_only=True)
    state["kernel"] += 1
    save(path, state)
    run_script("KD_AdaDistill.py", [*short, "--ada_loss", "ArcDistill"], expect=2)
    assert "centres changed" in capsys.readouterr().err


def test_a_released_student_is_not_trained(moved, capsys):
    """The inputs of its training are not needed."""
    cfg, given = moved
    for script, method in (("KD_alone.py", "a-KD"), ("KD_CEL.py", "EAF-KD"), ("KD_AdaDistill.py", "CosDistill")):
        folder = cfg.student_dir(method)
        folder.mkdir(parents=True)
        shutil.copy(cfg.teacher_dir("Asian") / "best_backbone.pth", folder / "MFN_backbone.pth")
        run_script(script, [*given, "--ada_loss", "CosDistill", "--pairs", "nowhere", "--data", "nowhere"])
        assert "MFN_backbone.pth and no checkpoint of a run: used as it is" in capsys.readouterr().out


def test_an_old_checkpoint_without_measures_is_resumed(moved):
    cfg, given = moved
    path = cfg.adaptor_dir("SL") / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    del state["measures"]
    save(path, state)
    run_script("fc_EArc.py", [*given, "--flip_targets"])


@pytest.mark.usefixtures("blank_pictures")
def test_one_teacher_of_all_groups(moved, capsys):
    cfg, given = moved
    alone = [*given, "--is_standalone", "--num_epoch", "1"]
    run_script("train.py", alone)
    assert "Teacher All: 64 images of 16 identities." in capsys.readouterr().out
    run_script("extract_all.py", alone)
    command = capsys.readouterr().out.splitlines()[-1].split("Next: python ")[1]
    assert command.startswith("KD_AdaDistill.py")
    run_script("KD_AdaDistill.py", shlex.split(command)[1:])
    run_script("eval.evaluation", given)
    lines = (Path(cfg.output) / "evaluation" / "accuracy.csv").read_text().splitlines()
    assert [(row["Setting"], row["Kind"], row["Model"]) for row in csv.DictReader(lines)][-2:] == [
        ("standalone", "teacher", "All"),
        ("standalone", "AdaArcDistill", "All iresnet_tiny"),
    ]
    for script in ("fc_EArc.py", "dual_layer_EAF-Fusion.py", "KD_alone.py"):
        capsys.readouterr()
        run_script(script, alone, expect=2)
        assert "teacher" in capsys.readouterr().err


def test_wrong_headers_are_refused_before_the_first_step(moved, capsys):
    cfg, given = moved
    frozen = [*given, "--ada_loss", "ArcDistill"]
    asian = ["--ada_source", "teacher", "--ethnicity", "Asian"]
    path = cfg.adaptor_dir("SL") / "best_header.pth"
    state = torch.load(path, weights_only=True)
    names = state._metadata[""]["identities"]
    assert names == [*Faces(cfg).identities]

    def refused(script, arguments, sentence):
        run_script(script, arguments, expect=2)
        assert sentence in capsys.readouterr().err

    def with_header(kernel, identities):
        write_header(path, kernel, identities)

    refused("KD_AdaDistill.py", [*frozen, *asian], "holds 4 classes of 32 dimensions; data holds 16 identities")
    with_header(state["kernel"].flip(1), names[::-1])
    refused("KD_AdaDistill.py", frozen, f"has {names[-1]} as class 0, data {names[0]}: set data to what the source was")
    learned = means_of_targets(cfg)
    with_header(learned.flip(1), [])  # a released header does not name its identities
    refused("KD_AdaDistill.py", frozen, "are closer to another class, first ")
    with_header(torch.cat([learned[:, :12], learned[:, 12:].roll(1, 1)], 1), [])  # most centres are at their identity
    refused("KD_AdaDistill.py", frozen, "does not say which identities its classes are, and of data")
    with_header(learned, [])
    run_script("KD_AdaDistill.py", [*frozen, "--num_epoch", "1"])
    save(path, {"weight": torch.zeros(3)})
    refused(
        "KD_AdaDistill.py", [*frozen, "--ada_loss", "CosDistill"], "best_header.pth is no header: expected its centres"
    )
    path.unlink()
    refused("KD_AdaDistill.py", [*frozen, "--ada_loss", "CosDistill"], f"There is no file {path}")
    flipped = cfg.adaptor_embeddings("SL", flipped=True)
    for suffix in (".npy", ".json"):
        shutil.copy(cfg.adaptor_embeddings("SL").with_suffix(suffix), flipped.with_suffix(suffix))
    refused("KD_AdaDistill.py", given, "embeddings_flipped.npy is of the images as they are. Run again: python fc_EArc")

    refused(
        "KD_AdaDistill.py",
        [*given, "--embedding_size", "16"],
        "is of shape (64, 32), expected (64, 16): set embedding_size",
    )
    cfg.adaptor_embeddings("SL", flipped=True).unlink()
    refused("KD_AdaDistill.py", given, "embeddings_flipped.npy. Run first: python fc_EArc.py --data")
    cfg.teacher_embeddings("Asian", flipped=True).unlink()
    refused("KD_AdaDistill.py", [*given, *asian], "Asian_flipped.npy. Run first: python extract_all.py --data")
    assert "--flip_targets True" in " ".join(Config.from_args(given).for_adadistill.changed)
    assert not cfg.student_dir("AdaArcDistill").exists()


# Data without groups --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folders", "records"])
def groupless(request, trained, tmp_path) -> list[str]:
    """Returns a command line for the same faces without groups, as folders or records, with two verification sets."""
    cfg, given = trained
    data = tmp_path / "data"
    identities = sorted(path for group in GROUPS for path in Path(cfg.data, group).iterdir())
    if request.param == "folders":
        for path in identities:
            shutil.copytree(path, data / path.name)
    else:
        data.mkdir()
        images = [(file.read_bytes(), k, -1) for k, path in enumerate(identities) for file in sorted(path.iterdir())]
        write_records(data, images, len(identities))
    for name, group in (("lfw", "Asian"), ("cfp_fp", "Indian")):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        shutil.copy(cfg.pairs_file(group), tmp_path / "pairs" / f"{name}.bin")
    paths = {"data": data, "pairs": tmp_path / "pairs", "output": tmp_path / "output", "cache": tmp_path / "cache"}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    return [*given, *options, "--ethnicities", "", "--pairs_sets", "lfw,cfp_fp"]


@pytest.mark.usefixtures("blank_pictures")
def test_one_teacher_and_its_students_on_data_without_groups(groupless, tmp_path, capsys):
    """Also tests files of the teacher that are named as released ones, in another output folder."""
    run_script("train.py", [*groupless, "--loss", "ArcFace"])
    cfg = Config.from_args(groupless)
    assert cfg.teacher_dir("All") == tmp_path / "output" / "standalone" / "iresnet_tiny" / "teachers" / "All"
    assert "Teacher All: 64 images of 16 identities." in capsys.readouterr().out
    run_script("extract_all.py", [*groupless, "--flip_targets"])
    assert "Next: python KD_AdaDistill.py" in capsys.readouterr().out
    distil = [*groupless, "--ada_source", "teacher"]
    cfg = Config.from_args(distil)
    learned = means_of_targets(cfg)  # two epochs are too few to train the header
    write_header(cfg.teacher_dir("All") / "best_header.pth", learned, [*Faces(cfg).identities])
    run_script("KD_AdaDistill.py", distil)
    run_script("KD_AdaDistill.py", [*distil, "--ada_loss", "ArcDistill"])
    run_script("KD_alone.py", [*distil, "--flip_targets"])
    run_script("eval.evaluation", groupless)
    (header,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Setting")][:1]
    assert [cell.strip() for cell in header.split("|")[5:-1]] == ["lfw", "cfp_fp", "Average"]
    lines = (tmp_path / "output" / "evaluation" / "lfw+cfp_fp" / "accuracy.csv").read_text().splitlines()
    assert [(row["Setting"], row["Kind"], row["Model"]) for row in csv.DictReader(lines)] == [
        ("standalone", "teacher", "All"),
        ("standalone", "a-KD", "All iresnet_tiny"),
        ("standalone", "AdaArcDistill", "All iresnet_tiny"),
        ("standalone", "ArcDistill", "All iresnet_tiny"),
    ]

    released = Config.from_args([*distil, "--output", str(tmp_path / "released")])
    released.teacher_dir("All").mkdir(parents=True)
    shutil.copy(cfg.teacher_dir("All") / "best_backbone.pth", released.teacher_dir("All") / "295672backbone.pth")
    torch.save({"kernel": learned}, released.teacher_dir("All") / "295672header.pth")
    distil += ["--output", released.output]
    run_script("train.py", distil)
    run_script("extract_all.py", [*distil, "--flip_targets"])
    run_script("KD_AdaDistill.py", [*distil, "--ada_loss", "ArcDistill"])
    folders = [one.for_adadistill.student_dir("ArcDistill") for one in (cfg, released)]
    one, other = (torch.load(folder / "last_backbone.pth", weights_only=True) for folder in folders)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_records_and_folders_give_the_same_labels_and_images(trained, tmp_path):
    cfg, _ = trained
    index = Faces(cfg).store.index
    contents = [
        (Path(cfg.data, path).read_bytes(), int(k)) for path, k in zip(index.paths, index.identity, strict=True)
    ]
    of_group = [GROUPS_OF_RECORDS.index(name.split("/")[0]) for name in index.identities]
    write_records(tmp_path, [(content, k, of_group[k]) for content, k in contents], len(index.identities))
    records = replace(cfg, data=str(tmp_path), cache=str(tmp_path / "cache"))
    for teacher in ("", "Indian"):
        one, other = (Faces(settings, teacher=teacher) for settings in (cfg, records))
        for column in ("image", "label"):
            rows = [faces.columns[column].arrays[0][faces.rows] for faces in (one, other)]
            assert np.array_equal(*rows)
    assert Faces(records).identities[0] == "African/00000000"
    two = replace(records, ethnicities=("Asian", "Indian"))
    assert len(Faces(two)) == 32
    with pytest.raises(InputError, match=r"the groups Caucasian, Indian, Asian, African, not A: set"):
        Faces(replace(records, ethnicities=("A",)))
    write_records(tmp_path, [(content, k, -1) for content, k in contents], len(index.identities))
    with pytest.raises(InputError, match=r"train.rec says no group of its images: set ethnicities to"):
        Faces(records)
    with pytest.raises(InputError, match=r"train.rec holds no image of Asian: set data or ethnicities"):
        write_records(tmp_path, [(content, k, 1) for content, k in contents], len(index.identities))
        Faces(replace(records, ethnicities=("Asian", "Indian")))
    assert Faces(replace(records, ethnicities=())).num_classes == 16
    write_records(tmp_path, [(contents[0][0], 0, group) for group in (0, 1)], 1)
    with pytest.raises(InputError, match=r"train.rec has identity 00000000 in two groups"):
        Faces(replace(records, ethnicities=("Caucasian", "Indian")))


def test_a_saved_index_of_records_is_used_until_they_change(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.index.SETTLED", 0.0)
    cfg, _ = trained
    path = next(Path(cfg.data).rglob("*.jpg"))
    settings = replace(cfg, data=str(tmp_path), cache=str(tmp_path / "cache"), ethnicities=())
    write_records(tmp_path, [(path.read_bytes(), 0, -1)], 1)
    first = find_images(settings)
    with monkeypatch.context() as patch:
        patch.setattr("utils.data.index.scan", None)
        assert find_images(settings).digest == first.digest
    other = cv2.imencode(".jpg", np.zeros((112, 112, 3), np.uint8))[1].tobytes().ljust(len(path.read_bytes()), b"x")
    write_records(tmp_path, [(other, 0, -1)], 1)  # with the same size, name and folder
    again = find_images(settings)
    assert again.stamps.tolist() == first.stamps.tolist()
    assert again.digest != first.digest
    (tmp_path / "train.rec").unlink()
    shutil.copytree(path.parent, tmp_path / "x")
    assert not find_images(settings).in_records
