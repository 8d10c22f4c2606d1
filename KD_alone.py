"""Stage 6 (a-KD): trains a student on the multi-teacher embeddings only, without identity labels.

With --ada_source teacher, the targets are the embeddings of one teacher: vanilla KD. If they have another size than the
student's, a linear projection of the student's is trained with it.

Reads   <data>, <pairs>, <output>/<setting>/<network>/adaptors/<SL|DuL|DLDPO>/ (or embeddings/<teacher>.npy)
Writes  <output>/<setting>/<network>/students/<student network>/<adaptor or teacher>-a-KD/
Run     python KD_alone.py [--is_dual_layer] [--has_dropout] [--ada_source teacher --ethnicity African]
"""

import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from eval.verification import validator
from utils.data.faces import Faces
from utils.data.pairs import load_pairs
from utils.process import announce, run, setup
from utils.training.engine import fit, is_given
from utils.training.start import build_projection


def main(cfg: Config) -> None:
    setup(cfg)
    folder = cfg.student_dir("a-KD")
    if is_given(folder):
        return
    pairs = load_pairs(cfg)
    faces = Faces(cfg, target=True, flip=True, pairs=pairs)
    student = build_backbone(cfg.student_network, cfg.embedding_size)
    project = build_projection(cfg, faces)

    def losses(image, target):
        return {"kd": cfg.loss_lambda * F.mse_loss(project(F.normalize(student(image))), target)}

    validate = validator(student, pairs, cfg)
    fit(losses, faces, folder, cfg, student, kind="a-KD", projection=project, validate=validate)
    announce(cfg, folder, "KD_CEL.py")


if __name__ == "__main__":
    run(main)
