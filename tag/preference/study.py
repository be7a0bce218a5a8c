"""A blind A/B study with people: which pairs, what stands left and right, and seals that tell a file of another study.

    OUT/set-1.html ...   one self-contained page a set, for raters
    OUT/key.json         which is which: never goes to a rater, and cannot be restored when lost

Which model stands as A is drawn from the study's secret, balanced within a set. Pairs go by tokens, HMACs under the
secret: neither they nor anything else on a page says which model wrote what, beyond what the texts give away.
"""

import hashlib
import hmac
import json
import os
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tag.errors import DataError
from tag.files import replacing
from tag.preference.pairs import Pair

FORMAT = "tag preference study 1"
CHOICES = ("A", "B", "tie")


@dataclass(frozen=True)
class Item:
    """One pair of a set. a: the model (0 or 1) that is shown as A. responses: fingerprints of the texts, by model."""

    token: str
    id: str
    a: int
    responses: tuple[str, str]


@dataclass(frozen=True)
class Study:
    """The content of `key.json`. sets: number of the set, from 1, -> its items in the order shown."""

    id: str
    secret: str
    models: tuple[str, str]
    sets: dict[int, list[Item]]

    def seal(self, number: int) -> str:
        """Of a set: its study, its pairs and their order, under the secret."""
        tokens = ",".join(item.token for item in self.sets[number])
        return _hmac(self.secret, f"set|{self.id}|{number}|{tokens}")


def make_study(pairs: Sequence[Pair], models: tuple[str, str], num_sets: int, secret: str = "") -> Study:
    """`pairs` cut into sets of equal size. secret: hex, for tests; drawn from the system if not given."""
    secret = secret or secrets.token_hex(32)
    study_id = _hmac(secret, "study")[:12]
    rng = random.Random(_hmac(secret, "sides"))
    size = len(pairs) // num_sets
    sets = {}
    for number in range(1, num_sets + 1):
        part = pairs[(number - 1) * size : number * size]
        sides = [i % 2 for i in range(len(part))]
        rng.shuffle(sides)
        sets[number] = [
            Item(_hmac(secret, f"pair|{study_id}|{number}|{i}|{pair.id}|{a}")[:16], pair.id, a, pair.fingerprints)
            for i, (pair, a) in enumerate(zip(part, sides))
        ]
    return Study(study_id, secret, models, sets)


def checksum(
    study: str, number: int, seal: str, rater: str, expert: bool, saved: str, answers: Sequence[dict[str, Any]]
) -> str:
    """SHA-256 that a page writes under its result file (`study_page.js` has the same lines).

    It tells a file that was damaged or edited after it was saved. It is no signature: who has the page can make one.
    """
    lines = [study, str(number), seal, rater, "expert" if expert else "lay", saved]
    lines += [f"{a['pair']} {a['choice'] or '-'} {a['seconds']}" for a in answers]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_key(path: str | os.PathLike, study: Study) -> None:
    """`key.json`, readable by its owner alone."""
    sets = [{"set": n, "seal": study.seal(n), "pairs": [asdict(i) for i in items]} for n, items in study.sets.items()]
    content = {"format": FORMAT, "study": study.id, "secret": study.secret, "models": study.models, "sets": sets}
    with replacing(path) as f:
        os.chmod(f.fileno(), 0o600)
        f.write(json.dumps(content, indent=1) + "\n")


def read_key(path: str | os.PathLike) -> Study:
    """Raises DataError for a file that is no key, or one whose seals do not fit its pairs."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError
        sets = {
            int(s["set"]): [
                Item(
                    str(i["token"]),
                    str(i["id"]),
                    [0, 1].index(i["a"]),
                    (str(i["responses"][0]), str(i["responses"][1])),
                )
                for i in s["pairs"]
            ]
            for s in raw["sets"]
        }
        study = Study(str(raw["study"]), str(raw["secret"]), (str(raw["models"][0]), str(raw["models"][1])), sets)
        if study.models[0] == study.models[1]:
            raise ValueError
        seals = {int(s["set"]): s["seal"] for s in raw["sets"]}
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DataError(f"{path}: not the key.json of a preference study") from None
    if not sets or any(study.seal(number) != seals[number] for number in sets):
        raise DataError(f"{path}: changed since the study was built (the seals do not fit its pairs)")
    return study


def _hmac(secret: str, text: str) -> str:
    secret_bytes, text_bytes = (v.encode("utf-8", "surrogatepass") for v in (secret, text))
    return hmac.new(secret_bytes, text_bytes, hashlib.sha256).hexdigest()
