"""Rate and memory of tools/build_tag310k.py at growing numbers of faces, as JSON.

    python tools/bench_build.py --faces 1000 10000 100000 --out docs/results/build_rules.json
    python tools/bench_build.py --faces 3000 --backend openai --concurrency 128 --servers 4 --out build_servers.json

The faces are made up: records with three AUs over eight small images. Servers are tools/fake_endpoint.py, which
answers at once, so that what is measured is the pipeline and the client (and, on the same machine, the server).
CPU time is that of the pipeline's process; memory is the largest it ever held.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from PIL import Image

from tag import __version__
from tag.args import Parser, check, run
from tag.boxes import Box
from tag.data.records import AU, Record, write_records
from tag.errors import DataError
from tag.files import replacing
from tag.labels import CLASSES

ROOT = Path(__file__).resolve().parents[1]
SIDE = 48  # pixels of the images, as FERPlus
BOXES: dict[str, Box] = {"AU12": (80, 323, 416, 407), "AU6": (117, 248, 396, 344), "AU25": (168, 353, 321, 417)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--faces", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes, one run each")
    p.add_argument("--backend", choices=("rules", "openai"), default="rules")
    p.add_argument("--servers", type=int, default=4, help="for --backend openai")
    p.add_argument("--concurrency", type=int, default=128, help="questions a server gets at a time")
    p.add_argument("--fault-rate", type=float, default=0.0, help="of the servers")
    p.add_argument("--image-size", type=int, default=512, help="side in pixels of the images that are sent")
    p.add_argument("--out", required=True, metavar="X.json", help="file to write")
    args = p.parse_args(argv)
    check(min(args.faces) >= 1 and args.servers >= 1, "--faces and --servers must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """One run a size; the table is printed and written after each."""
    args = parse_args(argv)
    words = [shlex.quote(word) for word in (sys.argv[1:] if argv is None else argv)]
    card = {
        "command": " ".join(["python tools/bench_build.py", *words]),
        "versions": {"tag": __version__, "python": platform.python_version()},
        "commit": subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "runs": [],
    }
    for count in args.faces:
        with tempfile.TemporaryDirectory() as folder:
            card["runs"].append(measure(Path(folder), count, args))
        print(json.dumps(card["runs"][-1]), flush=True)
        with replacing(args.out) as f:
            f.write(json.dumps(card, indent=1) + "\n")


def measure(folder: Path, count: int, args: argparse.Namespace) -> dict:
    """Build `count` made-up faces in a process of its own. Raises DataError if not every face is accounted for."""
    make_faces(folder, count)
    servers = []
    command = [sys.executable, str(ROOT / "tools" / "build_tag310k.py"), str(folder / "in.jsonl")]
    command += ["--image-root", str(folder), "--out", str(folder / "out")]
    try:
        if args.backend == "openai":
            for i in range(args.servers):
                server = [sys.executable, str(ROOT / "tools" / "fake_endpoint.py"), "--port", "0", "--seed", str(i)]
                server += ["--fault-rate", str(args.fault_rate)]
                servers.append(subprocess.Popen(server, stdout=subprocess.PIPE, text=True))
            command += ["--backend", "openai", "--model", "m", "--concurrency", str(args.concurrency)]
            command += ["--image-size", str(args.image_size), "--timeout", "30", "--endpoint"]
            command += [server.stdout.readline().strip() for server in servers]
        load = os.getloadavg()[0]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        seconds = time.perf_counter() - start
    finally:
        for server in servers:
            server.kill()
            server.wait()
            server.stdout.close()
    if process.returncode != 0:
        raise DataError(f"the build of {count} faces failed: {' '.join(errors.split())[-300:]}")
    result = json.loads((folder / "out" / "summary.json").read_text())
    this = result["this_run"]
    if sum(result["inputs"].values()) != count or result["inputs"]["not_reached"]:
        raise DataError(f"of {count} faces {result['inputs']} were accounted for")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "faces": count,
        "calls": this["calls"],
        "faces_per_second": round(this["faces"] / this["seconds"], 1),
        "calls_per_second": round(this["calls"] / this["seconds"], 1),
        "seconds_whole": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "cpu_ms_per_call": round(1000 * cpu / max(this["calls"], 1), 2),
        "max_rss_mb": round(usage.ru_maxrss / 1024, 1),
        "load_average_before": round(load, 1),
        "inputs": result["inputs"],
        "faults": {k: v["faults"] for k, v in this["backend"].items() if isinstance(v, dict)},
    }


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
