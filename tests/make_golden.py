"""Makes tests/golden_heads.json and tests/golden_adadistill.json from the formulas of the papers, in float64.

The files hold logits, loss and gradients of the margin headers, and three successive steps of AdaDistill with its
centres. The formulas are computed in their plain form (arc cosine, one sample and one class at a time) and the
gradients by central differences, so that no code is shared with utils.losses.

Run     python -m tests.make_golden
"""

import json
import math
from pathlib import Path

import numpy as np

BATCH, DIMENSIONS, CLASSES = 4, 5, 6
LABEL = [2, 0, 5, 2]
MARGINS = [0.43, 0.61, 0.50, 0.38]
S = 16.0


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings (4, 5) and kernel (5, 6) that reach every branch, without a random generator."""
    embeddings = np.array([[math.sin(1.7 * i + 0.9 * j + 1) for j in range(DIMENSIONS)] for i in range(BATCH)])
    kernel = np.array([[math.cos(2.3 * i - 1.1 * j + 0.5) for j in range(CLASSES)] for i in range(DIMENSIONS)])
    embeddings[0] += 2 * kernel[:, LABEL[0]]  # close to its class: its negatives are easy
    embeddings[3] -= 5 * kernel[:, LABEL[3]]  # beyond pi - m: CurricularFace's target is linear there
    return embeddings, kernel


def elastic_arc(theta, is_target, row, cosines):
    return math.cos(theta + MARGINS[row]) if is_target else math.cos(theta)


def elastic_cos(theta, is_target, row, cosines):
    return math.cos(theta) - MARGINS[row] if is_target else math.cos(theta)


def arc(theta, is_target, row, cosines):
    return math.cos(theta + 0.5) if is_target else math.cos(theta)


def cos(theta, is_target, row, cosines):
    return math.cos(theta) - 0.35 if is_target else math.cos(theta)


def curricular(theta, is_target, row, cosines, m=0.5):
    targets = [cosines[k][LABEL[k]] for k in range(BATCH)]
    t = 0.01 * FROZEN_MEAN[0] if FROZEN_MEAN else 0.01 * sum(targets) / BATCH
    target = math.acos(targets[row])
    if is_target:
        return math.cos(theta + m) if theta < math.pi - m else math.cos(theta) - m * math.sin(m)
    value = math.cos(theta)
    return value * (t + value) if value > math.cos(target + m) else value


FROZEN_MEAN: list[float] = []  # gradients treat the running mean as a constant


def logits(function, embeddings, kernel):
    cosines = [
        [
            float(np.dot(embeddings[i], kernel[:, j]) / np.linalg.norm(embeddings[i]) / np.linalg.norm(kernel[:, j]))
            for j in range(CLASSES)
        ]
        for i in range(BATCH)
    ]
    return [
        [S * function(math.acos(cosines[i][j]), j == LABEL[i], i, cosines) for j in range(CLASSES)]
        for i in range(BATCH)
    ], cosines


def loss(function, embeddings, kernel):
    rows, _ = logits(function, embeddings, kernel)
    return sum(math.log(sum(math.exp(v) for v in rows[i])) - rows[i][LABEL[i]] for i in range(BATCH)) / BATCH


def gradient(function, embeddings, kernel, which, step=1e-6):
    result = np.zeros_like((embeddings, kernel)[which])
    for place in np.ndindex(result.shape):
        values = []
        for sign in (1, -1):
            moved = [embeddings.copy(), kernel.copy()]
            moved[which][place] += sign * step
            values.append(loss(function, *moved))
        result[place] = (values[0] - values[1]) / (2 * step)
    return result


STEP_LABELS = ([2, 0, 2, 5], [1, 1, 1, 1], [5, 2, 0, 3])
"""Labels of three batches: a class twice, one class four times, and classes with centres that were updated before."""


def steps_inputs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns three batches (4, 5) of student and of teacher embeddings; the third samples' cosine is negative."""
    student = [
        np.array([[math.sin(1.3 * i + 0.7 * j + 2 * k + 1) for j in range(DIMENSIONS)] for i in range(BATCH)])
        for k in range(3)
    ]
    teacher = [
        np.array(
            [
                [math.sin(1.3 * i + 0.7 * j + 2 * k + 1.4) + 0.2 * math.cos(3 * j + i) for j in range(DIMENSIONS)]
                for i in range(BATCH)
            ]
        )
        for k in range(3)
    ]
    for batch in teacher:
        batch[2] *= -1
    return student, teacher


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(sum(one * other) / math.sqrt(sum(one * one)) / math.sqrt(sum(other * other)))


def ada_logits(student: np.ndarray, centres: np.ndarray, label: list[int], margin: str) -> list[list[float]]:
    rows = []
    for i in range(BATCH):
        cosines = [cosine(student[i], centres[:, j]) for j in range(CLASSES)]
        target = cosines[label[i]]
        cosines[label[i]] = math.cos(math.acos(target) + 0.45) if margin == "arc" else target - 0.35
        rows.append([S * value for value in cosines])
    return rows


def ada_loss(student: np.ndarray, centres: np.ndarray, label: list[int], margin: str) -> float:
    rows = ada_logits(student, centres, label, margin)
    return sum(math.log(sum(math.exp(v) for v in rows[i])) - rows[i][label[i]] for i in range(BATCH)) / BATCH


def ada_steps(margin: str, weighted: bool) -> list[dict]:
    """Computes Eq. 6 with alpha of Eq. 8 (`weighted`) or 7, one sample at a time, then the margin softmax of Eq. 4."""
    centres, steps = inputs()[1], []
    for student, teacher, label in zip(*steps_inputs(), STEP_LABELS, strict=True):
        alphas = []
        for i in range(BATCH):
            unit = teacher[i] / np.linalg.norm(teacher[i])
            alpha = cosine(student[i], teacher[i])
            if weighted:
                alpha *= cosine(centres[:, label[i]], teacher[i])
            alphas.append(min(1.0, max(0.0, alpha)))
            centres[:, label[i]] = alphas[i] * centres[:, label[i]] + (1 - alphas[i]) * unit
        gradient = np.zeros_like(student)
        for place in np.ndindex(gradient.shape):
            moved = [student.copy(), student.copy()]
            moved[0][place] += 1e-6
            moved[1][place] -= 1e-6
            losses = [
                ada_loss(one, centres, label, margin) for one in moved
            ]  # gradients treat the centres as constants
            gradient[place] = (losses[0] - losses[1]) / 2e-6
        steps.append(
            {
                "alpha": round(sum(alphas) / BATCH, 9),
                "logits": np.round(ada_logits(student, centres, label, margin), 9).tolist(),
                "loss": round(ada_loss(student, centres, label, margin), 9),
                "gradient": np.round(gradient, 7).tolist(),
                "centres": np.round(centres, 9).tolist(),
            }
        )
    return steps


def main() -> None:
    embeddings, kernel = inputs()
    golden = {}
    for name, function in {
        "ElasticArcFace": elastic_arc,
        "ElasticCosFace": elastic_cos,
        "ArcFace": arc,
        "CosFace": cos,
        "CurricularFace": curricular,
    }.items():
        FROZEN_MEAN.clear()
        rows, cosines = logits(function, embeddings, kernel)
        FROZEN_MEAN.append(sum(cosines[k][LABEL[k]] for k in range(BATCH)) / BATCH)
        golden[name] = {
            "logits": np.round(rows, 9).tolist(),
            "loss": round(loss(function, embeddings, kernel), 9),
            "embeddings_gradient": np.round(gradient(function, embeddings, kernel, 0), 7).tolist(),
            "kernel_gradient": np.round(gradient(function, embeddings, kernel, 1), 7).tolist(),
        }
    steps = {
        f"{margin}{' weighted' if weighted else ''}": ada_steps(margin, weighted)
        for margin in ("arc", "cos")
        for weighted in (True, False)
    }
    for name, values in (("golden_heads.json", golden), ("golden_adadistill.json", steps)):
        Path(__file__).with_name(name).write_text(json.dumps(values, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
