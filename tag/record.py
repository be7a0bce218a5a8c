"""Step records: one GRPO step, complete enough to look at every number and to compute the update again.

    OUT/records/step-000120/
        record.json            what and why: arguments, versions, faces, completions, rewards, matched boxes, metrics
        tensors.safetensors    per-token and per-completion numbers, below
        state.safetensors      (on request) trained weights and AdamW moments before the step, under checkpoint names

Tensors (N completions, prompt-major: the G of a face are consecutive; T the longest; P prompt tokens):
    prompt_ids (P,) int32            token_ids (N, T) int32             lengths (N,) int32
    sampled_logprobs, old_logprobs, logprobs, entropy, ratio (N, T) float32;   ref_logprobs, kl if there is a reference
    advantages (N,) float32          rewards (N, 4) float32: fmt, ans, au (NaN = absent), total
`logprobs` are those of the last inner update; with one update a step they equal old_logprobs.

A record appears whole or not at all; when all records together exceed the budget, the oldest go. Reading checks format,
shapes and finiteness of what must be finite, and never unpickles.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tag.checkpoint import trained_state
from tag.data.batching import Prompt
from tag.data.records import Record
from tag.dist import Dist
from tag.errors import DataError
from tag.files import write_tensors
from tag.lora import full_tensor
from tag.rewards import Rewards
from tag.rollout import Rollout

FORMAT = 1
PER_TOKEN = ("sampled_logprobs", "old_logprobs", "logprobs", "ref_logprobs", "entropy", "ratio", "kl")  # (N, T)
WITH_REFERENCE = ("ref_logprobs", "kl")  # those of them that only a run with a KL term has


@dataclass
class StepRecord:
    """One step in memory: `meta` is record.json, `tensors` and `state` as in the module docstring."""

    meta: dict
    tensors: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """G, completions per face."""
        return int(self.meta["args"]["group_size"])

    @property
    def completion_mask(self) -> Tensor:
        """(N, T) bool, True on completion tokens."""
        lengths, T = self.tensors["lengths"], self.tensors["token_ids"].shape[1]
        return torch.arange(T)[None, :] < lengths[:, None]

    def completion(self, n: int) -> list[int]:
        """Token ids of completion n, the end token included."""
        return self.tensors["token_ids"][n, : int(self.tensors["lengths"][n])].tolist()


def snapshot(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy of trained weights and moments, whole, on the CPU; on shards a collective that all ranks call."""
    state = {n: full_tensor(t).detach().cpu().clone() for n, t in trained_state(params, optimizer).items()}
    step = next((s["step"] for s in optimizer.state.values()), torch.zeros(()))
    return state | {"optimizer_step": step.detach().cpu().clone().reshape(1)}


def face_entry(record: Record, path: str | os.PathLike) -> dict:
    """What a record keeps of a face: its TAG record and the hash of the image file."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"record": asdict(record), "sha256": digest}


def completion_entry(rollout: Rollout, rewards: Rewards) -> dict:
    """What a record keeps of a completion besides numbers per token."""
    return {
        "text": rollout.text,
        "finish_reason": rollout.finish_reason,
        "seed": str(rollout.seed),  # 63 bits do not survive a JavaScript number
        "rewards": {k: v for k, v in asdict(rewards).items() if k != "boxes"},
        "boxes": [asdict(box) for box in rewards.boxes],
    }


def completion_tensors(
    prompt: Prompt, rollouts: list[Rollout], rewards: list[Rewards], advantages: Tensor
) -> dict[str, Tensor]:
    """The tensors of a record that sampling and rewards give; see the module docstring."""
    T = max(len(r.token_ids) for r in rollouts)
    token_ids = torch.zeros(len(rollouts), T, dtype=torch.int32)  # (N, T)
    for n, r in enumerate(rollouts):
        token_ids[n, : len(r.token_ids)] = torch.tensor(r.token_ids, dtype=torch.int32)
    absent = float("nan")
    return {
        "prompt_ids": prompt.input_ids.int(),
        "token_ids": token_ids,
        "lengths": torch.tensor([len(r.token_ids) for r in rollouts], dtype=torch.int32),
        "advantages": advantages,
        "rewards": torch.tensor([[r.fmt, r.ans, absent if r.au is None else r.au, r.total] for r in rewards]),
    }


def save_record(
    out: str | os.PathLike,
    meta: dict,
    faces: list[dict],
    completions: list[dict],
    tensors: dict[str, Tensor | None],
    state: dict[str, Tensor],
    here: Dist,
    budget_mb: float = 1024.0,
) -> Path | None:
    """Gather every rank's share and write OUT/records/step-XXXXXX; all ranks call. Returns the folder (main process).

    meta must hold `step` and `args`. tensors: this rank's, per-token ones (N, T), per-completion ones (N, ...); None
    for what this run does not have (ref_logprobs without a reference).
    """
    shares = here.gather(
        {
            "faces": faces,
            "completions": completions,
            "tensors": {k: v.cpu() for k, v in tensors.items() if v is not None},
        }
    )
    if not here.is_main:
        return None
    T = max(share["tensors"]["token_ids"].shape[1] for share in shares)
    merged = {"prompt_ids": shares[0]["tensors"].pop("prompt_ids").int()}
    for name in shares[0]["tensors"]:
        if name != "prompt_ids":
            parts = [share["tensors"][name] for share in shares]
            merged[name] = torch.cat(
                [_pad(p, T) if name in (*PER_TOKEN, "token_ids") else p for p in parts]
            ).contiguous()
    text = json.dumps(
        {
            "format": FORMAT,
            **meta,
            "faces": [f for share in shares for f in share["faces"]],
            "completions": [c for share in shares for c in share["completions"]],
        }
    )
    folder = Path(out) / "records"
    final, partial = folder / f"step-{meta['step']:06d}", folder / f"step-{meta['step']:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "record.json").write_text(text + "\n", encoding="utf-8")
    write_tensors(partial / "tensors.safetensors", merged)
    if state:
        write_tensors(partial / "state.safetensors", state)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _drop_oldest(folder, budget_mb * 2**20, keep=final)
    return final


def list_records(run: str | os.PathLike) -> list[Path]:
    """Record folders of a run, oldest first (empty if it has none). A record folder itself is its own only one."""
    run = Path(run)
    if (run / "record.json").is_file():
        return [run]
    return sorted(p for p in (run / "records").glob("step-*") if p.name[5:].isdigit() and p.is_dir())


def load_record(folder: str | os.PathLike, with_state: bool = True) -> StepRecord:
    """Read a record; `with_state=False` leaves out weights and moments, which can be gigabytes.

    Raises DataError (one line) if it is truncated, of another version, or inconsistent.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else None
            raise DataError(f"{folder}: a record of format {found!r}, this version reads {FORMAT}")
        tensors = load_file(folder / "tensors.safetensors")
        has_state = with_state and (folder / "state.safetensors").is_file()
        state = load_file(folder / "state.safetensors") if has_state else {}
        G, N, T = int(meta["args"]["group_size"]), *tensors["token_ids"].shape
        consistent = (
            len(meta["completions"]) == N == len(meta["faces"]) * G
            and all(tensors[k].shape == (N, T) for k in PER_TOKEN if k in tensors or k not in WITH_REFERENCE)
            and tensors["lengths"].shape == tensors["advantages"].shape == (N,)
            and tensors["rewards"].shape == (N, 4)
            and tensors["prompt_ids"].ndim == 1
            and not any(tensors[k].is_floating_point() for k in ("token_ids", "prompt_ids", "lengths"))
            and int(tensors["token_ids"].min()) >= 0
            and 0 < int(tensors["lengths"].min()) <= int(tensors["lengths"].max()) <= T
        )
        if not consistent:
            raise DataError(f"{folder}: record.json and tensors.safetensors do not belong together")
        finite = all(tensors[k].isfinite().all() for k in ("advantages", "sampled_logprobs"))
        finite = finite and bool(tensors["rewards"][:, [0, 1, 3]].isfinite().all())  # R_AU may be absent, which is NaN
        if not isinstance(meta["step"], int) or not isinstance(meta.get("complaints", []), list):
            raise DataError(f"{folder}: record.json names no step, or complaints that are no list")
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise DataError(f"{folder}: not a step record, or a truncated one ({reason})") from None
    if not finite:
        raise DataError(f"{folder}: an advantage, reward or sampled log-prob is not a number")
    return StepRecord(meta, tensors, state)


def _pad(tensor: Tensor, T: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, T - tensor.shape[1]))


def _drop_oldest(folder: Path, budget: float, keep: Path) -> None:
    records = list_records(folder.parent)
    sizes = {r: sum(f.stat().st_size for f in r.iterdir()) for r in records}
    for record in records:
        if sum(sizes.values()) > budget and record != keep:
            shutil.rmtree(record)
            del sizes[record]
