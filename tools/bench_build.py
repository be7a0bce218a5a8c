"""Rate, memory and losses of tools/build_tag310k.py on made-up faces, as JSON.

    python tools/bench_build.py --faces 1000 10000 100000 --out docs/results/build_rules.json
    python tools/bench_build.py --faces 2000 --backend openai --concurrency 128 --servers 4 --out build_servers.json
    python tools/bench_build.py --faces 3000 --backend openai --concurrency 128 --servers 3 --dead-servers 1 \\
        --fault-rate 0.2 --kills 5 --out build_faults.json

The faces are records with three AUs over eight small images. Servers are tools/fake_endpoint.py, which answers at
once, so that what is measured is the pipeline and the client (and, on the same machine, the servers). With --kills the
build is killed so many times while it works and started again. After every run each face must be in the kept lines
exactly once: one lost or doubled is an error, not a figure. CPU time is that of the pipeline's processes and, apart,
of the servers; memory is the largest the pipeline ever held.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

import torch
from PIL import Image

from tag.args import Parser, check, run
from tag.bench.measure import status_bytes
from tag.bench.output import card, write_json
from tag.boxes import Box
from tag.data.records import AU, Record, write_records
from tag.errors import DataError
from tag.labels import CLASSES

ROOT = Path(__file__).resolve().parents[1]
SIDE = 48  # pixels of the images, as FERPlus
BOXES: dict[str, Box] = {"AU12": (80, 323, 416, 407), "AU6": (117, 248, 396, 344), "AU25": (168, 353, 321, 417)}
RESTARTS = 10  # after the kills, for faces that ran out of tries


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--faces", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes, one run each")
    p.add_argument("--backend", choices=("rules", "openai"), default="rules")
    p.add_argument("--servers", type=int, default=4, help="for --backend openai")
    p.add_argument("--dead-servers", type=int, default=0, help="more addresses, at which nobody listens")
    p.add_argument("--concurrency", type=int, default=128, help="questions a server gets at a time")
    p.add_argument("--fault-rate", type=float, default=0.0, help="of the servers")
    p.add_argument("--timeout", type=float, default=30.0, help="seconds for one answer")
    p.add_argument("--kills", type=int, default=0, help="times that the build is killed and started again")
    p.add_argument("--image-size", type=int, default=512, help="side in pixels of the images that are sent")
    p.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    p.add_argument("--out", required=True, metavar="X.json", help="file to write")
    args = p.parse_args(argv)
    check(min(args.faces) >= 1 and args.servers >= 1, "--faces and --servers must be at least 1")
    check(args.kills >= 0 and args.dead_servers >= 0, "--kills and --dead-servers must not be negative")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """One run a size; the table is printed and written after each."""
    args = parse_args(argv)
    facts = card("tools/bench_build.py", args, argv, torch.device("cpu"), ("openai", "httpx2"))
    runs = []
    for count in args.faces:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(Path(folder), count, args))
        print(json.dumps(runs[-1]), flush=True)
        write_json(args.out, {**facts, "runs": runs})


def measure(folder: Path, count: int, args: argparse.Namespace) -> dict:
    """Build `count` made-up faces in processes of their own. Raises DataError if one is lost or doubled."""
    make_faces(folder, count)
    command = [sys.executable, str(ROOT / "tools" / "build_tag310k.py"), str(folder / "in.jsonl")]
    command += ["--image-root", str(folder), "--out", str(folder / "out")]
    with servers(args) as (urls, running):
        if urls:
            command += ["--backend", "openai", "--model", "m", "--concurrency", str(args.concurrency)]
            command += ["--image-size", str(args.image_size), "--timeout", str(args.timeout), "--endpoint", *urls]
        load, start = os.getloadavg()[0], time.perf_counter()
        result, used = build(command, folder / "out", count, args)
        seconds = time.perf_counter() - start
        servers_cpu = sum(cpu_seconds(server.pid) for server in running)
        injected = sum((end_server(server) for server in running), Counter())
    this = result["this_run"]
    calls = this["calls"]
    found = {
        "faces": count,
        "inputs": result["inputs"],
        **audit(folder / "out", count),
        "kills": args.kills,
        "starts": used.starts,
        "seconds_whole": round(seconds, 1),
        "cpu_seconds": round(used.cpu_seconds, 1),
        "servers_cpu_seconds": round(servers_cpu, 1),
        "max_rss_mb": round(used.max_rss_mb, 1),
        "load_average_before": round(load, 1),
        "calls_that_servers_got": injected.pop("calls", 0),
        "faults_injected": dict(sorted(injected.items())),
        "faults_met_in_last_start": {k: v["faults"] for k, v in this["backend"].items() if isinstance(v, dict)},
    }
    if used.starts == 1:  # the rates are those of the last start
        found |= {
            "calls": calls,
            "faces_per_second": round(this["faces"] / this["seconds"], 1),
            "calls_per_second": round(calls / this["seconds"], 1),
            "cpu_ms_per_call": round(1000 * used.cpu_seconds / max(calls, 1), 2),
            "servers_cpu_ms_per_call": round(1000 * servers_cpu / max(calls, 1), 2),
        }
    return found


@contextmanager
def servers(args: argparse.Namespace) -> Iterator[tuple[list[str], list[subprocess.Popen]]]:
    """(addresses, processes) of the servers, dead addresses last; none for the rules."""
    running, dead = [], []
    try:
        if args.backend == "openai":
            for i in range(args.servers):
                command = [sys.executable, str(ROOT / "tools" / "fake_endpoint.py"), "--port", "0", "--seed", str(i)]
                command += ["--fault-rate", str(args.fault_rate)]
                running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(args.dead_servers):
                dead.append(socket.socket())
                dead[-1].bind(("127.0.0.1", 0))  # taken, so that nobody else gets it, and never listened at
        urls = [server.stdout.readline().strip() for server in running]
        urls += [f"http://127.0.0.1:{s.getsockname()[1]}/v1" for s in dead]
        yield urls, running
    finally:
        for server in running:
            server.kill()
            server.wait()
            server.stdout.close()
        for s in dead:
            s.close()


def end_server(server: subprocess.Popen) -> Counter[str]:
    """What it has counted: calls, and faults by kind."""
    server.terminate()
    return Counter(json.loads(server.stdout.readline()))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process that is still there (Linux; 0 elsewhere)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Used:
    """What the starts of a build took together."""

    starts: int = 0
    cpu_seconds: float = 0.0
    max_rss_mb: float = 0.0
    errors: TextIO | None = None

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start it; what it says on standard error is kept."""
        self.starts += 1
        self.errors = tempfile.TemporaryFile("w+")
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.errors)

    def ended(self, process: subprocess.Popen) -> str:
        """Wait for its end; what it said on standard error."""
        while not has_ended(process.pid):
            self.max_rss_mb = max(self.max_rss_mb, peak_rss_mb(process.pid))
            time.sleep(0.05)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds += usage.ru_utime + usage.ru_stime
        with self.errors as f:
            f.seek(0)
            return " ".join(f.read().split())[-300:]


def peak_rss_mb(pid: int) -> float:
    """Largest memory of a process so far (Linux). Not that of wait4: it starts from what the forking process held."""
    try:
        return status_bytes("VmHWM", pid) / 2**20
    except OSError:
        return 0.0


def build(command: list[str], out: Path, count: int, args: argparse.Namespace) -> tuple[dict, Used]:
    """Kill the build `args.kills` times while it works, then let it finish; its last summary and what all that took."""
    rng, used, result = random.Random(args.seed), Used(), {}
    for n in range(args.kills):
        goal = int((n + rng.random()) * count / (args.kills + 1))
        process = used.start(command)
        while not has_ended(process.pid) and sum(p.read_bytes().count(b"\n") for p in shards(out)) <= goal:
            time.sleep(0.05)
        too_late = has_ended(process.pid)
        process.kill()
        errors = used.ended(process)
        if too_late:
            raise DataError(f"the build ended before it could be killed: {errors}")
    for _ in range(RESTARTS):
        errors = used.ended(used.start(command))
        if not (out / "summary.json").is_file():
            raise DataError(f"the build of {count} faces failed: {errors}")
        result = json.loads((out / "summary.json").read_text())
        if not result["inputs"]["failed"] and not result["inputs"]["not_reached"]:
            return result, used
    raise DataError(f"after {used.starts} starts {result['inputs']} of {count} faces: {errors}")


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def audit(out: Path, count: int) -> dict[str, int]:
    """Faces that the kept lines lack, and that they hold twice: 0 and 0, or DataError."""
    kept = kept_ids(out)
    ids = Counter(i for found in kept.values() for i in found)
    lost = sum(f"face-{i:07d}" not in ids for i in range(count))
    doubled = sum(n - 1 for n in ids.values())
    exported = sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl") if path.name != "runs.jsonl")
    if lost or doubled or exported != len(kept["accepted"]):
        raise DataError(f"of {count} faces {lost} are lost, {doubled} doubled, {exported} exported")
    return {"lost": lost, "doubled": doubled}


def shards(out: Path) -> list[Path]:
    """The append-only files."""
    return sorted(out.glob("accepted/*.jsonl")) + sorted(out.glob("rejected/*.jsonl"))


def kept_ids(out: Path) -> dict[str, list[str]]:
    """Ids on the whole lines of the shards, by kind."""
    found: dict[str, list[str]] = {"accepted": [], "rejected": []}
    for path in shards(out):
        lines = (line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
        found[path.parent.name] += [json.loads(line)["id"] for line in lines]
    return found


def make_faces(folder: Path, count: int) -> None:
    """Images and in.jsonl."""
    for i in range(8):
        Image.effect_noise((SIDE, SIDE), 40 + i).save(folder / f"{i}.png")
    aus = [AU(name, round(0.9 - 0.1 * i, 1), box) for i, (name, box) in enumerate(BOXES.items())]
    names = [au.au for au in aus]
    write_records(
        folder / "in.jsonl",
        (
            Record(f"face-{i:07d}", f"{i % 8}.png", "bench", "train", CLASSES[i % len(CLASSES)], aus, names)
            for i in range(count)
        ),
    )


if __name__ == "__main__":
    run(main)
