"""Our training scripts, as they are, on a model that is handed to them; and the clock on both sides' steps."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType

import torch

from tag.bench.measure import Clock, synchronize
from tag.data.faces import Faces
from tag.dist import Dist
from tag.rollout import RolloutEngine
from tag.vlm import VLM

# What counts as what in a step of ours; the rest is "other".
OUR_PARTS = (
    (Faces, "tower", "sample"),
    (RolloutEngine, "refresh", "sample"),
    (RolloutEngine, "generate", "sample"),
    (VLM, "forward", "score"),
    (torch.Tensor, "backward", "backward"),
)


class StepClock:
    """Seconds of each step and of its parts, the first `warmup` steps left out; `cpu` is processor time."""

    def __init__(self, device: torch.device, warmup: int, repeats: int, seconds: float) -> None:
        self.device, self.clock = device, Clock(device)
        self.warmup, self.repeats, self.seconds = warmup, repeats, seconds
        self.steps: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        """The first step begins."""
        self.started = self.last = time.perf_counter()
        self.last_cpu = time.process_time()

    def step(self) -> bool:
        """A step has ended; True when there are enough of them."""
        synchronize(self.device)
        now = time.perf_counter()
        cpu = time.process_time()
        parts, total = self.clock.take(), now - self.last
        step = {"total": total, **parts, "other": total - sum(parts.values()), "cpu": cpu - self.last_cpu}
        self.steps.append(step)
        self.last, self.last_cpu = now, cpu
        enough = len(self.steps) >= self.warmup + self.repeats
        return enough or (len(self.steps) > self.warmup and now - self.started > self.seconds)

    @property
    def measured(self) -> list[dict[str, float]]:
        """Steps after the warm-up."""
        return self.steps[self.warmup :]


class Enough(Exception):
    """Thrown out of a training loop that has run as long as it was meant to."""


def run_script(script: ModuleType, argv: list[str], vlm: VLM, here: Dist, clock: StepClock, parts=OUR_PARTS) -> None:
    """Run `script.train` on `vlm`, whatever its --model says, until `clock` has seen enough steps."""
    log = script.RunLog

    class TimedLog(log):
        def step(self, *args, **kwargs) -> None:
            super().step(*args, **kwargs)
            if clock.step():
                raise Enough

    with ExitStack() as stack:
        for owner, attribute, name in parts:
            stack.enter_context(clock.clock.wrapping(owner, attribute, name))
        stack.enter_context(replaced(script, "RunLog", TimedLog))
        stack.enter_context(replaced(script, "load_vlm", lambda *_: vlm))
        stack.enter_context(replaced(script, "check_memory", lambda *_: None))  # it would be told of another model
        clock.start()
        try:
            script.train(script.parse_args(argv), here, resuming=False)
        except Enough:
            pass


class replaced:
    """`owner.attribute` is `value` while the block runs."""

    def __init__(self, owner: object, attribute: str, value: Callable) -> None:
        self.owner, self.attribute, self.value = owner, attribute, value

    def __enter__(self) -> None:
        self.before = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, self.value)

    def __exit__(self, *_) -> None:
        setattr(self.owner, self.attribute, self.before)
