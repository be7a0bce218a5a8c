"""Operations, bytes and seconds of a step on each rank, stage by stage; hours of a whole run.

Operations count a multiplication and an addition as two. Frozen weights have no gradient: their backward pass costs as
much as the forward pass, not twice that; an adapter's costs twice. Bytes over links are those of a ring: (w - 1) / w of
a whole tensor to and from each of w ranks. FSDP2 gathers while it computes, so a stage takes the longer of the two.

Not counted: starting kernels (what CUDA graphs save in decoding), reading images, rewards, logging, checkpoints, and
ranks that wait for one another.
"""

from dataclasses import dataclass

from tag.plan.hardware import Efficiency, Gpu
from tag.plan.memory import kv
from tag.plan.run import Pass, Run
from tag.plan.shape import Shape

FLOAT32 = 4


@dataclass(frozen=True)
class Stage:
    """What one stage of a step asks of one rank."""

    flops: float = 0.0
    memory_bytes: float = 0.0  # read from its own memory, where that decides
    link_bytes: float = 0.0  # within the machine
    network_bytes: float = 0.0  # between machines

    def seconds(self, gpu: Gpu, share: Efficiency) -> float:
        """The longest of what has to be done, at the expected shares of the ceilings."""
        return max(
            self.flops / (gpu.flops * share.compute),
            self.memory_bytes / (gpu.bandwidth * share.bandwidth),
            self.link_bytes / (gpu.nvlink * share.links),
            self.network_bytes / (gpu.network * share.links),
        )


def matrices(shape: Shape) -> int:
    """Weights that multiply each token: those of the decoder layers, without biases and norms."""
    return shape.layers * sum(i * o for i, o in shape.linears)


def attention_flops(shape: Shape, work: Pass) -> float:
    """Scores and values of all layers, forward."""
    return 4.0 * shape.layers * shape.hidden * sum(S * Q * K for S, Q, K in work.segments(padded=False))


def forward_flops(shape: Shape, run: Run, work: Pass) -> float:
    """A pass without gradient, log-probs included."""
    weights = matrices(shape) + shape.lora(run.lora_rank)
    return 2.0 * (work.tokens * weights + work.targets * shape.vocab * shape.hidden) + attention_flops(shape, work)


def update_flops(shape: Shape, run: Run, work: Pass) -> float:
    """Forward and backward: the head's gradient is made on the way forward; recomputing is one more forward pass."""
    forward = forward_flops(shape, run, work)
    head = 2.0 * work.targets * shape.vocab * shape.hidden
    weights = matrices(shape) + 2 * shape.lora(run.lora_rank)
    backward = head + 2.0 * work.tokens * weights + 2 * attention_flops(shape, work)
    return forward + backward + (forward - head if run.checkpointing else 0.0)


def step_work(run: Run) -> Pass:
    """All of a rank's step as one pass, for counting."""
    return Pass(-(-run.per_rank // run.group), run.group, run.prompt, run.completion, run.completion)


# ---- links ------------------------------------------------------------------------------------------------------


def layer_gather_bytes(shape: Shape, run: Run) -> int:
    """Bytes of a gathered decoder layer, adapters included, whole."""
    adapters = 2 if run.stage == "grpo" and run.reference == "sft" else 1
    return (shape.layer + adapters * shape.lora_layer(run.lora_rank)) * run.item


def gather_bytes(shape: Shape, run: Run) -> dict[str, float]:
    """Whole tensors that FSDP2 gathers and reduces in a step, by stage (the formula of tag/bench/communication.py)."""
    if not run.sharded:
        return {"reference": 0, "update": 0, "refresh": 0, "reduce": shape.lora(run.lora_rank) * FLOAT32}
    layers = shape.layers * layer_gather_bytes(shape, run) * run.passes
    merged = shape.language_model + (shape.vocab * shape.hidden if shape.tied else 0)
    return {
        "reference": layers,
        "update": (2 * layers + run.passes * shape.root * run.item) * run.updates,
        "refresh": merged * run.item + shape.lora(run.lora_rank) * FLOAT32,
        "reduce": shape.lora(run.lora_rank) * FLOAT32 * run.updates,
    }


def over_links(run: Run, gathered: float, reduced: float) -> dict[str, float]:
    """Bytes to and from one rank, within and between machines, of whole tensors gathered and reduced.

    A hybrid run gathers within machines and sums shards of gradients between them; a full one over several machines
    goes at the network's pace.
    """
    w, n = run.shards, run.nodes
    if not run.sharded:
        both = 2 * reduced * (run.ranks - 1) / run.ranks
        return {"network_bytes" if n > 1 else "link_bytes": both}
    ring = (gathered + reduced) * (w - 1) / w
    if n > 1 and run.shard == "full":
        return {"network_bytes": ring}
    return {"link_bytes": ring, "network_bytes": 2 * reduced / w * (n - 1) / n}


# ---- stages -----------------------------------------------------------------------------------------------------


def decode(shape: Shape, run: Run, completions: int, prompts: int) -> Stage:
    """Sampling: prompts once, then as many steps as the longest completion, or as the rows need to get through."""
    plan = kv(shape, run)
    rows = min(plan.rows, completions)
    steps = max(run.longest, completions * run.completion / rows)
    weights = matrices(shape) + shape.vocab * shape.hidden
    keys = rows * (run.prompt / max(1, completions // prompts) + run.completion / 2)
    nbytes = steps * (weights + keys * shape.kv_per_token) * run.item
    seen = rows * (run.prompt + run.completion / 2)
    flops = steps * (2.0 * weights * rows + 4.0 * shape.layers * shape.hidden * seen)
    return Stage(flops + 2.0 * matrices(shape) * prompts * run.prompt, nbytes)


def stages(shape: Shape, run: Run) -> dict[str, Stage]:
    """What a step asks of each rank."""
    work, gathered = step_work(run), gather_bytes(shape, run)
    faces = work.groups
    state = shape.patches * shape.v_hidden * run.item
    fresh = 0 if run.faces and run.faces / run.ranks * state <= run.cache else faces  # cached after the first epoch
    found = {"encode": Stage(2.0 * shape.tower * shape.patches * fresh)}
    if run.stage == "grpo":
        merging = 2.0 * shape.lora(run.lora_rank) * shape.hidden
        memory = 3 * shape.language_model * FLOAT32
        found["refresh"] = Stage(merging, memory, **over_links(run, gathered["refresh"], 0))
        found["sample"] = decode(shape, run, run.per_rank, faces)
        if run.reference in ("sft", "base"):
            flops = forward_flops(shape, run, work)
            found["reference"] = Stage(flops, **over_links(run, gathered["reference"], 0))
    links = over_links(run, gathered["update"], gathered["reduce"])
    found["update"] = Stage(run.updates * update_flops(shape, run, work), **links)
    return found


def step_seconds(shape: Shape, run: Run, gpu: Gpu, share: Efficiency) -> dict[str, float]:
    """Seconds of a step, by stage."""
    return {name: stage.seconds(gpu, share) for name, stage in stages(shape, run).items()}


def evaluation_seconds(shape: Shape, run: Run, gpu: Gpu, share: Efficiency, faces: int = 512) -> float:
    """One evaluation on held-out faces: merging, and one completion a face."""
    own = -(-faces // run.ranks)
    refresh = over_links(run, gather_bytes(shape, run)["refresh"], 0)
    return Stage(0.0, 0.0, **refresh).seconds(gpu, share) + decode(shape, run, own, own).seconds(gpu, share)


def run_hours(
    shape: Shape, run: Run, gpu: Gpu, share: Efficiency, steps: int, eval_every: int, faces: int = 512
) -> float:
    """Hours of `steps` steps and their evaluations."""
    evaluations = (steps // eval_every if eval_every else 0) + 1
    step = sum(step_seconds(shape, run, gpu, share).values())
    return (steps * step + evaluations * evaluation_seconds(shape, run, gpu, share, faces)) / 3600
