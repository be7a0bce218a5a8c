"""A second simulated detector of the drawn faces: what another laboratory's tool would say about the same image.

It knows eight AUs (those of OpenFace 3.0), is noisier and more reserved than `tag.synth.params.detect`, and draws its
regions tighter and a little off. So no model trained with the first detector can reach IoU 1 against it, and how far
one can get is a question with an answer (tools/check_grounding.py).
"""

from dataclasses import replace

import numpy as np

from tag.au.openface import AUS_3
from tag.boxes import CANVAS_SIZE, Box
from tag.data.records import AU, NUM_CANDIDATES, Record
from tag.synth.dataset import describe
from tag.synth.geometry import au_boxes
from tag.synth.params import Face

NOISE = 0.1  # standard deviation of its scores about the true intensity
THRESHOLD = 0.5
SHRINK = 0.88  # its regions' sides, as a share of the first detector's
OFFSET = 0.04  # standard deviation of their shift, as a share of those sides


def describe_second(face: Face, split: str) -> Record:
    """The face's record with the second detector's AUs, scores and boxes; it has no trace."""
    rng = np.random.default_rng([face.seed, 6])
    boxes, aus = au_boxes(face), []
    for name in AUS_3:
        score = round(float(np.clip(face.aus[name] + rng.normal(0, NOISE), 0, 1)), 3)
        box = second_box(boxes[name], rng)
        if score >= THRESHOLD:
            aus.append(AU(name, score, box))
    aus.sort(key=lambda a: -a.score)
    candidates = [a.au for a in aus[:NUM_CANDIDATES]]
    return replace(describe(face, split), aus=aus, candidates=candidates, trace=None, detector="synth-second")


def second_box(box: Box, rng: np.random.Generator) -> Box:
    """`box` shrunk about its centre and shifted, on the canvas and at least 4 units wide and high."""
    x1, y1, x2, y2 = box
    centre = np.array([(x1 + x2) / 2, (y1 + y2) / 2]) + rng.normal(0, OFFSET, 2) * (x2 - x1, y2 - y1)
    half = np.maximum(np.array([x2 - x1, y2 - y1]) * SHRINK / 2, 2)
    low = np.clip(np.round(centre - half), 0, CANVAS_SIZE - 5)
    high = np.clip(np.round(centre + half), low + 4, CANVAS_SIZE - 1)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
