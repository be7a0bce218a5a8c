"""Allocated bytes, stage by stage: what tensors take, not what the process has of the system.

On a GPU PyTorch's allocator counts. On a CPU the profiler reports every allocation and release as it happens, inside
kernels too, and the stages are told apart by an empty tensor of a size that nothing else has.
"""

import gc

import torch

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
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
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
            torch.empty(MARK, dtype=torch.uint8)
            self.names.append(name)

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            return
        self.profile.__exit__(*exc)
        events = self.profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        names = iter(self.names)
        held = peak = 0
        for _, nbytes in changes:
            if nbytes == MARK:
                name = next(names)
                self.peaks[name], self.left[name] = peak, held
                peak = held
            elif nbytes != -MARK:
                held += nbytes
                peak = max(peak, held)
