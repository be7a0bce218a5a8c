"""The run that is planned: stage, processes, and the sizes of a step."""

from dataclasses import dataclass, replace

STAGES = ("sft", "grpo")


@dataclass(frozen=True)
class Run:
    """One training run. Tokens and sequences are counts, memory is bytes; "per rank" is one GPU (or process)."""

    stage: str
    ranks: int = 4
    ranks_per_node: int = 8
    shard: str = "full"  # as --shard
    item: int = 2  # bytes of a number in compute: 2 for bfloat16, 4 for float32
    lora_rank: int = 128
    dropout: bool = False  # LoRA dropout above 0
    train_projector: bool = False
    reference: str = "sft"  # as --kl-reference: sft holds a second adapter
    checkpointing: bool = False
    micro_tokens: int = 16384
    sequences: int = 512  # of an optimizer step over all ranks: traces in SFT, completions in GRPO
    group: int = 8  # completions behind one prompt; 1 in SFT
    updates: int = 1
    prompt: int = 178  # tokens, the face's included
    completion: int = 389  # tokens on average ...
    longest: int = 512  # ... and at most
    rows: int = 64  # that decode together, per rank
    kv_budget: int = 0  # bytes, 0 = a share of what is free
    cache: int = 4 * 2**30  # vision features kept, at most, per rank
    faces: int = 0  # training records; 0 = unknown, then the cache counts in full
    evaluates: bool = True  # SFT samples too, for held-out faces: from then on it holds the rollout engine
    flash: bool = False  # flash-attn is there: no padding, keys not repeated
    gpu: bool = True
    saves: bool = False  # the copies that checkpoints are written from count: they are in the memory of a CPU

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"unknown stage {self.stage!r}; expected one of {', '.join(STAGES)}")

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def shards(self) -> int:
        """Ranks that a sharded weight is spread over; 1 when each holds it whole."""
        if self.shard == "none" or self.ranks == 1:
            return 1
        return self.ranks // self.nodes if self.shard == "hybrid" else self.ranks

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 is at work; in a hybrid run of one rank a node it is, with shards of everything."""
        return self.ranks > 1 and self.shard != "none"

    @property
    def samples(self) -> bool:
        """Whether the rollout engine is ever filled."""
        return self.stage == "grpo" or self.evaluates

    @property
    def per_rank(self) -> int:
        """Sequences of a step on the rank that has most."""
        groups = self.sequences // self.group
        return -(-groups // self.ranks) * self.group

    @property
    def groups_per_pass(self) -> int:
        """Groups that fit a micro-batch at the average length; at least one, as in tag/data/batching.py."""
        return max(1, self.micro_tokens // (self.prompt + self.group * self.completion))

    @property
    def passes(self) -> int:
        """Forward passes of a step on a rank."""
        return -(-(self.per_rank // self.group) // self.groups_per_pass)


@dataclass(frozen=True)
class Pass:
    """One forward pass: `groups` groups of `group` completions; the longest completion sets what padding takes."""

    groups: int
    group: int
    prompt: int
    completion: int
    longest: int

    @property
    def completions(self) -> int:
        """All of them."""
        return self.groups * self.group

    @property
    def targets(self) -> int:
        """M, tokens scored."""
        return self.completions * self.completion

    @property
    def tokens(self) -> int:
        """L, tokens computed."""
        return self.groups * self.prompt + self.targets

    def segments(self, padded: bool = True) -> list[tuple[int, int, int]]:
        """(S, queries, keys) of the attention blocks: prompts, and completions that see their prompt."""
        T = self.longest if padded else self.completion
        return [(self.groups, self.prompt, self.prompt), (self.completions, T, self.prompt + T)]


def largest_pass(run: Run) -> Pass:
    """The pass that takes most memory: full of groups whose completions are average on the whole, and of which one is
    as long as may be; or of one group of the longest, where that alone is more than --micro-tokens."""
    groups = min(run.groups_per_pass, run.per_rank // run.group)
    longest_group = run.prompt + run.group * run.longest
    mean = run.completion
    if groups * (run.prompt + run.group * mean) < min(run.micro_tokens, longest_group):
        # What is drawn varies: a pass may be as full as --micro-tokens allows, if the step has that many tokens.
        mean = min(run.longest, (min(run.micro_tokens, longest_group) - run.prompt * groups) // (groups * run.group))
    return Pass(groups, run.group, run.prompt, mean, run.longest)


def on(run: Run, **changes: object) -> Run:
    """The same run with something changed."""
    return replace(run, **changes)
