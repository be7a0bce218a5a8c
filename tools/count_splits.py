"""Faces per class and split of RAF-DB, FERPlus or AffectNet on disk, beside the paper's Table 6.

    python tools/count_splits.py --dataset ferplus --root DIR
    python tools/count_splits.py --dataset raf-db --root DIR --json

Counts come from the label files alone. Where images lie beside them, the two are compared; where not, that is said.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, run
from tag.data.datasets import READERS, count, disagreement, read_dataset
from tag.labels import CLASSES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("--dataset", choices=sorted(READERS), required=True)
    p.add_argument("--root", required=True, metavar="DIR", help="the data set's folder, as it was distributed")
    rules = "; ".join(f"{name}: {', '.join(rules)}" for name, (_, rules, _) in READERS.items() if len(rules) > 1)
    p.add_argument("--rule", help=f"how votes become labels, the first is the paper's ({rules})")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Count and print."""
    args = parse_args(argv)
    result = summary(args.dataset, args.root, args.rule)
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def summary(dataset: str, root: str, rule: str | None = None) -> dict:
    """Everything that is printed. Raises DataError."""
    listing = read_dataset(dataset, root, rule)
    splits, paper = count(listing), READERS[dataset][2]
    differing = disagreement(listing)
    return {
        "dataset": dataset,
        "release": listing.release,
        "rule": listing.rule,
        "splits": splits,
        "paper_test": paper,
        "equals_paper": splits.get("test", {}).get("total") == paper,
        "images_checked": differing is not None,
        **{f"{k}_images": len(v) for k, v in (differing or {}).items()},
        **{f"first_{k}": v[0] for k, v in (differing or {}).items() if v},
    }


def as_text(result: dict) -> str:
    """The same for reading."""
    width = max(9, *(len(name) for name in CLASSES))
    lines = [f"{result['dataset']}: {result['release']}", f"rule: {result['rule']}", ""]
    lines.append(" " * 6 + "".join(f"{name:>{width + 2}}" for name in (*CLASSES, "total")))
    for split, counts in result["splits"].items():
        values = (*counts["classes"].values(), counts["total"])
        lines.append(f"{split:<6}" + "".join(f"{value:>{width + 2},}" for value in values))
    for split, counts in result["splits"].items():
        if counts["dropped"]:
            words = ", ".join(f"{word} {n:,}" for word, n in counts["dropped"].items())
            lines.append(f"{split}: dropped by the 7-class protocol or the rule: {words}")
    found = result["splits"].get("test", {}).get("total", 0)
    verdict = "the same" if result["equals_paper"] else f"{found - result['paper_test']:+,}"
    lines.append(f"test: {found:,} faces; the paper's Table 6 has {result['paper_test']:,} ({verdict})")
    if not result["images_checked"]:
        lines.append("images: none of them is here; counted from the label files alone")
    elif result["missing_images"] or result["unlisted_images"]:
        for kind, text in (("missing", "listed and not there"), ("unlisted", "there and not listed")):
            if result[f"{kind}_images"]:
                lines.append(f"images: {result[f'{kind}_images']:,} {text}, first {result[f'first_{kind}'][:100]}")
    else:
        lines.append("images: all there, none unlisted")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
