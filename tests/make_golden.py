"""Makes tests/golden_heads.json: logits, loss and gradients of the margin heads, from the formulae in float64.

The formulae are those of FACTS 2.1 and 3 in their plain form (arc cosine, one sample and one class at a time), the
gradients are central differences: nothing here shares a line with utils.losses. Run: python -m tests.make_golden
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
    """Embeddings (4, 5) and kernel (5, 6), smooth numbers that need no random generator and reach every branch."""
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


FROZEN_MEAN: list[float] = []  # the running mean is no function of the input where gradients are taken


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
    path = Path(__file__).with_name("golden_heads.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
