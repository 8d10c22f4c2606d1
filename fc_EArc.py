"""Stage 4: trains the single-layer adaptor (SL) on the concatenated embeddings of the teachers, then applies it.

The multi-teacher embeddings of all images are the targets of the students.

Reads   <output>/<setting>/<network>/embeddings/
Writes  <output>/<setting>/<network>/adaptors/SL/, which includes the multi-teacher embeddings of all images
Run     python fc_EArc.py [--flip_targets]
"""

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
    faces = Faces(cfg, inputs=cfg.teachers)
    adaptor = build_adaptor("SL", cfg, faces.columns["embedding"].width)
    header = build_header("ElasticArcFace", faces.num_classes, cfg, "SL")

    def losses(embedding, label):
        return {"eaf": header.loss(F.normalize(adaptor(embedding)), label)}

    fit(losses, faces, cfg.adaptor_dir("SL"), cfg, adaptor, header, kind="SL")
    embed_targets("SL", adaptor, faces, cfg)
    announce(cfg, cfg.adaptor_dir("SL"), "dual_layer_EAF-Fusion.py")


if __name__ == "__main__":
    run(main)
