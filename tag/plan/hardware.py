"""What a GPU can do at most, by the makers' public data sheets, and which share of it we expect to see."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. Links count one direction."""

    name: str
    memory: float  # bytes
    flops: float  # bfloat16 operations a second, dense
    bandwidth: float  # bytes a second of its memory
    nvlink: float  # bytes a second to the other GPUs of the machine
    network: float  # bytes a second to other machines, for each GPU


# SXM versions. NVIDIA's data sheets: H100 989 TFLOPS, 3.35 TB/s, NVLink 900 GB/s both ways together; H200 the same with
# 141 GB at 4.8 TB/s; A100 80 GB 312 TFLOPS, 2.04 TB/s, 600 GB/s. Network: one port a GPU, 400 Gb/s (A100: 200 Gb/s).
GPUS = {
    "h100": Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
    "a100": Gpu("a100", 80e9, 312e12, 2.04e12, 300e9, 25e9),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet. The first two are the goals of docs/benchmarks.md; none has been measured yet."""

    compute: float = 0.45
    bandwidth: float = 0.60
    links: float = 0.70


def gpu(name: str, **measured: float | None) -> Gpu:
    """A GPU of the table, figures of one's own in place of the data sheet's where they are given. Raises KeyError."""
    return replace(GPUS[name], **{k: v for k, v in measured.items() if v})
