"""The file to edit: every setting with its published default, and the paths and schedules derived from them."""

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import arguments
from config.errors import InputError
from config.paths import expanded
from config.published import MILESTONES, STD_FC, Schedule, scaled_milestones
from config.readers import ADA, CHANGES_NO_NUMBER, SCRIPTS, reads, script_that_trains
from config.registry import ADA_LOSSES, ADAPTORS, CHOICES, LOSSES, METHODS, named


@dataclass(frozen=True)
class Config:
    # Data
    data: str = "data/BUPT-BalancedFace"  # <data>/<ethnicity>/<identity>/<image>.jpg, 112 x 112, or train.rec; or a,b
    data_share: tuple[float, ...] = ()  # share of each data set that is used, at random, of every group alike; "": all
    share_of: str = "identities"  # data_share counts identities | images
    data_flip: tuple[str, ...] = ()  # on | off for each data set: images are flipped at random in training; "": on
    same_names_are_one: bool = False  # identities of one name and group in several data sets are one person
    pairs: str = "data/RFW"  # verification pairs: <pairs>/<ethnicity>_test.bin
    output: str = "output"  # run folders: checkpoints, embeddings, logs, tables
    cache: str = "cache"  # decoded images, 37.6 kB each: put it on a fast local disk
    ethnicities: tuple[str, ...] = ("African", "Asian", "Caucasian", "Indian")  # the groups; "": <data>/<identity>/...
    nested_images: bool = False  # read images in subfolders of an identity too: video, session, camera
    leave_out: str | None = None  # a file that names identities and images to train without, one a line: utils.prepare
    skip_bad_images: bool = False  # train without unreadable or wrongly sized images, if they are under 0.1 %

    # Selection
    ethnicity: str = "All"  # one group (one quarter of a baseline: quarter1, quarter2, ...), or All in turn
    is_teacher_baseline: bool = False  # teachers of one quarter of each group, instead of one group each
    is_standalone: bool = False  # one teacher of all groups together, as for data without groups
    is_dual_layer: bool = False  # students learn from the dual-layer adaptor, instead of the single-layer one
    has_dropout: bool = False  # the dual-layer adaptor has dropout before its activation (DLDPO)

    # Networks
    network: str = "iresnet34"  # of teachers: one of NETWORKS (config/registry.py)
    student_network: str = "iresnet34"  # of students: one of NETWORKS, independent of the teachers
    embedding_size: int = 512  # dimensions of every embedding
    middle_layer_size: int = 512  # dimensions between the two layers of the dual-layer adaptor

    # Fine-tuning
    init_from: str | None = None  # file of weights that the networks of teachers and students start from; None: random
    init_header: str | None = None  # means: class centres start at the mean embeddings of `init_from`; None: random
    freeze: str = ""  # with init_from: features (only the embedding's layers are trained) | bn (batch normalisation)

    # Losses
    loss: str = "ElasticArcFace"  # of teachers: one of LOSSES (config/registry.py)
    s: float = 64.0  # scale of the logits
    m: float | None = None  # margin of teachers, adaptors and EAF-KD; None: as published, Arc 0.5, Cos 0.35
    std: float | None = None  # standard deviation of an elastic margin; None: as published for the loss
    std_fc: float | None = None  # that of the adaptors' elastic margin; None: 0.0125, as in the published code
    loss_lambda: float = 10000.0  # weight of the distillation loss of the students
    flip_targets: bool = False  # a student that sees a flipped image learns the target of the flipped image

    # AdaDistill
    ada_source: str = "adaptor"  # students learn from the adaptor; or from one teacher, the one that `ethnicity` names
    ada_student_network: str = "mobilefacenet"  # of KD_AdaDistill.py's students: one of NETWORKS
    ada_loss: str = "AdaArcDistill"  # one of ADA_LOSSES; ArcDistill, CosDistill: the source's centres, frozen
    ada_weighted: bool = True  # alpha is weighted by how close the centre is to the teacher (Eq. 8; False: Eq. 7)
    ada_m: float | None = None  # margin of AdaDistill; None: as published, 0.45, or 0.35 for the losses with Cos

    # Optimisation
    num_epoch: int | None = None  # epochs; None: as published, teachers 52, students and standalone networks 26
    milestones: tuple[int, ...] | None = None  # epochs of learning rate drops; None: as published, scaled to num_epoch
    lr: float = 0.1  # learning rate of teachers and students for 512 images a step
    warmup_epochs: int = 0  # the learning rate of teachers and students rises linearly, step by step, in so many epochs
    num_epoch_fc: int = 26  # epochs of the adaptors
    milestones_fc: tuple[int, ...] | None = None  # epochs at which it drops; None: as published, scaled to num_epoch_fc
    lr_fc: float = 1.0  # learning rate of the adaptors for 512 rows a step
    batch_size: int = 128  # images (or rows) a batch, of each process
    accumulate: int = 1  # batches of a step, their gradients averaged: as one larger batch, in the memory of one
    global_batch: bool = False  # batch_size is that of all processes together (see docs/scale.md)
    sync_bn: bool = False  # synchronise batch normalisation across processes; False: each its own, as published
    momentum: float = 0.9  # of stochastic gradient descent
    weight_decay: float = 5e-4  # on every parameter
    max_grad_norm: float = 5.0  # gradients of the network, not of the header, are clipped to this norm
    seed: int = 0  # decides initial weights, order, flips, margins, dropout and the quarters of the baseline

    # Running
    device: str | None = None  # cpu | cuda; None: a GPU where there is one
    precision: str = "tf32"  # of networks in training: fp32 | tf32 | bf16; tf32 as published, on a CPU it is fp32
    infer_precision: str = "tf32"  # of networks where nothing is trained: extraction, verification, IJB
    header_sharding: bool = False  # spread the classes of the header over the processes: for millions of them
    compile: bool = False  # compile the networks: minutes at the start, faster steps after
    capture: bool = True  # on one GPU, a training step is one CUDA graph: no kernel waits for Python to launch it
    cudnn_benchmark: bool = False  # cuDNN times its convolutions first: faster, but a run repeats up to rounding only
    device_cache_gb: float | None = None  # data kept on the device; None: half of what a GPU has free after a step
    num_threads: int | None = None  # CPU threads; None: one for each core
    num_workers: int = 2  # threads that read batches ahead of the step; with 0 each batch is read when it is needed
    infer_batch_size: int = 256  # batch size of inference
    weights: str = "best"  # which checkpoint of a run the next stage and the evaluation read: best | last
    checkpoint_minutes: float = 10.0  # time between checkpoints inside an epoch
    tensorboard: bool = False  # write TensorBoard events into the run folders too; needs the package tensorboard

    # Evaluation
    evaluation_groups: tuple[str, ...] | None = None  # groups verified on, in training too; None: `ethnicities`
    pairs_sets: tuple[str, ...] | None = None  # sets to verify on, in training too: lfw,cfp_fp; None: of each group
    checkpoint: str | None = None  # evaluate this file of weights only: a `network`, or an adaptor on top of `teacher`
    teacher: tuple[str, ...] = ()  # files of teachers: those below an adaptor's `checkpoint`, in its order
    onnx_channels: str | None = None  # channels that an .onnx file takes, RGB or BGR; None: as in its metadata, or RGB
    onnx_mean: tuple[float, ...] | None = None  # of its input, 0 to 255; None: as in its metadata, or 127.5
    onnx_std: tuple[float, ...] | None = None  # likewise: it gets (value - mean) / std; None: metadata, or 127.5
    scores: str | None = None  # evaluate this file of somebody's scores instead of models: see docs/other_models.md
    score_forms: tuple[str, ...] = ()  # write the scores of each pair in these forms too: favfa, fairlearn, bob
    row: str | None = None  # compare `checkpoint` with this printed row: "EAF-KD SL iresnet34 specialized"
    published_adaptor_input: bool = False  # adaptors are fed raw teacher features, as by the published evaluator
    reference_group: str | None = None  # rates are compared with this group's; None: the one with the best accuracy
    threshold: float | None = None  # a threshold on the squared distance, to report error rates at it too
    corrections: bool = False  # compare with corrections of scores after training; keeps 20 MB for 10,000 images
    report: bool = False  # write report.html too, with all tables and pictures

    # ------------------------------------------------------------------------------------------------------------------

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (kind, _, is_optional) = getattr(self, field.name), arguments.kind_of(field)
            if kind is float and type(value) is int:
                value = float(value)
            if isinstance(value, list):
                value = tuple(value)
            if field.name == "data" and isinstance(value, tuple):
                value = ",".join(value)
            if field.name in PATHS:
                value = expanded(value)
            object.__setattr__(self, field.name, value)
            if not (type(value) is kind or (value is None and is_optional)):
                raise InputError(f"{field.name} = {value!r} must be of type {kind.__name__}{' or None' * is_optional}.")
        for name, allowed in CHOICES.items():
            self._check(name, lambda value, allowed=allowed: value in allowed, "one of " + ", ".join(allowed))
        self._check("batch_size", lambda n: n >= 2, "at least 2: one image has no statistics to normalise by")
        self._check("warmup_epochs", lambda n: n >= 0, "0 or more")
        sizes = ("embedding_size", "middle_layer_size", "infer_batch_size")
        for name in (*sizes, "accumulate", "num_epoch", "num_epoch_fc"):
            self._check(name, lambda n: n >= 1, "at least 1")
        self._check_data_sets()
        for name in ("s", "lr", "lr_fc", "max_grad_norm"):
            self._check(name, lambda x: 0 < x < math.inf, "a number above 0")
        margins = ("m", "std", "std_fc", "ada_m")
        for name in (*margins, "loss_lambda", "weight_decay", "momentum", "checkpoint_minutes", "device_cache_gb"):
            self._check(name, lambda x: 0 <= x < math.inf, "0 or more")
        self._check("momentum", lambda x: x < 1, "below 1")
        self._check("threshold", lambda x: 0 < x < math.inf, "a number above 0")
        self._check("seed", lambda n: 0 <= n < 2**63, "0 or more, and below 2**63")
        self._check("num_threads", lambda n: 1 <= n <= 1024, "between 1 and 1024")
        self._check("num_workers", lambda n: 0 <= n <= 1024, "between 0 and 1024")
        for name in ("milestones", "milestones_fc"):
            self._check(name, _are_milestones, "increasing epoch numbers above 1")
        self._check("freeze", lambda which: which in ("", "features", "bn"), 'features, bn or ""')
        self._check("freeze", lambda which: self.init_from or not which, "empty where there is no init_from")
        self._check("init_header", lambda _: self.init_from, "None where there is no init_from")
        for name in PATHS:
            self._check(name, lambda path: path != "", "a path")
        self._check("pairs_sets", _are_names, "names of <name>.bin files in pairs, separated by commas")
        self._check("evaluation_groups", _are_names, "names of groups, separated by commas")
        self._check("evaluation_groups", lambda names: len(set(names)) == len(names), "different names")
        self._check("evaluation_groups", lambda _: self.pairs_sets is None, "None where pairs_sets names the sets")
        for name in ("onnx_mean", "onnx_std"):
            self._check(name, lambda numbers: len(numbers) in (1, 3), "one number, or one for each channel")
        self._check("score_forms", lambda forms: set(forms) <= {*SCORE_FORMS}, f"of {', '.join(SCORE_FORMS)}")
        self._check("scores", lambda _: not self.checkpoint, "left out where a checkpoint is given")
        names = self.ethnicities
        self._require("ethnicities", not names or _are_names(names), "names of folders, separated by commas")
        self._require("ethnicities", len(set(names)) == len(names), "different names")
        if self.is_teacher_baseline:
            self._require("is_standalone", not self.is_standalone, "False together with is_teacher_baseline")
            self._require("ethnicities", names, "names of groups, which the baseline's teachers divide")
        meant = {"All", "average", "teachers", "adaptors", "students", *ADAPTORS, *self.quarters}
        reserved = sorted(name for name in names if name in meant or name.endswith("_flipped"))
        self._require("ethnicities", not reserved, f"without {', '.join(reserved)}, which means something else")
        known = ("All", *names, *self.quarters)
        self._require("ethnicity", self.ethnicity in known, "one of " + ", ".join(known))

    def _check_data_sets(self) -> None:
        count = len(self.data_paths)
        differ = all(self.data_paths) and (count == 1 or len({*map(os.path.realpath, self.data_paths)}) == count)
        self._require("data", self.data == "" or differ, "different paths")
        one_each = f"as many values as data has paths, {count}"
        self._check("data_share", lambda shares: len(shares) in (0, count), one_each)
        self._check("data_share", lambda shares: all(0 < share <= 1 for share in shares), "above 0, and at most 1")
        self._check("data_flip", lambda flips: len(flips) in (0, count), one_each)
        self._check("data_flip", lambda flips: set(flips) <= {"on", "off"}, "on or off for each data set")

    def _check(self, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
        """Raises InputError if the value of a setting is not None and does not satisfy `holds`."""
        value = getattr(self, name)
        self._require(name, value is None or holds(value), wanted)

    def _require(self, name: str, holds: object, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name} = {getattr(self, name)!r} must be {wanted}.")

    @classmethod
    def from_args(cls, argv: list[str] | None = None) -> "Config":
        """Returns the defaults above, changed by `--name value`; lists are `--name a,b`, switches `--name`.

        Raises InputError for an unknown name or an impossible value.
        """
        return arguments.parse(cls, argv)

    @property
    def data_paths(self) -> tuple[str, ...]:
        """Paths of the data sets: `data` divided at its commas, or all of it if there is a folder of this name."""
        if "," not in self.data or Path(self.data).exists():
            return (self.data,)
        return tuple(expanded(path.strip()) for path in self.data.split(","))

    # Names ------------------------------------------------------------------------------------------------------------

    @property
    def setting(self) -> str:
        if self.is_standalone or not self.ethnicities:
            return "standalone"
        return "baseline" if self.is_teacher_baseline else "specialized"

    @property
    def quarters(self) -> tuple[str, ...]:
        """Names of the baseline's teachers: as many as groups, each trained on one part of every group."""
        return tuple(f"quarter{i + 1}" for i in range(len(self.ethnicities)))

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of all teachers of the setting, in the order in which their embeddings are concatenated.

        The published code concatenates Asian, African, Caucasian, Indian; other names follow in the order given.
        """
        if self.setting == "standalone":
            return ("All",)
        if self.is_teacher_baseline:
            return self.quarters
        return _first(PUBLISHED_ORDER, self.ethnicities)

    def group_of(self, teacher: str) -> str:
        """The group whose accuracy selects the best epoch of a teacher; "" if the average over the groups does.

        A specialised teacher is selected on its own group (paper 4.2). The baseline's teachers, quarter1 first, are
        selected on African, Asian, Caucasian, Indian (paper 4.5 and Table 1); other groups follow in the order given.
        A group that is not among those verified on (`evaluation_groups`) cannot select an epoch.
        """
        if not self.of_groups or self.setting == "standalone":
            return ""
        group = teacher
        if self.is_teacher_baseline:
            group = _first(ASSIGNED_ORDER, self.ethnicities)[self.quarters.index(teacher)]
        return group if group in self.verified_groups else ""

    @property
    def selected_ethnicities(self) -> tuple[str, ...]:
        """The groups that `ethnicity` selects."""
        self._require("ethnicities", self.ethnicities, "names of groups")
        return self._selected(self.ethnicities, "a group")

    @property
    def selected_teachers(self) -> tuple[str, ...]:
        """The teachers that `ethnicity` selects."""
        return self._selected(self.teachers, f"a {self.setting} teacher")

    def _selected(self, names: tuple[str, ...], what: str) -> tuple[str, ...]:
        if self.ethnicity == "All":
            return names
        self._require("ethnicity", self.ethnicity in names, f"{what}: {', '.join(dict.fromkeys(('All', *names)))}")
        return (self.ethnicity,)

    @property
    def adaptor(self) -> str:
        """The adaptor that the students learn from: SL, DuL or DLDPO. Raises InputError in the standalone setting."""
        self._require("ada_source", self.setting != "standalone", "teacher where there is one teacher, and no adaptor")
        if not self.is_dual_layer:
            self._require(
                "has_dropout", not self.has_dropout, "False for the single-layer adaptor, or set is_dual_layer"
            )
            return "SL"
        return "DLDPO" if self.has_dropout else "DuL"

    @property
    def source(self) -> str:
        """The name of the adaptor that the students learn from, or of the teacher if `ada_source` is teacher."""
        if self.ada_source == "adaptor":
            return self.adaptor
        names = self.selected_teachers
        self._require("ethnicity", len(names) == 1, f"one of {', '.join(names)}: the teacher to learn from")
        return names[0]

    @property
    def ada_method(self) -> str:
        """The one of METHODS that `ada_loss` and `ada_weighted` name."""
        return self.ada_loss if self.ada_weighted or not self.ada_loss.startswith("Ada") else f"{self.ada_loss}-alpha"

    @property
    def for_adadistill(self) -> "Config":
        """A copy in which the student and its source see the same view of an image (`flip_targets`)."""
        return dataclasses.replace(self, flip_targets=True)

    @property
    def target_views(self) -> tuple[bool, ...]:
        """Whether each embedded view of an image is flipped: (False,), with `flip_targets` (False, True)."""
        return (False, True) if self.flip_targets else (False,)

    # Paths ------------------------------------------------------------------------------------------------------------

    @property
    def cache_dir(self) -> Path:
        """Folder of the index and the decoded images, its name made from the path of the data and the groups."""
        data = Path(self.data).resolve()
        source = "\n".join([str(data), *sorted(self.ethnicities), *["/nested images"] * self.nested_images])
        return Path(self.cache) / f"{data.name}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"

    @property
    def split_dir(self) -> Path:
        """Folder of the lists that divide each group's identities into the baseline's quarters."""
        return Path(self.output) / "baseline" / "split"

    @property
    def network_dir(self) -> Path:
        return Path(self.output) / self.setting / self.network

    def teacher_dir(self, teacher: str) -> Path:
        return self.network_dir / "teachers" / teacher

    def teacher_embeddings(self, teacher: str, flipped: bool = False) -> Path:
        """File of the unit-length embeddings (N, D) of all images by one teacher."""
        return self.network_dir / "embeddings" / _view(teacher, flipped)

    def adaptor_dir(self, adaptor: str) -> Path:
        return self.network_dir / "adaptors" / adaptor

    def adaptor_embeddings(self, adaptor: str, flipped: bool = False) -> Path:
        """File of the unit-length multi-teacher embeddings (N, D) of all images, the students' targets."""
        return self.adaptor_dir(adaptor) / _view("embeddings", flipped)

    @property
    def source_dir(self) -> Path:
        """The run folder of the adaptor or teacher that the students learn from."""
        return self.adaptor_dir(self.source) if self.ada_source == "adaptor" else self.teacher_dir(self.source)

    def source_embeddings(self, flipped: bool = False) -> Path:
        """File of the students' targets (N, D)."""
        path = self.adaptor_embeddings if self.ada_source == "adaptor" else self.teacher_embeddings
        return path(self.source, flipped)

    def student_dir(self, method: str) -> Path:
        """The run folder of the student that `method` trains, one of METHODS; raises InputError for another."""
        script = named("method", METHODS, method)
        network = self.ada_student_network if script == ADA else self.student_network
        return self.network_dir / "students" / network / f"{self.source}-{method}"

    @property
    def evaluation_dir(self) -> Path:
        """Folder of the results: <output>/evaluation for the best weights on the groups, else a subfolder of it."""
        parts = ["last"] if self.weights == "last" and not self.checkpoint else []
        if self.scores:
            digest = hashlib.sha256(os.fsencode(Path(self.scores).resolve())).hexdigest()[:8]
            return Path(self.output, "evaluation", f"{Path(self.scores).stem}-{digest}")
        parts += ["published adaptor input"] if self.published_adaptor_input else []
        if sets := self.pairs_sets or (() if self.verified_groups == self.ethnicities else self.verified_groups):
            parts.append(_joined(sets))
        if self.checkpoint:
            paths = "\n".join(str(Path(path).resolve()) for path in (self.checkpoint, *self.teacher))
            parts += [f"{Path(self.checkpoint).stem}-{hashlib.sha256(os.fsencode(paths)).hexdigest()[:8]}"]
        return Path(self.output, "evaluation", *parts)

    @property
    def verified_groups(self) -> tuple[str, ...]:
        """The groups that models are verified on: `evaluation_groups`, else `ethnicities`."""
        return self.ethnicities if self.evaluation_groups is None else self.evaluation_groups

    @property
    def of_groups(self) -> bool:
        """Whether there is one verification set per group, so that fairness can be measured."""
        return bool(self.verified_groups) and not self.pairs_sets

    @property
    def pairs_files(self) -> dict[str, Path]:
        """Files of the verification sets by name: `pairs_sets`, else one per group, else the usual five sets."""
        if self.of_groups:
            return {name: self.pairs_file(name) for name in self.verified_groups}
        return {name: Path(self.pairs) / f"{name}.bin" for name in self.pairs_sets or PAIRS_SETS}

    def pairs_file(self, ethnicity: str) -> Path:
        return Path(self.pairs) / f"{ethnicity}_test.bin"

    # Schedules --------------------------------------------------------------------------------------------------------

    def schedule(self, kind: str) -> Schedule:
        """Epochs and learning rates of training `kind`: "teacher", one of ADAPTORS, or one of METHODS."""
        if kind in ADAPTORS:
            epochs, milestones, lr = self.num_epoch_fc, self.milestones_fc, self.lr_fc
        else:
            published = 52 if kind == "teacher" and self.setting != "standalone" else 26
            epochs, milestones, lr = self.num_epoch or published, self.milestones, self.lr
        milestones = scaled_milestones(epochs) if milestones is None else milestones
        return Schedule(epochs, lr, milestones, 0 if kind in ADAPTORS else self.warmup_epochs)

    def margin(self, kind: str, name: str = "") -> tuple[float, float]:
        """Mean and standard deviation of the margin in training `kind`; published values where the setting is None.

        `name` is the loss, by default that of our scripts.
        """
        if script_that_trains(kind) == ADA:
            return ADA_LOSSES[self.ada_loss].m if self.ada_m is None else self.ada_m, 0.0
        loss = LOSSES[name or (self.loss if kind == "teacher" else "ElasticArcFace")]
        m = loss.m if self.m is None else self.m
        if loss.std == 0:
            return m, 0.0  # the margin of this loss does not vary, whatever `std` is for others
        std, given_std = (STD_FC, self.std_fc) if kind in ADAPTORS else (loss.std, self.std)
        return m, std if given_std is None else given_std

    def in_use(self, kind: str) -> dict[str, Any]:
        """Epochs, milestones and margins in use in training `kind`, by setting, with None replaced by its value."""
        schedule, (m, std) = self.schedule(kind), self.margin(kind)
        values: dict[str, Any] = {"num_epoch": schedule.epochs, "num_epoch_fc": schedule.epochs}
        values |= dict.fromkeys(("milestones", "milestones_fc"), schedule.milestones)
        values |= {"m": m, "ada_m": m, "std": std, "std_fc": std}
        script = script_that_trains(kind)
        if script not in SCRIPTS:  # it may have any header, or none
            values = {name: value for name, value in values.items() if name in ("num_epoch", "milestones")}
        return {name: value for name, value in values.items() if reads(script, name)}

    def described(self, kind: str) -> str:
        """One line with the values of `in_use`; marks those that are published because the setting is None."""
        parts, has_std = [], kind != "teacher" or LOSSES[self.loss].std > 0
        for name, value in self.in_use(kind).items():
            if name == "std" and not has_std:
                parts += [] if self.std is None else [f"std {self.std} is not used, since {self.loss} has none"]
                continue
            origin = ""
            if getattr(self, name) is None:
                is_scaled = name.startswith("milestones") and self.schedule(kind).epochs not in MILESTONES
                origin = " (scaled from the published ones)" if is_scaled else " (published)"
            parts.append(f"{name} {arguments.as_text(value) or 'none'}{origin}")
        return f"In use for {kind}: {', '.join(parts)}."

    # Commands ---------------------------------------------------------------------------------------------------------

    @property
    def changed(self) -> list[str]:
        """Command-line arguments for the settings that differ from the defaults."""
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return [text for f in fields for text in (f"--{f.name}", arguments.as_text(getattr(self, f.name)))]

    def decisive(self, kind: str) -> dict[str, Any]:
        """The settings that a resumed run must share: all that the script reads, except CHANGES_NO_NUMBER."""
        script = script_that_trains(kind)
        names = [field.name for field in dataclasses.fields(self) if reads(script, field.name)]
        found = {name: getattr(self, name) for name in names if name not in CHANGES_NO_NUMBER} | self.in_use(kind)
        if kind in ADAPTORS:
            found["teachers"] = self.teachers  # their order is that of the adaptor's inputs
        return found


SETTINGS = ("specialized", "baseline", "standalone", "")  # "" for a file given by --checkpoint
LONGEST_NAME = 150  # bytes in the name of a folder that lists names
PATHS = ("data", "pairs", "output", "cache", "leave_out", "init_from", "checkpoint", "teacher", "scores")
SCORE_FORMS = ("favfa", "fairlearn", "bob")
PAIRS_SETS = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")
# The order in which teachers are concatenated (paper 4.3), and that of the groups which select the quarters (Table 1).
PUBLISHED_ORDER = ("Asian", "African", "Caucasian", "Indian")
ASSIGNED_ORDER = ("African", "Asian", "Caucasian", "Indian")


def _are_milestones(epochs: tuple) -> bool:
    return all(type(epoch) is int and epoch > 1 for epoch in epochs) and sorted(set(epochs)) == list(epochs)


def _are_names(names: tuple) -> bool:
    """Tells whether all are names of files or folders; blanks may separate their words."""
    word = r"[\w()'-][\w()'.-]*"
    return bool(names) and all(isinstance(name, str) and re.fullmatch(rf"{word}( {word})*", name) for name in names)


def _first(order: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Sorts the names that are in `order` to the front, in that order."""
    return (*(name for name in order if name in names), *(name for name in names if name not in order))


def _joined(names: tuple[str, ...]) -> str:
    """Joins names to the name of a folder: a+b+c; a long one is cut, and made unique by a digest of all names."""
    whole = "+".join(names)
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    return whole if len(os.fsencode(whole)) <= LONGEST_NAME else f"{names[0][:LONGEST_NAME]}+{len(names) - 1}-{digest}"


def _view(name: str, flipped: bool) -> str:
    return f"{name}_flipped.npy" if flipped else f"{name}.npy"
