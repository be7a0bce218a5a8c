"""Processes and sharding: `torchrun` or plain python, gloo on CPU, NCCL on GPUs, FSDP2.

What is sharded: the decoder layers (one unit each) and the root (embeddings, final norm, output head). What is not: the
vision tower and the projector. They are small (0.7 of 8.3 billion parameters), frozen or nearly so, and left whole they
need no collective, so ranks may encode different numbers of faces at any time without waiting for each other.
"""

import gc
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

from tag.errors import DataError, UsageError

SHARDING = ("full", "hybrid", "none")


@dataclass(frozen=True)
class Dist:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    patience: timedelta = timedelta(hours=1)  # how long a collective waits for the other ranks

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes shared files."""
        return self.rank == 0

    def print(self, *text: object) -> None:
        """Print on the main process only."""
        if self.is_main:
            print(*text, flush=True)

    # The three collectives the loops use. With one process they are the identity.

    def sum(self, value: float | Tensor) -> Tensor:
        """Sum over ranks, float64 () or the tensor's own shape and dtype."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        tensor = tensor.detach().to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """Largest value over ranks."""
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, value: object) -> list:
        """The values of all ranks, in rank order, on every rank. For small python objects of our own making."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, call: Callable[[], Any]) -> Any:
        """What `call()` gives on the main process, which alone calls it. A complaint about the input or the usage that
        it raises is raised on every rank, so that none is left waiting."""
        value, complaint = None, None
        if self.is_main:
            try:
                value = call()
            except (DataError, UsageError) as e:
                complaint = e
                complaint.everywhere = True  # said once, by the main process (tag.args.run)
        value, complaint = self.gather((value, complaint))[0]
        if complaint is not None:
            raise complaint
        return value

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()


def setup(device: str = "auto", threads: int = 0, onednn: bool = True, hang_minutes: float = 55.0) -> Dist:
    """Join the process group `torchrun` describes, or be alone. Call `cleanup` in a finally block.

    threads: of the CPU, 0 = PyTorch's choice. onednn: False computes without that library (`tag.linear`). hang_minutes:
    how long a stage may take, 0 = a day; a collective waits a little longer, so that the watch (`tag.watch`), which can
    say who is waited for, comes first.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    patience = timedelta(minutes=hang_minutes + 5) if hang_minutes else timedelta(days=1)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and hardly two passes have the same
    else:
        chosen = torch.device(device)
    if threads:
        torch.set_num_threads(threads)
    if not onednn:
        with warnings.catch_warnings():  # about Intel's GPUs, of all things
            warnings.simplefilter("ignore", UserWarning)
            torch.backends.mkldnn.set_flags(False)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=patience, store=_attempt_store(patience))
    return Dist(rank, world, chosen, patience)


def _attempt_store(timeout: timedelta) -> dist.Store | None:
    """Where the processes find one another; None is PyTorch's choice.

    torchrun's agent keeps one store over restarts (--max-restarts), in which a process that is quick finds the address
    of one that has been killed ("Gloo connectFullMesh failed ... Connection refused"). So each attempt has its own
    names there.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def cleanup() -> None:
    """Leave the process group, if there is one. Call it in a finally block.

    Not with NCCL and an error of this rank alone: the others wait for it inside a kernel, NCCL's orderly end waits for
    them, and the error would be said when their patience is over. `tag.args.run` says it, and leaves without an end.

    Garbage first: FSDP2's modules and their optimizer hang together in cycles, and what still holds a communicator when
    the group goes makes gloo's threads abort the process at exit ("terminate called without an active exception").
    """
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    if error is not None and dist.get_backend() != "gloo" and not getattr(error, "everywhere", False):
        return
    gc.collect()
    dist.destroy_process_group()


def shard(vlm: nn.Module, here: Dist, mode: str = "full", nodes: int | None = None) -> bool:
    """Shard `vlm` (a tag.vlm.VLM) in place with FSDP2; returns whether it was sharded (one process never is).

    full: over all ranks. hybrid: sharded within a node, replicated across nodes (a 2-D mesh). none: replicated, the
    loop sums gradients itself. Order: LoRA -> freeze -> (activation checkpointing) -> shard; do the first three before.
    """
    if mode not in SHARDING:
        raise ValueError(f"unknown sharding {mode!r}; expected one of {', '.join(SHARDING)}")
    if here.world == 1 or mode == "none":
        return False
    if mode == "hybrid":
        nodes = nodes or max(1, here.world // int(os.environ.get("LOCAL_WORLD_SIZE", here.world)))
        mesh = init_device_mesh(here.device.type, (nodes, here.world // nodes), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(here.device.type, (here.world,), mesh_dim_names=("shard",))
    for dim in range(mesh.ndim):  # groups that the mesh has made have a patience of their own
        dist.distributed_c10d._set_pg_timeout(here.patience, mesh.get_group(dim))
    # Trained fp32 masters and frozen bf16 weights share a unit: both compute in the model's dtype, gradients are fp32.
    policy = MixedPrecisionPolicy(param_dtype=vlm.compute_dtype, reduce_dtype=torch.float32)
    whole = set(vlm.hf_model.model.visual.parameters())
    for layer in vlm.hf_model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(vlm, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in vlm.modules():
        if isinstance(module, FSDPModule):
            # FSDP averages nothing: every loss is already divided by one normaliser of the whole optimizer step, so
            # gradients simply add up. (Sum-reduction is forced because gloo has no pre-multiplied sum.)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return True


def set_gradient_sync(vlm: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks (FSDP2); off for all micro-batches but the last."""
    if isinstance(vlm, FSDPModule):
        vlm.set_requires_gradient_sync(on)


def sum_replicated_gradients(params: list[nn.Parameter], here: Dist) -> None:
    """Add up over ranks the gradients that FSDP2 does not: those of parameters left whole, all in one collective."""
    whole = [param for param in params if not isinstance(param, DTensor)]
    if here.world == 1 or not whole:
        return
    for param in whole:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    joined = torch.cat([param.grad.flatten() for param in whole])
    dist.all_reduce(joined)
    for param, grad in zip(whole, joined.split([param.numel() for param in whole])):
        param.grad.copy_(grad.view_as(param))


def clip_gradients(params: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before.

    Works on sharded and whole parameters side by side, with one collective for all that are sharded alike. A non-finite
    norm leaves the gradients as they are: the caller decides what to do with the step.
    """
    squares: dict[tuple | None, Tensor] = {}  # (mesh, placements) of a shard, None of what is whole -> sum of squares
    for param in params:
        if param.grad is not None:
            sharded = isinstance(param.grad, DTensor)
            kind = (param.grad.device_mesh, param.grad.placements) if sharded else None
            local = param.grad.to_local() if sharded else param.grad
            norm = torch.linalg.vector_norm(local, dtype=torch.float32)
            squares[kind] = squares.get(kind, 0.0) + norm.double() ** 2
    total = 0.0
    for kind, square in squares.items():
        if kind is not None:  # each rank has the squares of its own rows; replicas have the same ones
            mesh, placements = kind
            parts = [Partial() if p.is_shard() else Replicate() for p in placements]
            square = DTensor.from_local(square, mesh, parts, run_check=False).full_tensor()
        total += float(square)
    total = math.sqrt(total)
    if max_norm > 0 and total > max_norm and math.isfinite(total):
        for param in params:
            if param.grad is not None:
                param.grad.mul_(max_norm / (total + 1e-6))
    return total
