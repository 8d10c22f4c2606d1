"""Evaluates networks on IJB-B or IJB-C: true accept rate (TAR) at false accept rates (FAR), 1:1 template verification.

Reads   <folder>, as insightface distributes it, with the prefix ijbc_ or ijbb_:
          meta/ijbc_face_tid_mid.txt         <image name> <template id> <media id> of every image
          meta/ijbc_name_5pts_score.txt      <image name> x1 y1 ... x5 y5 <detector score>, in the same order
          meta/ijbc_template_pair_label.txt  <template id> <template id> <1 genuine, 0 impostor>
          loose_crop/<image name>
        the checkpoints: weights of the network --network, or .onnx files
Writes  <output>/ijb/<name>/: features.npy, which a repeated evaluation reuses; tar.json, tar.md
Run     python -m eval.ijb --folder data/IJBC --checkpoint path [path ...] --network iresnet50
        python -m eval.ijb --folder data/IJBC --checkpoint path --network mobilefacenet --row "AdaArcDistill m=0.45"

<name> contains the digest of the weights. Features are recomputed if the weights or meta/*_name_5pts_score.txt have
changed. A change of the images is not detected: delete features.npy in that case. On a GPU, reading images is the
bottleneck: set --num_workers to the number of cores.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config
from eval import published
from eval.identities import Ends
from eval.ijb_files import SETS, Benchmark, kind_of, load_benchmark
from eval.intervals import Sampled
from eval.rates import just_above
from eval.verification import normalize
from utils.data import images
from utils.data.align import align
from utils.data.columns import Column, cut
from utils.errors import InputError
from utils.prepare.work import path_of
from utils.process import run, setup
from utils.storage.arrays import read
from utils.storage.files import write_json, write_text
from utils.tables import RULE_OF_THREE
from utils.training.extract import Output, embed_all
from utils.weights import input_of, load_backbone, size_of

FARS = {"1e-6": 10**6, "1e-5": 10**5, "1e-4": 10**4, "1e-3": 10**3, "1e-2": 100, "1e-1": 10}
"""1 / FAR for each FAR: an integer, since the product of 1e-6 and a count is rounded."""

INTERVALS = (
    "95 % intervals: Clopper-Pearson at the given threshold. Genuine pairs of one person count as dependent: templates "
    "that genuine pairs connect are of one person."
)
ROWS, COLUMNS = 4096, 64  # of a float64 block: converting all features at once would double their memory


def main(folder: Path, checkpoints: list[Path], cfg: Config, detector_score: bool = True, norm: bool = True) -> None:
    """Evaluates checkpoints of `cfg.network` on the benchmark in `folder`.

    `detector_score` and `norm` choose the weights of images, see `image_weights`. Raises InputError for files that are
    missing or invalid.
    """
    setup(cfg, trains=False)
    printed = _printed(cfg.row, SETS[kind_of(folder)], len(checkpoints)) if cfg.row else {}
    networks = [load_backbone(cfg.network, path, cfg) for path in checkpoints]
    benchmark = load_benchmark(folder)
    about = {"benchmark": benchmark.name, "network": cfg.network, "detector score": detector_score, "norm": norm}
    about |= {"images": len(benchmark.images), "templates": int(benchmark.template.max()) + 1}
    about |= {"genuine pairs": int(benchmark.same.sum()), "impostor pairs": int((~benchmark.same).sum())}
    # Other switches must not overwrite the results of the published protocol.
    stem = "tar" + "-no_detector_score" * (not detector_score) + "-no_norm" * (not norm)
    results = {}
    for checkpoint, (network, digest) in zip(checkpoints, networks, strict=True):
        name = f"{benchmark.name}-{checkpoint.resolve().parent.name}-{checkpoint.stem}-{digest[:8]}"
        place = Path(cfg.output) / "ijb" / name
        features = extract(place / "features.npy", benchmark, network, digest, cfg)
        weight = image_weights(features, benchmark.detector_score if detector_score else None, norm)
        embeddings = normalize(pool(features, weight, benchmark.template, benchmark.media))
        scores = pair_scores(embeddings, benchmark.pairs)
        results[name] = tar_at_far(scores[benchmark.same], scores[~benchmark.same], benchmark.people())
        about |= {"network": "onnx" if checkpoint.suffix == ".onnx" else cfg.network}
        about.pop("input", None)
        about |= {"checkpoint": str(checkpoint), "weights": digest, **input_of(network)}
        about |= {"row": cfg.row, "printed TAR in %": printed} if printed else {}
        write_json(place / f"{stem}.json", {**about, "at FAR": results[name]})
        write_text(place / f"{stem}.md", as_table({name: results[name]}, about, printed) + "\n")
        print(f"Written to {place}: {stem}.json, {stem}.md.")
    print(as_table(results, about, printed))


def _printed(row: str, benchmark: str, checkpoints: int) -> dict[str, float]:
    """Returns the TAR in percent that AdaDistill prints in `row`, by FAR; raises InputError if it prints none."""
    if checkpoints > 1:
        raise InputError(f"row = {row!r} is compared with one checkpoint: give one, not {checkpoints}.")
    rows = published.adadistill().values()
    found = {one.name: {far: tar for (name, far), tar in one.tar.items() if name == benchmark} for one in rows}
    found = {name: tar for name, tar in found.items() if tar}
    if row not in found:
        raise InputError(f"row = {row!r} has no printed TAR on {benchmark}. Set row to one of: {', '.join(found)}.")
    return found[row]


# Features -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Crops(Column):
    """A column of faces (N, 112, 112, 3), read and aligned on access; `arrays` holds the landmarks (N, 5, 2)."""

    paths: list[Path]

    def gather(self, rows: np.ndarray, _) -> torch.Tensor:
        return torch.from_numpy(np.stack([align(read_image(self.paths[k]), self.arrays[0][k]) for k in rows]))


def read_image(path: Path) -> np.ndarray:
    """Reads an RGB image (H, W, 3) uint8 of any size; raises InputError if the file is not an image."""
    try:
        return images.read(path, upright=True)[..., ::-1]
    except ValueError as error:
        raise InputError(f"{path} {error}: replace it and run again, the features computed so far are kept.") from error


def extract(path: Path, benchmark: Benchmark, network: nn.Module, digest: str, cfg: Config) -> np.ndarray:
    """Returns the features f(x) + f(flip x) of all images, (N, D) float32, memory-mapped from `path`.

    Features that `path` already holds are not computed again. `digest` is the SHA-256 of the network's weights.
    """

    def both(image: torch.Tensor) -> torch.Tensor:
        return network(image) + network(image.flip(-1))

    paths = [benchmark.crops / name for name in benchmark.images]
    made_from = {"landmarks": benchmark.digest, "weights": digest, **input_of(network)}
    crops = Crops((benchmark.landmarks,), paths=paths)
    embed_all([Output(path, made_from, both)], network, {"image": crops}, cfg)
    return read(path, (len(paths), size_of(network, cfg)), np.float32, checked=False)  # embed_all has checked it


# Templates and scores -------------------------------------------------------------------------------------------------


def image_weights(features: np.ndarray, detector_score: np.ndarray | None, norm: bool) -> np.ndarray:
    """Returns the weights (N,) float64 by which the features (N, D) are multiplied before they are pooled.

    With `norm` a feature keeps its length, which is small for poor images; without it, it is scaled to unit length.
    `detector_score` (N,), unless it is None, is another factor. The published protocol uses both.

    Raises InputError if a feature is not finite.
    """
    parts = cut(range(len(features)), ROWS)
    length = np.concatenate([np.linalg.norm(features[p.start : p.stop].astype(np.float64), axis=1) for p in parts])
    if not np.isfinite(length).all():
        raise InputError("Some features are not finite: the network gives NaN or infinity for some images.")
    weight = np.ones(len(length)) if norm else 1 / np.where(length == 0, 1, length)
    return weight if detector_score is None else weight * detector_score


def pool(features: np.ndarray, weight: np.ndarray, template: np.ndarray, media: np.ndarray) -> np.ndarray:
    """Pools weighted features into templates (T, D) float64, in order of their ids.

    A template is the sum over its media of the mean feature of each, so that all frames of a video together count as
    one photograph. A media id is only unique within its template. Templates are not scaled to unit length. Shapes:
    `features` (N, D); `weight`, `template` and `media` (N,).
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
    """Returns the cosine similarities (P,) of pairs of embeddings (T, D); `pairs` (P, 2) are their row numbers."""
    scores = np.empty(len(pairs))
    for part in tqdm(cut(range(len(pairs)), ROWS), "score pairs", leave=False, disable=None, delay=1):
        one, other = embeddings[pairs[part.start : part.stop].T]
        scores[part.start : part.stop] = np.einsum("pd,pd->p", one, other)
    return scores


def tar_at_far(genuine: np.ndarray, impostors: np.ndarray, people: Ends | None = None) -> dict[str, dict | None]:
    """Returns TAR (in [0, 1]) and threshold at each of FARS, from the scores (n,) of genuine and of impostor pairs.

    The 95 % interval of a TAR is that of a rate at a given threshold (`eval.intervals`); `people` are the identities of
    the genuine pairs, which count as independent without them.

    A pair is accepted if its score is at least the threshold, which is the smallest float64 at which the share of
    accepted impostor pairs does not exceed the FAR. The published script uses the nearest point of the ROC curve
    instead, which may exceed the FAR.

    The value is None with fewer than 3 / FAR impostor pairs: if none of n is accepted, the rate may still be as high
    as 3 / n (rule of three, 95 % confidence).
    """
    impostors = np.sort(impostors)[::-1]
    found: dict[str, dict | None] = {}
    for far, one_in in FARS.items():
        if len(impostors) < RULE_OF_THREE * one_in:
            found[far] = None
            continue
        # The first len // one_in scores may be accepted; the next one, and all equal to it, must be rejected.
        threshold = just_above(impostors[len(impostors) // one_in])
        low, high = Sampled.of(genuine < threshold, people).interval  # of the share that is rejected
        tar = float(np.mean(genuine >= threshold))
        found[far] = {"tar": tar, "interval": [1 - high, 1 - low], "threshold": threshold}
    return found


# Output ---------------------------------------------------------------------------------------------------------------


def as_table(results: dict[str, dict], about: dict, printed: dict[str, float] | None = None) -> str:
    """Returns a Markdown table of TAR in percent with 95 % intervals; a dash marks a FAR that is not resolved.

    If `printed` holds a row of the paper, TAR in percent by FAR, two more lines show it and the difference from it.
    """
    rows = [["TAR in % at FAR", *FARS]]
    for name, found in results.items():
        rows.append([name, *(f"{100 * point['tar']:.2f}" if point else "-" for point in found.values())])
        rows.append(["95 % interval", *(_interval(point) if point else "" for point in found.values())])
    if printed:
        (found,) = results.values()
        both = {far: (found[far], printed.get(far)) for far in FARS}
        rows.append(["printed", *("" if tar is None else f"{tar:.2f}" for _, tar in both.values())])
        apart = [None if point is None or tar is None else 100 * point["tar"] - tar for point, tar in both.values()]
        rows.append(["difference", *("" if value is None else f"{value:+.2f}" for value in apart)])
    width = max(len(row[0]) for row in rows)
    wide = max(len(cell) for row in rows for cell in row[1:])
    lines = [f"| {row[0].ljust(width)} | {' | '.join(cell.rjust(wide) for cell in row[1:])} |" for row in rows]
    lines.insert(1, f"|{'-' * (width + 2)}|{('-' * (wide + 1) + ':|') * len(FARS)}")
    counts = ", ".join(f"{about[name]:,} {name}" for name in ("images", "templates", "genuine pairs", "impostor pairs"))
    switches = ", ".join(f"{name} {'on' if about[name] else 'off'}" for name in ("detector score", "norm"))
    text = [f"{about['benchmark']} 1:1: {counts}; {switches}.", "", *lines, "", INTERVALS]
    text += ["", f"Printed: AdaDistill's {about['row']}."] if printed else []
    if any(point is None for found in results.values() for point in found.values()):
        limit = RULE_OF_THREE / about["impostor pairs"]
        text += [
            "",
            f"A dash: not resolved, so few impostor pairs cannot show a FAR below {limit:.1e} (rule of three).",
        ]
    return "\n".join(text)


def _interval(point: dict) -> str:
    low, high = point["interval"]
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def command(argv: list[str] | None = None) -> None:
    """Runs `main` with a command line; on bad input prints one sentence and exits with status 2."""
    parser = argparse.ArgumentParser(
        description="TAR at FAR of trained networks on IJB-B or IJB-C, 1:1.",
        epilog="Also every setting of config/config.py: --network, --device, --infer_batch_size, --output, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--folder", type=path_of, required=True, help="holds meta and loose_crop")
    parser.add_argument(
        "--checkpoint", type=path_of, required=True, nargs="+", help="weights of --network, or .onnx files"
    )
    parser.add_argument("--no_detector_score", action="store_true", help="do not weight images by the detector's score")
    parser.add_argument("--no_norm", action="store_true", help="scale features to unit length before pooling")
    own, settings = parser.parse_known_args(argv)
    run(
        lambda cfg: main(own.folder, own.checkpoint, cfg, not own.no_detector_score, not own.no_norm),
        settings,
        alone=True,
    )


if __name__ == "__main__":
    command()
