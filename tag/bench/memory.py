"""Allocated bytes, stage by stage: what tensors take, not what the process has of the system.

On a GPU PyTorch's allocator counts. On a CPU the profiler reports every allocation as it happens, inside kernels too,
with what all threads hold at that moment; the stages are told apart by an empty tensor of a size nothing else has.
"""

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tag.bench.measure import free_memory

MARK = 7_777_777  # bytes; never touched, so no page of it exists


class AllocatedBytes:
    """While it is active: the highest number of allocated bytes of each stage, and what is left at its end.

    with AllocatedBytes(device) as found: ...; found.lap("build"); ...; found.lap("step")
    found.peaks, found.left         stage -> bytes, complete when the block has ended

    On a CPU memory that was taken before the block began does not count; on a GPU it does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.names = device, []
        self.peaks: dict[str, int] = {}
        self.left: dict[str, int] = {}

    def __enter__(self) -> "AllocatedBytes":
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.counting = _counts_all_threads()
            self.counting.value = True
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self.profile.__enter__()
        return self

    def lap(self, name: str) -> None:
        """What happened since the last lap is the stage `name`; of several of the same name the last one counts."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peaks[name] = torch.cuda.max_memory_allocated(self.device)
            self.left[name] = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            time.sleep(0.05)  # gloo's threads may be the last to let go of what they carried, a moment later
            torch.empty(MARK, dtype=torch.uint8)
            self.names.append(name)

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            return
        self.profile.__exit__(*exc)
        self.counting.value = False
        changes = sorted(_allocations(self.profile.profiler.kineto_results.experimental_event_tree()))
        names = iter(self.names)
        before = changes[0][2] - changes[0][1] if changes else 0  # what an earlier block has left
        peak = 0
        for _, nbytes, total in changes:
            if nbytes == MARK:
                name = next(names)
                held = total - MARK - before
                self.peaks[name], self.left[name] = max(peak, held), held
                peak = held
            elif nbytes != -MARK:
                peak = max(peak, total - before)


def _counts_all_threads() -> ctypes.c_bool:
    """PyTorch's switch to count allocations of every thread, not only of one that is profiled.

    Without it a gathered layer that one of gloo's threads is the last to let go of would count for ever: the profiler
    follows the thread that started it.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage")


def _allocations(events: list) -> Iterator[tuple[int, int, int]]:
    """(time, bytes taken or, negative, let go of, bytes that are held then), in no order."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            found = event.extra_fields
            yield event.start_time_ns, found.alloc_size, found.total_allocated
        yield from _allocations(event.children)
