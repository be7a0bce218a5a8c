"""People's summary for people: the parts of `people.md` and `people.html`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tag.report.summary import Part, Shares, Table, Text, Verdict, number, percent

GROUPS = ("all", "experts", "others")


def people_parts(found: Mapping[str, Any], left_out: Sequence[str]) -> list[Part]:
    """From the content of `people.json`."""
    first, second = found["models"]
    whole = found["groups"]["all"]
    parts: list[Part] = [
        Text(
            f"Study {found['study']}: {whole['raters']} raters, {whole['ratings']} ratings of {whole['pairs']} pairs "
            f"(of {found['pairs_in_study']}). Intervals: 95 %, bootstrap over pairs."
        ),
        Verdict(_in_words(found)),
    ]
    if left_out:
        lines = " | ".join(left_out)
        parts.append(Verdict(f"{len(left_out)} files were left out: {lines}", warn=True))
    if any(r["open"] for r in found["raters"]):
        parts.append(Verdict("Some raters left pairs open; see the table of raters.", warn=True))
    shares = whole["preference"]
    rows = [(first, shares["first"]), ("tie", shares["tie"]), (second, shares["second"])]
    parts.append(Shares("Preferences of all raters", rows))
    parts += [_groups(found, first, second), _position(found["position"])]
    if found["judge"]:
        parts += _judge(found["judge"], first, second)
    return [*parts, _raters(found["raters"])]


def _in_words(found: Mapping[str, Any]) -> str:
    """Who is preferred, if that can be said."""
    first, second = found["models"]
    net = found["groups"]["all"]["preference"]["net"]
    low, high = net["ci"]
    points = f"{abs(100 * net['value']):.0f} points"
    if low <= 0 <= high:
        return f"No preference for either model can be told from chance with this many pairs (net {points})."
    better = second if low > 0 else first
    return f"These raters prefer {better}, by {points} net."


def _groups(found: Mapping[str, Any], first: str, second: str) -> Part:
    groups = [found["groups"][name] for name in GROUPS]

    def shares(key: str) -> list[str]:
        return [percent(g["preference"] and g["preference"][key]) for g in groups]

    rows = [
        ("raters", *(str(g["raters"]) for g in groups)),
        ("ratings", *(str(g["ratings"]) for g in groups)),
        (f"{first} (%)", *shares("first")),
        ("tie (%)", *shares("tie")),
        (f"{second} (%)", *shares("second")),
        ("net preference (points)", *shares("net")),
        ("two raters choose alike (%)", *(percent(g["same_choice"]) for g in groups)),
        ("Fleiss' kappa", *(number(g["fleiss_kappa"]) for g in groups)),
    ]
    difference = found["experts_minus_others"]
    note = f"Experts minus others, net preference on pairs that both rated: {percent(difference)} points."
    return Table("Experts and others", ("", *GROUPS), rows, note)


def _position(position: Mapping[str, Any]) -> Part:
    rows = [
        ("A, shown first", percent(position["A"])),
        ("B, shown second", percent(position["B"])),
        ("tie", percent(position["tie"])),
        ("leaning to A (points)", percent(position["lean_to_a"])),
    ]
    return Table("Position", ("", "% [95 % CI]"), rows, "Each model stands as A in half of a set's pairs.")


def _judge(judge: Mapping[str, Any], first: str, second: str) -> list[Part]:
    def cell(name: str, key: str) -> str:
        return percent(judge[name] and judge[name][key])

    rows = [
        ("pairs that both judged", *(str(judge[n]["pairs"] if judge[n] else 0) for n in GROUPS)),
        ("same verdict (%)", *(cell(n, "same_verdict") for n in GROUPS)),
        ("Cohen's kappa", *(number(judge[n] and judge[n]["cohen_kappa"]) for n in GROUPS)),
    ]
    parts: list[Part] = [
        Table("People and judge", ("", *GROUPS), rows, "By the majority of the raters, and of the judge's judgements.")
    ]
    if judge["all"]:
        shares = judge["all"]["judge_preference"]
        bars = [(first, shares["first"]), ("tie", shares["tie"]), (second, shares["second"])]
        parts.append(Shares("The judge's preferences on these pairs", bars))
    return parts


def _raters(raters: Sequence[Mapping[str, Any]]) -> Part:
    rows = [
        (
            r["rater"],
            "expert" if r["expert"] else "other",
            str(r["set"]),
            f"{r['answered']} ({r['open']} open)",
            *(str(r[name]) for name in ("A", "B", "tie")),
            "–" if r["median_seconds"] is None else f"{r['median_seconds']:.0f}",
        )
        for r in raters
    ]
    columns = ("rater", "", "set", "answered", "A", "B", "tie", "median s a pair")
    return Table("Raters", columns, rows, "A rater who needs two seconds a pair, or always says A, has not looked.")
