"""Which points of the MediaPipe face mesh (478 points) make the region of each action unit.

Right and left are the subject's: the right eye is on the left of the picture. "5-8" stands for 5 6 7 8. The lists were
drawn on photographs and looked at; several AUs share one region because they move the same skin (the lips, say).
"""

from dataclasses import dataclass

NUM_POINTS = 478  # 468 mesh points + 2 x 5 iris points

_OUTER_LIPS = "0 17 37 39 40 61 84 91 146 181 185 267 269 270 291 314 321 375 405 409"
_LOWER_LIP = "14 17 61 78 84 87 88 91 95 146 178 181 291 308 314 317 318 321 324 375 402 405"

# region name -> (AUs, right-side points, left-side points, points on the midline or on both sides, what one sees there)
_TABLE: dict[tuple[str, ...], tuple[str, str, str, str]] = {
    ("AU1",): (
        "55 65 66 107 108",
        "285 295 296 336 337",
        "9 151",
        "inner halves of both brows and the forehead between them",
    ),
    ("AU2",): (
        "46 52 53 63 70 104 105",
        "276 282 283 293 300 333 334",
        "",
        "outer part of each brow and the forehead just above",
    ),
    ("AU4",): ("55 107 193", "285 336 417", "8 9 168", "inner brow ends, glabella and root of the nose"),
    ("AU5",): (
        "27-30 33 56 133 157-161 173 190 221-225 246 247",
        "257-260 263 286 362 384-388 398 414 441-445 466 467",
        "",
        "upper lids and lid folds",
    ),
    ("AU6",): (
        "31 36 50 100 101 111 116-120 123 187 205 228-231",
        "261 266 280 329 330 340 345-349 352 411 425 448-451",
        "",
        "cheeks under the eyes",
    ),
    ("AU7",): (
        "7 22-30 33 56 110 112 130 133 144 145 153-155 157-161 163 173 228-231 246 247",
        "249 252-260 263 286 339 341 359 362 373 374 380-382 384-388 390 398 448-451 466 467",
        "",
        "eyes and lower lids",
    ),
    ("AU9",): (
        "48 49 115 122 129 131 174 193 196 198 236",
        "278 279 344 351 358 360 399 417 419 420 456",
        "5 6 8 168 195 197",
        "root, bridge and wings of the nose",
    ),
    ("AU10",): (
        "37 39 40 92 97 98 129 165 167 185 186 203 206",
        "267 269 270 322 326 327 358 391 393 409 410 423 426",
        "0 2 164",
        "base of the nose to the upper lip",
    ),
    ("AU11",): (
        "36 129 142 203 205-207 216",
        "266 358 371 423 425-427 436",
        "",
        "upper part of the folds beside the nose",
    ),
    ("AU12",): (
        "40 57 61 91 92 146 185 186 206 207 212 214 216",
        "270 287 291 321 322 375 409 410 426 427 432 434 436",
        "",
        "mouth corners over the whole width of the mouth",
    ),
    ("AU13",): (
        "40 61 92 185 186 203 205 206 216",
        "270 291 322 409 410 423 425 426 436",
        "",
        "mouth corners and the skin above them",
    ),
    ("AU14",): (
        "57 61 187 192 205-207 212 214 216",
        "287 291 411 416 425-427 432 434 436",
        "",
        "strip from cheek to cheek at the mouth corners",
    ),
    ("AU15",): (
        "43 57 61 91 106 146 186 202 204 210 212",
        "273 287 291 321 335 375 410 422 424 430 432",
        "",
        "mouth corners and the skin below them",
    ),
    ("AU16",): ("83 84 91 106 146 181 182", "313 314 321 335 375 405 406", _LOWER_LIP + " 18 200", "lower lip"),
    ("AU17",): (
        "32 84 106 140 148 171 176 181 182 194 201 204 208",
        "262 314 335 369 377 396 400 405 406 418 421 424 428",
        "17 18 152 175 199 200",
        "border of the lower lip to the tip of the chin",
    ),
    ("AU18", "AU22"): (
        "43 57 92 106 165 182 186",
        "273 287 322 335 391 406 410",
        _OUTER_LIPS + " 18 164",
        "lips and the skin close around them",
    ),
    ("AU19",): ("", "", _LOWER_LIP + " 0 13", "mouth opening and lower lip"),
    ("AU20",): ("43 57 61 186 202 212", "273 287 291 410 422 432", _OUTER_LIPS, "lips and mouth corners"),
    ("AU23", "AU24", "AU25", "AU28", "AU32"): ("", "", _OUTER_LIPS, "lips"),
    ("AU26", "AU27"): (
        "32 140 148 176 204 208",
        "262 369 377 400 424 428",
        _OUTER_LIPS + " 18 152 175 199 200",
        "mouth and chin",
    ),
    ("AU38", "AU39"): (
        "45 48 49 64 97 98 102 115 129 220",
        "275 278 279 294 326 327 331 344 358 440",
        "1 2 4 5",
        "nostrils",
    ),
    ("AU43", "AU45"): (
        "7 22-24 26-30 33 56 110 133 144 145 153-155 157-161 163 173 246 247",
        "249 252-254 256-260 263 286 339 362 373 374 380-382 384-388 390 398 466 467",
        "",
        "eyes and both lids",
    ),
}


@dataclass(frozen=True)
class Region:
    """Mesh points of one AU: on the subject's right, on the left, and those that belong to neither or both sides."""

    right: tuple[int, ...]
    left: tuple[int, ...]
    centre: tuple[int, ...]
    text: str

    def points(self, side: str | None = None) -> tuple[int, ...]:
        """Indices of the whole region (`side` None) or of the subject's "right" or "left" half of it."""
        if side not in (None, "right", "left"):
            raise ValueError(f"side must be 'right', 'left' or None, got {side!r}")
        if side is None:
            return self.right + self.left + self.centre
        return (self.right if side == "right" else self.left) + self.centre


def _indices(text: str) -> tuple[int, ...]:
    points: list[int] = []
    for word in text.split():
        first, _, last = word.partition("-")
        points.extend(range(int(first), int(last or first) + 1))
    return tuple(points)


REGIONS: dict[str, Region] = {
    au: Region(_indices(right), _indices(left), _indices(centre), text)
    for aus, (right, left, centre, text) in sorted(_TABLE.items(), key=lambda entry: int(entry[0][0][2:]))
    for au in aus
}
REGIONS = {au: REGIONS[au] for au in sorted(REGIONS, key=lambda name: int(name[2:]))}

# The paper's figures print one and the same box for AU4 and AU9: it maps both to the glabella.
PAPER_ALIAS = {"AU9": "AU4"}
