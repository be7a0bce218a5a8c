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

# What else an answer may be called (`tag.lenient`); label files must use the words above.
LOOSE_SYNONYMS = {
    "furious": "anger",
    "scared": "fear",
    "frightened": "fear",
    "terrified": "fear",
    "joyful": "happiness",
    "sorrow": "sadness",
    "astonished": "surprise",
    "astonishment": "surprise",
}
# The classes in German, French, Spanish, Chinese and Japanese, each list in that order, adjectives behind nouns.
TRANSLATIONS = {
    "anger": "wut ärger wütend colère ira enfado enojo 愤怒 生气 憤怒 怒り",
    "disgust": "ekel dégoût asco 厌恶 厭惡 嫌悪",
    "fear": "angst furcht ängstlich peur miedo 恐惧 害怕 恐懼 恐怖 恐れ",
    "happiness": "freude glück glücklich joie bonheur heureux felicidad alegría feliz 快乐 高兴 开心 快樂 幸福 喜び",
    "neutral": "neutre 中性 中立 無表情",
    "sadness": "trauer traurigkeit traurig tristesse triste tristeza 悲伤 难过 悲傷 悲しみ",
    "surprise": "überraschung überrascht sorpresa 惊讶 驚訝 驚き",
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
