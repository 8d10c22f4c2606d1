"""Evaluation: the paper's tables of all trained models, how sure they are, and error rates at shared thresholds.

Reads   <pairs>, and <output>: teachers, adaptors (through their teachers) and students, specialized and baseline; or
        the files that --checkpoint and --teacher name
Writes  <output>/evaluation/: accuracy, intervals, differences and rates as .md, .csv and .tex, results.json, scores/
        (a line per pair), pictures, and with --report report.html; distances/, from which it goes on
Run     python -m eval.evaluation [--report] [--pairs_sets lfw,cfp_fp] [--checkpoint FILE --network iresnet50]
"""

import json
from pathlib import Path

from config.config import NETWORKS, Config
from eval import figures, report
from eval.models import KINDS, families, model_of_files, models_of
from eval.results import Results
from eval.scores import Scored, Scores
from eval.verification import Pairs, load_pairs
from utils.checkpoint import versions
from utils.errors import InputError
from utils.files import write_json, write_text
from utils.process import run, setup
from utils.synthetic import is_generated


def main(cfg: Config) -> None:
    setup(cfg)
    folder = Path(cfg.output) / "evaluation"
    if cfg.checkpoint:
        model = model_of_files(cfg)
        folder /= f"{Path(cfg.checkpoint).stem}-{model.weights[0][:8]}"
        sets = load_pairs(cfg)
        scored = Scores(cfg, sets, folder / "distances").of([model])
    else:
        found = families(cfg)
        if not found:
            command = cfg.command("train.py")
            raise InputError(f"{cfg.output} holds no trained model. Set output, or run first: {command}")
        sets = load_pairs(cfg)
        scored = [one for family in found for one in _scored(family, sets, folder)]
    scored.sort(key=lambda one: (one.setting != "specialized", NETWORKS.index(one.network), KINDS.index(one.kind)))

    note = "Generated faces, not photographs: the group names mean nothing." if is_generated(Path(cfg.pairs)) else ""
    results = Results(scored, {name: pairs.same for name, pairs in sets.items()}, not cfg.pairs_sets, note)
    tables = results.tables()
    for name, table in tables.items():
        write_text(folder / f"{name}.md", table.markdown())
        write_text(folder / f"{name}.csv", table.csv())
        write_text(folder / f"{name}.tex", table.latex())
    write_json(folder / "results.json", {"versions": versions(cfg), "sets": _sets(sets), **results.as_dict()})
    for one in scored:
        write_text(folder / "scores" / f"{_file_name(one)}.csv", _scores(one, sets))
    pictures = _draw(results, _logs(cfg), folder)
    for table in tables.values():
        if table.is_printed:
            print(table.markdown())
    written = [*(f"{name}.md, .csv, .tex" for name in tables), "results.json", "scores/", *pictures.values()]
    if cfg.report:
        shown = {title: folder / name for title, name in pictures.items()}
        write_text(folder / "report.html", report.page(tables, shown, cfg))
        written.append("report.html")
    print(f"Written to {folder}: {', '.join(written)}.")


def _scored(family: Config, sets: dict[str, Pairs], folder: Path) -> list[Scored]:
    scores = Scores(family, sets, folder / "distances" / f"{family.setting}-{family.network}")
    return [one for models in models_of(family) for one in scores.of(models)]


def _sets(sets: dict[str, Pairs]) -> dict[str, dict]:
    return {
        name: {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "sha256": pairs.digest}
        for name, pairs in sets.items()
    }


def _file_name(one: Scored) -> str:
    return "-".join(part for part in (one.setting, one.network, one.kind, one.name) if part).replace(" ", "-")


def _scores(one: Scored, sets: dict[str, Pairs]) -> str:
    """A line per pair with all digits: enough to compute every figure again without this code."""
    lines = ["set,pair,same,squared distance"]
    for name, pairs in sets.items():
        both = zip(pairs.same.tolist(), one.distances[name].tolist(), strict=True)
        lines += [f"{name},{k},{int(same)},{distance!r}" for k, (same, distance) in enumerate(both)]
    return "\n".join(lines) + "\n"


def _draw(results: Results, logs: dict[str, list[dict]], folder: Path) -> dict[str, str]:
    """Draws all pictures; their files below the folder by title."""
    models, note = results.models, results.note
    drawn = {"Accuracy of each group": "accuracy.png"}
    figures.draw_accuracies(models, list(results.same), results.intervals, folder / "accuracy.png", note)
    if results.of_groups:
        drawn["Average against STD"] = "trade_off.png"
        figures.draw_trade_off(models, results.pairs, folder / "trade_off.png", note)
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
    """The entries of every run's log.jsonl below the output folder, by the run folder's path."""
    if cfg.checkpoint:
        return {}
    logs = {}
    for path in sorted(Path(cfg.output).glob("*/*/*/**/log.jsonl")):
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if entries:
            logs[path.parent.relative_to(cfg.output).as_posix()] = entries
    return logs


if __name__ == "__main__":
    run(main)
