"""The seven classes of the task and the ways people write them."""

CLASSES = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
CLASS_INDEX = {name: i for i, name in enumerate(CLASSES)}

# Contempt and the annotators' "no expression to be had" codes are dropped from every data set (7-class protocol).
DROPPED = frozenset({"contempt", "unknown", "nf", "none", "uncertain", "non-face"})

SYNONYMS = {
    "angry": "anger",
    "disgusted": "disgust",
    "fearful": "fear",
    "afraid": "fear",
    "happy": "happiness",
    "joy": "happiness",
    "sad": "sadness",
    "surprised": "surprise",
}


def normalise_label(text: str) -> str | None:
    """A label as people type it -> one of `CLASSES`, or None when the 7-class protocol drops it.

    Raises ValueError for a word that is neither a class nor a known dropped one, naming it.
    """
    word = text.strip().lower()
    if word in CLASS_INDEX:
        return word
    if word in SYNONYMS:
        return SYNONYMS[word]
    if word in DROPPED:
        return None
    raise ValueError(f"unknown expression label {text[:40]!r}; expected one of {', '.join(CLASSES)}")
