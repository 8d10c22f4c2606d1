"""Stage 2: trains the teachers, each on one ethnicity (for the baseline, on one quarter of every ethnicity).

With --is_standalone, trains one network, All, on all images. The data may then have no ethnicities (--ethnicities "").

Reads   <data>, <pairs>; for the baseline the split of stage 1
Writes  <output>/<setting>/<network>/teachers/<teacher>/
Run     python train.py [--ethnicity African] [--is_teacher_baseline] [--is_standalone]
"""

from dataclasses import replace

import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from eval.verification import validator
from utils.data.faces import Faces
from utils.data.pairs import Pairs, load_pairs
from utils.losses import build_header
from utils.process import announce, run, setup
from utils.training.engine import check_run, fit


def main(cfg: Config) -> None:
    setup(cfg)
    pairs, store, faces = load_pairs(cfg), None, {}
    for teacher in cfg.selected_teachers:  # check all teachers before the first one is trained
        faces[teacher] = Faces(cfg, teacher=teacher, flip=True, pairs=pairs, store=store)
        store = faces[teacher].store
        check_run(faces[teacher], cfg.teacher_dir(teacher), cfg, "teacher")
    for teacher in faces:
        train_teacher(cfg, teacher, faces[teacher], pairs)
    announce(replace(cfg, init_from=None, init_header=None, freeze=""), cfg.network_dir / "teachers", "extract_all.py")


def train_teacher(cfg: Config, teacher: str, faces: Faces, pairs: dict[str, Pairs]) -> None:
    setup(cfg)
    backbone = build_backbone(cfg.network, cfg.embedding_size)
    header = build_header(cfg.loss, faces.num_classes, cfg, "teacher")
    validate = validator(backbone, pairs, cfg, best_on=cfg.group_of(teacher))

    def losses(image, label):
        return {"margin": header.loss(F.normalize(backbone(image)), label)}

    print(f"Teacher {teacher}: {len(faces):,} images of {faces.num_classes:,} identities.")
    fit(losses, faces, cfg.teacher_dir(teacher), cfg, backbone, header, kind="teacher", validate=validate)


if __name__ == "__main__":
    run(main)
