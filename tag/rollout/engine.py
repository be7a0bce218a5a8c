"""The rollout engine: which prompt is prefilled when, which rows decode together, and who takes a free row.

    waiting completions -> [ row | row | row | ... ] -> rollouts
                             one token each, per step

A prompt is run once for its whole group; every row that continues it starts from a copy of its KV. A fixed number of
rows decodes together, and a row that has finished is given to the next waiting completion, so long and short ones do
not wait for each other. Nothing in a step depends on the host: what has finished is looked up every few steps, and
until then a finished row marks time without effect. Random numbers belong to (seed, token index), never to the batch.

Why rows hold copies of the prompt's KV and do not share it: sharing pays when attention to the prompt dominates. Here
prompts are about as long as completions, and refilling mixes prompts among the rows, so that sharing needs a gather
before and a scatter after attention in every layer; on a CPU that was slower by a factor of two (docs/benchmarks.md),
and on a GPU a 7B model reads 15 GB of weights a step against 0.5 GB of prompt KV for 64 rows.

Shapes:  R rows, `width` of them decoding;  L cache length;  T longest completion;  S prompts prefilled together.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from tag.data.batching import Prompt
from tag.rollout.box_limit import BoxLimit
from tag.rollout.decoder import TextDecoder
from tag.rollout.records import Rollout, RolloutStats, Sampling, check_request
from tag.rollout.rows import Rows
from tag.rollout.sampling import sample

CHECK_EVERY = 4  # steps between looks at what has finished
PREFILL_TOKENS = 8192  # prompt tokens computed together, at most
BACKENDS = ("engine", "hf")


class RolloutEngine:
    """Samples completions from merged weights of its own, never from the (sharded) training modules."""

    def __init__(
        self,
        vlm,
        max_rows: int = 64,
        max_new_tokens: int = 512,
        backend: str = "engine",
        max_kv_bytes: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """vlm: a tag.vlm.VLM (or anything with its text_config, tokenizer, eos_id, device, compute_dtype and
        merged_text_weights). max_rows: completions that decode together; memory and speed, never results.
        cuda_graphs: replay the decoding step as a graph (CUDA only; ignored on a CPU).
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown rollout backend {backend!r}; expected one of {', '.join(BACKENDS)}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be positive, got {max_rows}")
        self.vlm, self.max_rows, self.max_new_tokens = vlm, max_rows, max_new_tokens
        self.backend, self.max_kv_bytes = backend, max_kv_bytes
        self.static = torch.device(vlm.device).type == "cuda"  # always the same shapes
        self.cuda_graphs = cuda_graphs and self.static
        self.decoder: TextDecoder | None = None
        self.rows: Rows | None = None
        self.adapter: str | None = None
        self.refreshed = False
        self.stats: RolloutStats | None = None
        self._box_limits: dict[int, BoxLimit] = {}
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    # ---- weights ----------------------------------------------------------------------------------------------

    def refresh(self, adapter: str | None = "policy") -> None:
        """Take over the language model's current weights with `adapter` merged in (None: the bare base).

        A collective when the model is sharded: every rank must call it. Copies into the buffers of the first time.
        """
        self.adapter, self.refreshed = adapter, True
        if self.backend == "hf":  # generates through the model itself
            return
        if self.decoder is None:
            self.decoder = TextDecoder(self.vlm.text_config, torch.device(self.vlm.device), self.vlm.compute_dtype)
        self.decoder.load(self.vlm.merged_text_weights(adapter))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache held now."""
        return self.rows.cache.nbytes if self.rows is not None else 0

    # ---- sampling ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seeds: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        max_boxes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """Sample `group_size` completions of every prompt, in prompt-major order, with the weights last refreshed.

        seeds: one for each completion, in that order (None: drawn from torch's generator). temperature 0: the most
        likely token, always. max_boxes: forbid any `<bbox>` beyond so many. progress: called with (finished, all).

        A completion is a function of weights, prompt, seed and settings: the other rows, their number and order change
        it only where rounding moves the border between two tokens onto the random number (about 1e-7 a token in fp32;
        bfloat16 rounds more coarsely, so there it happens). Raises RuntimeError if never refreshed, ValueError for
        what does not fit.
        """
        if not self.refreshed:
            raise RuntimeError("the rollout engine holds no weights yet: call refresh(adapter) before generate")
        limit = max_new_tokens or self.max_new_tokens
        sampling = Sampling(temperature, top_p, max_boxes)
        seeds = check_request(prompts, group_size, seeds, limit, self.vlm.text_config.max_position_embeddings)
        if not prompts:
            return []
        if self.backend == "hf":
            from tag.rollout.hf import generate_hf

            return generate_hf(
                self.vlm, prompts, group_size, adapter=self.adapter, seeds=seeds, temperature=temperature, top_p=top_p,
                max_new_tokens=limit, max_boxes=max_boxes, max_rows=self.max_rows, progress=progress,
            )  # fmt: skip
        rollouts = self._run(prompts, group_size, seeds, sampling, limit, progress or (lambda done, total: None))
        for rollout in rollouts:
            # Made outside inference mode, so that a loss may use it.
            rollout.logprobs = torch.tensor(rollout.logprobs, dtype=torch.float32)  # (T,)
        return rollouts

    @torch.inference_mode()
    def _run(self, prompts, group_size, seeds, sampling, limit, progress) -> list[Rollout]:
        started = time.perf_counter()
        total = len(seeds)
        self._prepare(max(len(p.input_ids) for p in prompts), total, limit)
        rows = self.rows
        width = self.max_rows if self.static else min(self.max_rows, total)  # rows that decode
        waiting = deque(range(total))  # completion n continues prompt n // group_size
        owner: list[int | None] = [None] * width  # completion in each row
        reach = [0] * width  # cache columns that each row may have filled
        done: list[Rollout | None] = [None] * total
        self._prefilled = range(0)  # prompts whose KV is in self._prefix
        steps = row_steps = self._prefill_tokens = 0
        while True:
            free = [r for r in range(width) if owner[r] is None]
            if free and waiting:
                self._admit(free, owner, reach, waiting, prompts, group_size, seeds)
            elif free and not self.static:
                width = rows.compact(owner, reach)
            if width == 0 or all(n is None for n in owner[:width]):
                break

            length = min(_round_up(max(reach[:width]) + CHECK_EVERY, 128 if self.static else 16), rows.length)
            for _ in range(CHECK_EVERY):
                self._step(width, length, sampling, limit)
            steps += CHECK_EVERY
            row_steps += CHECK_EVERY * width
            reach = [n + CHECK_EVERY for n in reach]

            active = rows.active[:width].tolist()
            finished = [r for r in range(width) if owner[r] is not None and not active[r]]
            for r, (token_ids, logprobs) in zip(finished, rows.take(finished)):
                n = owner[r]
                reason = "stop" if token_ids[-1] == self.vlm.eos_id else "length"
                text = self.vlm.tokenizer.decode(token_ids, skip_special_tokens=True)
                done[n] = Rollout(token_ids, text, logprobs, seeds[n], reason, n // group_size, n % group_size)
                owner[r], reach[r] = None, 0
            if finished:
                progress(sum(r is not None for r in done), total)

        self._prefix = self._prefix_logits = None
        tokens = sum(len(r.token_ids) for r in done)
        seconds = time.perf_counter() - started
        self.stats = RolloutStats(
            len(prompts), total, tokens, self._prefill_tokens, steps, row_steps, self.kv_bytes, seconds
        )
        return done

    def _prepare(self, prompt_length: int, completions: int, limit: int) -> None:
        """Rows and KV cache for prompts of at most `prompt_length`; kept from call to call, replaced when too small."""
        # One column more than tokens: a row that has reached its limit marks time there.
        length = _round_up(prompt_length + limit + 1, 64)
        count = self.max_rows if self.static else min(self.max_rows, completions)
        if self.rows is not None and self.rows.fits(count, length, limit):
            self.rows.clear()
            return
        per_row = self.decoder.kv_bytes(1, length)
        if self.max_kv_bytes is not None and count * per_row > self.max_kv_bytes:
            raise ValueError(
                f"{count} rows of {length} tokens need {count * per_row / 2**20:.0f} MiB of KV cache, allowed are "
                f"{self.max_kv_bytes / 2**20:.0f} MiB: enough for {self.max_kv_bytes // per_row} rows (max_rows)"
            )
        self._graphs.clear()  # they point into the old rows
        self.rows = None  # free before allocating
        self.rows = Rows(self.decoder, count, length, limit)

    def _admit(self, free, owner, reach, waiting, prompts, group_size, seeds) -> None:
        """Give free rows to waiting completions, prefilling their prompts on the way."""
        rows, taken = self.rows, []
        for r in free[: len(waiting)]:
            n = waiting.popleft()
            i = n // group_size
            if i not in self._prefilled:
                self._prefill(i, prompts, wanted=1 + (len(free) - len(taken) - 1) // group_size)
            P = len(prompts[i].input_ids)
            rows.cache[:, r, :, :, :P].copy_(self._prefix[:, i - self._prefilled.start, :, :, :P])
            rows.logits[r].copy_(self._prefix_logits[i - self._prefilled.start])
            owner[r], reach[r] = n, P
            taken.append(r)
        admitted = [prompts[owner[r] // group_size] for r in taken]
        rows.start(
            taken,
            slots=[len(p.input_ids) for p in admitted],
            positions=[p.next_position for p in admitted],
            seeds=[seeds[owner[r]] for r in taken],
        )

    def _prefill(self, first: int, prompts: Sequence[Prompt], wanted: int) -> None:
        """Run prompts first, first + 1, ..., as many as `wanted` and PREFILL_TOKENS allow, padded to the longest."""
        decoder, device = self.decoder, self.decoder.device
        P = max(len(p.input_ids) for p in prompts[first : first + wanted])
        S = min(wanted, max(1, PREFILL_TOKENS // P), len(prompts) - first)
        chosen = prompts[first : first + S]
        input_ids = torch.zeros(S, P, dtype=torch.long, device=device)
        position_ids = torch.zeros(3, S, P, dtype=torch.long, device=device)
        for s, prompt in enumerate(chosen):
            input_ids[s, : len(prompt.input_ids)] = prompt.input_ids
            position_ids[:, s, : len(prompt.input_ids)] = prompt.position_ids
        embeds = decoder.embed[input_ids]  # (S, P, H)
        for s, prompt in enumerate(chosen):
            if prompt.image_features is not None:
                where = prompt.image_mask.nonzero().squeeze(1).to(device)
                embeds[s, where] = prompt.image_features.to(device, decoder.dtype)
        lengths = torch.tensor([len(p.input_ids) for p in chosen], device=device)  # (S,)
        self._prefix, self._prefix_logits = decoder.prefill(embeds, position_ids, lengths)
        self._prefilled = range(first, first + S)
        self._prefill_tokens += S * P

    # ---- one decoding step ------------------------------------------------------------------------------------

    def _step(self, width: int, length: int, sampling: Sampling, limit: int) -> None:
        """Sample a token in every row from its logits, then compute the logits of the next."""
        if not self.cuda_graphs:
            return self._compute_step(width, length, sampling, limit)
        key = (width, length, sampling, limit)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        self._graphs[key].replay()

    def _compute_step(self, width: int, length: int, sampling: Sampling, limit: int) -> None:
        # No host synchronisation and no new addresses for what lives on: this is what a CUDA graph records.
        rows = self.rows.first(width)
        forbidden = None
        if sampling.max_boxes is not None:
            boxes = self._box_limit(sampling.max_boxes)
            forbidden = boxes.forbidden(rows.box_state, rows.box_count)  # (width, V)
        here = rows.count[:, None]  # (width, 1) index of the token to be sampled
        u = rows.uniforms.gather(1, here).squeeze(1)  # (width,)
        token, logprob = sample(rows.logits, u, sampling.temperature, sampling.top_p, forbidden)
        rows.token_ids.scatter_(1, here, token[:, None])
        rows.logprobs.scatter_(1, here, logprob[:, None])
        if sampling.max_boxes is not None:
            state, count = boxes.advance(rows.box_state, rows.box_count, token)
            rows.box_state.copy_(state), rows.box_count.copy_(count)
        self.decoder.step(token, rows.position, rows.slot, rows.cache[..., :length, :], rows.logits)
        # A finished row stays where it is, and overwrites the same column until it is taken out.
        rows.counters.add_(rows.active)  # count, slot, position
        rows.active.mul_((token != self.vlm.eos_id) & (rows.count < limit))

    def _box_limit(self, max_boxes: int) -> BoxLimit:
        if max_boxes not in self._box_limits:
            self._box_limits[max_boxes] = BoxLimit(
                self.vlm.tokenizer, self.decoder.V, max_boxes, device=self.decoder.device
            )
        return self._box_limits[max_boxes]

    def _capture(self, width: int, length: int, sampling: Sampling, limit: int) -> torch.cuda.CUDAGraph:
        """Record one step. Warm-up runs are real steps, so the rows are put back as they were afterwards."""
        saved = [t.clone() for t in self.rows.per_row()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up on a side stream, as CUDA graphs require
            for _ in range(2):
                self._compute_step(width, length, sampling, limit)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # never replayed at the same time
        with torch.cuda.graph(graph, pool=pool):
            self._compute_step(width, length, sampling, limit)
        # The KV that warm-up wrote lies at and behind each row's slot: the row writes it again before it reads it.
        for tensor, value in zip(self.rows.per_row(), saved):
            tensor.copy_(value)
        return graph


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
