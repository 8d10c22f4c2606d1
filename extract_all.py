"""Stage 3: the unit-length embeddings of all images, of every ethnicity, by each teacher.

Reads   <data>, <output>/<setting>/<network>/teachers/<teacher>/
Writes  <output>/<setting>/<network>/embeddings/<teacher>.npy; with flip_targets those of the flipped images too
Run     python extract_all.py [--ethnicity African]
"""

import torch.nn.functional as F
from torch import nn

from backbones import load_backbone
from config.config import Config
from utils.checkpoint import need_weights
from utils.dataset import Faces
from utils.embeddings import origin
from utils.extract import embed_all
from utils.process import announce, run, setup


def main(cfg: Config) -> None:
    setup(cfg)
    names = cfg.selected_teachers
    paths = need_weights([cfg.teacher_dir(name) for name in names], cfg.weights)
    teachers = [load_backbone(cfg.network, path, cfg) for path in paths]
    faces = Faces(cfg)
    for name, (teacher, digest) in zip(names, teachers, strict=True):
        for flipped in cfg.target_views:
            extract(cfg, faces, name, teacher, digest, flipped)
    announce(cfg, cfg.network_dir / "embeddings", "fc_EArc.py")


def extract(cfg: Config, faces: Faces, name: str, teacher: nn.Module, digest: str, flipped: bool) -> None:
    def embedding(image):
        return F.normalize(teacher(image.flip(-1) if flipped else image))

    made_from = origin(faces.store.digest, digest, flipped)
    embed_all(embedding, teacher, faces.columns, cfg.teacher_embeddings(name, flipped), made_from, cfg)


if __name__ == "__main__":
    run(main)
