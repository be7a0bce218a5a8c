"""The short study: base, SFT, RLVR and TAG on one data set, seed after seed, in one table (the shape of Table 2)."""

import statistics

MODELS = {  # row of the table -> stage whose best adapter it is
    "base (zero-shot)": None,
    "SFT": "sft",
    "SFT + RLVR": "rlvr",
    "SFT + TAG": "tag",
}
PAIRS = (("SFT", "SFT + RLVR"), ("SFT", "SFT + TAG"), ("SFT + RLVR", "SFT + TAG"))


def table(runs: list[dict]) -> str:
    """Markdown: the paper's Table 2 shape, with the bootstrap interval (one seed) or the spread over seeds."""
    lines = ["| model | accuracy % | AU IoU % | format % | boxes a trace |", "| --- | --- | --- | --- | --- |"]
    for model in MODELS:
        cells = []
        for key in ("accuracy", "au_iou", "format_valid", "boxes_per_trace"):
            scale = 1 if key == "boxes_per_trace" else 100
            values = [r["metrics"][model][key] or 0.0 for r in runs]
            text = f"{statistics.mean(values) * scale:.{2 if scale == 1 else 1}f}"
            interval = runs[0]["metrics"][model].get(f"{key}_ci")
            if len(values) > 1:
                text += f" ± {statistics.stdev(values) * scale:.1f}"
            elif interval:
                text += f" [{interval[0] * scale:.1f}, {interval[1] * scale:.1f}]"
            cells.append(text)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    note = "± standard deviation over seeds" if len(runs) > 1 else "[95 % bootstrap interval over test faces]"
    lines += ["", f"{len(runs)} seed(s), {note}; accuracy is strict: only a class in the one answer block counts.", ""]
    lines += [
        "| difference, paired by face | accuracy, points | McNemar's p | AU IoU, points |",
        "| --- | --- | --- | --- |",
    ]
    for name in runs[0]["paired"]:
        found = [r["paired"][name] for r in runs]
        accuracy, iou = (difference(found, key) for key in ("accuracy_difference", "au_iou_difference"))
        p = ", ".join(f"{f['mcnemar_p']:.2g}" for f in found)
        lines.append(f"| {name} | {accuracy} | {p} | {iou} |")
    return "\n".join(lines) + "\n"


def difference(found: list[dict], key: str) -> str:
    """A difference in points: with its paired 95 % interval (one seed), or mean and spread, each seed in brackets."""
    values = [100 * (f[key] or 0.0) for f in found]
    if len(values) == 1:
        interval = found[0][f"{key}_ci"]
        return f"{values[0]:+.1f}" + (f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else "")
    each = ", ".join(f"{v:+.1f}" for v in values)
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f} ({each})"
