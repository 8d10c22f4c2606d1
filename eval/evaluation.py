"""Evaluates all trained models: the paper's tables, confidence intervals, and error rates at shared thresholds.

Reads   <pairs>, and from <output> the teachers, adaptors (with their teachers) and students of every setting; or the
        files given by --checkpoint and --teacher
Writes  <output>/evaluation/ (a subfolder of it for other sets or given files): accuracy, intervals, differences and
        rates as .md, .csv and .tex; on RFW also paper.*, the paper's printed results beside the measured ones;
        results.json; scores/ with a line per pair; pictures; with --report also report.html; distances/, which an
        interrupted or repeated evaluation reuses
Run     python -m eval.evaluation [--report] [--pairs_sets lfw,cfp_fp] [--checkpoint FILE --network iresnet50]
        python -m eval.evaluation --checkpoint FILE --row "EAF-KD SL iresnet34 specialized"
"""

import json
from dataclasses import replace
from pathlib import Path

from config.config import SETTINGS, Config
from config.registry import NETWORKS
from eval import figures, paper, report
from eval.models import KINDS, families, left_out, model_of_files, models_of
from eval.results import Results
from eval.scores import Scored, Scores
from utils.data.pairs import Pairs, load_pairs
from utils.data.synthetic import is_generated
from utils.environment import versions
from utils.errors import InputError
from utils.process import command, run, setup
from utils.storage.files import write_json, write_text
from utils.tables import Table

LOG_KEYS = {"epoch", "loss", "scores", "best"}  # keys of a log entry that the pictures need


def main(cfg: Config) -> None:
    setup(cfg, trains=False)
    paper.check(cfg)
    folder = cfg.evaluation_dir
    model = model_of_files(cfg) if cfg.checkpoint else None
    found = [] if model else _families(cfg)
    sets = load_pairs(cfg)
    printed = paper.comparable(cfg, {name: len(pairs.same) for name, pairs in sets.items()})
    if model:
        scored, notes = Scores(cfg, sets, folder / "distances").of([model]), _notes(cfg)
    else:
        scored, missing = _score_families(cfg, found, sets, folder)
        notes = (*_notes(cfg), *missing)
    scored.sort(key=lambda one: (SETTINGS.index(one.setting), [*NETWORKS].index(one.network), KINDS.index(one.kind)))

    results = Results(scored, {name: pairs.same for name, pairs in sets.items()}, cfg.of_groups, notes)
    compared = paper.compare(printed, scored, cfg, notes)
    tables = results.tables()
    forms = {name: {"md": one.markdown(), "csv": one.csv(), "tex": one.latex()} for name, one in tables.items()}
    if compared:
        tables |= compared.tables()
        forms["paper"] = compared.forms()
    for table in tables.values():
        if table.is_printed:
            print(table.markdown())
    if results.of_groups and results.of_one_kind:
        print(f"No error rates: {', '.join(results.of_one_kind)} has no genuine or no impostor pairs.")
    written = _write_forms(forms, folder)
    write_json(folder / "results.json", _results_json(cfg, sets, scored, tables))
    for one in scored:
        write_text(folder / "scores" / f"{_file_name(one)}.csv", _scores_csv(one, sets))
    pictures = _draw(results, compared, _logs(cfg), folder, " ".join(_notes(cfg)))
    written |= {"results.json": ["results.json"], "scores/": [f"scores/{_file_name(one)}.csv" for one in scored]}
    written |= {name: [name] for name in pictures.values() if "/" not in name}
    written["curves/"] = [name for name in pictures.values() if "/" in name]
    if cfg.report:
        shown = {title: folder / name for title, name in pictures.items()}
        write_text(folder / "report.html", report.page(tables, shown, cfg))
        written["report.html"] = ["report.html"]
    _remove_stale(folder, {folder / name for names in written.values() for name in names})
    print(f"Written to {folder}: {', '.join(what for what, names in written.items() if names)}.")


def _families(cfg: Config) -> list[Config]:
    found = families(cfg)
    if not found:
        if others := left_out(cfg, ()):
            groups = ", ".join(cfg.ethnicities) or "all groups"
            raise InputError(
                f"{cfg.output} holds {', '.join(others)}, but no model of {groups}: "
                "set ethnicities to the groups of the models, and evaluation_groups to those to verify on."
            )
        first = command(replace(cfg, report=False), "train.py")
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
    ours = [folder / name for name in ("report.html", "trade_off.png", "training.png", "paper.png")]
    ours += [path for path in folder.glob("*.*") if path.suffix in (".md", ".csv", ".tex")]
    ours += [*folder.glob("scores/*.csv"), *folder.glob("curves/*.png")]
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
    advice = "ethnicities names the groups of the models, evaluation_groups those to verify on."
    return scored, [f"Not in the tables, though in {cfg.output}: {', '.join(others)}; {advice}"] if others else []


def _file_name(one: Scored) -> str:
    return "-".join(part for part in (one.setting, one.network, one.kind, one.name) if part).replace(" ", "-")


def _scores_csv(one: Scored, sets: dict[str, Pairs]) -> str:
    """Returns a CSV with one line per pair and all digits, from which every accuracy and rate can be recomputed."""
    lines = ["set,pair,same,squared distance"]
    for name, pairs in sets.items():
        both = zip(pairs.same.tolist(), one.distances[name].tolist(), strict=True)
        lines += [f"{name},{k},{int(same)},{distance!r}" for k, (same, distance) in enumerate(both)]
    return "\n".join(lines) + "\n"


def _draw(
    results: Results, compared: paper.Comparison | None, logs: dict[str, list[dict]], folder: Path, note: str
) -> dict[str, str]:
    """Draws all pictures, `note` under each; returns their paths relative to `folder`, by title."""
    models = results.models
    drawn = {"Accuracy of each group": "accuracy.png"}
    figures.draw_accuracies(models, list(results.same), results.intervals, folder / "accuracy.png", note)
    if results.of_groups:
        drawn["Average against STD"] = "trade_off.png"
        figures.draw_trade_off(models, results.pairs, folder / "trade_off.png", note)
    if compared:
        drawn["Printed accuracies and those here"] = "paper.png"
        figures.draw_paper(compared.panels, compared.sets, folder / "paper.png", note)
    for one, shared in zip(models, results.shared, strict=True):
        if shared:
            name = f"curves/{_file_name(one)}.png"
            drawn[f"Error rates of {one.title}"] = name
            thresholds = {title: threshold for title, threshold in shared.items() if threshold is not None}
            figures.draw_curves(one, results.same, thresholds, folder / name, note)
    if logs:
        drawn["Training"] = "training.png"
        figures.draw_training(logs, folder / "training.png", note)
    return drawn


def _logs(cfg: Config) -> dict[str, list[dict]]:
    """Reads every log.jsonl below the output folder; returns the entries by the run folder's relative path."""
    if cfg.checkpoint:
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
