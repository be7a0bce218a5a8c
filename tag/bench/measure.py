"""Measuring: hardware, rounds of timed calls, peak memory, and what the machine can do at most."""

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch


def hardware(device: torch.device) -> dict:
    """What this runs on."""
    found: dict = {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = "unknown"
    else:
        found["cpu"] = cpu_name()
        found["load_1min"] = round(os.getloadavg()[0], 2)  # what else the machine is doing
    return found | {"flash_attn": find_spec("flash_attn") is not None}


def cpu_name() -> str:
    """The processor's name as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- time -------------------------------------------------------------------------------------------------------


class Stages:
    """Seconds and peak memory between `lap`s; waits for the device, so that each stage pays for what it started."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """What happened since the last lap counts for nothing."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap, and the highest memory in it, as `name`."""
        if self.cuda:
            torch.cuda.synchronize()
            self.peak_gib[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.seconds[name] = round(time.perf_counter() - self.last, 4)
        self.restart()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def rounds(
    sides: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int = 5,
    warmup: int = 1,
    seconds: float = float("inf"),
    cpu: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of every side, warm-up calls before. The sides take turns, so that whatever else the
    machine does meets all of them; when `seconds` are spent, no further round begins (one is always made).

    A side that runs out of GPU memory is dropped and has an empty list. cpu: filled with the processor time of the same
    calls, over all threads: what is left to compare on a machine that is busy with other work.
    """
    started = time.perf_counter()
    found: dict[str, list[float]] = {name: [] for name in sides}
    running = dict(sides)
    for number in range(-warmup, repeats):
        if number > 0 and time.perf_counter() - started > seconds:
            break
        for name, call in list(running.items()):
            used = time.process_time()
            try:
                took = timed(call, device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                del running[name]
                found[name] = []
                continue
            if number >= 0:
                found[name].append(took)
                if cpu is not None:
                    cpu.setdefault(name, []).append(time.process_time() - used)
    return found


def median(values: list[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


class Clock:
    """Seconds spent inside wrapped functions, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.inside: list[str] = []

    @contextmanager
    def wrapping(self, owner: object, attribute: str, name: str) -> Iterator[None]:
        """Time every call of `owner.attribute` as `name` while the block runs. Time in a wrapped function that another
        one calls counts for the outer one alone."""
        original = getattr(owner, attribute)

        def call(*args, **kwargs):
            if self.inside:
                return original(*args, **kwargs)
            self.inside.append(name)
            synchronize(self.device)
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.inside.pop()

        own = attribute in vars(owner)
        setattr(owner, attribute, call)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)

    def take(self) -> dict[str, float]:
        """The seconds so far, which start again from zero."""
        taken, self.seconds = self.seconds, {}
        return taken


def operators(call: Callable[[], object], top: int = 12) -> list[dict]:
    """The PyTorch operators that `call` spends its time in: name, share of all operators' own time, calls."""
    with torch.profiler.profile() as profile:
        call()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    return [
        {"operator": e.key, "share": round(e.self_cpu_time_total / total, 4), "calls": e.count} for e in found[:top]
    ]


# ---- memory -----------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> None:
    """Let go of garbage, and on a GPU of what the allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needed at most on top of what was there before; None where the system does not tell.

    On a CPU the process's resident memory (Linux): memory that is free but still held by the allocator is given back
    first, or a call that reuses it would seem to need nothing. Needs a warm-up call before: libraries load with first
    calls.
    """
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = status_bytes("VmRSS")
        call()
        return status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A field of the process's memory in bytes, VmRSS (now) or VmHWM (the most so far). Linux.

    Raises OSError where the system does not tell, and for a process that has ended.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"process {pid} has no {field}")


# ---- ceilings ---------------------------------------------------------------------------------------------------


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = 10
    found = rounds({"": lambda: [a @ b for _ in range(calls)]}, device, repeats, warmup=2)
    return calls * 2 * n**3 / min(found[""])


def bandwidth(device: torch.device, nbytes: int, repeats: int = 5) -> float:
    """Bytes a second when a working set of `nbytes` is read again and again: from whatever cache holds it, or none.

    The better of a sum and a copy (which reads and writes).
    """
    x = torch.ones(max(nbytes // 4, 1024), device=device)
    half = len(x) // 2
    calls = max(1, min(100, 2**30 // x.nbytes))
    sides = {
        "sum": lambda: [x.sum() for _ in range(calls)],
        "copy": lambda: [x[:half].copy_(x[half : 2 * half]) for _ in range(calls)],
    }
    found = rounds(sides, device, repeats, warmup=2)
    return calls * x.nbytes / min(*found["sum"], *found["copy"])
