"""Measures what AdaDistill saves by precomputing the teacher's embeddings instead of running the teacher on each batch.

Both ways train mobilefacenet with AdaDistill from an iresnet50 by the same training loop, one after the other in one
process; only the source of the teacher's embedding differs. Rates are medians of five after warm-up, projected to a run
of 26 epochs; ours includes the one pass that embeds both views (plain and flipped) of every image.

Reads   nothing; images are noise
Writes  benchmarks/results/distillation_<device>.json and .md
Run     python -m benchmarks.distillation
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from backbones import build_backbone
from benchmarks.measuring import RESULTS, made_by, rates, write
from config.config import Config
from utils.data.columns import Column
from utils.environment import device_of, versions
from utils.losses import AdaDistill
from utils.process import setup
from utils.stages.rates import training_rate
from utils.training.extract import Output, embed_all

DEVICE = device_of(Config())
TEACHER, STUDENT = "iresnet50", "mobilefacenet"
CLASSES = 85_742  # of MS1MV2
PUBLISHED_EPOCHS = 26


def measure(images: int, batch: int, work: Path, teacher: str = TEACHER, classes: int = CLASSES) -> dict[str, float]:
    """Returns images per second of both ways, of the embedding pass, and of the student's step alone."""
    cfg = Config(student_network=STUDENT, batch_size=batch, infer_batch_size=batch)
    setup(cfg)
    random = np.random.default_rng(0)
    network = build_backbone(teacher).eval()
    seen = random.integers(0, 256, (images, 112, 112, 3), np.uint8)
    columns = {
        "image": seen[:batch],
        "label": random.integers(0, classes, batch),
        "target": random.normal(size=(batch, 512)).astype(np.float32),
    }
    repeats = int(np.bincount(columns["label"]).max())

    def trained(embedding) -> float:
        student, header = build_backbone(STUDENT), AdaDistill(512, classes)

        def losses(image, label, target):
            loss = header.loss(F.normalize(student(image)), embedding(image, target), label, repeats=repeats)
            return {"ada": loss, "alpha": header.alpha}

        return training_rate(losses, "AdaArcDistill", columns, cfg, student, header, measures=("alpha",))

    @torch.no_grad()
    def online(image, target):
        return F.normalize(network(image))

    def views() -> None:
        functions = {"plain": lambda image: network(image), "flipped": lambda image: network(image.flip(-1))}
        outputs = [Output(work / f"{name}.npy", {}, function) for name, function in functions.items()]
        for output in outputs:
            output.path.unlink(missing_ok=True)
        embed_all(outputs, network, {"image": Column((seen,))}, cfg)

    network.to(DEVICE, memory_format=torch.channels_last)
    found = {"teacher on every batch": trained(online)}
    found["student's step, teacher read"] = trained(lambda image, target: target)
    found["both views embedded once"] = rates(images, views)[0]
    step, once = found["student's step, teacher read"], found["both views embedded once"]
    found["ours, 26 epochs"] = 1 / (1 / step + 1 / once / PUBLISHED_EPOCHS)
    return found


def report(found: dict[str, float], about: str) -> str:
    """Formats the rates, and the speedup over a run of 26 epochs, as Markdown."""
    ratio = found["ours, 26 epochs"] / found["teacher on every batch"]
    share = found["ours, 26 epochs"] / found["student's step, teacher read"]
    lines = [
        f"# AdaDistill, {STUDENT} from {TEACHER}: the teacher read, and on every batch",
        "",
        about,
        "",
        "| | images/s |",
        "|---|--:|",
        *(f"| {name} | {rate:,.1f} |" for name, rate in found.items()),
        "",
        f"Over {PUBLISHED_EPOCHS} epochs ours is {ratio:.1f} times as fast; {share:.0%} of the student's step alone.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    images, batch = (64, 16) if DEVICE.type == "cpu" else (25_600, 128)
    with tempfile.TemporaryDirectory() as work:
        found = measure(images, batch, Path(work))
    conditions = versions(Config())
    about = f"Batch {batch}, {CLASSES:,} classes. {made_by('benchmarks.distillation', conditions)}"
    page = report(found, about)
    path = RESULTS / f"distillation_{DEVICE.type}.json"
    write(path, {"versions": conditions, "images per second": found}, page)
    print(page)


if __name__ == "__main__":
    main()
