"""The recipes, the quick start and the pins say what they mean: run with stand-ins for torchrun and python, in seconds.

pytest tests/test_recipes.py
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

import eval as eval_script
import train_grpo
import train_sft

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tools" / "recipes"
SCRIPTS = {"train_sft.py": train_sft, "train_grpo.py": train_grpo, "eval.py": eval_script}
GIVEN = {"DATA": "some data", "IMAGE_ROOT": "faces", "ADAPTER": "runs/sft/best", "OUT": "runs/x"}


def shell(script: Path, *args: str, path: Path | None = None, cwd: Path = ROOT, **env: str):
    """Run a script with bash and only these variables; `path` goes before the usual programs."""
    env["PATH"] = os.pathsep.join(filter(None, [str(path or ""), os.environ["PATH"]]))
    return subprocess.run(["bash", str(script), *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def torchrun(tmp_path):
    """A folder with a torchrun that prints its arguments, one a line."""
    program(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    return tmp_path


def command(torchrun: Path, name: str, *args: str, **env: str):
    """(torchrun's own arguments, the script's path, its parsed arguments) of a recipe."""
    done = shell(RECIPES / name, *args, path=torchrun, cwd=torchrun, **(GIVEN | env))
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = Path(words[at])
    assert script.is_file() and script.parent == ROOT
    return words[:at], script.name, vars(SCRIPTS[script.name].parse_args(words[at + 1 :]))


NAMES = {
    "sft_7b_4xh200.sh": "train_sft.py",
    "grpo_7b_4xh200.sh": "train_grpo.py",
    "rlvr_7b_4xh200.sh": "train_grpo.py",
    "eval_7b.sh": "eval.py",
}


def test_all_recipes_are_tested():
    assert {p.name for p in RECIPES.iterdir()} == {*NAMES, "nodes.sh", "slurm.sh"}


NODES = {"NODES": "3", "HEAD": "node1:29400", "JOB": "tag-7b"}


def test_several_machines(torchrun):
    """Torchrun's own flags are ones it has; the script's are the script's, and one given last wins."""
    given = ["train_grpo.py", "--data", "some data", "--adapter", "a", "--out", "runs/x"]
    done = shell(RECIPES / "nodes.sh", *given, path=torchrun, **NODES, GPUS="8", RESTARTS="5")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    asked = parse_args(words)
    assert (asked.nnodes, asked.nproc_per_node, asked.max_restarts) == ("3", "8", 5)
    assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.rdzv_id) == ("c10d", "node1:29400", "tag-7b")
    assert "SIGUSR1" in asked.signals_to_handle and asked.shutdown_timeout == 120
    args = train_grpo.parse_args(asked.training_script_args)
    assert Path(asked.training_script) == ROOT / "train_grpo.py"
    assert (args.shard, args.data, args.out) == ("hybrid", "some data", "runs/x")
    done = shell(RECIPES / "nodes.sh", *given, "--shard", "full", path=torchrun, **NODES)
    assert train_grpo.parse_args(parse_args(done.stdout.splitlines()).training_script_args).shard == "full"
    for variable in NODES:
        done = shell(RECIPES / "nodes.sh", *given, path=torchrun, **{k: v for k, v in NODES.items() if k != variable})
        assert done.returncode != 0 and f"{variable}: is not set" in done.stderr


@pytest.mark.parametrize("stopped", [True, False])
def test_slurm(tmp_path, stopped):
    """srun starts nodes.sh on all machines; a run that was stopped goes back into the queue, a finished one not."""
    program(tmp_path, "srun", 'shift; printf "%s\\n" "$NODES" "$HEAD" "$JOB" "$GPUS" "$@"')
    program(tmp_path, "scontrol", '[ "$1" != show ] || echo node7; [ "$1" != requeue ] || echo "requeued $2"')
    out = tmp_path / "run"
    out.mkdir()
    if stopped:
        (out / "stopped.json").write_text("{}")
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    given = ["train_sft.py", "--data", "d", "--out", str(out)]
    done = shell(RECIPES / "slurm.sh", *given, path=tmp_path, **slurm)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["2", "node7:20077", "tag-77", "4"]
    assert lines[4:6] == ["bash", str(RECIPES / "nodes.sh")] and lines[6 : 6 + len(given)] == given
    assert ("requeued 77" in lines) is stopped


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_the_scripts(torchrun, name):
    launcher, script, args = command(torchrun, name)
    assert script == NAMES[name] and launcher[:3] == ["--standalone", "--nproc-per-node", "4"]
    if script != "eval.py":  # has nothing to save but answers, and these are appended one by one
        asked = parse_args([*launcher, script])
        assert {"SIGTERM", "SIGUSR1"} <= set(asked.signals_to_handle.split(",")) and asked.shutdown_timeout == 120
    assert (args["data"], args["image_root"], args["out"]) == ("some data", "faces", "runs/x")
    assert args["model"] == "Qwen/Qwen2.5-VL-7B-Instruct" and args["dtype"] == "bfloat16"
    launcher, _, args = command(torchrun, name, "--threads", "3", GPUS="2", MODEL="my model")
    assert launcher[2] == "2" and (args["model"], args["threads"]) == ("my model", 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_that_is_not_set_is_named(torchrun, name):
    needed = set(GIVEN) - ({"ADAPTER"} if name.startswith("sft") else set())
    for variable in needed:
        done = shell(RECIPES / name, path=torchrun, **{k: v for k, v in GIVEN.items() if k != variable})
        assert done.returncode != 0 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and f"{variable}: is not set" in done.stderr
        assert re.search(rf"^# {variable} ", (RECIPES / name).read_text(), re.M)  # and explained in the head


def test_settings_are_the_papers(torchrun):
    sft = command(torchrun, "sft_7b_4xh200.sh")[2]
    expected = dict(lora_rank=128, lora_alpha=256, lora_dropout=0.05, lr=2e-5, warmup=0.03, weight_decay=0.01)
    expected |= dict(clip_norm=1.0, epochs=3, context=2048, batch_size=8 * 8 * 4, freeze_projector=False)
    assert {k: sft[k] for k in expected} == expected
    grpo = command(torchrun, "grpo_7b_4xh200.sh")[2]
    expected = dict(group_size=8, temperature=1.0, max_new_tokens=512, clip_eps=0.2, beta=0.04, lr=1e-6, epochs=2)
    expected |= dict(weight_decay=0.01, clip_norm=1.0, au_reward="iou", kl_reference="sft", train_projector=False)
    expected |= dict(clip_eps_high=None, max_steps=0, adapter="runs/sft/best", loss_average="sequence")
    assert {k: grpo[k] for k in expected} == expected
    rlvr = command(torchrun, "rlvr_7b_4xh200.sh")[2]
    assert rlvr == grpo | {"au_reward": "none"}
    answers = command(torchrun, "eval_7b.sh")[2]
    assert answers["max_new_tokens"] == 512 and not answers["no_box_limit"] and answers["adapter"] == "runs/sft/best"
    assert command(torchrun, "eval_7b.sh", ADAPTER="none")[2]["adapter"] is None


def required(text: str) -> set[str]:
    """Names in a list of quoted requirements."""
    return {re.match(r"[\w-]+", requirement)[0] for requirement in re.findall(r'"(.*?)"', text)}


def pinned(text: str) -> set[str]:
    """Names with an exact version."""
    return set(re.findall(r"^([\w-]+)==[\w.]+$", text, re.M))


def test_the_pins_cover_what_setup_asks_for():
    setup = (ROOT / "setup.py").read_text()
    install = setup.split("install_requires=[")[1].split("]")[0]
    extras = setup.split("extras_require={")[1].split("\n    }")[0]
    dev = extras.split('"dev": ')[1]
    core, rest = (ROOT / "constraints.txt").read_text().split("# Extras")
    assert required(install) <= pinned(core)
    assert required(dev) <= pinned(rest.split("# What those need")[0])
    assert "torch==2.13.0" in core.splitlines()  # no local part: no index is forced on anyone
    lines = [line for line in (core + rest).splitlines()[2:] if line and not line.startswith("#")]
    assert not [line for line in lines if re.match(r"nvidia|triton|cuda|jax", line, re.I)]


def test_nothing_is_imported_that_is_not_required():
    """Oracles of tests (trl, peft) and what they bring (pandas, pyarrow) stay out of the package and of all tools but
    the benches against them."""
    ours = {"tag", "trl_side", *(path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")))}
    required = {"torch", "transformers", "safetensors", "numpy", "PIL", "tqdm", "setuptools"}
    required |= {"tokenizers", "huggingface_hub"}  # transformers brings them
    # Extras `data`, `flash`, `api`, `fuzz`; TensorBoard comes through torch.
    optional = {"mediapipe", "flash_attn", "openai", "atheris"}
    for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tag").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            alone = {"trl"} if path.name == "bench_grpo.py" else set()
            alone |= {"matplotlib"} if path.parts[-3:-1] == ("tag", "report") and "figure" in path.name else set()
            for top in {name.split(".")[0] for name in names}:
                assert top in ours | required | optional | alone | sys.stdlib_module_names, f"{path.name} imports {top}"


# ---------------------------------------------------------------- quickstart.sh and test.sh


@pytest.fixture
def project(tmp_path):
    """The shell scripts in an otherwise empty project whose .venv holds a python that prints its arguments."""
    (tmp_path / "tools").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("quickstart.sh", "test.sh", "venv.sh"):
        (tmp_path / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
    for name in ("constraints.txt", "setup.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    program(
        tmp_path / ".venv" / "bin",
        "python",
        'case "$1" in -c | -I) exec ' + sys.executable + ' "$@";; esac\necho "python $*"',
    )
    return tmp_path


def test_quickstart_runs_the_study(project):
    for args, profile, out in (([], "quick", "runs/quickstart"), (["--fast"], "smoke", "runs/quickstart-fast")):
        done = shell(project / "tools" / "quickstart.sh", *args)
        assert done.returncode == 0, done.stderr
        assert f"python tools/run_study.py --profile {profile} --out {out}" in done.stdout.splitlines()
        assert "pip install" not in done.stdout.split("What to run next")[0]  # everything is there already
        for path in re.findall(r"tools/[\w/]+\.(?:sh|py)", done.stdout):
            assert (ROOT / path).is_file(), path
    done = shell(project / "tools" / "quickstart.sh", "--quick")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown argument --quick")


def test_test_sh_checks_style_then_runs_the_tests(project):
    done = shell(project / "tools" / "test.sh", "--fast", "tests/test_grpo.py")
    assert done.returncode == 0, done.stderr
    style, layout, tests = done.stdout.splitlines()
    assert (style, layout) == ("python -m ruff check .", "python -m ruff format --check .")
    assert tests.startswith("python -m pytest -q") and tests.endswith("-m not slow tests/test_grpo.py")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1].endswith("bash tools/test.sh")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_an_old_python_is_refused_by_name(project, tmp_path):
    old = tmp_path / "bin"
    old.mkdir()
    program(old, "old-python", 'case "$2" in *exit*) exit 1;; *) echo ", /usr/bin/old-python is Python 3.9.2";; esac')
    (project / ".venv").rename(project / "elsewhere")
    done = shell(project / "tools" / "quickstart.sh", path=old, PYTHON="old-python")
    assert done.returncode == 2 and not (project / ".venv").exists()
    assert len(done.stderr.splitlines()) == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "is Python 3.9.2" in done.stderr


def test_what_is_missing_is_installed_once(project):
    (project / "constraints.txt").write_text((project / "constraints.txt").read_text().replace("torch==", "torch==9."))
    done = shell(project / "tools" / "test.sh")
    assert f"-c {project}/constraints.txt -e {project}[dev]" in done.stdout
    done = shell(project / "tools" / "quickstart.sh")
    assert f"-c {project}/constraints.txt -e {project}\n" in done.stdout
