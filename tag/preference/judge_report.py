"""A judge's summary for people: the parts of `judge.md` and `judge.html`."""

from collections.abc import Mapping
from typing import Any

from tag.preference.rubric import CRITERIA, CRITERION_TEXT
from tag.report.summary import Part, Shares, Table, Text, Verdict, number, percent

BAD_KINDS = ("unknown", "all ties", "one-sided", "not above chance")  # of `position`: preferences cannot be used


def judge_parts(found: Mapping[str, Any]) -> list[Part]:
    """From the content of `judge.json`."""
    first, second = found["models"]
    counts, judge, position = found["judgements"], found["judge"], found["position"]
    parts: list[Part] = [
        Text(
            f"Judge: {judge['name']}. {found['pairs']} pairs, both orders, {found['seeds']} seeds: "
            f"{counts['expected']} questions, {counts['valid']} valid judgements, {counts['missing']} missing, "
            f"{counts['not_asked']} not asked. Intervals: 95 %, bootstrap over pairs. Rubric {found['rubric']}."
        )
    ]
    if judge["name"] == "rules":
        parts.append(
            Verdict(
                "These are rules, not a model: they compare responses with the detector's AUs and boxes and cannot see "
                "the image. This repeats AU IoU and AU F1 in another form and is no evidence beside them.",
                warn=True,
            )
        )
    if counts["not_asked"]:
        parts.append(Verdict(f"Not finished: {counts['not_asked']} questions have not been asked yet.", warn=True))
    parts.append(Verdict(position["verdict"], warn=position["kind"] in BAD_KINDS))
    return parts + [
        _preferences("Preferences", found["preference"], first, second),
        _preferences(
            "Consistent preferences",
            found["preference_consistent"],
            first,
            second,
            "A model counts only where it wins in both orders under the same seed; anything else is a tie.",
        ),
        _scores(found["scores"], first, second),
        _position(position),
        _trust(found),
    ]


def _preferences(title: str, shares: Mapping[str, Any] | None, first: str, second: str, note: str = "") -> Part:
    if shares is None:
        return Text(f"{title}: no pair has a valid judgement in both orders.")
    net = f"Net preference for {second}: {number(shares['net'], 1, 100)} points."
    rows = [(first, shares["first"]), ("tie", shares["tie"]), (second, shares["second"])]
    return Shares(title, rows, f"{note} {net}".strip())


def _scores(scores: Mapping[str, Any], first: str, second: str) -> Part:
    names = [*CRITERIA, "mean"]
    rows = [
        (name.replace("_", " "), *(number(scores[key][name]) for key in ("first", "second", "difference")))
        for name in names
    ]
    note = "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in CRITERION_TEXT.items())
    return Table("Scores, 1 to 5", ("", first, second, "difference"), rows, note)


def _position(position: Mapping[str, Any]) -> Part:
    rows = [
        ("the response shown first wins", percent(position["first_wins"])),
        ("the response shown second wins", percent(position["second_wins"])),
        ("tie", percent(position["tie"])),
        ("leaning to the first (points)", percent(position["lean_to_first"])),
        ("same verdict in both orders", percent(position["same_in_both_orders"])),
        ("Cohen's kappa between the orders", number(position["kappa_between_orders"])),
    ]
    return Table("Position", ("", "% [95 % CI]"), rows)


def _trust(found: Mapping[str, Any]) -> Part:
    agreement, counts = found["self_agreement"], found["judgements"]
    refused = ", ".join(f"{rule} {n}" for rule, n in counts["answers_not_taken"].items()) or "none"
    rows = [
        ("same preference under another seed (%)", percent(agreement["same_preference"])),
        ("Fleiss' kappa over seeds", number(agreement["fleiss_kappa"])),
        ("mean difference of scores over seeds (points)", number(agreement["score_gap"])),
        ("preferred the response it scored lower (%)", percent(found["contradictions"])),
        ("missing judgements (%)", f"{100 * (counts['missing_share'] or 0):.1f}"),
        ("answers not taken, by reason", refused),
    ]
    sampled = found["judge"].get("temperature")
    note = "" if sampled else "The judge answers without randomness: agreement over seeds says nothing about it."
    return Table("Self-agreement", ("", "[95 % CI]"), rows, note)
