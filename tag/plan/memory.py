"""Memory of one rank, stage by stage and item by item, in bytes.

What is held from step to step stands in every stage; each stage adds what comes and goes in it. The largest stage is
what the run takes. CUDA itself, NCCL's buffers and the allocator's rounding are not tensors: see `RESERVE`.
"""

from tag.plan import activations as act
from tag.plan.run import Pass, Run, largest_pass
from tag.plan.shape import Shape
from tag.rollout.budget import CPU_SHARE, GPU_SHARE, KVPlan, plan_kv

FLOAT32, FLOAT64, INT64 = 4, 8, 8
RESERVE = 2 * 2**30  # of a GPU: CUDA context, NCCL, cuBLAS workspaces. To be measured; 1 to 2 GB are usual
FRAGMENTATION = 0.03  # of a GPU: blocks of the allocator that are free but of no use
PREFILL_TOKENS = 8192  # as tag/rollout/engine.py
Items = dict[str, int]


def share(count: int, run: Run) -> int:
    """Numbers of `count` that one rank holds. FSDP2 pads rows to equal numbers; that is less than 0.1 % here."""
    return -(-count // run.shards)


# ---- held -------------------------------------------------------------------------------------------------------


def weights(shape: Shape, run: Run) -> Items:
    """What is there before the first step: base, adapters, optimizer."""
    base = share(shape.language_model, run) * run.item
    projector = shape.projector * (FLOAT32 if run.train_projector else run.item)
    lora = share(shape.lora(run.lora_rank), run) * FLOAT32
    trained = share(shape.lora(run.lora_rank), run) + (shape.projector if run.train_projector else 0)
    held = {"language model": base, "vision tower, projector": shape.tower * run.item + projector, "adapter": lora}
    if run.stage == "grpo":
        held["projectors kept"] = 2 * shape.projector * run.item
        if run.reference == "sft":
            held["reference adapter"] = lora
    if run.saves:  # of tag/saving.py: what is trained and its moments
        held["checkpoint's copy"] = 3 * trained * FLOAT32
    return held | {"optimizer": 2 * trained * FLOAT32}


def kv(shape: Shape, run: Run, free: int = 2**62) -> KVPlan:
    """The KV cache. free: bytes of the GPU that are not taken when the engine asks; raises ValueError if not even one
    row fits."""
    prompts = -(-run.per_rank // run.group)
    P, R, S = run.prompt, min(run.rows, prompts * run.group), prompts
    if run.gpu:
        P, R, S = -(-P // 32) * 32, run.rows, run.rows
    budget = run.kv_budget or int(free * (GPU_SHARE if run.gpu else CPU_SHARE))
    return plan_kv(shape.kv_per_token * run.item, run.group if run.stage == "grpo" else 1, P, run.longest, R, S, budget)


def rollout(shape: Shape, run: Run, free: int = 2**62) -> Items:
    """What the rollout engine holds from its first use on."""
    if not run.samples:
        return {}
    plan = kv(shape, run, free)
    columns = run.longest + 1
    rows = plan.rows * (shape.vocab * run.item + columns * (INT64 + FLOAT32 + FLOAT64))
    rows += plan.slots * shape.vocab * run.item  # logits of each prompt's first token
    return {"rollout weights": shape.language_model * run.item, "KV cache": plan.nbytes, "rollout rows": rows}


def step_inputs(shape: Shape, run: Run) -> Items:
    """Tower states of a step's faces, and its batches: token ids, positions, who sees whom."""
    faces = -(-run.per_rank // run.group)
    tower = faces * shape.patches * shape.v_hidden * run.item
    work = largest_pass(run)
    blocks = sum(S * (Q * K + 8 * (2 * Q + 2 * K)) for S, Q, K in work.segments())
    batches = run.passes * (blocks + work.tokens * 7 * INT64 + work.targets * 4 * INT64)
    cached = min(run.cache, run.faces * shape.patches * shape.v_hidden * run.item if run.faces else run.cache)
    return {"vision features, cached": cached, "faces and batches of a step": tower + batches}


# ---- stages -----------------------------------------------------------------------------------------------------


def gathered(shape: Shape, run: Run, backward: bool) -> Items:
    """What FSDP2 gathers: the root, kept until a backward pass has ended; a layer, and the buffer it came in; in the
    backward pass the next one's buffer as well."""
    if not run.sharded:
        return {}
    adapters = 2 if run.stage == "grpo" and run.reference == "sft" else 1
    layer = (shape.layer + adapters * shape.lora_layer(run.lora_rank)) * run.item
    return {"gathered: embeddings, head": shape.root * run.item, "gathered: layers": (3 if backward else 2) * layer}


def gradients(shape: Shape, run: Run) -> Items:
    """Gradients while activations are at their highest.

    Of one pass there are none yet: they come as activations go. Of several those of the passes before are there, whole
    even under FSDP2, which reduces them only once, in the last pass.
    """
    trained = shape.lora(run.lora_rank) + (shape.projector if run.train_projector else 0)
    return {"gradients": trained * FLOAT32 if run.passes > 1 else 0}


def update(shape: Shape, run: Run, work: Pass) -> Items:
    """Forward and backward of one pass under the policy: at the log-probs, or on entering the backward pass."""
    items = gradients(shape, run) | gathered(shape, run, backward=True)
    items["activations"] = act.kept_bytes(shape, run, work)
    head, passing = act.head_bytes(shape, run, work), act.passing_bytes(shape, run, work)
    if run.checkpointing:  # at the log-probs no layer is computed anew
        head -= act.layer_bytes(shape, run, work)
    name = "log-probs of a chunk" if head > passing else "gradients of activations"
    return items | {name: max(head, passing, 0)}


def scoring(shape: Shape, run: Run, work: Pass) -> Items:
    """A pass without gradient, under the reference."""
    found = max(act.forward_bytes(shape, run, work), act.head_bytes(shape, run, work))
    return gathered(shape, run, backward=False) | {"activations": found}


def refreshing(shape: Shape, run: Run) -> Items:
    """Merging: the largest matrix in float32, three times, and in the model's dtype as gathered and merged. Or putting
    the embedding together from its shards: what came, and the whole."""
    matrix = shape.hidden * shape.mlp
    found = matrix * (3 * FLOAT32 + run.item if run.item < FLOAT32 else 3 * FLOAT32)
    if run.sharded:
        found = max(found + matrix * run.item, 2 * shape.vocab * shape.hidden * run.item)
    return {"merging": found}


def sampling(shape: Shape, run: Run, free: int = 2**62) -> Items:
    """Prefill of prompts, or a decoding step: probabilities of all rows in float32, their sums in float64."""
    plan = kv(shape, run, free)
    tokens = min(max(1, PREFILL_TOKENS // plan.prompt_length), plan.slots) * plan.prompt_length
    width = 3 * shape.mlp + 8 * shape.hidden + 2 * shape.kv_width  # a layer's attention is not let go before its MLP
    if not run.gpu and run.item == FLOAT32:
        width += shape.mlp  # oneDNN copies what it multiplies next: half of each row of the joint gate-up product
    prefill = tokens * run.item * (shape.kv_per_token + width)
    logits = plan.rows * shape.vocab * (FLOAT32 + FLOAT64 + (FLOAT32 if run.item < FLOAT32 else 0))
    scores = 2 * plan.rows * shape.heads * (plan.prompt_length + plan.length) * FLOAT32
    return {"prefill" if prefill > logits + scores else "sampling": max(prefill, logits + scores)}


def encoding(shape: Shape, run: Run, chunk: int = 64) -> Items:
    """The vision tower on a chunk of faces."""
    faces = min(chunk, -(-run.per_rank // run.group))
    width = 3 * shape.v_mlp + 4 * shape.v_hidden + shape.v_hidden * FLOAT32 // run.item
    return {"vision tower": faces * shape.patches * width * run.item}


def loading(shape: Shape, run: Run) -> Items:
    """Every rank loads the whole model before it is sharded."""
    lora = shape.lora(run.lora_rank) * FLOAT32
    items = {"whole model": shape.total * run.item, "adapter": lora}
    if run.stage == "grpo" and run.reference == "sft":
        items["reference adapter"] = lora
    return items


def memory(shape: Shape, run: Run, free: int = 2**62) -> dict[str, Items]:
    """Stage -> item -> bytes of one rank.

    free: bytes of the device, all told; the KV cache asks for its share of what is left. Raises ValueError when not
    even one row of it fits.
    """
    held = weights(shape, run)
    left = max(free - sum(held.values()), 0)
    held |= rollout(shape, run, left) | step_inputs(shape, run)
    work = largest_pass(run)
    stages = {"load": loading(shape, run), "encode": held | encoding(shape, run)}
    if run.samples:
        stages["refresh"] = held | refreshing(shape, run)
        stages["sample"] = held | sampling(shape, run, left)
    if run.stage == "grpo" and run.reference in ("sft", "base"):
        stages["reference"] = held | scoring(shape, run, work)
    stages["update"] = held | update(shape, run, work)
    return stages


def peak(stages: dict[str, Items]) -> tuple[str, int]:
    """The stage that takes most, and how much."""
    name = max(stages, key=lambda s: sum(stages[s].values()))
    return name, sum(stages[name].values())
