"""Evaluates all trained models: the paper's tables, confidence intervals, and error rates at shared thresholds.

Reads   <pairs>, and from <output> the teachers, adaptors (with their teachers) and students of every setting; or the
        files given by --checkpoint and --teacher
Writes  <output>/evaluation/ (a subfolder of it for other sets or given files): accuracy, intervals, differences and
        rates as .md, .csv and .tex; on RFW also paper.*, the paper's printed results beside the measured ones;
        results.json; scores/ with a line per pair; pictures as .png, .svg and .pdf; with --report also report.html;
        distances/, which an interrupted or repeated evaluation reuses
Run     python -m eval.evaluation [--report] [--pairs_sets lfw,cfp_fp] [--checkpoint FILE --network iresnet50]
        python -m eval.evaluation --checkpoint FILE.onnx
        python -m eval.evaluation --checkpoint FILE --row "EAF-KD SL iresnet34 specialized"
        python -m eval.evaluation --scores theirs.csv    (scores of a model that is not at hand: eval/exchange.py)
"""

import json
from dataclasses import dataclass
from pathlib import Path

from config.config import SETTINGS, Config
from config.registry import NETWORKS
from eval import acquisition, attributes, calibration, figures, paper, report
from eval.answer import answer
from eval.audit import Audit
from eval.curves import draw_curves
from eval.exchange import read_scores, written
from eval.models import KINDS, families, left_out, model_of_files, models_of
from eval.operating import check_reference, marked, reference_of
from eval.pictures import Picture
from eval.published import Row
from eval.results import BEST, Results, file_name, names_of
from eval.scores import Scored, Scores
from utils.data.identities import in_two_groups
from utils.data.pairs import Pairs, load_pairs
from utils.data.synthetic import is_generated
from utils.environment import versions
from utils.errors import InputError
from utils.process import command_of_run, run, setup
from utils.storage.files import write_json, write_text
from utils.tables import Table
from utils.weights import find_weights

LEFT_OUT = "Not in the tables"  # begins the note on models that were not evaluated
LOG_KEYS = {"epoch", "loss", "scores", "best"}  # keys of a log entry that the pictures need


@dataclass(frozen=True)
class Measured:
    """The distances of all models on all sets, and what the tables have to say of them."""

    sets: dict[str, Pairs]
    scored: list[Scored]
    of_groups: bool
    of_rfw: bool
    printed: dict[str, Row]  # rows of a paper that these can be compared with
    notes: tuple[str, ...]


def main(cfg: Config) -> None:
    setup(cfg, trains=False)
    paper.check(cfg)
    if cfg.of_groups and not cfg.scores:
        check_reference(list(cfg.verified_groups), cfg.reference_group)
    folder = cfg.evaluation_dir
    measured = _measured_by_others(cfg) if cfg.scores else _measured(cfg, folder)
    sets, scored = measured.sets, measured.scored
    identities = {name: pairs.identities for name, pairs in sets.items()}
    if shared := in_two_groups(identities):
        print(shared)
    same = {name: pairs.same for name, pairs in sets.items()}
    results = Results(scored, same, measured.of_groups, measured.notes, identities, measured.of_rfw)
    compared = paper.compare(measured.printed, scored, cfg, measured.notes)
    every = results.tables() | _audit(cfg, results, sets)
    tables = {name: table for name, table in every.items() if table.rows}
    forms = {name: one.forms() for name, one in tables.items()}
    if compared:
        tables |= compared.tables()
        forms["paper"] = compared.forms()
    for table in tables.values():
        if table.is_printed:
            print(table.markdown())
    answered, absent = answer(results), _absent(cfg, results, every)
    print(*answered, *absent, sep="\n")
    written_files = _write_forms(forms, folder)
    write_json(folder / "results.json", _results_json(cfg, sets, scored, tables))
    for one in scored:
        write_text(folder / "scores" / f"{file_name(names_of(one))}.csv", _scores_csv(one, sets))
    exchanged = _write_exchanged(cfg, results, sets, folder)
    pictures = _draw(cfg, results, compared, _logs(cfg), folder)
    written_files |= {
        "results.json": ["results.json"],
        "scores/": [*(f"scores/{file_name(names_of(one))}.csv" for one in scored), *exchanged],
    }
    for picture in pictures:
        names = [path.relative_to(folder).as_posix() for path in picture.files]
        label = "curves/" if "/" in names[0] else f"{names[0]}, .svg, .pdf"
        written_files[label] = written_files.get(label, []) + names
    if cfg.report:
        page = report.page(answered, tables, pictures, cfg, [*sets], (*measured.notes, *absent))
        write_text(folder / "report.html", page)
        written_files["report.html"] = ["report.html"]
    _remove_stale(folder, {folder / name for names in written_files.values() for name in names})
    print(f"Written to {folder}: {', '.join(what for what, names in written_files.items() if names)}.")


def _measured(cfg: Config, folder: Path) -> Measured:
    """Computes the distances of the models in the output folder, or of the given checkpoint."""
    if cfg.teacher and not cfg.checkpoint:
        raise InputError("teacher names files below an adaptor: set checkpoint to that of the adaptor.")
    model = model_of_files(cfg) if cfg.checkpoint else None
    found = [] if model else _families(cfg)
    sets = load_pairs(cfg)
    printed = paper.comparable(cfg, {name: len(pairs.same) for name, pairs in sets.items()})
    if model:
        scored, notes = Scores(cfg, sets, folder / "distances").of([model]), _notes(cfg)
    else:
        scored, missing = _score_families(cfg, found, sets, folder)
        notes = (*_notes(cfg), *missing)
    scored.sort(
        key=lambda one: (SETTINGS.index(one.setting), [*NETWORKS, "onnx"].index(one.network), KINDS.index(one.kind))
    )
    of_rfw = paper.is_rfw(cfg, {name: len(pairs.same) for name, pairs in sets.items()})
    return Measured(sets, scored, cfg.of_groups, of_rfw, printed, notes)


def _measured_by_others(cfg: Config) -> Measured:
    """Reads the distances of a model that is not at hand from `cfg.scores`."""
    theirs = read_scores(Path(cfg.scores))
    if len(theirs.sets) > 1:
        check_reference(list(theirs.sets), cfg.reference_group)
    notes = (f"Scores of {Path(cfg.scores).name}, computed elsewhere.", *theirs.notes)
    return Measured(theirs.sets, [theirs.scored], len(theirs.sets) > 1, False, {}, notes)


def _write_exchanged(cfg: Config, results: Results, sets: dict[str, Pairs], folder: Path) -> list[str]:
    """Writes the scores of each model in the forms that `cfg.score_forms` names; returns their names in `folder`."""
    names = []
    for one, shared in zip(results.models, results.shared, strict=True):
        for form in cfg.score_forms:
            names.append(f"scores/{file_name(names_of(one))}.{form}.{'txt' if form == 'bob' else 'csv'}")
            write_text(folder / names[-1], written(form, one, sets, shared.get(BEST)))
    return names


def _audit(cfg: Config, results: Results, sets: dict[str, Pairs]) -> dict[str, Table]:
    """Returns the tables of the fairness audit by file name; none for several sets that are no groups."""
    if results.of_one_kind or not (results.of_groups or len(results.same) == 1):
        return {}
    tables = Audit(results, cfg.reference_group, cfg.threshold).tables()
    failures = acquisition.table(Path(cfg.pairs), list(results.same), results.notes)
    by_attribute = attributes.table(results, {name: pairs.attributes for name, pairs in sets.items()})
    if by_attribute:
        tables["attributes"] = by_attribute
    if cfg.corrections and results.of_groups:
        tables["corrections"] = calibration.table(results, {name: pairs.rows for name, pairs in sets.items()})
    return tables | ({"acquisition": failures} if failures else {})


def _absent(cfg: Config, results: Results, tables: dict[str, Table]) -> list[str]:
    """Returns a sentence on each table that these sets or settings do not allow."""
    if results.of_one_kind:
        return [f"No error rates: they need both kinds of pairs, and {', '.join(results.of_one_kind)} lacks one."]
    if len(results.same) > 1 and not results.of_groups:
        return ["No error rates: they are given for groups, or for a single set, and these sets are not groups."]
    said = [f"No table {name}: {table.notes[-1]}" for name, table in tables.items() if not table.rows]
    if results.of_groups and not results.models[0].samples:
        said.append("No table impostors: pairs across groups need images, and there are scores only.")
    if cfg.corrections and not results.of_groups:
        said.append("No table corrections: it compares groups, and there is a single set.")
    return said


def _families(cfg: Config) -> list[Config]:
    found = families(cfg)
    if not found:
        if others := left_out(cfg, ()):
            groups = ", ".join(cfg.ethnicities) or "all groups"
            raise InputError(
                f"{cfg.output} holds {', '.join(others)}, but no model of {groups}: "
                "set ethnicities to the groups of the models, and evaluation_groups to those to verify on."
            )
        first = command_of_run(cfg, "train.py")
        raise InputError(f"{cfg.output} holds no trained model. Set output, or run first: {first}")
    return found


def _write_forms(forms: dict[str, dict[str, str]], folder: Path) -> dict[str, list[str]]:
    """Writes `forms`, texts by file name and extension; returns the files by the label under which they are printed."""
    for name, texts in forms.items():
        for kind, text in texts.items():
            write_text(folder / f"{name}.{kind}", text)
    return {f"{name}.md, .csv, .tex": [f"{name}.{kind}" for kind in texts] for name, texts in forms.items()}


def _notes(cfg: Config) -> tuple[str, ...]:
    """Returns the notes that go under every table."""
    notes = []
    if is_generated(Path(cfg.pairs)):
        notes.append("Generated faces, not photographs: the group names mean nothing.")
    if cfg.weights == "last" and not cfg.checkpoint:
        notes.append("Weights of the last epoch.")
    if cfg.published_adaptor_input:
        notes.append("Adaptors are fed raw teacher features, as by the published evaluator.")
    return tuple(notes)


def _results_json(cfg: Config, sets: dict[str, Pairs], scored: list[Scored], tables: dict[str, Table]) -> dict:
    return {
        "versions": versions(cfg),
        "sets": {
            name: {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "sha256": pairs.digest}
            for name, pairs in sets.items()
        },
        "weights": {one.title: [*one.weights] for one in scored},
        "tables": {name: table.as_dict() for name, table in tables.items()},
    }


def _remove_stale(folder: Path, written: set[Path]) -> None:
    """Deletes files of an earlier evaluation whose models or tables no longer exist."""
    ours = [folder / "report.html"]
    ours += [path for path in folder.glob("*.*") if path.suffix in (".md", ".csv", ".tex", ".png", ".svg", ".pdf")]
    ours += [*folder.glob("scores/*.csv"), *folder.glob("scores/*.bob.txt"), *folder.glob("curves/*.*")]
    for path in ours:
        if path not in written:
            path.unlink(missing_ok=True)


def _score_families(
    cfg: Config, found: list[Config], sets: dict[str, Pairs], folder: Path
) -> tuple[list[Scored], list[str]]:
    """Scores all models of the families; also returns a note that names the run folders that no model comes from."""
    scored, used = [], []
    for family in found:
        scores = Scores(family, sets, folder / "distances" / f"{family.setting}-{family.network}")
        for models in models_of(family):
            scored += scores.of(models)
            used += [model.folder for model in models]
    others = left_out(cfg, used)
    for student in (Path(cfg.output, name) for name in others if "/students/" in name):
        if find_weights(student, cfg.weights):  # all that the registry and the settings name are used
            print(
                f"{student} is left out: add its network and method to config/registry.py, its teacher to ethnicities."
            )
    advice = "ethnicities names the groups of the models, evaluation_groups those to verify on."
    return scored, [f"{LEFT_OUT}, though in {cfg.output}: {', '.join(others)}; {advice}"] if others else []


def _scores_csv(one: Scored, sets: dict[str, Pairs]) -> str:
    """Returns a CSV with one line per pair and all digits, from which every accuracy and rate can be recomputed."""
    lines = ["set,pair,same,squared distance"]
    for name, pairs in sets.items():
        both = zip(pairs.same.tolist(), one.distances[name].tolist(), strict=True)
        lines += [f"{name},{k},{int(same)},{distance!r}" for k, (same, distance) in enumerate(both)]
    return "\n".join(lines) + "\n"


def _draw(
    cfg: Config, results: Results, compared: paper.Comparison | None, logs: dict[str, list[dict]], folder: Path
) -> list[Picture]:
    """Draws all pictures into `folder`."""
    models, note = results.models, " ".join(one for one in results.notes if not one.startswith(LEFT_OUT))
    drawn: list[Picture] = []

    def keep(section: str, title: str, path: Path, alt: str) -> None:
        drawn.append(Picture(section, title, path, f"{note} {alt}".strip()))

    path = folder / "accuracy.png"
    alt = figures.draw_accuracies(models, list(results.same), results.intervals, path, note, results.whole)
    keep("Accuracy of each group" if results.of_groups else "Accuracy of each set", "", path, alt)
    if results.has_spread:
        path = folder / "trade_off.png"
        keep("Average against STD", "", path, figures.draw_trade_off(models, results.pairs, path, note, results.whole))
    if compared:
        path = folder / "paper.png"
        alt = figures.draw_paper(compared.panels, compared.sets, path, note)
        keep("Printed accuracies and those here", "", path, alt)
    for one, shared in zip(models, results.shared, strict=True):
        if shared:
            path = folder / "curves" / f"{file_name(names_of(one))}.png"
            alt = draw_curves(one, results.same, _marked(cfg, results, one, shared), path, note)
            keep("ROC, DET and thresholds", one.title, path, alt)
    for start in range(0, len(logs), figures.RUNS):
        names = [*logs][start : start + figures.RUNS]
        path = folder / (f"training_{start // figures.RUNS + 1}.png" if start else "training.png")
        alt = figures.draw_training({name: logs[name] for name in names}, path, note)
        keep("Training", f"Runs {names[0]} to {names[-1]}", path, alt)
    return drawn


def _marked(cfg: Config, results: Results, one: Scored, shared: dict[str, float | None]) -> dict[str, float]:
    """Returns the thresholds that are marked in the curves of a model, by name."""
    if not results.of_groups:
        every = {**shared, "--threshold": cfg.threshold if len(results.same) == 1 else None}
        return {name: threshold for name, threshold in every.items() if threshold is not None}
    reference = reference_of(dict(zip(results.same, one.accuracies, strict=True)), cfg.reference_group)
    return marked(shared, results.groups(one), reference, cfg.threshold)


def _logs(cfg: Config) -> dict[str, list[dict]]:
    """Reads every log.jsonl below the output folder; returns the entries by the run folder's relative path."""
    if cfg.checkpoint or cfg.scores:
        return {}
    logs = {}
    for path in sorted(Path(cfg.output).glob("*/*/*/**/log.jsonl")):
        try:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            is_log = bool(entries) and all(entry.keys() >= LOG_KEYS for entry in entries)
        except (ValueError, AttributeError):
            is_log = False
        if is_log and any(entry["best"] for entry in entries):
            logs[path.parent.relative_to(cfg.output).as_posix()] = entries
        else:
            print(f"{path} is damaged: its curves are left out.")
    return logs


if __name__ == "__main__":
    run(main, alone=True)
