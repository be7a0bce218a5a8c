#!/usr/bin/env python3
"""Break the code on purpose, one well-known mistake at a time, and see which test or gate notices.

    python tools/try_mutations.py                              # all of them, some seconds each
    python tools/try_mutations.py --only "sign of the KL" --only "end token"
    python tools/try_mutations.py --markdown docs/mutations.md

Each mutation is one replaced line in a copy of the working tree, never in the tree itself. Then the fast tests that
should notice run there, those of tests/test_replay.py among them: they train for two steps with all gates on, so a gate
that stops the run shows as a failed test, too. A mutation whose line is no longer there is an error, so that this list
cannot rot. Exit code 1 if one was not caught.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tag.args import Parser, run
from tag.checkpoint import run_card
from tag.errors import UsageError
from tag.files import replacing

SHOWN = 4  # failures named a row
ROOT = Path(__file__).resolve().parents[1]

FORMULAS = ("tests/test_grpo.py", "tests/test_against_trl.py")
# Of the replay tests those that look at the run itself: it must be the one that its record says it was.
REPLAY = (
    "test_the_record_is_worth_a_replay",
    "test_loss_and_gradient_norm_are_those_of_the_run",
    "test_the_next_step_starts_where_the_replayed_update_ends",
    "test_inner_updates_and_a_trained_projector",
    "test_a_temperature_in_sampling_alone_is_stopped",
)
LOOP = ("tests/test_order_gates.py", *(f"tests/test_replay.py::{name}" for name in REPLAY))
SCORING = ("tests/test_batching.py", "tests/test_vlm.py")


# Which gate says what (tag/gates.py), by how its complaint begins.
GATES = {
    "check_mismatch": "sampled and re-scored",
    "check_ratio": "the ratio is off",
    "check_reference": "KL to the sft reference",
    "check_gradient": "the gradient norm",
}


@dataclass(frozen=True)
class Mutation:
    """One mistake: `find` (once in `file`) becomes `replace`; `tests` are what might notice."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


MUTATIONS = [
    Mutation("sign of the KL flipped", "tag/grpo.py", "kl_loss = beta * (kl", "kl_loss = -beta * (kl", FORMULAS),
    Mutation(
        "biased standard deviation (divisor G)",
        "tag/grpo.py",
        "groups.std(dim=1, keepdim=True)",
        "groups.std(dim=1, keepdim=True, unbiased=False)",
        FORMULAS,
    ),
    Mutation(
        "end token dropped from the loss",
        "tag/grpo.py",
        "    keep = completion_mask.bool()  # (N, T)\n",
        "    keep = completion_mask.bool()  # (N, T)\n"
        "    keep = keep & keep.roll(-1, 1).index_fill(1, torch.tensor([-1]), False)\n"
        "    completion_mask = keep\n",
        FORMULAS,
    ),
    Mutation(
        "end token dropped from what was sampled",
        "tag/rollout/engine.py",
        "                text = self.vlm.tokenizer.decode(token_ids",
        "                if reason == 'stop' and len(token_ids) > 1:\n"
        "                    token_ids, logprobs = token_ids[:-1], logprobs[:-1]\n"
        "                text = self.vlm.tokenizer.decode(token_ids",
        ("tests/test_rollout*.py", *LOOP),
    ),
    Mutation(
        "end token dropped from SFT targets",
        "tag/vlm.py",
        "return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id]",
        "return self.tokenizer.encode(text, add_special_tokens=False)",
        SCORING,
    ),
    Mutation(
        "normalised per micro-batch", "train_grpo.py", "normaliser=normaliser,", "normaliser=None,", LOOP
    ),
    Mutation(
        "dropout left on",
        "train_grpo.py",
        "    set_dropout(vlm.hf_model, 0.0)\n",
        "    set_dropout(vlm.hf_model, 0.05)\n    vlm.train()\n",
        LOOP,
    ),
    Mutation(
        "base model as the SFT reference",
        "train_grpo.py",
        'set_adapter(vlm.hf_model, "reference" if args.kl_reference == "sft" else None)',
        "set_adapter(vlm.hf_model, None)",
        LOOP,
    ),
    Mutation(
        "KL measured the wrong way round",
        "tag/grpo.py",
        "\n    d = logprobs - ref_logprobs\n",
        "\n    d = ref_logprobs - logprobs\n",
        FORMULAS,
    ),
    Mutation(
        "groups taken across prompts",
        "tag/grpo.py",
        "groups = rewards.view(-1, group_size)",
        "groups = rewards.view(group_size, -1).T",
        FORMULAS,
    ),
    Mutation(
        "the larger of the two surrogates",
        "tag/grpo.py",
        "torch.minimum(unclipped",
        "torch.maximum(unclipped",
        FORMULAS,
    ),
    Mutation(
        "pi_old carries gradient",
        "tag/grpo.py",
        "old_logprobs.masked_fill(~keep, 0.0).detach()",
        "old_logprobs.masked_fill(~keep, 0.0)",
        FORMULAS,
    ),
    Mutation(
        "log-probs shifted by one",
        "tag/data/batching.py",
        "sources.append(torch.cat([torch.tensor([last_of_prompt]), first + torch.arange(T - 1)]))",
        "sources.append(first + torch.arange(T))",
        (*SCORING, *LOOP),
    ),
    Mutation(
        "completions see their siblings' positions (no restart after the prompt)",
        "tag/data/batching.py",
        "position_ids[:, r, here] = group.prompt.next_position + torch.arange(T)",
        "position_ids[:, r, here] = cursor + torch.arange(T)",
        (*SCORING, *LOOP),
    ),
    Mutation(
        "reference sees the trained projector",
        "train_grpo.py",
        "passes.score(vlm, tower, N, T, projector=args.kl_reference)",
        "passes.score(vlm, tower, N, T)",
        LOOP,
    ),
    Mutation(
        "temperature applied in sampling only",
        "train_grpo.py",
        "temperature=args.temperature,",
        "temperature=0.9,",
        LOOP,
    ),
    Mutation(
        "temperature not applied in sampling",
        "tag/rollout/sampling.py",
        "logits = logits / temperature",
        "pass",
        ("tests/test_rollout*.py", *LOOP),
    ),
    Mutation(
        "stale rollout weights",
        "train_grpo.py",
        '        engine.refresh("policy")\n        rollouts',
        '        if step == 0:\n            engine.refresh("policy")\n        rollouts',
        LOOP,
    ),
    Mutation(
        "pi_old renewed at every inner update",
        "train_grpo.py",
        "if update == 0:\n                            old",
        "if True:\n                            old",
        LOOP,
    ),
    Mutation(
        "rewards of another face",
        "train_grpo.py",
        "records[indices[n // G]]",
        "records[indices[n % len(indices)]]",
        LOOP,
    ),
    Mutation(
        "gradients never cleared", "train_grpo.py", "optimizer.zero_grad(set_to_none=True)", "pass", LOOP
    ),
    Mutation(
        "gradient not clipped",
        "train_grpo.py",
        "dist.clip_gradients(list(params.values()), args.clip_norm)",
        "dist.clip_gradients(list(params.values()), 0.0)",
        LOOP,
    ),
]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--only", action="append", default=[], help="those whose name contains this; may be repeated")
    p.add_argument("--markdown", help="write the table to this file")
    p.add_argument("--list", action="store_true", help="only show what would be done")
    return p.parse_args(argv)


def copy_tree(target: Path) -> None:
    """The working tree without what is not ours."""
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__", ".pytest_cache", ".ruff_cache")
    shutil.copytree(ROOT, target, ignore=skip)


def apply(tree: Path, mutation: Mutation) -> str:
    """Make the mistake; returns the text to put back."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.find) != 1:
        raise UsageError(
            f"{mutation.name!r}: {mutation.find!r} is {text.count(mutation.find)} times in {mutation.file}"
        )
    path.write_text(text.replace(mutation.find, mutation.replace), encoding="utf-8")
    return text


def failures(tree: Path, tests: tuple[str, ...]) -> list[str]:
    """What fails in `tree`: "test file::test" without parameters, or the gate that stopped a run, each once."""
    files = sorted({str(p.relative_to(tree)) for t in tests if "::" not in t for p in tree.glob(t)})
    files += [t for t in tests if "::" in t]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--maxfail=40"]
    done = subprocess.run([*command, *files], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise UsageError(f"pytest ended with {done.returncode}: {' '.join(done.stdout.split()[-60:])}")
    found = []
    for line in re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.M):
        name, _, message = line.partition(" - ")
        if gate := re.search(r"gate at (step \d+): (.*)", message):
            name = next((n for n, start in GATES.items() if gate[2].startswith(start)), "one")
            found.append(f"gate {name}, in a run at {gate[1]}")
        else:
            found.append(re.sub(r"\[.*", "", name.removeprefix("tests/")))
    return sorted(dict.fromkeys(found), key=lambda name: "::" in name)  # gates first


def as_markdown(rows: list[tuple[Mutation, list[str]]]) -> str:
    """The page docs/mutations.md."""
    card = run_card("tools/try_mutations.py", {})
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    lines = [
        "# Mutations: which test or gate notices which mistake",
        "",
        "Each row is a mistake that GRPO implementations have made, put on purpose into a copy of the tree: one line "
        "is replaced, then the fast tests that might notice are run. One of the test files trains for two steps with "
        "all gates on, so a row can also name the gate (`tag/gates.py`) that stopped such a run. At most "
        f"{SHOWN} names a row.",
        "",
        f"Made by `{shlex.join(['python', 'tools/try_mutations.py', *sys.argv[1:]])}` ({versions}; CPU, "
        f"{platform.machine()}). Nothing here is written by hand.",
        "",
        "| mistake | in | caught by |",
        "|---|---|---|",
    ]
    for mutation, found in rows:
        caught = "<br>".join(f"`{name}`" if "::" in name else name for name in found[:SHOWN]) or "**nothing**"
        more = f"<br>and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        lines.append(f"| {mutation.name} | `{mutation.file}` | {caught}{more} |")
    caught = sum(bool(found) for _, found in rows)
    return "\n".join([*lines, "", f"{caught} of {len(rows)} are caught."]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    chosen = [m for m in MUTATIONS if not args.only or any(part in m.name for part in args.only)]
    if not chosen:
        raise UsageError(f"no mutation is called anything like {', '.join(args.only)}")
    if args.list:
        for m in chosen:
            print(f"{m.name}\n    {m.file}: {m.find.strip()!r} -> {m.replace.strip()!r}")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        if broken := failures(tree, tuple({t for m in chosen for t in m.tests})):
            raise UsageError(f"without any mutation these fail: {', '.join(broken)}")
        for mutation in chosen:
            text = apply(tree, mutation)
            rows.append((mutation, failures(tree, mutation.tests)))
            (tree / mutation.file).write_text(text, encoding="utf-8")
            print(f"{mutation.name}: {'; '.join(rows[-1][1]) or 'NOT CAUGHT'}", flush=True)
    if args.markdown:
        with replacing(args.markdown) as f:
            f.write(as_markdown(rows))
    sys.exit(0 if all(found for _, found in rows) else 1)


if __name__ == "__main__":
    run(main)
