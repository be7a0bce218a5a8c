"""What a drawn face is: class, action units, identity, pose and light, all sampled from one integer seed.

The class model is small enough for its Bayes-optimal accuracy to be computed exactly (`bayes_accuracy`): given the
class, every AU is present or absent on its own, and the intensity of a present AU does not depend on the class. So a
reader who knows which AUs are present knows everything that a face says about its class.
"""

from dataclasses import dataclass, field

import numpy as np

from tag.au.facs import PROTOTYPES
from tag.labels import CLASSES

AUS = (
    *("AU1", "AU2", "AU4", "AU5", "AU6", "AU7", "AU9", "AU10"),
    *("AU12", "AU14", "AU15", "AU17", "AU20", "AU23", "AU25", "AU26"),
)
DOMAINS = ("shaded", "lineart", "grey")

P_KEEP = 0.83  # an AU of the prototype is present
P_SPURIOUS = 0.08  # an AU outside the prototype is present
P_SPURIOUS_NEUTRAL = 0.035  # the same on a neutral face
MIN_INTENSITY = 0.2  # of a present AU: some are too weak for the detector
DETECTOR_NOISE = 0.04
DETECTOR_THRESHOLD = 0.35


@dataclass(frozen=True)
class Habits:
    """How the people of a domain show expressions. Probabilities not named here are the common ones above.

    keep: AU -> probability that it is present where it is in the prototype. spurious: AU -> the same where it is not
    (neutral faces aside). power: intensities are t ** power of a t in [0, 1], so below 1 is strong and above is weak.
    """

    keep: dict[str, float] = field(default_factory=dict)
    spurious: dict[str, float] = field(default_factory=dict)
    power: float = 1.0


# The data sets of this field differ in how they were drawn from the world, not only in how they look: posed or
# candid, strong or weak, open mouths or closed ones. So do the domains.
HABITS = {
    "shaded": Habits(),
    # Drawn to be read: brows and mouths are never forgotten and large; folds of the skin often are left out.
    "lineart": Habits(
        keep=dict.fromkeys(("AU1", "AU2", "AU4", "AU12", "AU15", "AU25", "AU26"), 0.93)
        | dict.fromkeys(("AU6", "AU7", "AU9", "AU10", "AU14", "AU23"), 0.68),
        power=0.7,
    ),
    # Candid and weak: mouths tend to stay closed, and people press lips and chin whatever they feel.
    "grey": Habits(
        keep=dict.fromkeys(("AU25", "AU26", "AU5"), 0.7),
        spurious={"AU14": 0.2, "AU17": 0.2, "AU25": 0.04},
        power=1.3,
    ),
}

HAIR_STYLES = ("bald", "short", "parted", "long", "curly", "bun")
_SKINS = ((255, 224, 196), (241, 194, 160), (224, 172, 130), (198, 134, 92), (150, 98, 66), (104, 68, 48))
_HAIRS = ((36, 28, 26), (72, 46, 30), (120, 76, 40), (196, 152, 84), (150, 60, 32), (150, 148, 146), (60, 54, 60))
_IRISES = ((84, 56, 34), (52, 36, 28), (70, 104, 140), (76, 110, 70), (112, 88, 50))


@dataclass(frozen=True)
class Identity:
    """Looks that do not change with the expression. Lengths in face units (half a face width is about 0.9)."""

    width: float
    jaw: float  # exponent of the jaw line: low is square, high is pointed
    chin_y: float
    eye_x: float
    eye_y: float
    eye_w: float
    eye_h: float
    iris_r: float
    brow_gap: float  # brow above the eye
    brow_arch: float
    brow_slope: float
    brow_thick: float
    nose_w: float
    nose_y: float
    mouth_y: float
    mouth_w: float
    lip_upper: float
    lip_lower: float
    hairline: float
    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    iris: tuple[float, float, float]
    lips: tuple[float, float, float]
    hair_style: str


@dataclass(frozen=True)
class Pose:
    """Face units -> the unit square: yaw about the vertical axis, roll in the image, scale, centre."""

    roll: float  # degrees
    yaw: float  # degrees
    scale: float  # of one face unit, as a fraction of the image side
    x: float
    y: float


@dataclass(frozen=True)
class Light:
    """Direction of the light (x right, y down), how much of it is directional, and how bright it is."""

    x: float
    y: float
    contrast: float
    gain: float
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Face:
    """One face, ready to draw. `aus` holds all 16 intensities, 0 for an absent AU."""

    seed: int
    label: str
    aus: dict[str, float]
    identity: Identity
    pose: Pose
    light: Light
    gaze: tuple[float, float]
    occlusion: str  # "", "glasses", "hand" or "fringe"
    noise: float  # standard deviation, grey levels
    blur: float  # pixels
    domain: str = "shaded"
    background: tuple[tuple[float, float, float], ...] = field(default=())  # four corner colours


def presence_probabilities(domain: str = "shaded") -> np.ndarray:
    """P(AU present | class) in a domain, (7, 16), rows as CLASSES, columns as AUS."""
    habits = HABITS[domain]
    table = np.tile([habits.spurious.get(name, P_SPURIOUS) for name in AUS], (len(CLASSES), 1))
    table[CLASSES.index("neutral")] = P_SPURIOUS_NEUTRAL
    for i, label in enumerate(CLASSES):
        for name in PROTOTYPES[label]:
            table[i, AUS.index(name)] = habits.keep.get(name, P_KEEP)
    return table


def class_posterior(present: np.ndarray, domain: str = "shaded") -> np.ndarray:
    """P(class | set of present AUs) for boolean rows (n, 16) -> (n, 7)."""
    p = presence_probabilities(domain)
    present = np.asarray(present, dtype=np.float64)
    log_joint = present @ np.log(p).T + (1 - present) @ np.log1p(-p).T
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return joint / joint.sum(1, keepdims=True)


def bayes_accuracy(samples: int = 0, seed: int = 0, domain: str = "shaded") -> float:
    """Accuracy of the best possible reader of the true AU set of a domain's faces.

    Exact over all 2^16 sets by default; with `samples` > 0 a Monte Carlo estimate from the generative model.
    """
    p = presence_probabilities(domain)
    if samples:
        rng = np.random.default_rng(seed)
        label = rng.integers(len(CLASSES), size=samples)
        present = rng.random((samples, len(AUS))) < p[label]
        return float((class_posterior(present, domain).argmax(1) == label).mean())
    sets = (np.arange(1 << len(AUS))[:, None] >> np.arange(len(AUS))) & 1
    likelihood = np.exp(sets @ np.log(p).T + (1 - sets) @ np.log1p(-p).T)  # (65536, 7)
    return float(likelihood.max(1).sum() / len(CLASSES))


def sample_face(seed: int, domain: str = "shaded", habits: str | None = None) -> Face:
    """The face of `seed` in a domain: same seed, same person, class, pose and light in all of them.

    What differs is the drawing and, by `HABITS`, which AUs are present and how strong; all domains read the same
    random numbers. habits: those of another domain (default: of `domain`). Raises ValueError for an unknown domain.
    """
    habits = domain if habits is None else habits
    for name in (domain, habits):
        if name not in DOMAINS:
            raise ValueError(f"unknown domain {name!r}; expected one of {', '.join(DOMAINS)}")
    rng = np.random.default_rng([seed, 1])
    label = CLASSES[int(rng.integers(len(CLASSES)))]
    present = rng.random(len(AUS)) < presence_probabilities(habits)[CLASSES.index(label)]
    strength = MIN_INTENSITY + (1 - MIN_INTENSITY) * rng.beta(2.4, 1.5, len(AUS)) ** HABITS[habits].power
    aus = {name: round(float(s), 3) if on else 0.0 for name, s, on in zip(AUS, strength, present)}
    identity = _sample_identity(rng)
    pose = Pose(
        roll=float(rng.uniform(-12, 12)),
        yaw=float(np.clip(rng.normal(0, 9), -20, 20)),
        scale=float(rng.uniform(0.285, 0.355)),
        x=float(0.5 + rng.uniform(-0.06, 0.06)),
        y=float(0.51 + rng.uniform(-0.045, 0.035)),
    )
    angle = rng.uniform(-2.6, -0.5)  # from above, left to right
    light = Light(
        x=float(np.cos(angle)),
        y=float(np.sin(angle)),
        contrast=float(rng.uniform(0.15, 0.5)),
        gain=float(rng.uniform(0.82, 1.08)),
        tint=tuple(float(v) for v in 1 + rng.uniform(-0.03, 0.03, 3)),
    )
    gaze = (float(rng.uniform(-0.03, 0.03)), float(rng.uniform(-0.012, 0.012)))
    occlusion = str(rng.choice(["", "glasses", "fringe", "hand"], p=[0.915, 0.045, 0.02, 0.02]))
    noise, blur = float(rng.uniform(0, 6)), float(max(0.0, rng.uniform(-0.6, 0.9)))
    grey = rng.uniform(50, 215)
    base = grey + rng.normal(0, 15, 3)
    background = tuple(_colour(base + rng.normal(0, 16) + rng.normal(0, 9, 3)) for _ in range(4))
    return Face(seed, label, aus, identity, pose, light, gaze, occlusion, noise, blur, domain, background)


def detect(face: Face) -> dict[str, float]:
    """Scores of the simulated AU detector: true intensity plus a little noise, in [0, 1]."""
    rng = np.random.default_rng([face.seed, 2])
    noise = rng.normal(0, DETECTOR_NOISE, len(AUS))
    return {name: round(float(np.clip(face.aus[name] + e, 0, 1)), 3) for name, e in zip(AUS, noise)}


def _sample_identity(rng: np.random.Generator) -> Identity:
    u = rng.uniform
    tone = u(0, len(_SKINS) - 1)
    low = int(tone)
    skin = np.array(_SKINS[low]) * (1 - tone + low) + np.array(_SKINS[min(low + 1, len(_SKINS) - 1)]) * (tone - low)
    skin = skin * u(0.95, 1.03) + rng.normal(0, 3, 3)
    lips = skin * np.array([0.86, 0.60, 0.62]) + u(-8, 14) * np.array([1.0, 0.2, 0.4])
    return Identity(
        width=float(u(0.84, 0.98)),
        jaw=float(u(0.62, 0.95)),
        chin_y=float(u(1.08, 1.2)),
        eye_x=float(u(0.36, 0.42)),
        eye_y=float(u(-0.15, -0.08)),
        eye_w=float(u(0.155, 0.19)),
        eye_h=float(u(0.062, 0.082)),
        iris_r=float(u(0.078, 0.092)),
        brow_gap=float(u(0.23, 0.29)),
        brow_arch=float(u(0.02, 0.07)),
        brow_slope=float(u(-0.03, 0.03)),
        brow_thick=float(u(0.026, 0.046)),
        nose_w=float(u(0.14, 0.2)),
        nose_y=float(u(0.26, 0.34)),
        mouth_y=float(u(0.6, 0.68)),
        mouth_w=float(u(0.27, 0.34)),
        lip_upper=float(u(0.045, 0.075)),
        lip_lower=float(u(0.065, 0.1)),
        hairline=float(u(-0.92, -0.8)),
        skin=_colour(skin),
        hair=_colour(np.array(_HAIRS[int(rng.integers(len(_HAIRS)))]) * u(0.8, 1.2) + rng.normal(0, 3, 3)),
        iris=_colour(np.array(_IRISES[int(rng.integers(len(_IRISES)))]) + rng.normal(0, 8, 3)),
        lips=_colour(lips),
        hair_style=str(rng.choice(HAIR_STYLES, p=[0.08, 0.24, 0.2, 0.26, 0.12, 0.1])),
    )


def _colour(values: np.ndarray) -> tuple[float, float, float]:
    r, g, b = np.clip(values, 8, 255)
    return float(r), float(g), float(b)
