"""Lists the stages of the paper's tables, in order: each is a script with its settings, inputs and outputs."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.config import Config
from config.readers import reads, script_that_trains
from config.registry import ADAPTORS
from utils.data.sources import folders as data_folders
from utils.weights import weights_in

FIXED = (
    "ethnicity",
    "is_teacher_baseline",
    "is_standalone",
    "is_dual_layer",
    "has_dropout",
    "ada_source",
    "checkpoint",
    "teacher",
    "published_adaptor_input",
    "row",
    "report",
)
"""Settings that reproduce.py sets itself, or that name one file to evaluate."""

STUDENTS = ("a-KD", "EAF-KD")
SETTINGS_OF: dict[str, dict[str, Any]] = {
    "SL": {},
    "DuL": {"is_dual_layer": True},
    "DLDPO": {"is_dual_layer": True, "has_dropout": True},
}
"""Settings of the students that learn from each adaptor."""


@dataclass(frozen=True)
class Stage:
    """A script with its settings. It may start when all stages in `needs` are finished."""

    name: str  # also the stem of its log file
    script: str  # "train.py", or "-m eval.evaluation"
    cfg: Config
    needs: tuple[str, ...] = ()  # names of stages
    kind: str = ""  # the argument `kind` of `utils.training.engine.fit`; or split, embeddings, evaluation
    reads: tuple[Path, ...] = ()  # files and folders
    writes: tuple[Path, ...] = ()  # files and folders

    @property
    def arguments(self) -> list[str]:
        """The command line after the interpreter: the script and the settings that it reads."""
        changed, script = self.cfg.changed, self.script.removeprefix("-m ")
        pairs = zip(changed[::2], changed[1::2], strict=True)
        read = [pair for pair in pairs if reads(script, pair[0].removeprefix("--"))]
        return [*shlex.split(self.script), *(text for pair in read for text in pair)]

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", *self.arguments])

    @property
    def results(self) -> list[Path]:
        """The files that show that a stage is finished: the weights in a run folder, else the files that it writes."""
        folders = [weights_in(path) if path.is_dir() else [path] for path in self.writes]
        return [file for files in folders for file in files]


def paper(cfg: Config) -> list[Stage]:
    """Returns all stages of the tables for the teachers' network `cfg.network`; each follows the stages that it needs.

    These are teachers, adaptors and students of both settings, and a standalone network of the students' architecture,
    trained on all identities. Raises InputError for data without groups.
    """
    groups = cfg.selected_ethnicities
    baseline = replace(cfg, is_teacher_baseline=True)
    lists = tuple(cfg.split_dir / f"{name}.json" for name in groups)
    split = Stage("split", "baseline_data_split.py", cfg, (), "split", data_folders(cfg), lists)
    alone = replace(cfg, is_standalone=True, network=cfg.student_network)
    stages = [split, *_setting(cfg, (), ()), *_setting(baseline, (split.name,), lists), *_teachers(alone, (), ())]
    runs = [stage for stage in stages if stage.kind not in ("split", "embeddings")]
    needs = tuple(stage.name for stage in stages)
    read = (*cfg.pairs_files.values(), *(stage.writes[0] for stage in runs))
    evaluated = replace(cfg, report=True)
    results = (evaluated.evaluation_dir / "results.json", evaluated.evaluation_dir / "report.html")
    return [*stages, Stage("evaluation", "-m eval.evaluation", evaluated, needs, "evaluation", read, results)]


def of_seeds(cfg: Config, seeds: tuple[int, ...]) -> list[Stage]:
    """Returns the stages of `paper` for each seed; they write below <output>/seed<k>, and their names start so."""

    def named(stage: Stage, seed: int) -> Stage:
        return replace(stage, name=f"seed{seed}-{stage.name}", needs=tuple(f"seed{seed}-{one}" for one in stage.needs))

    plans = {seed: paper(replace(cfg, seed=seed, output=f"{cfg.output}/seed{seed}")) for seed in seeds}
    return [named(stage, seed) for seed, stages in plans.items() for stage in stages]


def _teachers(cfg: Config, needs: tuple[str, ...], reads: tuple[Path, ...]) -> list[Stage]:
    read = (*data_folders(cfg), *cfg.pairs_files.values(), *reads)
    return [
        Stage(
            f"teacher-{name}",
            "train.py",
            replace(cfg, ethnicity=name),
            needs,
            "teacher",
            read,
            (cfg.teacher_dir(name),),
        )
        for name in cfg.teachers
    ]


def _setting(cfg: Config, needs: tuple[str, ...], reads: tuple[Path, ...]) -> list[Stage]:
    """Returns the stages of teachers, embeddings, adaptors and students of the specialized or baseline setting."""
    teachers = _teachers(cfg, needs, reads)
    folders = tuple(cfg.teacher_dir(name) for name in cfg.teachers)
    arrays = tuple(cfg.teacher_embeddings(name, view) for name in cfg.teachers for view in cfg.target_views)
    names = tuple(stage.name for stage in teachers)
    read = (*data_folders(cfg), *folders)
    embeddings = Stage(f"embeddings-{cfg.setting}", "extract_all.py", cfg, names, "embeddings", read, arrays)
    adaptors = [_adaptor(cfg, name, embeddings) for name in ADAPTORS]
    students = [_student(cfg, name, method) for method in STUDENTS for name in ADAPTORS]
    return [*teachers, embeddings, *adaptors, *students]


def _adaptor(cfg: Config, name: str, embeddings: Stage) -> Stage:
    own = replace(cfg, has_dropout=name == "DLDPO")
    writes = (cfg.adaptor_dir(name), *_targets(cfg, name))
    return Stage(
        _name_of(cfg, name), script_that_trains(name), own, (embeddings.name,), name, embeddings.writes, writes
    )


def _student(cfg: Config, name: str, method: str) -> Stage:
    """Returns the stage of the student that learns from the adaptor `name`."""
    own = replace(cfg, **SETTINGS_OF[name])
    reads = (*data_folders(cfg), *cfg.pairs_files.values(), cfg.adaptor_dir(name), *_targets(cfg, name))
    writes = (own.student_dir(method),)
    return Stage(
        f"{method}-{_name_of(cfg, name)}",
        script_that_trains(method),
        own,
        (_name_of(cfg, name),),
        method,
        reads,
        writes,
    )


def _targets(cfg: Config, adaptor: str) -> tuple[Path, ...]:
    return tuple(cfg.adaptor_embeddings(adaptor, view) for view in cfg.target_views)


def _name_of(cfg: Config, adaptor: str) -> str:
    return f"{adaptor}-{cfg.setting}"
