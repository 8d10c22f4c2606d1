"""Stage 7 (EAF-KD): trains a student on the multi-teacher embeddings and on the identity labels with ElasticArcFace.

With --ada_source teacher, the targets are the embeddings of one teacher. If they have another size than the student's,
a linear projection of the student's is trained with it.

Reads   <data>, <pairs>, <output>/<setting>/<network>/adaptors/<SL|DuL|DLDPO>/ (or embeddings/<teacher>.npy)
Writes  <output>/<setting>/<network>/students/<student network>/<adaptor or teacher>-EAF-KD/
Run     python KD_CEL.py [--is_dual_layer] [--has_dropout] [--ada_source teacher --ethnicity African]
"""

import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from eval.verification import validator
from utils.data.faces import Faces
from utils.data.pairs import load_pairs
from utils.losses import build_header
from utils.process import announce, run, setup
from utils.training.engine import fit, is_given
from utils.training.start import build_projection


def main(cfg: Config) -> None:
    setup(cfg)
    folder = cfg.student_dir("EAF-KD")
    if is_given(folder):
        return
    pairs = load_pairs(cfg)
    faces = Faces(cfg, target=True, flip=True, pairs=pairs)
    student = build_backbone(cfg.student_network, cfg.embedding_size)
    project = build_projection(cfg, faces)
    header = build_header("ElasticArcFace", faces.num_classes, cfg, "EAF-KD")

    def losses(image, label, target):
        embedding = F.normalize(student(image))
        return {
            "eaf": header.loss(embedding, label),
            "kd": cfg.loss_lambda * F.mse_loss(project(embedding), target),
        }

    validate = validator(student, pairs, cfg)
    fit(losses, faces, folder, cfg, student, header, kind="EAF-KD", projection=project, validate=validate)
    announce(cfg, folder, "-m eval.evaluation")


if __name__ == "__main__":
    run(main)
