"""MediaPipe blendshapes -> action units: activation = clip((raw - low) / (high - low), 0, 1).

The pairing follows the published ARKit-to-FACS sheets; low and high were set on 804 photographs so that a face at rest
scores near 0 and the strong end near 1. No FACS-coded set was at hand: read the scores as plausible, not as measured.
Some channels of the model never move (cheekSquint, noseSneer, cheekPuff), so AU6 comes by a proxy and AU9 hardly at
all; `WEAK` lists what is left out unless asked for.
"""

from collections.abc import Callable, Mapping

Blendshapes = Mapping[str, float]


def _one(name: str) -> Callable[[Blendshapes], float]:
    return lambda b: b[name]


def _pair(name: str) -> Callable[[Blendshapes], float]:
    return lambda b: (b[name + "Left"] + b[name + "Right"]) / 2


def _geometric(first: str, second: str) -> Callable[[Blendshapes], float]:
    a, b = _pair(first), _pair(second)
    return lambda shapes: (a(shapes) * b(shapes)) ** 0.5


def _lips_part(b: Blendshapes) -> float:
    return max(b["jawOpen"], _pair("mouthLowerDown")(b), _pair("mouthUpperUp")(b))


def _lip_tighten(b: Blendshapes) -> float:
    return (b["mouthRollUpper"] + b["mouthRollLower"] + _pair("mouthPress")(b)) / 3


# AU -> (raw value, low, high)
RULES: dict[str, tuple[Callable[[Blendshapes], float], float, float]] = {
    "AU1": (_one("browInnerUp"), 0.02, 0.75),
    "AU2": (_pair("browOuterUp"), 0.05, 0.70),
    "AU4": (_pair("browDown"), 0.07, 0.70),
    "AU5": (_pair("eyeWide"), 0.01, 0.10),
    "AU6": (_geometric("eyeSquint", "mouthSmile"), 0.02, 0.70),
    "AU7": (_pair("eyeSquint"), 0.38, 0.72),
    "AU9": (_geometric("browDown", "mouthUpperUp"), 0.0, 0.33),
    "AU10": (_pair("mouthUpperUp"), 0.0, 0.60),
    "AU12": (_pair("mouthSmile"), 0.0, 0.85),
    "AU14": (_pair("mouthDimple"), 0.005, 0.06),
    "AU15": (_pair("mouthFrown"), 0.003, 0.27),
    "AU16": (_pair("mouthLowerDown"), 0.004, 0.80),
    "AU17": (_one("mouthShrugLower"), 0.005, 0.40),
    "AU18": (_one("mouthPucker"), 0.005, 0.75),
    "AU20": (_pair("mouthStretch"), 0.005, 0.45),
    "AU22": (_one("mouthFunnel"), 0.001, 0.05),
    "AU23": (_lip_tighten, 0.04, 0.19),
    "AU24": (_pair("mouthPress"), 0.04, 0.25),
    "AU25": (_lips_part, 0.03, 0.80),
    "AU26": (_one("jawOpen"), 0.02, 0.50),
    "AU27": (_one("jawOpen"), 0.50, 1.0),
    "AU28": (lambda b: (b["mouthRollUpper"] + b["mouthRollLower"]) / 2, 0.03, 0.21),
    # Below 0.5 the eyes are narrowed or look down; closed they are (lid gap / eye width < 0.13) from there on.
    "AU43": (_pair("eyeBlink"), 0.40, 0.70),
    "AU45": (_pair("eyeBlink"), 0.40, 0.70),
}

# AU9 fires on smiles, AU23 has no blendshape of its own, AU27 repeats AU26, and a still picture cannot tell AU45
# from AU43.
WEAK = frozenset({"AU9", "AU23", "AU27", "AU45"})

# Lips cannot be apart (AU25) and pressed, tightened or sucked in; the model says both on bared teeth and open mouths.
CLOSED_LIPS = ("AU23", "AU24", "AU28")
_LIPS_TOUCH, _LIPS_APART = 0.15, 0.25  # AU25 up to which they count in full, and from which not at all


def au_activations(blendshapes: Blendshapes, weak: bool = False) -> dict[str, float]:
    """52 blendshape scores by name -> AU activations in [0, 1]: 20 AUs, 24 with the `weak` ones."""
    activations = {}
    for au, (raw, low, high) in RULES.items():
        if weak or au not in WEAK:
            activations[au] = _clip((raw(blendshapes) - low) / (high - low))
    together = _clip((_LIPS_APART - activations["AU25"]) / (_LIPS_APART - _LIPS_TOUCH))
    return {au: value * together if au in CLOSED_LIPS else value for au, value in activations.items()}


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
