"""Stage 2: trains the teachers, each on one ethnicity (or, for the baseline, on one quarter of every ethnicity).

Reads   <data>, <pairs>; for the baseline the split of stage 1
Writes  <output>/<setting>/<network>/teachers/<teacher>/
Run     python train.py [--ethnicity African] [--is_teacher_baseline]
"""

import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from eval.verification import Pairs, load_pairs, validator
from utils.dataset import Faces
from utils.engine import announce, fit, run, setup
from utils.losses import build_header
from utils.store import ImageStore


def main(cfg: Config) -> None:
    teachers, pairs, store = cfg.selected_teachers, load_pairs(cfg), ImageStore(cfg)
    for teacher in teachers:
        train_teacher(cfg, teacher, pairs, store)
    announce(cfg, cfg.network_dir / "teachers", "extract_all.py")


def train_teacher(cfg: Config, teacher: str, pairs: dict[str, Pairs], store: ImageStore) -> None:
    setup(cfg)
    faces = Faces(cfg, teacher=teacher, flip=True, store=store)
    backbone = build_backbone(cfg.network, cfg.embedding_size)
    header = build_header(cfg.loss, cfg.embedding_size, faces.num_classes, cfg.s, cfg.m, cfg.std)
    validate = validator(backbone, pairs, cfg, best_on="" if cfg.is_teacher_baseline else teacher)

    def losses(image, label):
        embedding = F.normalize(backbone(image))
        return {"margin": F.cross_entropy(header(embedding, label), label)}

    print(f"Teacher {teacher}: {len(faces):,} images of {faces.num_classes:,} identities.")
    fit(losses, faces, cfg.teacher_dir(teacher), cfg, backbone, header, schedule=cfg.schedule, validate=validate)


if __name__ == "__main__":
    run(main)
