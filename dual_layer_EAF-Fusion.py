"""Stage 5: trains a dual-layer adaptor on the concatenated embeddings of the teachers, then applies it.

Trains DuL or, with --has_dropout, DLDPO: a DuL with dropout 0.2 before its activation. The multi-teacher embeddings of
all images are the targets of the students.

Reads   <output>/<setting>/<network>/embeddings/
Writes  <output>/<setting>/<network>/adaptors/<DuL|DLDPO>/, which includes the multi-teacher embeddings
Run     python dual_layer_EAF-Fusion.py [--has_dropout] [--flip_targets]
"""

from dataclasses import replace

import torch.nn.functional as F

from backbones import build_adaptor
from config.config import Config
from utils.data.faces import Faces
from utils.losses import build_header
from utils.process import announce, run, setup
from utils.training.engine import fit
from utils.training.extract import embed_targets


def main(cfg: Config) -> None:
    setup(cfg)
    name = "DLDPO" if cfg.has_dropout else "DuL"
    faces = Faces(cfg, inputs=cfg.teachers)
    adaptor = build_adaptor(name, cfg, faces.columns["embedding"].width)
    header = build_header("ElasticArcFace", faces.num_classes, cfg, name)

    def losses(embedding, label):
        return {"eaf": header.loss(F.normalize(adaptor(embedding)), label)}

    fit(losses, faces, cfg.adaptor_dir(name), cfg, adaptor, header, kind=name)
    embed_targets(name, adaptor, faces, cfg)
    announce(replace(cfg, is_dual_layer=True), cfg.adaptor_dir(name), "KD_alone.py")


if __name__ == "__main__":
    run(main)
