"""FACS: what each action unit is called, what one sees, and which AUs make which expression.

Names and appearance follow Ekman, Friesen and Hager, "Facial Action Coding System" (2002), in our own words; the
expression prototypes are those of EMFACS as commonly tabulated (e.g. Du, Tao and Martinez 2014, Table 1).
"""

# AU name -> (short name of the action, visible signs: alternative noun phrases for trace writers)
AU_TEXT: dict[str, tuple[str, tuple[str, ...]]] = {
    "AU1": ("inner brow raiser", ("the inner brows are pulled up", "the inner ends of the brows rise")),
    "AU2": ("outer brow raiser", ("the outer brows are lifted", "the outer ends of the brows arch up")),
    "AU4": ("brow lowerer", ("the brows are drawn down and together", "the brows knit over the nose")),
    "AU5": ("upper lid raiser", ("the upper lids are raised", "the eyes are opened wide")),
    "AU6": ("cheek raiser", ("the cheeks are pushed up", "the cheeks rise under the eyes")),
    "AU7": ("lid tightener", ("the eyelids are tightened", "the lids narrow the eyes")),
    "AU9": ("nose wrinkler", ("the nose is wrinkled", "wrinkles run over the bridge of the nose")),
    "AU10": ("upper lip raiser", ("the upper lip is raised", "the upper lip is drawn up")),
    "AU11": ("nasolabial deepener", ("the fold beside the nose is deep", "the nasolabial fold deepens")),
    "AU12": ("lip corner puller", ("the lip corners are pulled up", "the mouth corners go up")),
    "AU13": ("sharp lip puller", ("the lip corners are pulled sharply up", "the cheeks puff above the corners")),
    "AU14": ("dimpler", ("the lip corners are pressed inward", "dimples form beside the mouth")),
    "AU15": ("lip corner depressor", ("the lip corners are pulled down", "the mouth corners droop")),
    "AU16": ("lower lip depressor", ("the lower lip is pulled down", "the lower teeth show")),
    "AU17": ("chin raiser", ("the chin is pushed up", "the chin boss wrinkles")),
    "AU18": ("lip pucker", ("the lips are puckered", "the lips push forward")),
    "AU19": ("tongue show", ("the tongue shows", "the tongue is out")),
    "AU20": ("lip stretcher", ("the lips are stretched sideways", "the mouth is drawn wide")),
    "AU22": ("lip funneler", ("the lips form a funnel", "the lips turn outward")),
    "AU23": ("lip tightener", ("the lips are tightened", "the lips are drawn thin")),
    "AU24": ("lip pressor", ("the lips are pressed together", "the lips press on each other")),
    "AU25": ("lips part", ("the lips are parted", "the lips come apart")),
    "AU26": ("jaw drop", ("the jaw is dropped", "the jaw hangs open")),
    "AU27": ("mouth stretch", ("the mouth is stretched open", "the mouth gapes")),
    "AU28": ("lip suck", ("the lips are sucked in", "the lips roll over the teeth")),
    "AU32": ("lip bite", ("the lip is bitten", "the teeth hold the lip")),
    "AU38": ("nostril dilator", ("the nostrils flare", "the nostrils are wide")),
    "AU39": ("nostril compressor", ("the nostrils are narrowed", "the nostrils are pinched")),
    "AU43": ("eyes closed", ("the eyes are closed", "the lids are shut")),
    "AU45": ("blink", ("the eyes blink", "the lids are closing")),
}

# Expression -> AUs of its prototype.
PROTOTYPES: dict[str, tuple[str, ...]] = {
    "anger": ("AU4", "AU5", "AU7", "AU23"),
    "disgust": ("AU9", "AU10", "AU15", "AU17"),
    "fear": ("AU1", "AU2", "AU4", "AU5", "AU20", "AU26"),
    "happiness": ("AU6", "AU12", "AU25"),
    "neutral": (),
    "sadness": ("AU1", "AU4", "AU15", "AU17"),
    "surprise": ("AU1", "AU2", "AU5", "AU26"),
}


def au_number(name: str) -> int:
    """`"AU12"` -> 12."""
    return int(name[2:])
