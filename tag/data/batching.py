"""Rows of tokens for one forward pass, for both stages.

A `Group` is one prompt (with its face) and one or more completions. SFT has one completion a group; GRPO has G, and
lays them out behind *one* copy of the prompt:

    row:       [ prompt | completion 1 | completion 2 | ... ]     then perhaps the next group, then padding
    sees:        itself   prompt + itself (causally), never its siblings or other groups
    positions:   as alone: every completion restarts right after the prompt

So packing (several groups in a row), prefix sharing (one prompt copy) and padding side are ways to spend memory; they
do not change any log-prob. `sources[m]` says which hidden state predicts token m: for a completion's first token that
is the prompt's last one, wherever it lies.

Shapes:  R rows, L row length, M completion tokens in all, N completions, T longest completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tag.attention import AttentionBlock, make_block

PAD_SEGMENT = -1


@dataclass
class Prompt:
    """A tokenised prompt: input_ids (P,), mRoPE position_ids (3, P), and where the face's features go, (P,) bool."""

    input_ids: Tensor
    position_ids: Tensor
    image_mask: Tensor
    image_features: Tensor | None = None  # (tokens per image, H), needed by the rollout engine only

    @property
    def next_position(self) -> int:
        """mRoPE position (same on all three axes) of the token after the prompt."""
        return int(self.position_ids.max()) + 1


@dataclass
class Group:
    """One prompt, the index of its image in the features tensor, its completions (lists of token ids) and their rows
    in the caller's (N, T) tensors."""

    prompt: Prompt
    image: int
    completions: list[list[int]]
    rows: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens this group takes in a row, P + sum T_i."""
        return len(self.prompt.input_ids) + sum(len(c) for c in self.completions)


@dataclass
class Batch:
    """One forward pass, see the module docstring."""

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (3, R, L) int64
    segment: Tensor  # (R, L) int64, which prompt or completion a token belongs to; PAD_SEGMENT on padding
    prefix: Tensor  # (R, L) int64, the segment a token sees besides its own (its prompt); own segment for prompts
    image_positions: Tensor  # (I * tokens per image,) int64, flat positions in (R * L) where features go
    blocks: list[AttentionBlock]  # the same visibility as segment and prefix, gathered (tag/attention.py)
    images: list[int]  # I indices into the features tensor, in the order of image_positions
    sources: Tensor  # (M,) int64, flat positions in (R * L) of the hidden states that predict `targets`
    targets: Tensor  # (M,) int64 token ids
    row_of_target: Tensor  # (M,) int64, completion row n in the caller's (N, T)
    step_of_target: Tensor  # (M,) int64, token index t in the completion

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.input_ids.numel()

    @property
    def fill(self) -> float:
        """Share of computed tokens that are not padding."""
        return float((self.segment != PAD_SEGMENT).float().mean())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        fields = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**fields | {"blocks": [block.to(device) for block in self.blocks]})

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask (R, 1, L, L): 0 where a query (dim 2) sees a key (dim 3), a very negative number elsewhere.

        The whole truth about who sees whom, L x L; `blocks` says the same more cheaply.
        """
        query, key = self.segment[:, :, None], self.segment[:, None, :]
        visible = (query == key) | (self.prefix[:, :, None] == key)  # (R, L, L) own segment or own prompt
        visible &= torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).tril()  # and causal
        # Padding sees padding before it: a row with nothing visible would be NaN in some kernels.
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    def scatter(self, values: Tensor, num_rows: int, num_steps: int) -> Tensor:
        """Per-token values (M,) -> (num_rows, num_steps), zeros elsewhere; differentiable."""
        out = values.new_zeros(num_rows, num_steps)
        return out.index_put((self.row_of_target, self.step_of_target), values)

    def gather(self, values: Tensor) -> Tensor:
        """The inverse: (N, T) -> (M,)."""
        return values[self.row_of_target, self.step_of_target]


def group_completions(prompt: Prompt, completions: Sequence[list[int]], group_size: int) -> list[Group]:
    """N completions of N / group_size faces, prompt-major, as groups behind one copy of the prompt each."""
    return [
        Group(
            prompt,
            start // group_size,
            list(completions[start : start + group_size]),
            [*range(start, start + group_size)],
        )
        for start in range(0, len(completions), group_size)
    ]


def split_groups(groups: Sequence[Group]) -> list[Group]:
    """Every completion behind its own copy of the prompt: prefix sharing off."""
    return [Group(g.prompt, g.image, [c], [row]) for g in groups for c, row in zip(g.completions, g.rows)]


def plan_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of items for each row of at most `row_tokens`; a longer item has a row of its own.

    As few rows as first-fit decreasing needs, then, where the budget allows it, about equally long ones: ranks run
    their passes in step, so each pass takes as long as its longest row on any rank. Deterministic; the rows are ordered
    by their first item.
    """
    rows = _first_fit(lengths, row_tokens)
    even: list[list[int]] = [[] for _ in rows]
    load = [0] * len(rows)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        r = load.index(min(load))
        even[r].append(i)
        load[r] += lengths[i]
    if all(n <= row_tokens or len(row) == 1 for n, row in zip(load, even)):
        rows = even
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def _first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for r, free in enumerate(room):
            if lengths[i] <= free:
                rows[r].append(i)
                room[r] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(row_tokens - lengths[i])
    return rows


def plan_micro_batches(groups: Sequence[Group], micro_tokens: int, pack: bool = True) -> list[list[list[Group]]]:
    """Cut an optimizer step into forward passes of at most `micro_tokens` computed tokens, padding included.

    Returns micro-batches of rows of groups. With `pack` a micro-batch is one row that holds as many groups as fit;
    without, every group has a row and rows are padded to the longest. A group above the budget gets its own
    micro-batch, so nothing is ever dropped.
    """
    groups = list(groups)
    if pack:
        return [[[groups[i] for i in row]] for row in plan_rows([g.num_tokens for g in groups], micro_tokens)]
    batches: list[list[list[Group]]] = []
    longest = 0
    for group in sorted(groups, key=lambda g: -g.num_tokens):
        longest = max(longest, group.num_tokens) if batches else group.num_tokens
        if batches and (len(batches[-1]) + 1) * longest <= micro_tokens:
            batches[-1].append([group])
        else:
            batches.append([[group]])
            longest = group.num_tokens
    return batches


def cut_to(micro_batches: Sequence[list[list[Group]]], passes: int) -> list[list[list[Group]]]:
    """The same groups in `passes` micro-batches, cutting the largest in two again and again, or in as many as there are
    groups.

    Ranks have to run equally many passes. One with fewer would have to repeat some for nothing; smaller ones cost it
    nothing.
    """
    parts = list(micro_batches)
    while len(parts) < passes:
        k = max(
            range(len(parts)),
            key=lambda i: (sum(map(len, parts[i])) > 1, sum(g.num_tokens for r in parts[i] for g in r)),
        )
        rows = parts[k]
        if len(rows) > 1:
            halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        elif len(rows[0]) > 1:
            halves = [[rows[0][: len(rows[0]) // 2]], [rows[0][len(rows[0]) // 2 :]]]
        else:
            break
        parts[k : k + 1] = halves
    return parts


def collate(rows: Sequence[Sequence[Group]], pad_id: int, pad_side: str = "right") -> Batch:
    """Lay groups out in rows, padded on `pad_side` to the longest row."""
    if pad_side not in ("left", "right"):
        raise ValueError(f"pad_side must be left or right, got {pad_side!r}")
    width = max(sum(g.num_tokens for g in row) for row in rows)
    R = len(rows)
    input_ids = torch.full((R, width), pad_id, dtype=torch.long)
    position_ids = torch.zeros((3, R, width), dtype=torch.long)
    segment = torch.full((R, width), PAD_SEGMENT, dtype=torch.long)
    prefix = torch.full((R, width), PAD_SEGMENT, dtype=torch.long)
    images: list[int] = []
    prompts, answers = [], []  # (prefix positions, own positions) of the attention blocks
    image_positions, sources, targets, row_of_target, step_of_target = [], [], [], [], []

    for r, row in enumerate(rows):
        cursor = 0 if pad_side == "right" else width - sum(g.num_tokens for g in row)
        next_segment = 0
        for group in row:
            P = len(group.prompt.input_ids)
            here = slice(cursor, cursor + P)
            input_ids[r, here] = group.prompt.input_ids
            position_ids[:, r, here] = group.prompt.position_ids
            segment[r, here] = prefix[r, here] = prompt_segment = next_segment
            next_segment += 1
            images.append(group.image)
            image_positions.append(r * width + cursor + group.prompt.image_mask.nonzero().squeeze(1))
            last_of_prompt = r * width + cursor + P - 1
            prompt_positions = r * width + cursor + torch.arange(P)
            prompts.append((prompt_positions[:0], prompt_positions))
            cursor += P
            for completion, n in zip(group.completions, group.rows):
                T = len(completion)
                here = slice(cursor, cursor + T)
                tokens = torch.tensor(completion, dtype=torch.long)  # (T,)
                input_ids[r, here] = tokens
                position_ids[:, r, here] = group.prompt.next_position + torch.arange(T)
                segment[r, here], prefix[r, here] = next_segment, prompt_segment
                next_segment += 1
                # Token 0 is predicted by the prompt's last hidden state, token t by the one at t - 1. The hidden state
                # of the last token (the end token) predicts nothing and is dropped.
                first = r * width + cursor
                answers.append((prompt_positions, first + torch.arange(T)))
                sources.append(torch.cat([torch.tensor([last_of_prompt]), first + torch.arange(T - 1)]))
                targets.append(tokens)
                row_of_target.append(torch.full((T,), n))
                step_of_target.append(torch.arange(T))
                cursor += T
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment=segment,
        prefix=prefix,
        image_positions=torch.cat(image_positions),
        blocks=[make_block(prompts), make_block(answers)],
        images=images,
        sources=torch.cat(sources),
        targets=torch.cat(targets),
        row_of_target=torch.cat(row_of_target),
        step_of_target=torch.cat(step_of_target),
    )
