"""Stage 3: computes the unit-length embeddings of all images, of every ethnicity, by each teacher.

Reads   <data>, <output>/<setting>/<network>/teachers/<teacher>/
Writes  <output>/<setting>/<network>/embeddings/<teacher>.npy; also <teacher>_flipped.npy if flip_targets or standalone
Run     python extract_all.py [--ethnicity African] [--flip_targets]
        python extract_all.py --teacher a.onnx,b.pth,...    (files instead of run folders, in the order of the teachers)
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from config.config import Config
from utils.data.embeddings import origin
from utils.data.faces import Faces
from utils.process import announce, run, setup
from utils.training.extract import Output, embed_all
from utils.weights import given_teachers, input_of, load_backbone, need_weights


def main(cfg: Config) -> None:
    setup(cfg, trains=False)
    names = cfg.selected_teachers
    paths = given_teachers(cfg, names) or need_weights([cfg.teacher_dir(name) for name in names], cfg.weights)
    teachers = [load_backbone(cfg.network, path, cfg) for path in paths]
    faces = Faces(cfg)
    for name, (teacher, digest) in zip(names, teachers, strict=True):
        extract(cfg, faces, name, teacher, digest)
    alone = cfg.setting == "standalone"  # one teacher needs no adaptor
    following = replace(cfg, teacher=(), ada_source="teacher" if alone else cfg.ada_source)
    announce(following, cfg.network_dir / "embeddings", "KD_AdaDistill.py" if alone else "fc_EArc.py")


def extract(cfg: Config, faces: Faces, name: str, teacher: nn.Module, digest: str) -> None:
    def output(flipped: bool) -> Output:
        def embedding(image):
            return F.normalize(teacher(image.flip(-1) if flipped else image))

        made_from = origin(faces.store.digest, digest, flipped) | input_of(teacher)
        return Output(cfg.teacher_embeddings(name, flipped), made_from, embedding)

    views = (False, True) if cfg.setting == "standalone" else cfg.target_views
    embed_all([output(flipped) for flipped in views], teacher, {"image": faces.columns["image"]}, cfg)


if __name__ == "__main__":
    run(main)
