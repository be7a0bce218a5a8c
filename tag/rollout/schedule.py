"""Who decodes where: waiting completions, rows, prompt slots. Plain host bookkeeping, touched every few steps.

Completions wait in order. A free row takes the next one, as soon as its prompt sits in a slot; a slot is free again
when the last completion of its prompt has finished.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice


class Schedule:
    """State of one `generate`: completion n continues prompt n // group_size."""

    def __init__(self, num_prompts: int, group_size: int, rows: int, slots: int) -> None:
        self.group_size, self.total = group_size, num_prompts * group_size
        self.waiting = deque(range(self.total))
        self.owner: list[int | None] = [None] * rows  # completion in each row
        self.cell: list[tuple[int, int] | None] = [None] * rows  # (slot, place) of each row
        self.reach = [0] * rows  # tokens each row may have at most
        self.slot_of: dict[int, int] = {}  # prompt -> slot
        self.num_slots, self.free_slots = slots, list(range(slots))
        self.unfinished: dict[int, int] = {}  # prompt in a slot -> completions not finished yet
        self.num_finished = 0
        self.per_slot = cells_per_slot(group_size, rows)

    @property
    def width(self) -> int:
        """Rows that decode."""
        return len(self.owner)

    @property
    def live_slots(self) -> int:
        """The lowest number of slots that holds all prompts in use."""
        return 1 + max(self.slot_of.values(), default=0)

    def new_prompts(self) -> dict[int, int]:
        """Prompts that free rows are waiting for, put into slots: prompt -> slot. To be prefilled before `admit`."""
        free_rows = self.owner.count(None)
        wanted = {n // self.group_size for n in islice(self.waiting, free_rows)} - self.slot_of.keys()
        new = {}
        for prompt in sorted(wanted)[: len(self.free_slots)]:
            new[prompt] = self.slot_of[prompt] = min(self.free_slots)
            self.free_slots.remove(new[prompt])
            self.unfinished[prompt] = self.group_size
        return new

    def admit(self) -> list[int]:
        """Give free rows to waiting completions whose prompt is in a slot. Returns these rows."""
        rows = []
        for row, owner in enumerate(self.owner):
            if not self.waiting or self.waiting[0] // self.group_size not in self.slot_of:
                break
            if owner is not None:
                continue
            n = self.owner[row] = self.waiting.popleft()
            slot = self.slot_of[n // self.group_size]
            taken = {cell[1] for cell in self.cell if cell is not None and cell[0] == slot}
            self.cell[row] = (slot, min(set(range(self.per_slot)) - taken))
            self.reach[row] = 0
            rows.append(row)
        return rows

    def finish(self, row: int) -> int:
        """Free `row`; returns its completion."""
        n = self.owner[row]
        prompt = n // self.group_size
        self.owner[row] = self.cell[row] = None
        self.reach[row] = 0
        self.num_finished += 1
        self.unfinished[prompt] -= 1
        if not self.unfinished[prompt]:
            del self.unfinished[prompt]
            self.free_slots.append(self.slot_of.pop(prompt))
        return n

    def compact(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """When nothing waits any more: drop rows that would be computed for nothing, as far as `widths`, rising, allow.

        Returns (from, to) of the rows to move to the front.
        """
        taken = [row for row, n in enumerate(self.owner) if n is not None]
        width = next((w for w in widths if w >= len(taken)), self.width)
        if self.waiting or width >= self.width:
            return []
        holes = [row for row in range(width) if self.owner[row] is None]
        moves = list(zip([row for row in taken if row >= width], holes))
        for source, target in moves:
            for state in (self.owner, self.cell, self.reach):
                state[target] = state[source]
        del self.owner[width:], self.cell[width:], self.reach[width:]
        return moves


def cells_per_slot(group_size: int, rows: int) -> int:
    """Rows that can continue one prompt at the same time."""
    return min(group_size, rows)


def slots_needed(group_size: int, rows: int) -> int:
    """Prompt slots for `rows` rows: twice what full groups take, because stragglers of old groups hold on to theirs."""
    return min(rows, 2 * -(-rows // cells_per_slot(group_size, rows)))
