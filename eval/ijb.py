"""IJB-B and IJB-C, 1:1 verification of templates: share of genuine pairs accepted (TAR) at false accept rates (FAR).

Reads   <folder>, as insightface distributes it, ijbc_ or ijbb_:
          meta/ijbc_face_tid_mid.txt         <image name> <template id> <media id> of every image
          meta/ijbc_name_5pts_score.txt      <image name> x1 y1 ... x5 y5 <detector score>, in the same order
          meta/ijbc_template_pair_label.txt  <template id> <template id> <1 genuine, 0 impostor>
          loose_crop/<image name>
        the checkpoints: state dicts of one kind of network
Writes  <output>/ijb/<name>/: features.npy, from which it goes on; tar.json, tar.md
Run     python -m eval.ijb --folder data/IJBC --checkpoint path [path ...] --network iresnet50
        python -m eval.ijb --folder data/IJBC --checkpoint path --network mobilefacenet --row "AdaArcDistill m=0.45"

<name> holds the digest of the weights. Features are made again where the weights or meta/*_name_5pts_score.txt are
others; images that are exchanged are not noticed: delete features.npy then. On a GPU the reading of images sets the
pace: give as many --num_workers as there are cores.
"""

import argparse
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config
from eval import published
from eval.rates import just_above
from eval.verification import normalize
from utils.data import images
from utils.data.align import TEMPLATE, align
from utils.data.columns import Column, cut
from utils.errors import InputError
from utils.process import run, setup
from utils.storage.arrays import read
from utils.storage.files import sha256, write_json, write_text
from utils.training.extract import Output, embed_all
from utils.weights import load_backbone

SETS = {"ijbb": "IJB-B", "ijbc": "IJB-C"}
FARS = {"1e-6": 10**6, "1e-5": 10**5, "1e-4": 10**4, "1e-3": 10**3, "1e-2": 100, "1e-1": 10}
"""One impostor pair accepted in so many: whole numbers, since the product of 1e-6 and a count is rounded."""

ROWS, COLUMNS = 4096, 64  # that are worked on together in float64: all at once would take twice the memory of features


@dataclass(frozen=True)
class Benchmark:
    """N images of T templates, and P pairs of templates."""

    name: str  # IJB-B | IJB-C
    crops: Path  # the folder of the images
    images: list[str]  # N names of files
    landmarks: np.ndarray  # (N, 5, 2) float64, x and y in pixels
    detector_score: np.ndarray  # (N,) float64
    template: np.ndarray  # (N,) int64 in 0 ... T - 1: which template an image belongs to
    media: np.ndarray  # (N,) int64: which photograph or video it was taken from
    pairs: np.ndarray  # (P, 2) int64 in 0 ... T - 1
    same: np.ndarray  # (P,) bool
    digest: str  # SHA-256 of the file of names and landmarks, which decide the features


def main(folder: Path, checkpoints: list[Path], cfg: Config, detector_score: bool = True, norm: bool = True) -> None:
    """Evaluates networks of the kind `cfg.network`; the two switches are those of `image_weights`."""
    setup(cfg, trains=False)
    printed = _printed(cfg.row, SETS[_which(folder)], len(checkpoints)) if cfg.row else {}
    networks = [load_backbone(cfg.network, path, cfg) for path in checkpoints]
    benchmark = load_benchmark(folder)
    about = {"benchmark": benchmark.name, "network": cfg.network, "detector score": detector_score, "norm": norm}
    about |= {"images": len(benchmark.images), "templates": int(benchmark.template.max()) + 1}
    about |= {"genuine pairs": int(benchmark.same.sum()), "impostor pairs": int((~benchmark.same).sum())}
    # Results with other switches stand beside each other.
    stem = "tar" + "-no_detector_score" * (not detector_score) + "-no_norm" * (not norm)
    results = {}
    for checkpoint, (network, digest) in zip(checkpoints, networks, strict=True):
        name = f"{benchmark.name}-{checkpoint.resolve().parent.name}-{checkpoint.stem}-{digest[:8]}"
        place = Path(cfg.output) / "ijb" / name
        features = extract(place / "features.npy", benchmark, network, digest, cfg)
        weight = image_weights(features, benchmark.detector_score if detector_score else None, norm)
        embeddings = normalize(pool(features, weight, benchmark.template, benchmark.media))
        scores = pair_scores(embeddings, benchmark.pairs)
        results[name] = tar_at_far(scores[benchmark.same], scores[~benchmark.same])
        about |= {"checkpoint": str(checkpoint), "weights": digest}
        about |= {"row": cfg.row, "printed TAR in %": printed} if printed else {}
        write_json(place / f"{stem}.json", {**about, "at FAR": results[name]})
        write_text(place / f"{stem}.md", as_table({name: results[name]}, about, printed) + "\n")
        print(f"Written to {place}: {stem}.json, {stem}.md.")
    print(as_table(results, about, printed))


def _printed(row: str, benchmark: str, checkpoints: int) -> dict[str, float]:
    """The TAR in percent that AdaDistill prints in this row, by FAR; raises InputError where it prints none."""
    if checkpoints > 1:
        raise InputError(f"row = {row!r} is compared with one checkpoint: give one, not {checkpoints}.")
    rows = published.adadistill().values()
    found = {one.name: {far: tar for (name, far), tar in one.tar.items() if name == benchmark} for one in rows}
    found = {name: tar for name, tar in found.items() if tar}
    if row not in found:
        raise InputError(f"row = {row!r} has no printed TAR on {benchmark}. Set row to one of: {', '.join(found)}.")
    return found[row]


# Input ----------------------------------------------------------------------------------------------------------------


def load_benchmark(folder: Path) -> Benchmark:
    """Reads the text files of IJB-B or IJB-C, whichever is there; opens no image, but looks whether all are there.

    Raises InputError that names the file, and the line where there is one, for whatever is missing or does not fit.
    """
    kind = _which(folder)
    meta, crops = folder / "meta", folder / "loose_crop"
    path = meta / f"{kind}_name_5pts_score.txt"
    images, numbers = _table(path, "<image name> x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 <detector score>", 11, float)
    landmarks = numbers[:, :10].reshape(-1, *TEMPLATE.shape)
    _check_lines(path, np.isfinite(numbers).all(1), "a number is not finite")
    _check_lines(path, np.ptp(landmarks, axis=1).any(1), "all landmarks lie at one point")

    of_images = meta / f"{kind}_face_tid_mid.txt"
    names, ids = _table(of_images, "<image name> <template id> <media id>", 2, int)
    if len(names) != len(images):
        raise InputError(f"{of_images} has {len(names)} lines, {path} {len(images)}: expected one per image in both.")
    in_order = np.array([one == other for one, other in zip(names, images, strict=True)])
    _check_lines(of_images, in_order, f"another image than in this line of {path}: expected both in one order")
    found = set(os.listdir(crops))
    if missing := [name for name in images if name not in found]:
        raise InputError(f"{crops} lacks {len(missing)} of {len(images)} images, the first {missing[0]}: add them.")

    of_pairs = meta / f"{kind}_template_pair_label.txt"
    _, pairs = _table(of_pairs, "<template id> <template id> <1 or 0>", 3, int)
    _check_lines(of_pairs, np.isin(pairs[:, 2], (0, 1)), "the last number must be 1 (genuine) or 0 (impostor)")
    known, template = np.unique(ids[:, 0], return_inverse=True)
    rows = np.searchsorted(known, pairs[:, :2]).clip(max=len(known) - 1)
    _check_lines(of_pairs, (known[rows] == pairs[:, :2]).all(1), f"a template that is not in {of_images}")
    same = pairs[:, 2] == 1
    if same.all() or not same.any():
        raise InputError(f"{of_pairs} holds no {'impostor' if same.all() else 'genuine'} pair: replace it.")
    scores = numbers[:, 10]
    return Benchmark(SETS[kind], crops, images, landmarks, scores, template, ids[:, 1], rows, same, sha256(path))


def _which(folder: Path) -> str:
    """ijbb or ijbc; raises InputError that names all that is missing."""
    names = ("face_tid_mid", "name_5pts_score", "template_pair_label")
    files = {kind: [folder / "meta" / f"{kind}_{name}.txt" for name in names] for kind in SETS}
    there = [kind for kind, paths in files.items() if any(path.is_file() for path in paths)]
    if len(there) > 1:
        raise InputError(f"{folder} holds files of both IJB-B and IJB-C: give each a folder of its own.")
    kind, instead = (there[0], "") if there else ("ijbc", " (or the same with ijbb_)")
    missing = [str(path) for path in files[kind] if not path.is_file()]
    missing += [] if (folder / "loose_crop").is_dir() else [str(folder / "loose_crop")]
    if missing:
        raise InputError(f"Missing: {', '.join(missing)}{instead}. Set --folder to where meta and loose_crop are.")
    return kind


def _table(path: Path, form: str, columns: int, kind: type) -> tuple[list[str], np.ndarray]:
    """The names, if the form of a line begins with one, and the numbers (lines, columns), int64 or float64.

    Raises InputError that names the first line of another form.
    """
    names, numbers = [], array("d" if kind is float else "q")
    first = int(form.startswith("<image name>"))  # field that is a number
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = tqdm(file, f"read {path.name}", unit=" lines", leave=False, disable=None, delay=1)
        for number, line in enumerate(lines, 1):
            fields = line.split()
            try:
                numbers.extend(map(kind, fields[first:]))
                is_good = len(fields) == first + columns
            except (ValueError, OverflowError):
                is_good = False
            if not is_good:
                raise InputError(f"{path}, line {number}: expected {form}, found {line.strip()[:80]!r}.")
            names += fields[:first]
    if not numbers:
        raise InputError(f"{path} is empty: expected lines {form}.")
    return names, np.frombuffer(numbers, np.float64 if kind is float else np.int64).reshape(-1, columns)


def _check_lines(path: Path, is_good: np.ndarray, what: str) -> None:
    if not is_good.all():
        raise InputError(f"{path}, line {is_good.argmin() + 1}: {what}.")


# Features -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Crops(Column):
    """The images as a column of aligned faces, read when they are gathered; `arrays` are the landmarks (N, 5, 2)."""

    paths: list[Path]

    def gather(self, rows: np.ndarray, _) -> torch.Tensor:
        return torch.from_numpy(np.stack([align(read_image(self.paths[k]), self.arrays[0][k]) for k in rows]))


def read_image(path: Path) -> np.ndarray:
    """RGB image (H, W, 3) uint8 of any size; raises InputError where the file is none."""
    try:
        return images.read(path, upright=True)[..., ::-1]
    except ValueError as error:
        raise InputError(f"{path} {error}: replace it, and what was finished is kept.") from error


def extract(path: Path, benchmark: Benchmark, network: nn.Module, digest: str, cfg: Config) -> np.ndarray:
    """The features f(x) + f(flip x) of all images, (N, D) float32, mapped from `path`, where they are kept.

    Only those that are not there yet are computed. `digest` is that of the network's weights.
    """

    def both(image: torch.Tensor) -> torch.Tensor:
        return network(image) + network(image.flip(-1))

    paths = [benchmark.crops / name for name in benchmark.images]
    made_from = {"landmarks": benchmark.digest, "weights": digest}
    crops = Crops((benchmark.landmarks,), paths=paths)
    embed_all([Output(path, made_from, both)], network, {"image": crops}, cfg)
    return read(path, (len(paths), cfg.embedding_size), np.float32, checked=False)  # embed_all has checked it


# Templates and scores -------------------------------------------------------------------------------------------------


def image_weights(features: np.ndarray, detector_score: np.ndarray | None, norm: bool) -> np.ndarray:
    """What each of the features (N, D) is multiplied by before it is pooled, (N,) float64.

    `norm` leaves a feature its length, which is small for poor images, as a weight; without it only its direction
    counts. `detector_score` (N,) is a factor more, None leaves it out. The published protocol uses both.

    Raises InputError where a feature is not finite.
    """
    parts = cut(range(len(features)), ROWS)
    length = np.concatenate([np.linalg.norm(features[p.start : p.stop].astype(np.float64), axis=1) for p in parts])
    if not np.isfinite(length).all():
        raise InputError("Some features are not finite: the network gives NaN or infinity for some images.")
    weight = np.ones(len(length)) if norm else 1 / np.where(length == 0, 1, length)
    return weight if detector_score is None else weight * detector_score


def pool(features: np.ndarray, weight: np.ndarray, template: np.ndarray, media: np.ndarray) -> np.ndarray:
    """The templates (T, D) float64, in order of their ids: sums over media of the mean of weighted features.

    `features` (N, D), `weight`, `template` and `media` (N,). Frames of one video count as much as one photograph. The
    same media id in another template is another media. Templates are not scaled to unit length.
    """
    order = np.lexsort((media, template))
    template, media, weight = template[order], media[order], weight[order, None]
    opens_template = np.append(True, template[1:] != template[:-1])
    opens_media = opens_template | np.append(True, media[1:] != media[:-1])
    first = np.flatnonzero(opens_media)
    count = np.diff(np.append(first, len(order)))[:, None]
    first_media = np.flatnonzero(opens_template[first])

    pooled = np.empty((len(first_media), features.shape[1]))
    for part in cut(range(features.shape[1]), COLUMNS):
        weighted = features[:, part.start : part.stop][order] * weight
        means = np.add.reduceat(weighted, first) / count
        pooled[:, part.start : part.stop] = np.add.reduceat(means, first_media)
    return pooled


def pair_scores(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The cosines (P,) of pairs (P, 2) of rows of unit-length embeddings (T, D)."""
    scores = np.empty(len(pairs))
    for part in tqdm(cut(range(len(pairs)), ROWS), "score pairs", leave=False, disable=None, delay=1):
        one, other = embeddings[pairs[part.start : part.stop].T]
        scores[part.start : part.stop] = np.einsum("pd,pd->p", one, other)
    return scores


def tar_at_far(genuine: np.ndarray, impostors: np.ndarray) -> dict[str, dict[str, float] | None]:
    """TAR and threshold at each of FARS, from the scores of genuine and of impostor pairs.

    A pair is accepted where its score is not below the threshold: the smallest float64 at which the share of impostor
    pairs accepted does not exceed the FAR. The published script takes the nearest point of the ROC curve instead, which
    may exceed it.

    None where there are fewer than 3 / FAR impostor pairs: if none of n is accepted, the rate may still be as high as
    3 / n (rule of three, 95 % confidence).
    """
    impostors = np.sort(impostors)[::-1]
    found: dict[str, dict[str, float] | None] = {}
    for far, one_in in FARS.items():
        if len(impostors) < 3 * one_in:
            found[far] = None
            continue
        # So many may be accepted: the next one, and all that equal it, must not be.
        threshold = just_above(impostors[len(impostors) // one_in])
        found[far] = {"tar": float(np.mean(genuine >= threshold)), "threshold": threshold}
    return found


# Output ---------------------------------------------------------------------------------------------------------------


def as_table(results: dict[str, dict], about: dict, printed: dict[str, float] | None = None) -> str:
    """Markdown table with one line per name, TAR in percent; a dash where the FAR is not resolved.

    Where a row of the paper is `printed`, TAR in percent by FAR, it and the difference from it are two lines more.
    """
    rows = [["TAR in % at FAR", *FARS]]
    for name, found in results.items():
        rows.append([name, *(f"{100 * point['tar']:.2f}" if point else "-" for point in found.values())])
    if printed:
        (found,) = results.values()
        both = {far: (found[far], printed.get(far)) for far in FARS}
        rows.append(["printed", *("" if tar is None else f"{tar:.2f}" for _, tar in both.values())])
        apart = [None if point is None or tar is None else 100 * point["tar"] - tar for point, tar in both.values()]
        rows.append(["difference", *("" if value is None else f"{value:+.2f}" for value in apart)])
    width = max(len(row[0]) for row in rows)
    lines = [f"| {row[0].ljust(width)} | {' | '.join(cell.rjust(6) for cell in row[1:])} |" for row in rows]
    lines.insert(1, f"|{'-' * (width + 2)}|{'-------:|' * len(FARS)}")
    counts = ", ".join(f"{about[name]:,} {name}" for name in ("images", "templates", "genuine pairs", "impostor pairs"))
    switches = ", ".join(f"{name} {'on' if about[name] else 'off'}" for name in ("detector score", "norm"))
    text = [f"{about['benchmark']} 1:1: {counts}; {switches}.", "", *lines]
    text += ["", f"Printed: AdaDistill's {about['row']}."] if printed else []
    if any(point is None for found in results.values() for point in found.values()):
        limit = 3 / about["impostor pairs"]
        text += [
            "",
            f"A dash: not resolved, so few impostor pairs cannot show a FAR below {limit:.1e} (rule of three).",
        ]
    return "\n".join(text)


def command(argv: list[str] | None = None) -> None:
    """Runs `main` with a command line; bad input is one sentence and exit status 2."""
    parser = argparse.ArgumentParser(
        description="TAR at FAR of trained networks on IJB-B or IJB-C, 1:1.",
        epilog="Also every setting of config/config.py: --network, --device, --infer_batch_size, --output, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=Path, required=True, help="holds meta and loose_crop")
    parser.add_argument("--checkpoint", type=Path, required=True, nargs="+", help="state dicts of --network")
    parser.add_argument("--no_detector_score", action="store_true", help="images count whatever the detector's score")
    parser.add_argument("--no_norm", action="store_true", help="features are scaled to unit length before pooling")
    own, settings = parser.parse_known_args(argv)
    run(
        lambda cfg: main(own.folder, own.checkpoint, cfg, not own.no_detector_score, not own.no_norm),
        settings,
        alone=True,
    )


if __name__ == "__main__":
    command()
