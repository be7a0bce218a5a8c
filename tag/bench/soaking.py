"""What tools/soak.py does to runs, and how it judges them: a toy to train, injuries, comparison, slopes."""

import hashlib
import json
import math
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tag.bench.forks import ForkServer
from tag.data.records import write_records
from tag.lora import add_lora, lora_layers, save_adapter
from tag.synth.dataset import write_dataset
from tag.tiny.checkpoint import build_config, build_model, build_tokenizer, save_checkpoint
from tag.vlm import load_vlm

FACES = 12
TIMING = ("_seconds", "tokens_per_second", "record_share")  # metrics of the clock


def make_toy(folder: Path) -> None:
    """A random model of one decoder layer, an adapter of it, and twelve faces, in `folder`."""
    tokenizer = build_tokenizer()
    config = build_config(tokenizer, small=True)
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 1, [0]
    save_checkpoint(folder / "model", build_model(config), tokenizer)
    vlm = load_vlm(str(folder / "model"), "float32")
    torch.manual_seed(0)
    add_lora(vlm.hf_model, 4, 8.0, 0.0)
    with torch.no_grad():
        for layer in lora_layers(vlm.hf_model).values():
            layer.lora_B["policy"].normal_(std=0.1)  # so that there is something to move
    save_adapter(vlm.hf_model, folder / "adapter", base_model=str(folder / "model"))
    for split in ("train", "val"):
        write_records(folder / "data" / f"{split}.jsonl", write_dataset(folder / "data", split, FACES, workers=1))


def toy_flags(toy: Path, script: str, out: Path, steps: int, seed: int, **changed: object) -> list[str]:
    """Command line of a run of `steps` steps on the toy."""
    chosen: dict[str, object] = {"model": toy / "model", "data": toy / "data", "out": out, "dtype": "float32"}
    chosen |= {"device": "cpu", "threads": 1, "workers": 0, "max_new_tokens": 8, "seed": seed, "hang_minutes": 0}
    if script == "train_sft":
        chosen |= {"batch_size": 4, "epochs": steps * 4 / FACES, "lora_rank": 4, "lora_alpha": 8, "lr": 1e-2}
    else:
        chosen |= {"adapter": toy / "adapter", "group_size": 2, "rollouts_per_step": 8, "max_steps": steps, "lr": 1e-3}
    chosen |= {"eval_faces": 4, "eval_every": 5, "save_every": 1} | changed
    return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def outcome(out: Path) -> dict[str, str]:
    """Hashes of the final weights and moments and of the best adapter; every step's metrics without the clock's."""
    newest = max(out.glob("checkpoints/step-??????"))
    files = [*newest.glob("rank-*"), *out.glob("adapter/*"), *out.glob("best/*")]
    found = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith(TIMING)} for line in lines]
    return found | {"metrics": json.dumps(kept)}


def samples_lost(out: Path, whole: Path, per_step: int) -> int:
    """Samples of steps that the disturbed run has not trained on exactly once, or not as the other did."""

    def logged(folder: Path) -> list[tuple]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return sorted((x["step"], x["loss"], x["grad_norm"]) for x in lines if "grad_norm" in x)

    theirs, ours = logged(whole), logged(out)
    return per_step * (len(set(theirs) ^ set(ours)) + len(ours) - len(set(ours)))


# ---- injuries -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has been done to runs, and what came of it."""

    runs: int = 0
    equal: int = 0
    samples_lost: int = 0
    injuries: dict[str, int] = field(default_factory=dict)
    passed_over: int = 0  # damaged checkpoints that a run named and did not use
    resumed: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        """One more of a kind."""
        self.injuries[what] = self.injuries.get(what, 0) + 1

    @property
    def kills(self) -> int:
        """SIGKILLs, of one rank or all."""
        return sum(n for what, n in self.injuries.items() if what.startswith("SIGKILL"))


def damage(out: Path, dice: random.Random) -> str | None:
    """Hurt the newest checkpoint, as a bad disk or a torn write would; what was done, None if there is none."""
    folders = sorted(out.glob("checkpoints/step-??????"))
    if not folders:
        return None
    file = dice.choice(sorted(folders[-1].iterdir()))
    data = bytearray(file.read_bytes())
    kind = dice.choice(("bit flipped", "cut", "removed"))
    if kind == "removed" or not data:
        file.unlink()
        return "file removed"
    if kind == "cut":
        file.write_bytes(data[: dice.randrange(len(data))])
        return "file cut"
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return "bit flipped"


def injure(pids: list[int], dice: random.Random) -> str:
    """Do something to a running run: SIGKILL to all or one of its processes, or the scheduler's polite signal."""
    kind = dice.choices(("SIGKILL to all", "SIGKILL to one rank", "SIGTERM"), (4, 4, 1))[0]
    chosen = pids if kind == "SIGKILL to all" else [dice.choice(pids)]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        except ProcessLookupError:
            return "too late"
    return kind


def disturbed_run(
    server: ForkServer, script: str, argv: list[str], world: int, out: Path, seconds: float, tally: Tally, dice
) -> None:
    """The same command again and again, injured at random moments, until it has ended by itself."""
    for _ in range(1000):
        pids = server.start(script, argv, world)
        time.sleep(dice.uniform(0.1, 0.95) * seconds)
        tally.count(injure(pids, dice))
        ended = server.finish()
        tally.resumed += "resuming after step" in ended.output
        tally.passed_over += ended.output.count("cannot be used")
        if ended.codes == [0] * world and "stopped by" not in ended.output:
            return
        if any(code > 0 and code != 1 for code in ended.codes):  # 1: a rank whose neighbour was killed
            tally.problems.append(f"{script}, {world} processes: exit codes {ended.codes}: {ended.output[-300:]}")
        if dice.random() < 0.5 and (what := damage(out, dice)):
            tally.count(what)
    raise RuntimeError(f"{script} in {world} processes does not end")


# ---- slopes -------------------------------------------------------------------------------------------------------

T95 = {8: 2.306, 13: 2.160, 18: 2.101, 28: 2.048}  # two-sided, by degrees of freedom


def slope(x: list[float], y: list[float], blocks: int = 20) -> dict[str, float]:
    """Least-squares slope of y over x and its 95 % interval, from means of consecutive blocks (neighbouring values are
    not independent; means of long blocks nearly are). Raises ValueError for fewer than two values a block."""
    if len(x) < 2 * blocks:
        raise ValueError(f"{len(x)} values are too few for {blocks} blocks")
    size = len(x) / blocks
    parts = [slice(round(k * size), round((k + 1) * size)) for k in range(blocks)]
    xs, ys = ([statistics.fmean(values[p]) for p in parts] for values in (x, y))
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    sxx = sum((a - mx) ** 2 for a in xs)
    found = sum((a - mx) * (b - my) for a, b in zip(xs, ys)) / sxx
    rest = sum((b - my - found * (a - mx)) ** 2 for a, b in zip(xs, ys))
    half = T95[blocks - 2] * math.sqrt(rest / (blocks - 2) / sxx)
    return {"slope": found, "low": found - half, "high": found + half, "mean": my}


def observe(pid: int) -> dict[str, float] | None:
    """Resident memory (MiB), open files, threads and CPU seconds of a process so far (Linux); None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, StopIteration):
        return None
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return {"memory_mib": rss / 1024, "files": files, "threads": int(fields[17]), "cpu_seconds": cpu}
