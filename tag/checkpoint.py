"""Checkpoints for resuming: what is trained, the optimizer's moments, and a readable card. Nothing is ever unpickled.

    OUT/checkpoints/step-000120/
        rank-00000.safetensors ...   each rank's own rows of every tensor (FSDP2 shards dimension 0)
        checkpoint.json              the card: step, arguments, versions, git hash; for every file its size and sha256;
                                     and the sha256 of all that

All randomness of a run is a function of (seed, step, sample), so no generator state needs saving. A checkpoint is
written beside its final name and renamed: it is there whole or not at all. A damaged one is named loudly and the one
before it is used. Loading reads the rows each rank needs from whatever files hold them, so the number of ranks may
change.

Saving has three parts, so that a loop need not wait for the disk (tag/saving.py): `own_share` copies, `write_share`
writes and may run in a thread, `commit` gives the whole its name.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tag.dist import Dist
from tag.errors import DataError
from tag.files import replacing, sync_folder, write_tensors

CARD = "checkpoint.json"


def trained_state(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name -> live tensor for every trained parameter and its AdamW moments (created as zeros if not there yet)."""
    state: dict[str, Tensor] = {}
    fused = any(group["fused"] for group in optimizer.param_groups)  # then it counts steps beside the parameters
    for name, param in params.items():
        moments = optimizer.state[param]
        if "exp_avg" not in moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
            moments["exp_avg"] = torch.zeros_like(param)
            moments["exp_avg_sq"] = torch.zeros_like(param)
        state[f"param.{name}"] = param.detach()
        state[f"exp_avg.{name}"] = moments["exp_avg"]
        state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return state


def own_share(
    params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, here: Dist, into: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Copies on the CPU of the rows that this rank writes, by name, and {name: {first row, full shape}}.

    into: copies of an earlier call, whose memory is used again.
    """
    mine, layout, into = {}, {}, into or {}
    for name, tensor in trained_state(params, optimizer).items():
        start, rows = _own_rows(tensor)
        if isinstance(tensor, DTensor):
            # Under hybrid sharding several ranks hold the same rows; those of the first replica write them.
            if any(c for c, p in zip(tensor.device_mesh.get_coordinate(), tensor.placements) if p.is_replicate()):
                continue
        elif not here.is_main:
            continue
        if rows.numel() or rows.ndim == 0:
            mine[name] = into[name].copy_(rows) if name in into else rows.to("cpu", copy=True).contiguous()
            layout[name] = {"start": start, "shape": list(tensor.shape)}
    return mine, layout


def partial_folder(out: str | os.PathLike, step: int) -> Path:
    """Where the files of a checkpoint stand until `commit`."""
    return Path(out) / "checkpoints" / f"step-{step:06d}.partial"


def write_share(folder: Path, rank: int, mine: dict[str, Tensor], layout: dict) -> dict:
    """Write what `own_share` copied; the file's entry in the card. No collective: safe in a thread."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank:05d}.safetensors"
    write_tensors(file, mine, {"layout": json.dumps(layout)})
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}


def commit(
    out: str | os.PathLike, step: int, files: list[dict], card: dict, keep: int = 2, pinned: int | None = None
) -> None:
    """Give the written files their card and their name; drop all checkpoints but the newest `keep` and that of step
    `pinned`. The main process calls, when all shares are written."""
    partial = partial_folder(out, step)
    final = partial.with_suffix("")
    with open(partial / CARD, "w", encoding="utf-8") as f:
        f.write(json.dumps(_sealed(card | {"step": step, "files": files}), indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(final.parent)
    # Later ones can only be damaged ones, passed over when this run was resumed: they must not push sound ones out.
    so_far = [f for f in sorted(final.parent.glob("step-??????")) if f.name <= final.name]
    for old in so_far[: -max(keep, 1)]:
        if old.name != f"step-{pinned or 0:06d}":
            shutil.rmtree(old)


def save_checkpoint(
    out: str | os.PathLike,
    step: int,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    card: dict,
    here: Dist,
    keep: int = 2,
) -> None:
    """Write the checkpoint after `step` finished optimizer steps, waiting for the disk. All ranks call."""
    partial = partial_folder(out, step)
    if here.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    here.barrier()
    files = here.gather(write_share(partial, here.rank, *own_share(params, optimizer, here)))
    if here.is_main:
        commit(out, step, files, card | {"optimizer_step": optimizer_step(optimizer)}, keep)
    here.barrier()


def optimizer_step(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has made: fewer than the run's steps if some were skipped."""
    return int(next((s["step"] for s in optimizer.state.values() if "step" in s), 0))


def load_checkpoint(
    out: str | os.PathLike, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, here: Dist
) -> dict | None:
    """Restore the newest sound checkpoint under `out` into `params` and `optimizer` in place; its card, or None.

    All ranks call, and all get the same one: the main process looks and tells the others. Raises DataError if the
    checkpoint is of another model.
    """
    found = here.gather(_newest_sound(Path(out) / "checkpoints", here) if here.is_main else None)[0]
    if found is None:
        return None
    folder, card = found
    state = trained_state(params, optimizer)
    filled = dict.fromkeys(state, 0)
    for entry in card["files"]:
        with safe_open(Path(folder) / entry["name"], framework="pt") as f:
            layout = json.loads(f.metadata()["layout"])
            for name, place in layout.items():
                if name not in state or list(state[name].shape) != place["shape"]:
                    raise DataError(f"{folder}: {name} {place['shape']} does not fit this model; choose another --out")
                filled[name] += _copy_rows(state[name], f.get_slice(name), place["start"])
    if short := [name for name, tensor in state.items() if filled[name] != _own_rows(tensor)[1].shape.numel()]:
        raise DataError(f"{folder}: {short[0]} is missing or incomplete; choose another --out")
    for param in params.values():
        optimizer.state[param]["step"].fill_(card["optimizer_step"])
    return card


def run_card(script: str, args: dict, **more: object) -> dict:
    """What identifies a run: script, arguments, versions, commit. Written to run.json and into every checkpoint."""
    import numpy
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions["transformers"] = transformers.__version__
    return {"script": script, "args": args, "versions": versions, "commit": _commit(), **more}


def write_run_card(out: str | os.PathLike, card: dict, here: Dist) -> None:
    """OUT/run.json; the main process writes."""
    if here.is_main:
        with replacing(Path(out) / "run.json") as f:
            f.write(json.dumps(card, indent=2) + "\n")


def _commit() -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _own_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """(first row, rows) of dimension 0 that this rank holds. FSDP2 gives rank i of w the i-th chunk of ceil(n / w)."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    local = tensor.to_local()
    dim = next((d for d, p in enumerate(tensor.placements) if p.is_shard()), None)
    if dim is None:
        return 0, local
    if not tensor.placements[dim].is_shard(0):
        raise ValueError(f"expected a tensor sharded on dimension 0, got {tensor.placements}")
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
    return min(chunk * tensor.device_mesh.get_coordinate()[dim], tensor.shape[0]), local


def _copy_rows(tensor: Tensor, saved, saved_start: int) -> int:
    """Copy the overlap of saved rows into this rank's rows; returns how many elements."""
    own_start, own = _own_rows(tensor)
    saved_rows = saved.get_shape()[0]
    start, end = max(own_start, saved_start), min(own_start + len(own), saved_start + saved_rows)
    if start >= end:
        return 0
    rows = saved[start - saved_start : end - saved_start]
    with torch.no_grad():
        own[start - own_start : end - own_start].copy_(rows)
    return rows.numel()


def _newest_sound(folder: Path, here: Dist) -> tuple[str, dict] | None:
    for candidate in sorted(folder.glob("step-??????"), reverse=True):
        try:
            card = json.loads((candidate / CARD).read_text())
            if "seal" in card and _sealed(card) != card:  # checkpoints of earlier versions have none
                raise ValueError(f"{CARD} is damaged")
            for entry in card["files"]:
                file = candidate / Path(entry["name"]).name
                if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                    raise ValueError(f"{file.name} is damaged")
            int(card["step"]), int(card["optimizer_step"])
            return str(candidate), card
        except (OSError, ValueError, KeyError, TypeError) as e:
            here.print(f"WARNING: {candidate} cannot be used ({e}); trying the checkpoint before it")
    return None


def _sealed(card: dict) -> dict:
    """The card with the hash of all the rest of it."""
    rest = {k: v for k, v in card.items() if k != "seal"}
    return rest | {"seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
