"""The documentation is true: paths, flags, commands, names, lines, logged metrics and worked examples are checked here.

pytest tests/test_docs.py
python -m tests.test_docs      # after code has moved: writes line numbers and the output of commands anew; look at
                               # the difference before it is committed
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tag.data.records import Record
from tag.dist import Dist
from tag.evaluation.held_out import LOGGED
from tag.evaluation.metrics import compute_metrics
from tag.evaluation.predictions import make_prediction, to_line
from tag.gates import Mismatch
from tag.grpo import grpo_loss
from tag.record import PER_TOKEN
from tag.rewards import AU_KINDS, audit, reward_means, score_completion
from tag.stepstats import StepStats, length_metrics
from tag.trace import RULES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train_sft.py", "train_grpo.py", "eval.py")
TOOLS = sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))
FOREIGN_FLAGS = {"--signals-to-handle", "--shutdown-timeout", "--nproc-per-node", "--max-restarts"}  # of torchrun

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---------------------------------------------------------------- reading pages and scripts


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, body) of every fenced block, in order."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text_of(page), re.S | re.M)
    return [(language, textwrap.dedent(body)) for _, language, body in found]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command line: those of bash blocks, and code spans that start with a program's name."""
    lines = [line for language, body in fences(page) if language == "bash" for line in body.splitlines()]
    lines += re.findall(r"`((?:python|torchrun|bash) [^`\n]+)`", text_of(page))
    for line in lines:
        if line.split(" ")[0] in ("python", "torchrun", "bash"):
            yield shlex.split(line, comments=True)


@cache
def load(script: str) -> ModuleType:
    """A script or tool as a module."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser(script: str) -> Callable:
    """Its function from command-line words to arguments."""
    module = load(script)
    return getattr(module, "parse_args", None) or module.parse


def help_of(script: str, *command: str) -> str:
    """What a script or tool prints for --help."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        parser(script)([*command, "--help"])
    return out.getvalue()


@cache
def flags(script: str) -> set[str]:
    """Every flag of a script or tool, from its --help and that of its commands; of a shell script, from its text."""
    if script.endswith(".sh"):
        shown = (ROOT / script).read_text()
    else:
        shown = help_of(script)
        if found := re.search(r"^positional arguments:\n +\{([\w,]+)\}", shown, re.M):
            shown += "".join(help_of(script, command) for command in found[1].split(","))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown))


# ---------------------------------------------------------------- paths and names


def files() -> set[str]:
    """Names of the files at the top and in our folders."""
    inside = (p for folder in ("tag", "tools", "tests", "docs") for p in (ROOT / folder).rglob("*"))
    return {path.name for path in (*ROOT.iterdir(), *inside)}


@pages
def test_every_path_exists(page):
    text = text_of(page)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), f"link to {target}"
    for path in re.findall(r"(?<![\w./-])(?:tag|tools|docs|tests)/[\w./-]*", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    known = files()
    for name in re.findall(r"(?<![\w./-])[\w-][\w.-]*\.(?:py|sh|toml|txt|md)\b", text):
        assert name in known, name


def tree() -> list[str]:
    """Paths of the README's file tree."""
    block = next(body for _, body in fences(ROOT / "README.md") if body.startswith("train_sft.py"))
    paths, folder = [], ""
    for line in block.splitlines():
        assert re.fullmatch(r"(  )?\S+ {2,}\S.*|\S+/", line), f"not 'path   purpose': {line}"
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        paths.append(name if not line.startswith(" ") else folder + name)
    return paths


def test_the_file_tree_is_the_tree():
    listed = tree()
    for path in listed:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    there = [*ROOT.glob("*.py"), *(ROOT / "tag").iterdir(), *(ROOT / "tools").iterdir(), *(ROOT / "docs").glob("*.md")]
    for path in there:
        if not path.name.startswith(("_", ".")):
            name = f"{path.relative_to(ROOT)}{'/' * path.is_dir()}"
            assert name in listed, f"README's file tree lacks {name}"


@pages
def test_every_dotted_name_is_one(page):
    for name in set(re.findall(r"(?<![\w./-])tag(?:\.\w+)+", text_of(page))):
        words, found = name.split("."), None
        for i in range(len(words), 0, -1):
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join(words[:i]))
                break
        for word in words[i:]:
            assert hasattr(found, word), name
            found = getattr(found, word)


# ---------------------------------------------------------------- flags and commands


@pages
def test_every_flag_exists(page):
    shell = [f"tools/{path.name}" for path in (ROOT / "tools").glob("*.sh")]
    known = set().union(FOREIGN_FLAGS, *(flags(script) for script in (*SCRIPTS, *TOOLS, *shell)))
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(page)):
        assert flag in known, flag


@pages
def test_every_command_is_accepted(page):
    for words in commands(page):
        at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
        script, rest = words[at], words[at + 1 :]
        assert (ROOT / script).is_file(), script
        if script.endswith(".py"):
            with contextlib.redirect_stderr(io.StringIO()) as complaint:
                try:
                    parser(script)(rest)
                except (SystemExit, ValueError) as e:
                    pytest.fail(f"{shlex.join(words)}: {complaint.getvalue() or e}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    args = parser(script)(["--data", "x", "--out", "y", "--adapter", "z"])
    source = (ROOT / script).read_text()
    for part, file in (("HeldOut(", "tag/evaluation/held_out.py"), ("Guard(", "tag/guard.py")):
        if part in source:  # is handed all arguments
            source += (ROOT / file).read_text()
    if "check_memory(" in source:  # as well; whether to refuse is for it alone to know
        lines = (ROOT / "tag/plan/startup.py").read_text().splitlines()
        source += next(line for line in lines if "args.no_memory_check" in line)
    if "load_model(args" in source:
        parts = ("fingerprint", "models", "hf_model", "server_model")
        source += "".join((ROOT / f"tag/evaluation/{name}.py").read_text() for name in parts)
    del args.preset  # read by Parser itself
    assert not [name for name in vars(args) if not re.search(rf"\bargs\.{name}\b", source)]


# ---------------------------------------------------------------- what is logged

RECORD = Record("r", "r.png", "d", "test", "fear")


def step_stats() -> dict[str, float]:
    """Metrics of one update on two completions of one token."""
    clock, mask, logprobs = StepStats(), torch.ones(2, 1), torch.zeros(2, 1)
    terms = grpo_loss(logprobs, logprobs, torch.tensor([1.0, -1.0]), mask, ref_logprobs=logprobs)
    clock.new_update().add(terms, mask, logprobs, torch.ones(2, 1))
    return clock.metrics(Dist(0, 1, torch.device("cpu")))


def logged(script: str) -> set[str]:
    """Names that a training script writes into metrics.jsonl: the keys of its `metrics`, laps, held-out scores."""
    scored = [score_completion("", RECORD)] * 2
    sources = {"reward_means": reward_means(scored), "audit": audit(scored, 2), "clock.metrics": step_stats()}
    alone = Dist(0, 1, torch.device("cpu"))
    sources["found.metrics"] = Mismatch(0.0, 0.0, 0.0).metrics(alone)
    sources["length_metrics"] = length_metrics([SimpleNamespace(finish_reason="stop")], torch.ones(1, 2), alone)
    source = (ROOT / script).read_text()
    names = {"step"} | {f"val_{name}" for name in LOGGED} | set(re.findall(r'\.lap\("(\w+)"\)', source))
    literals = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics"
    ]
    assert len(literals) == 1 and isinstance(literals[0], ast.Dict)
    for key, value in zip(literals[0].keys, literals[0].values):
        if key is not None:
            names.add(ast.literal_eval(key))
        else:
            names |= set(sources[ast.unparse(value.func)])
    return names


def documented(section: str) -> set[str]:
    """Names in the first column of the tables between a heading and the next of its level."""
    text = text_of(ROOT / "docs" / "metrics.md")
    start = text.index(f"\n## {section}")
    rows = re.findall(r"^\| (`[^|]*) \|", text[start : text.find("\n## ", start + 1)], re.M)
    return set(re.findall(r"`([^`]+)`", " ".join(rows)))


def test_every_logged_metric_is_documented_and_no_other():
    both = documented("`train_sft.py` and `train_grpo.py`, each held-out evaluation") | {"step"}
    assert "`step`" in text_of(ROOT / "docs" / "metrics.md")
    assert logged("train_sft.py") == documented("`train_sft.py`, each step") | both
    assert logged("train_grpo.py") == documented("`train_grpo.py`, each step") | both


def test_the_fields_of_an_evaluation_are_documented():
    prediction = make_prediction(RECORD, "", 1)
    written = " ".join(re.findall(r"^ +about \|?= \{(.*)\}$", (ROOT / "eval.py").read_text(), re.M))
    expected = set(compute_metrics([prediction])) | set(re.findall(r'"(\w+)":', written))
    assert documented("`eval.py`: metrics.json") == expected
    text = text_of(ROOT / "docs" / "metrics.md")
    for name in json.loads(to_line(prediction)):
        assert f"`{name}`" in text, name


def test_fields_rules_and_tensors_are_documented():
    data, metrics = text_of(ROOT / "docs" / "data.md"), text_of(ROOT / "docs" / "metrics.md")
    for name in (*(f.name for f in fields(Record)), *RULES):
        assert f"| `{name}` |" in data, name
    for name in PER_TOKEN:
        assert f"`{name}`" in metrics, name
    for kind in AU_KINDS:
        assert kind in text_of(ROOT / "docs" / "grpo.md"), kind


def test_every_dependency_has_its_reason():
    text = text_of(ROOT / "docs" / "dependencies.md")
    call = next(
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in given["extras_require"].keys:
        assert f"| `{name.value}` |" in text, name.value
    for part in (given["install_requires"], *given["extras_require"].values):
        for node in ast.walk(part):
            if isinstance(node, ast.Constant):
                package = re.match(r"[\w-]+", node.value)[0]
                assert re.search(rf"\b{package}\b", text), package


# ---------------------------------------------------------------- lines of code


ANCHOR = re.compile(r"`([\w/]+\.py):(\d+)`")


def anchors(page: Path) -> Iterator[tuple[str, int, str, str, str]]:
    """(file, line number, code that stands there, function, the page's line) of every `file.py:12` on a page: the code
    is the last code span of the line, the function the first dotted name in it."""
    for line in text_of(page).splitlines():
        for file, number in ANCHOR.findall(line):
            spans = re.findall(r"`([^`]+)`", line)
            function = next((span for span in spans if re.fullmatch(r"tag(\.\w+)+", span)), "")
            yield file, int(number), spans[-1], function, line


def lines_with(file: str, code: str) -> list[int]:
    """Line numbers of a file that hold some code."""
    return [i for i, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1) if code in line]


def span_of(function: str) -> range:
    """The lines of a function or method, by its dotted name."""
    module, found, name = importlib.import_module("tag"), None, ""
    for word in function.split(".")[1:]:
        name = f"{module.__name__}.{word}"
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            continue
        found = getattr(found or module, word)
    lines, first = inspect.getsourcelines(found)
    return range(first, first + len(lines))


@pages
def test_lines_are_where_the_page_says(page):
    for file, number, code, function, line in anchors(page):
        there = lines_with(file, code)
        assert there == [number], f"{code!r} is at {file}:{there}, not {number}: python -m tests.test_docs\n{line}"
        if function:
            assert number in span_of(function), f"{file}:{number} is not in {function}"


def test_every_equation_has_its_lines():
    rows = [line.split("|")[1] for *_, line in anchors(ROOT / "docs" / "grpo.md")]
    assert {f"Eq. {n}" for n in range(1, 6)} <= {row.strip() for row in rows}


# ---------------------------------------------------------------- worked examples


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]\d)")


def words_of(line: str) -> str:
    """A line without its numbers. Another processor may sum in another order: that is rounding, and said as such."""
    return " ".join(NUMBER.sub(" # ", line.replace("within 1e-06", "bit for bit")).split())


def same_words(a: str, b: str) -> bool:
    """Whether two lines differ by their numbers alone."""
    return words_of(a) == words_of(b)


def same_line(a: str, b: str) -> bool:
    """Whether two lines say the same, up to rounding."""
    numbers = [[float(x) for x in NUMBER.findall(line.replace("within 1e-06", ""))] for line in (a, b)]
    return same_words(a, b) and numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=2e-6)


def excerpt(told: list[str], found: list[str], same: Callable[[str, str], bool]) -> list[str] | None:
    """What an excerpt ("..." for any lines) quotes of an output, as the output has it; None if it does not fit."""
    parts: list[list[str]] = [[]]
    for line in told:
        parts.append([]) if line == "..." else parts[-1].append(line)
    out, at = [], 0
    for k, part in enumerate(parts):
        end = len(found) - len(part)
        starts = [at] if k == 0 else range(at, end + 1)
        if k == len(parts) - 1 and part:  # nothing follows it
            starts = [i for i in starts if i == end]
        start = next((i for i in starts if i <= end and all(map(same, found[i:], part))), None)
        if start is None:
            return None
        at = start + len(part)
        out += ["..."] * (k > 0) + found[start:at]
    return out


def shown_commands() -> Iterator[tuple[Path, str, str]]:
    """(page, a command, the output that stands right behind it)."""
    block = re.compile(r"^```bash\n(python [^\n]+)\n```\n\n```text\n(.*?)^```$", re.S | re.M)
    for page in PAGES:
        for command, output in block.findall(text_of(page)):
            yield page, command, output


def output_of(words: list[str]) -> list[str]:
    """Lines that one of our tools prints, run in the repository's root. It must end with exit code 0."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", words[1:])
        try:
            load(words[1]).main()
        except SystemExit as e:
            assert not e.code, f"{shlex.join(words)}: exit code {e.code}"
    return out.getvalue().splitlines()


@pytest.mark.parametrize("page, command, told", shown_commands())
def test_commands_print_what_the_page_shows(page, command, told):
    found = output_of(shlex.split(command))
    assert excerpt(told.splitlines(), found, same_line), f"{command} prints\n" + "\n".join(found)


def example_commands() -> list[list[str]]:
    """Every command on our pages that reads docs/example, each once."""
    found = {shlex.join(words): words for page in PAGES for words in commands(page)}
    return [words for words in found.values() if any("docs/example" in word for word in words)]


@pytest.mark.parametrize("words", example_commands(), ids=shlex.join)
def test_commands_on_the_example_run_as_they_stand(words, tmp_path):
    assert output_of([word.replace("page.html", str(tmp_path / "page.html")) for word in words])


def test_an_excerpt_must_fit():
    found = ["a 1", "b 2", "c 3.00", "d 4"]
    for told in (
        ["a 1", "b 2", "c 3", "d 4"],
        ["a 1", "..."],
        ["...", "c 3.001", "..."],
        ["...", "d 4"],
        ["a 1", "...", "d 4"],
    ):
        assert excerpt(told, found, same_line)
    for told in (
        ["a 1"],
        ["b 2", "..."],
        ["...", "c 3"],
        ["...", "c 3.1", "..."],
        ["...", "d 4", "c 3"],
        ["a 1", "...", "e 4"],
    ):
        assert excerpt(told, found, same_line) is None
    assert excerpt(["...", "c 9", "..."], found, same_words) == ["...", "c 3.00", "..."]


def examples() -> Iterator[tuple[str, str, str | None]]:
    """(page, python block, the text block right behind it or None)."""
    for page in PAGES:
        blocks = [*fences(page), ("", "")]
        for (language, body), (after, output) in pairwise(blocks):
            behind = f"```python\n{body}```\n\n```text\n" in text_of(page)
            if language == "python":
                yield page.name, body, output if after == "text" and behind else None


@pytest.mark.parametrize("name, code, output", examples())
def test_examples_say_what_they_print(name, code, output):
    if output is None:  # needs a finished run: its imports must hold
        lines = [ast.unparse(n) for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
        code, output = "\n".join(lines), ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, name, "exec"), {})
    assert out.getvalue() == output


# ---------------------------------------------------------------- written anew


def refreshed(page: Path) -> str:
    """A page with its line numbers and the outputs of its commands as they are now."""
    lines = text_of(page).splitlines(keepends=True)
    for i, line in enumerate(lines):
        for file, number in ANCHOR.findall(line):
            there = lines_with(file, re.findall(r"`([^`]+)`", line)[-1])
            if len(there) == 1:
                lines[i] = lines[i].replace(f"`{file}:{number}`", f"`{file}:{there[0]}`")
            else:
                print(f"{page.name}: which line is this? {line.strip()} (there are {there})")
    text = "".join(lines)
    for other, command, told in shown_commands():
        if other == page:
            found = output_of(shlex.split(command))
            new = excerpt(told.splitlines(), found, same_words) if "..." in told.splitlines() else found
            if new is None:
                print(f"{page.name}: the excerpt of {command} fits no more")
            else:
                head = f"{command}\n```\n\n```text\n"
                text = text.replace(f"{head}{told}```", head + "".join(f"{line}\n" for line in new) + "```")
    return text


if __name__ == "__main__":
    for path in PAGES:
        if (text := refreshed(path)) != text_of(path):
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: rewritten")
