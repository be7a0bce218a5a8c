"""The rollout engine: which prompt is prefilled when, which rows decode together, and who takes a free row.

    waiting completions -> [ row | row | row | ... ] -> rollouts
                             one token each, per step

A prompt is run once for its whole group, and its KV is kept once. A fixed number of rows decodes together, and a row
that has finished is given to the next waiting completion, so long and short ones do not wait for each other. Nothing
in a step depends on the host: what has finished is looked up every few steps, and until then a finished row marks time
without effect. Random numbers belong to (seed, token index), never to the batch.

Shapes:  R rows;  S prompt slots;  P prompt length;  V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch

from tag.data.batching import Prompt
from tag.rollout.box_limit import BoxLimit
from tag.rollout.budget import KVPlan, default_budget, kv_bytes_per_token, plan_kv
from tag.rollout.cache import CacheView, GroupCache
from tag.rollout.decoder import TextDecoder
from tag.rollout.records import Rollout, RolloutStats, Sampling, check_request
from tag.rollout.rows import Rows
from tag.rollout.sampling import sample
from tag.rollout.schedule import Schedule

CHECK_EVERY = 4  # steps between looks at what has finished
PREFILL_TOKENS = 8192  # prompt tokens computed together, at most
MIN_WIDTH = 8  # decoding fewer rows than this is hardly faster
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
        compiled: bool = False,
        fused: bool = True,
    ) -> None:
        """vlm: a tag.vlm.VLM (or anything with its text_config, tokenizer, eos_id, device, compute_dtype and
        merged_text_weights). max_rows: completions that decode together, fewer if their keys and values do not fit
        into max_kv_bytes (None: a share of what is free at the first call). cuda_graphs: replay the decoding step as
        a graph (CUDA only; ignored on a CPU). compiled: `torch.compile` the decoding step. fused: queries, keys and
        values by one matrix product, gate and up by another. All of this is memory and speed, never results.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown rollout backend {backend!r}; expected one of {', '.join(BACKENDS)}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be positive, got {max_rows}")
        self.vlm, self.max_rows, self.max_new_tokens = vlm, max_rows, max_new_tokens
        self.backend, self.max_kv_bytes = backend, max_kv_bytes
        self.static = torch.device(vlm.device).type == "cuda"  # always the same shapes
        self.cuda_graphs, self.compiled, self.fused = cuda_graphs and self.static, compiled, fused
        self.decoder: TextDecoder | None = None
        self.rows: Rows | None = None
        self.cache: GroupCache | None = None
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
            device, dtype = torch.device(self.vlm.device), self.vlm.compute_dtype
            self.decoder = TextDecoder(self.vlm.text_config, device, dtype, self.compiled, self.fused)
        self.decoder.load(self.vlm.merged_text_weights(adapter))

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache held now."""
        return self.cache.nbytes if self.cache is not None else 0

    def plan(
        self, prompt_tokens: int, group_size: int, max_new_tokens: int | None = None, prompts: int | None = None
    ) -> KVPlan:
        """How many rows will decode together, and what their KV cache takes. prompts: how many there are, if known.

        Raises ValueError if not even one row fits, and for more tokens than the model has positions for.
        """
        config, limit = self.vlm.text_config, self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if prompt_tokens + limit > config.max_position_embeddings:
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens with {limit} new ones is more than the model's "
                f"{config.max_position_embeddings} positions"
            )
        if self.max_kv_bytes is None:  # once: later, what the cache itself holds would count as taken
            self.max_kv_bytes = default_budget(torch.device(self.vlm.device))
        P, R, S = prompt_tokens, self.max_rows, self.max_rows
        if self.static:
            P = _round_up(P, 32)
        elif prompts is not None:
            R, S = min(R, prompts * group_size), prompts
        per_token = kv_bytes_per_token(config, self.vlm.compute_dtype)
        return plan_kv(per_token, group_size, P, limit, R, S, self.max_kv_bytes)

    # ---- sampling ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seeds: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int | Sequence[int] | None = None,
        max_boxes: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """Sample `group_size` completions of every prompt, in prompt-major order, with the weights last refreshed.

        seeds: one for each completion, in that order (None: drawn from torch's generator). temperature 0: the most
        likely token, always. max_new_tokens: one limit, or one for each completion. max_boxes: forbid any `<bbox>`
        beyond so many. progress: called with (finished, all).

        A completion is a function of weights, prompt, seed and settings: the other rows, their number and order change
        it only where rounding moves the border between two tokens onto the random number (about 1e-7 a token in fp32;
        bfloat16 rounds more coarsely, so there it happens). Raises RuntimeError if never refreshed, ValueError for
        what does not fit.
        """
        if not self.refreshed:
            raise RuntimeError("the rollout engine holds no weights yet: call refresh(adapter) before generate")
        limits = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampling = Sampling(temperature, top_p, max_boxes)
        positions = self.vlm.text_config.max_position_embeddings
        seeds, limits = check_request(prompts, group_size, seeds, limits, positions)
        if not prompts:
            return []
        if self.backend == "hf":
            from tag.rollout.hf import generate_hf

            return generate_hf(
                self.vlm, prompts, group_size, adapter=self.adapter, seeds=seeds, temperature=temperature, top_p=top_p,
                max_new_tokens=limits, max_boxes=max_boxes, max_rows=self.max_rows, progress=progress,
            )  # fmt: skip
        rollouts = self._run(prompts, group_size, seeds, sampling, limits, progress or (lambda done, total: None))
        for rollout in rollouts:
            # Made outside inference mode, so that a loss may use it.
            rollout.logprobs = torch.tensor(rollout.logprobs, dtype=torch.float32)  # (T,)
        return rollouts

    @torch.inference_mode()
    def _run(self, prompts, group_size, seeds, sampling, limits, progress) -> list[Rollout]:
        started = time.perf_counter()
        schedule = self._prepare(prompts, group_size, max(limits))
        done: list[Rollout | None] = [None] * schedule.total
        prefill_tokens = steps = row_steps = 0
        while schedule.num_finished < schedule.total:
            # 1. Free rows go to what is waiting; when nothing is, they are dropped.
            prefill_tokens += self._prefill(schedule.new_prompts(), prompts)
            self._admit(schedule, prompts, seeds, limits)

            # 2. Some steps for all rows.
            rows, cache = self._views(schedule, max(limits))
            for _ in range(CHECK_EVERY):
                self._step(rows, cache, sampling)
            schedule.reach = [n + CHECK_EVERY for n in schedule.reach]
            steps += CHECK_EVERY
            row_steps += CHECK_EVERY * schedule.width

            # 3. What has finished is taken out.
            active = rows.active.tolist()
            finished = [r for r, n in enumerate(schedule.owner) if n is not None and not active[r]]
            for row, (token_ids, logprobs) in zip(finished, self.rows.take(finished)):
                if not math.isfinite(sum(logprobs)):
                    self.cache = None  # whatever is NaN in it must not outlive this call
                    raise FloatingPointError("a sampled token has no finite log-prob: NaN in weights or image features")
                n = schedule.finish(row)
                reason = "stop" if token_ids[-1] == self.vlm.eos_id else "length"
                text = self.vlm.tokenizer.decode(token_ids, skip_special_tokens=True)
                done[n] = Rollout(token_ids, text, logprobs, seeds[n], reason, n // group_size, n % group_size)
            if finished:
                progress(schedule.num_finished, schedule.total)

        tokens, seconds = sum(len(r.token_ids) for r in done), time.perf_counter() - started
        self.stats = RolloutStats(
            len(prompts), len(done), tokens, prefill_tokens, steps, row_steps, self.kv_bytes, seconds
        )
        return done

    def _prepare(self, prompts: Sequence[Prompt], group_size: int, limit: int) -> Schedule:
        """An empty schedule, and rows and cache for it; these are kept from call to call, replaced when too small."""
        decoder = self.decoder
        plan = self.plan(max(len(p.input_ids) for p in prompts), group_size, limit, len(prompts))
        R, S, P = plan.rows, plan.slots, plan.prompt_length
        T = limit + 1  # a row that has reached its limit marks time in the last column
        schedule = Schedule(len(prompts), group_size, R, S)
        self._prompt_length = P
        if self.cache is not None and self.cache.fits(S, P, R, T) and self.rows.fits(R, limit):
            self.rows.clear()
            return schedule

        self._graphs.clear()  # they point into the old buffers
        self.rows = self.cache = None  # free before allocating
        where = {"dtype": decoder.dtype, "device": decoder.device}
        self.rows = Rows(R, limit, decoder.V, **where)
        self.cache = GroupCache(decoder.N, decoder.K, decoder.D, S, P, R, T, **where)
        self._prompt_logits = torch.zeros(S, decoder.V, **where)  # of the first token of each slot's completions
        return schedule

    def _prefill(self, slot_of: dict[int, int], prompts: Sequence[Prompt]) -> int:
        """Run prompts and store their KV and logits in their slots. Returns the tokens computed."""
        decoder, device, computed = self.decoder, self.decoder.device, 0
        at_once = max(1, PREFILL_TOKENS // self._prompt_length)
        items = list(slot_of.items())
        for part in (items[i : i + at_once] for i in range(0, len(items), at_once)):
            chosen, slots = [prompts[n] for n, _ in part], [slot for _, slot in part]
            lengths = [len(p.input_ids) for p in chosen]
            S, P = len(chosen), max(lengths)
            input_ids = torch.zeros(S, P, dtype=torch.long, device=device)
            position_ids = torch.zeros(3, S, P, dtype=torch.long, device=device)
            for s, prompt in enumerate(chosen):
                input_ids[s, : lengths[s]] = prompt.input_ids
                position_ids[:, s, : lengths[s]] = prompt.position_ids
            embeds = decoder.embed[input_ids]  # (S, P, H)
            for s, prompt in enumerate(chosen):
                if prompt.image_features is not None:
                    where = prompt.image_mask.nonzero().squeeze(1).to(device)
                    embeds[s, where] = prompt.image_features.to(device, decoder.dtype)
            kv, logits = decoder.prefill(embeds, position_ids, torch.tensor(lengths, device=device))
            self.cache.put_prompts(slots, kv, lengths)
            self._prompt_logits[slots] = logits
            computed += S * P
        return computed

    def _admit(self, schedule: Schedule, prompts, seeds: Sequence[int], limits: Sequence[int]) -> None:
        """Start completions in free rows; with none left to start, close the gaps."""
        admitted = schedule.admit()
        if admitted:
            numbers = [schedule.owner[row] for row in admitted]
            self.rows.start(
                admitted,
                logits=self._prompt_logits[[schedule.cell[row][0] for row in admitted]],
                positions=[prompts[n // schedule.group_size].next_position for n in numbers],
                seeds=[seeds[n] for n in numbers],
                limits=[limits[n] for n in numbers],
            )
        for source, target in schedule.compact(self._widths(schedule.width)):
            self.rows.move(source, target)
            self.cache.move_row(source, target, schedule.reach[target])
        self.cache.seat(schedule.cell, self._slots_in_use(schedule), schedule.per_slot)

    def _widths(self, width: int) -> range | list[int]:
        """Numbers of rows that decoding may be narrowed to, rising. On a GPU few, because each is a CUDA graph."""
        if not self.static:
            return range(MIN_WIDTH, width, MIN_WIDTH)
        halves = [self.max_rows >> k for k in range(1, self.max_rows.bit_length())]
        return sorted(w for w in halves if MIN_WIDTH <= w < width)

    def _slots_in_use(self, schedule: Schedule) -> int:
        return schedule.num_slots if self.static else schedule.live_slots

    def _views(self, schedule: Schedule, limit: int) -> tuple[Rows, CacheView]:
        """The rows and the part of the cache that the next steps work on. On a GPU few different shapes, for graphs."""
        columns = _round_up(max(schedule.reach) + CHECK_EVERY, 128 if self.static else 1)
        slots = self._slots_in_use(schedule)
        cache = self.cache.view(slots, schedule.per_slot, self._prompt_length, schedule.width, min(columns, limit + 1))
        return self.rows.first(schedule.width), cache

    # ---- one decoding step ------------------------------------------------------------------------------------

    def _step(self, rows: Rows, cache: CacheView, sampling: Sampling) -> None:
        """Sample a token in every row from its logits, then compute the logits of the next."""
        if not self.cuda_graphs:
            return self._compute_step(rows, cache, sampling)
        key = (tuple(t.shape for t in (rows.logits, cache.prompt, cache.own, cache.to_cells)), sampling)
        if key not in self._graphs:
            self._graphs[key] = self._capture(rows, cache, sampling)
        self._graphs[key].replay()

    def _compute_step(self, rows: Rows, cache: CacheView, sampling: Sampling) -> None:
        # No host synchronisation and no new addresses for what lives on: this is what a CUDA graph records.
        forbidden = None
        if sampling.max_boxes is not None:
            boxes = self._box_limit(sampling.max_boxes)
            forbidden = boxes.forbidden(rows.box_state, rows.box_count)  # (R, V)
        here = rows.count[:, None]  # (R, 1) index of the token to be sampled
        u = rows.uniforms.gather(1, here).squeeze(1)  # (R,)
        token, logprob = sample(rows.logits, u, sampling.temperature, sampling.top_p, forbidden)
        rows.token_ids.scatter_(1, here, token[:, None])
        rows.logprobs.scatter_(1, here, logprob[:, None])
        if sampling.max_boxes is not None:
            state, count = boxes.advance(rows.box_state, rows.box_count, token)
            rows.box_state.copy_(state)
            rows.box_count.copy_(count)
        self.decoder.step(token, rows.position, rows.count, cache, rows.logits)
        # A finished row stays where it is, and overwrites the same column until it is taken out.
        rows.counters.add_(rows.active)
        rows.active.mul_((token != self.vlm.eos_id) & (rows.count < rows.limit))

    def _box_limit(self, max_boxes: int) -> BoxLimit:
        if max_boxes not in self._box_limits:
            boxes = BoxLimit(self.vlm.tokenizer, self.decoder.V, max_boxes, device=self.decoder.device)
            self._box_limits[max_boxes] = boxes
        return self._box_limits[max_boxes]

    def _capture(self, rows: Rows, cache: CacheView, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """Record one step. Warm-up runs are real steps, so the rows are put back as they were afterwards."""
        saved = [t.clone() for t in rows.tensors()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up on a side stream, as CUDA graphs require
            for _ in range(2):
                self._compute_step(rows, cache, sampling)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # no two replay at the same time
        # thread_local: what other threads do meanwhile (NCCL's watchdog, the writer of checkpoints) is no part of it.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._compute_step(rows, cache, sampling)
        # KV that warm-up wrote lies at and behind each row's next column: written again before it is read.
        for tensor, value in zip(rows.tensors(), saved):
            tensor.copy_(value)
        return graph


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
