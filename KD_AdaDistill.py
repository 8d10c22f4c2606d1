"""Stage 8 (AdaDistill): trains a compact student against class centres that follow the teacher's embeddings.

The centres get no gradient. ArcDistill and CosDistill freeze the centres that the source was trained with. If
a teacher's embeddings have another size than the student's, a linear projection of the student's is trained with it.

Reads   <data>, <pairs>, <output>/<setting>/<network>/adaptors/<SL|DuL|DLDPO>/ (or embeddings/<teacher>.npy), both views
Writes  <output>/<setting>/<network>/students/<student network>/<adaptor or teacher>-<ada_loss>/
Run     python KD_AdaDistill.py [--ada_loss AdaCosDistill] [--is_dual_layer] [--ada_source teacher --ethnicity African]
"""

import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from eval.verification import validator
from utils.data.faces import Faces
from utils.data.pairs import load_pairs
from utils.process import announce, run, setup
from utils.training.centres import build_distiller
from utils.training.engine import fit, is_given
from utils.training.start import build_projection


def main(cfg: Config) -> None:
    setup(cfg)
    cfg = cfg.for_adadistill
    folder = cfg.student_dir(cfg.ada_method)
    if is_given(folder):
        return
    pairs = load_pairs(cfg)
    faces = Faces(cfg, target=True, flip=True, pairs=pairs)
    student = build_backbone(cfg.ada_student_network, cfg.embedding_size)
    project = build_projection(cfg, faces)
    header, centres = build_distiller(cfg, faces)
    faces.sources |= centres

    def losses(image, label, target, repeats):
        loss = header.loss(project(F.normalize(student(image))), target, label, repeats=repeats)
        return {"ada": loss, "alpha": header.alpha}

    print(f"Student {cfg.ada_student_network} learns from {cfg.source}.")
    kind, measures, check = cfg.ada_method, ("alpha",), validator(student, pairs, cfg)
    fit(losses, faces, folder, cfg, student, header, kind=kind, projection=project, measures=measures, validate=check)
    announce(cfg, folder, "-m eval.evaluation")


if __name__ == "__main__":
    run(main)
