"""The rollout engine (tag/rollout) against Hugging Face's `generate` and forward pass, and its promises: a completion
depends on weights, prompt, seed and settings only; the sampled distribution is the model's; boxes are limited.

pytest tests/test_rollout.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import add_random_lora, make_vlm
from torch import Tensor
from transformers import GenerationConfig

import tag.rollout.engine
from tag.lora import lora_layers, set_adapter
from tag.rollout import BoxLimit, Prompt, Rollout, RolloutEngine
from tag.rollout.box_limit import OPENING, token_pieces
from tag.rollout.budget import free_bytes, plan_kv
from tag.rollout.hf import left_padded
from tag.rollout.sampling import sample, top_p_probs, uniforms
from tag.rollout.schedule import Schedule, slots_needed
from tag.vlm import VLM, mrope_positions


def random_prompts(vlm: VLM, count: int, seed: int = 0, longest: int = 40) -> list[Prompt]:
    """Prompts of random tokens and different lengths; three in four show an image of 2 x 2 to 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for i in range(count):
        side = i % 4 and 1 + i % 4  # 0, 2, 3, 4
        before, after = torch.randint(1, longest // 2, (2,), generator=generator).tolist()
        image_mask = torch.zeros(before + side * side + after, dtype=torch.bool)
        image_mask[before : before + side * side] = True
        input_ids = torch.randint(1100, image_mask.shape, generator=generator)
        input_ids[image_mask] = vlm.image_token_id
        features = 3 * torch.randn(side * side, vlm.text_config.hidden_size, generator=generator) if side else None
        prompts.append(Prompt(input_ids, mrope_positions(image_mask, side), image_mask, features))
    return prompts


def make_engine(vlm: VLM, max_rows: int = 64, max_new_tokens: int = 24, **options) -> RolloutEngine:
    engine = RolloutEngine(vlm, max_rows, max_new_tokens, **options)
    engine.refresh("policy")
    return engine


@pytest.fixture(scope="module")
def vlm() -> VLM:
    """A random model with a random adapter that ends now and then, everywhere. Shared: do not change it."""
    vlm = add_random_lora(make_vlm())
    set_adapter(vlm.hf_model, "policy")
    # Fit the end token's output row: about one token in fifteen, whatever came before.
    with torch.no_grad():
        inputs = left_padded(vlm, random_prompts(vlm, 16, seed=9))
        hidden = vlm.hf_model.model.language_model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
        wanted = vlm.hf_model.lm_head(hidden).logsumexp(-1) - np.log(15)  # (tokens,)
        vlm.hf_model.lm_head.weight[vlm.eos_id] = torch.linalg.lstsq(hidden, wanted[:, None]).solution[:, 0]
    return vlm


@pytest.fixture(scope="module")
def prompts(vlm: VLM) -> list[Prompt]:
    return random_prompts(vlm, 32)


@torch.no_grad()
def hf_logits(vlm: VLM, prompt: Prompt, token_ids: list[int]) -> Tensor:
    """Logits before each token of a completion by one plain Hugging Face forward pass, (T, V)."""
    inputs = left_padded(vlm, [prompt])
    embed = vlm.hf_model.get_input_embeddings()
    embeds = torch.cat([inputs["inputs_embeds"], embed(torch.tensor([token_ids]))], dim=1)  # (1, P + T, H)
    P, T = len(prompt.input_ids), len(token_ids)
    after = (prompt.next_position + torch.arange(T)).expand(3, 1, T)
    positions = torch.cat([inputs["position_ids"], after], dim=2)  # (3, 1, P + T)
    hidden = vlm.hf_model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    return vlm.hf_model.lm_head(hidden[0, P - 1 : P + T - 1]).float()


def hf_logprobs(vlm: VLM, prompt: Prompt, token_ids: list[int]) -> Tensor:
    """log pi of each token of a completion, (T,)."""
    return hf_logits(vlm, prompt, token_ids).log_softmax(-1)[range(len(token_ids)), token_ids]


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    """The same completions, log-probs up to rounding."""
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert [(r.text, r.seed, r.finish_reason) for r in found] == [(r.text, r.seed, r.finish_reason) for r in expected]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=2e-5)


# ---- against Hugging Face ---------------------------------------------------------------------------------------


def test_greedy_is_hugging_faces_greedy(vlm, prompts):
    assert len({len(p.input_ids) for p in prompts}) > 16
    found = make_engine(vlm).generate(prompts, 1, temperature=0.0)
    config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=vlm.eos_id, pad_token_id=vlm.eos_id)
    expected = vlm.hf_model.generate(**left_padded(vlm, prompts), generation_config=config).tolist()
    assert len(found) == 32 and len({tuple(r.token_ids) for r in found}) >= 16
    for rollout, tokens in zip(found, expected):
        end = tokens.index(vlm.eos_id) + 1 if vlm.eos_id in tokens else 24
        assert rollout.token_ids == tokens[:end]
        # Greedy log-probs are those of the full distribution.
        torch.testing.assert_close(
            rollout.logprobs, hf_logprobs(vlm, prompts[rollout.prompt_index], tokens[:end]), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_logprobs_are_the_models(vlm, prompts, temperature, top_p):
    engine = make_engine(vlm, max_rows=16)
    for rollout in engine.generate(prompts[:8], 4, seeds=range(32), temperature=temperature, top_p=top_p):
        logits = hf_logits(vlm, prompts[rollout.prompt_index], rollout.token_ids) / temperature
        probs = logits.softmax(-1) if top_p == 1 else top_p_probs(logits.softmax(-1), top_p)
        expected = probs[range(len(logits)), rollout.token_ids].log()
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.9}, {"max_boxes": 1, "max_new_tokens": 9}]
)
def test_both_back_ends_give_the_same(vlm, prompts, settings):
    found = make_engine(vlm).generate(prompts[:6], 3, seeds=range(18), **settings)
    vlm.hf_model.generation_config.repetition_penalty = 5.0  # as some checkpoints have it: not ours to apply
    set_adapter(vlm.hf_model, None)
    try:
        other = make_engine(vlm, max_rows=7, backend="hf").generate(prompts[:6], 3, seeds=range(18), **settings)
        assert not vlm.training and vlm.hf_model.generation_config.repetition_penalty == 5.0
        assert {layer.active for layer in lora_layers(vlm.hf_model).values()} == {None}
    finally:
        vlm.hf_model.generation_config.repetition_penalty = None
        set_adapter(vlm.hf_model, "policy")
    assert_same(found, other)
    assert [(r.prompt_index, r.sample_index) for r in found] == [divmod(n, 3) for n in range(18)]
    assert [(r.prompt_index, r.sample_index) for r in other] == [divmod(n, 3) for n in range(18)]


def test_bfloat16_stays_close_to_hugging_face():
    vlm = make_vlm()
    vlm.hf_model.to(torch.bfloat16)
    vlm.compute_dtype = torch.bfloat16
    prompts = random_prompts(vlm, 4)
    off = []
    for r in make_engine(vlm).generate(prompts, 2, seeds=range(8)):
        off.append((r.logprobs - hf_logprobs(vlm, prompts[r.prompt_index], r.token_ids)).abs())
    assert torch.cat(off).mean() < 0.05  # the gate of train_grpo.py (tag/gates.py)


# ---- what a completion depends on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(vlm, prompts) -> list[Rollout]:
    """12 prompts x 4 completions, all rows at once."""
    return make_engine(vlm).generate(prompts[:12], 4, seeds=range(100, 148))


@pytest.mark.parametrize("max_rows", [1, 3, 7, 16])
def test_rows_are_refilled_and_change_nothing(vlm, prompts, group, max_rows):
    engine = make_engine(vlm, max_rows=max_rows)
    assert_same(engine.generate(prompts[:12], 4, seeds=range(100, 148)), group)
    if max_rows == 7:
        assert {r.finish_reason for r in group} == {"stop", "length"}
        lengths = [len(r.token_ids) for r in group]
        in_waves = sum(max(lengths[i : i + 7]) for i in range(0, 48, 7))
        assert engine.stats.steps < 0.9 * in_waves  # rows did not wait for the longest of their wave
        assert engine.stats.tokens == sum(lengths) and engine.stats.occupancy > 0.7
        # Every prompt was run once, not once for each completion.
        assert engine.stats.prefill_tokens <= sum(len(p.input_ids) for p in prompts[:12]) + 12 * 40


def test_order_and_company_change_nothing(vlm, prompts, group):
    order = [7, 2, 11, 0]
    seeds = [100 + 4 * i + g for i in order for g in range(4)]
    found = make_engine(vlm, max_rows=5).generate([prompts[i] for i in order], 4, seeds=seeds)
    assert_same(found, [group[4 * i + g] for i in order for g in range(4)])


def test_group_size_changes_nothing(vlm, prompts, group):
    engine = make_engine(vlm, max_rows=6)
    apart = [prompts[n // 4] for n in range(48)]
    assert_same(engine.generate(apart, 1, seeds=range(100, 148)), group)
    larger = engine.generate(prompts[:1], 20, seeds=[*range(100, 104), *range(16)])  # the same engine, other shapes
    assert_same(larger[:4], group[:4])


def test_fixed_shapes_change_nothing(vlm, prompts, group):
    """As on a GPU, where rows, slots and columns are padded so that CUDA graphs can be replayed."""
    engine = make_engine(vlm, max_rows=10)
    engine.static = True
    assert_same(engine.generate(prompts[:12], 4, seeds=range(100, 148)), group)
    assert_same(engine.generate(prompts[:1], 2, seeds=range(100, 102)), group[:2])


def test_seeds_decide(vlm, prompts):
    engine = make_engine(vlm)
    first, second = engine.generate(prompts[:2], 4, seeds=[5] * 8)[:2]
    assert_same([first], [second])
    assert len({tuple(r.token_ids) for r in engine.generate(prompts[:1], 8, seeds=range(8))}) == 8
    # All 64 bits of a seed count.
    big = engine.generate(prompts[:1], 4, seeds=[5, 5 + 2**32, 5 + 2**62, 5 + 2**63])
    assert len({tuple(r.token_ids) for r in big}) == 4 and big[0].token_ids == first.token_ids
    # Without seeds, torch's own are drawn.
    torch.manual_seed(1)
    drawn = engine.generate(prompts[:1], 2)
    torch.manual_seed(1)
    assert_same(engine.generate(prompts[:1], 2), drawn)
    assert drawn[0].seed != drawn[1].seed


def test_temperature_zero_ignores_seeds(vlm, prompts):
    engine = make_engine(vlm)
    a = engine.generate(prompts[:3], 2, temperature=0.0, seeds=range(6))
    b = engine.generate(prompts[:3], 2, temperature=0.0, seeds=range(90, 96), top_p=0.5)
    assert [r.token_ids for r in a] == [r.token_ids for r in b]
    assert a[0].token_ids == a[1].token_ids


# ---- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5, 24])
def test_end_token_and_length_limit(vlm, prompts, limit):
    long = make_engine(vlm).generate(prompts[:8], 8, seeds=range(64))
    for rollout, whole in zip(make_engine(vlm).generate(prompts[:8], 8, seeds=range(64), max_new_tokens=limit), long):
        assert rollout.token_ids == whole.token_ids[:limit]  # a shorter limit only cuts
        assert vlm.eos_id not in rollout.token_ids[:-1] and len(rollout.logprobs) == len(rollout.token_ids)
        ended = rollout.token_ids[-1] == vlm.eos_id
        assert rollout.finish_reason == ("stop" if ended else "length") and (ended or len(rollout.token_ids) == limit)
        assert rollout.text == vlm.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    assert {r.finish_reason for r in long} == {"stop", "length"}


def test_progress_is_reported(vlm, prompts):
    calls = []
    make_engine(vlm, max_rows=4).generate(prompts[:5], 2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10) and calls == sorted(set(calls)) and len(calls) > 2


def test_logprobs_can_be_used_in_a_loss_and_prompts_are_left_alone(vlm, prompts):
    before = [replace(p, input_ids=p.input_ids.clone(), image_mask=p.image_mask.clone()) for p in prompts[:2]]
    rollout = make_engine(vlm).generate(prompts[:2], 2)[0]
    weight = torch.ones((), requires_grad=True)
    (rollout.logprobs * weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None
    for p, b in zip(prompts, before):
        assert torch.equal(p.input_ids, b.input_ids) and torch.equal(p.image_mask, b.image_mask)


# ---- the distribution -------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_independent():
    u = uniforms(range(4000), 50)  # (4000, 50), consecutive seeds and counters: the hard case
    assert u.min() > 0 and u.max() < 1 and len(u.unique()) > 199_000
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 99 + 5 * 14  # chi-square, 99 degrees of freedom
    noise = 5 / 200_000**0.5
    centred = (u - 0.5) * 12**0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[64:], u[:-64])):
        assert abs(float(((a - 0.5) * (b - 0.5)).mean() * 12)) < 1.1 * noise  # neighbours in t, in seed, 64 seeds apart
    assert abs(float(centred.mean())) < noise
    assert torch.equal(uniforms([3, 9], 50), u[[3, 9]]) and torch.equal(uniforms([-1], 3), uniforms([2**64 - 1], 3))
    assert not torch.equal(uniforms([3], 50), uniforms([3 + 2**32], 50))


def test_first_tokens_follow_the_softmax(vlm, prompts):
    N = 2000
    found = make_engine(vlm, max_rows=256, max_new_tokens=1).generate(prompts[1:2], N, seeds=range(N))
    expected = N * hf_logits(vlm, prompts[1], [0]).softmax(-1)[0]  # (V,)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in found]), minlength=len(expected))
    often = expected >= 5
    assert int(often.sum()) > 10
    pairs = [*zip(counts[often], expected[often]), (counts[~often].sum(), expected[~often].sum())]
    chi_square = sum(float((c - e) ** 2 / e) for c, e in pairs)
    freedom = len(pairs) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_sample_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(5, 4)
    u = torch.tensor([0.1, 0.2001, 0.6999, 0.7001, 1 - 2**-33], dtype=torch.float64)
    tokens, logprobs = sample(logits, u)
    assert tokens.tolist() == [0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.5, 0.5, 0.3, 0.3]))
    tokens, logprobs = sample(logits, u, forbidden=torch.tensor([False, False, True, False]).expand(5, 4))
    assert tokens.tolist() == [0, 0, 3, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.4, 0.4, 0.6, 0.6, 0.6]))


def test_large_vocabularies_are_sampled_at_both_ends():
    logits = torch.zeros(2, 152_064)
    tokens, logprobs = sample(logits, torch.tensor([2**-33, 1 - 2**-33], dtype=torch.float64))
    assert tokens.tolist() == [0, 152_063]
    torch.testing.assert_close(logprobs, torch.full((2,), -float(np.log(152_064))))


def test_top_p_is_exact():
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(200, 50, generator=generator)).softmax(-1)
    probs[0] = torch.eye(50)[3]
    probs[1] = 1 / 50  # ties: the lower ids stay
    for top_p in (0.05, 0.5, 0.9, 0.999):
        for row, found in zip(probs.double().numpy(), top_p_probs(probs, top_p)):
            order = np.argsort(-row, kind="stable")
            keep = order[: int(np.searchsorted(np.cumsum(row[order]), top_p)) + 1]  # fewest that reach top_p
            expected = np.zeros(50)
            expected[keep] = row[keep] / row[keep].sum()
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
            assert set(np.flatnonzero(found.numpy())) <= set(keep)


# ---- the box limit ----------------------------------------------------------------------------------------------


class NastyTokenizer:
    """Cuts `<bbox>` in every way, glues it to itself and its neighbours."""

    pieces = [
        "<",
        "b",
        "bb",
        "o",
        "ox",
        "x>",
        ">",
        "<b",
        "box>",
        "<bbox>",
        "<bbox><bbox>",
        "ox><bb",
        "a<",
        "Ġ<bbo",
        "x",
    ]
    pieces += ["><", "</bbox>", "<<bbox>>", "bbox><bbox><", "Ġ", "<sep>"]
    added_tokens_decoder = {20: type("Special", (), {"special": True})()}

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


@pytest.mark.parametrize("max_boxes", [0, 1, 3])
def test_box_mask_forbids_exactly_what_would_open_one_too_many(max_boxes):
    boxes = BoxLimit(NastyTokenizer(), 23, max_boxes)
    texts = [*NastyTokenizer.pieces[:20], "", "", ""]  # a special token and two unused ids add nothing
    generator = torch.Generator().manual_seed(max_boxes)
    state = count = torch.zeros(40, dtype=torch.long)
    written, history = [""] * 40, []
    for _ in range(60):
        forbidden = boxes.forbidden(state, count)
        for text, row in zip(written, forbidden):
            assert row.tolist() == [(text + piece).count(OPENING) > max_boxes for piece in texts]
        tokens = torch.multinomial((~forbidden).float(), 1, generator=generator).squeeze(1)
        history.append((state, count, tokens))
        state, count = boxes.advance(state, count, tokens)
        written = [text + texts[t] for text, t in zip(written, tokens)]
        assert count.tolist() == [text.count(OPENING) for text in written]
    assert max(text.count(OPENING) for text in written) == max_boxes
    # The trainer's view of the same completions.
    states, counts = boxes.scan(torch.stack([t for _, _, t in history], 1))
    assert torch.equal(states, torch.stack([s for s, _, _ in history], 1))
    assert torch.equal(counts, torch.stack([c for _, c, _ in history], 1))


def test_boxes_are_never_exceeded_by_a_model_that_loves_them(vlm, prompts, monkeypatch):
    pieces = token_pieces(vlm.tokenizer, vlm.text_config.vocab_size)
    loved = torch.tensor([piece in ("<", "Ġ<", "bbox", ">", "><", ">[") for piece in pieces])
    bias = torch.where(loved, 0.0, -30.0)
    monkeypatch.setattr(tag.rollout.engine, "sample", lambda logits, *rest: sample(0.1 * logits + bias, *rest))
    engine = make_engine(vlm, max_new_tokens=100)
    free = engine.generate(prompts[:2], 8, seeds=range(16))
    limited = engine.generate(prompts[:2], 8, seeds=range(16), max_boxes=3)
    assert max(r.text.count(OPENING) for r in free) > 3
    assert max(r.text.count(OPENING) for r in limited) == 3
    # The log-probs are those of the masked distribution, which `scan` and `forbidden` give to a trainer.
    boxes = BoxLimit(vlm.tokenizer, len(pieces), 3)
    hit = 0
    for r in limited[:4]:
        state, count = boxes.scan(torch.tensor([r.token_ids]))
        forbidden = boxes.forbidden(state[0], count[0])  # (T, V)
        hit += int(forbidden.any(1).sum())
        logits = 0.1 * hf_logits(vlm, prompts[r.prompt_index], r.token_ids) + bias
        logprobs = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)[range(len(logits)), r.token_ids]
        torch.testing.assert_close(r.logprobs, logprobs, rtol=0, atol=1e-4)
    assert hit > 5


# ---- weights ----------------------------------------------------------------------------------------------------


def test_refresh_takes_new_weights_into_old_buffers(adapted):
    prompts = random_prompts(adapted, 3)
    engine = make_engine(adapted)

    def check(adapter: str | None) -> list[list[int]]:
        engine.refresh(adapter)
        set_adapter(adapted.hf_model, adapter)
        rollouts = engine.generate(prompts, 2, seeds=range(6), max_new_tokens=8)
        for r in rollouts:
            expected = hf_logprobs(adapted, prompts[r.prompt_index], r.token_ids)
            torch.testing.assert_close(r.logprobs, expected, rtol=0, atol=1e-4)
        return [r.token_ids for r in rollouts]

    def addresses() -> list[int]:
        layers = [t.data_ptr() for layer in engine.decoder.layers for t in layer.tensors]
        return [*layers, engine.decoder.embed.data_ptr(), engine.decoder.norm.data_ptr(), engine.cache.own.data_ptr()]

    first = check("policy")
    before, size = addresses(), engine.decoder.weight_bytes
    with torch.no_grad():
        for layer in lora_layers(adapted.hf_model).values():
            layer.lora_B["policy"].normal_(std=0.2)
    assert engine.generate(prompts, 2, seeds=range(6), max_new_tokens=8)[0].token_ids == first[0]  # not yet
    second, base = check("policy"), check(None)
    assert first != second != base != first
    assert addresses() == before and engine.decoder.weight_bytes == size
    text = adapted.hf_model.model.language_model.parameters()
    assert size == sum(p.numel() * 4 for p in text) - sum(
        p.numel() * 4 for layer in lora_layers(adapted.hf_model).values() for p in layer.lora_A.parameters()
    ) - sum(p.numel() * 4 for layer in lora_layers(adapted.hf_model).values() for p in layer.lora_B.parameters())


def test_refresh_takes_the_whole_iterator_and_names_what_does_not_fit(small):
    weights = list(small.merged_text_weights(None))
    taken = []

    class Broken:
        """The model, but one tensor is missing and another has the wrong size."""

        def __getattr__(self, name):
            return getattr(small, name)

        def merged_text_weights(self, adapter):
            for name, tensor in weights:
                taken.append(name)
                if name != "norm.weight":
                    yield name, tensor[:-1] if name == "layers.0.self_attn.q_proj.weight" else tensor

    with pytest.raises(ValueError, match=r"q_proj.*missing.*norm\.weight"):
        RolloutEngine(Broken()).refresh(None)
    assert len(taken) == len(weights)  # gathering is a collective: no rank may stop early


def test_nan_is_an_error_and_does_not_linger(vlm, prompts):
    engine = make_engine(vlm)
    bad = [replace(p, image_features=p.image_features * torch.nan) for p in prompts[1:2]]
    with pytest.raises(FloatingPointError, match="NaN"):
        engine.generate(bad, 4)
    good = make_engine(vlm).generate(prompts[1:2], 4, seeds=range(4))
    assert_same(engine.generate(prompts[1:2], 4, seeds=range(4)), good)


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_sampled_is_refused(vlm, prompts):
    engine = RolloutEngine(vlm)
    with pytest.raises(RuntimeError, match="refresh"):
        engine.generate(prompts, 1)
    engine.refresh()
    assert engine.generate([], 8) == []
    image = prompts[1]
    for message, args, options in (
        ("positions", (prompts, 1), {"max_new_tokens": 2040}),
        ("seeds", (prompts, 2), {"seeds": [1]}),
        ("image features", ([replace(image, image_features=None)], 1), {}),
        ("image features", ([replace(image, image_features=image.image_features[:-1])], 1), {}),
        ("empty", ([replace(image, input_ids=image.input_ids[:0])], 1), {}),
        ("top_p", (prompts, 1), {"top_p": 0.0}),
        ("temperature", (prompts, 1), {"temperature": -1.0}),
        ("group_size", (prompts, 0), {}),
        ("max_new_tokens", (prompts, 1), {"max_new_tokens": 0}),
        ("max_boxes", (prompts, 1), {"max_boxes": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(*args, **options)
    with pytest.raises(ValueError, match="backend"):
        RolloutEngine(vlm, backend="vllm")
    with pytest.raises(ValueError, match="max_rows"):
        RolloutEngine(vlm, max_rows=0)


def test_rows_are_chosen_to_fit_the_kv_budget(vlm, prompts):
    expected = make_engine(vlm, max_rows=32).generate(prompts[:8], 8, seeds=range(64))
    engine = make_engine(vlm, max_rows=32, max_kv_bytes=200_000)
    assert_same(engine.generate(prompts[:8], 8, seeds=range(64)), expected)
    plan = engine.plan(max(len(p.input_ids) for p in prompts[:8]), 8, prompts=8)
    assert 1 <= plan.rows < 32 == plan.asked_rows
    assert 0 < engine.kv_bytes == engine.stats.kv_bytes == plan.nbytes <= 200_000
    assert f"{plan.rows} rows (32 asked for)" in str(plan)
    # With one more row it would not have fitted, and nothing is printed about rows that were not taken away.
    per_token = plan.nbytes // (plan.slots * plan.prompt_length + plan.rows * (plan.length + 2))
    larger = plan_kv(per_token, 8, plan.prompt_length, plan.length, plan.rows + 1, 8, 10**18)
    assert larger.nbytes > 200_000 and "asked for" not in str(larger)


def test_a_prompt_too_long_for_the_kv_budget_is_an_error(vlm, prompts):
    engine = make_engine(vlm, max_kv_bytes=20_000)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens with 24 new ones needs .* MiB of KV cache"):
        engine.generate(prompts[:8], 8)
    with pytest.raises(ValueError, match="2048 positions"):
        engine.plan(2030, 8)


def test_without_a_kv_budget_a_share_of_free_memory_is_taken(vlm, prompts):
    engine = make_engine(vlm)
    assert engine.max_kv_bytes is None
    engine.generate(prompts[:1], 2)
    assert 2**20 < engine.max_kv_bytes < free_bytes(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["engine", "hf"])
def test_each_completion_may_have_a_limit_of_its_own(vlm, prompts, group, backend):
    limits = [1 + n % 24 for n in range(48)]
    engine = make_engine(vlm, max_rows=10, backend=backend)
    found = engine.generate(prompts[:12], 4, seeds=range(100, 148), max_new_tokens=limits)
    assert [r.token_ids for r in found] == [r.token_ids[:n] for r, n in zip(group, limits)]
    assert {r.finish_reason for r in found} == {"stop", "length"}
    with pytest.raises(ValueError, match="3 length limits"):
        engine.generate(prompts[:1], 4, max_new_tokens=[1, 2, 3])


def test_projections_apart_change_nothing(vlm, prompts, group):
    engine = make_engine(vlm, max_rows=10, fused=False)
    assert_same(engine.generate(prompts[:12], 4, seeds=range(100, 148)), group)
    fused = make_engine(vlm).decoder
    for layer, whole in zip(engine.decoder.layers, fused.layers):
        assert (len(layer.qkv), len(layer.gate_up)) == (3, 2) and (len(whole.qkv), len(whole.gate_up)) == (1, 1)
    assert engine.decoder.weight_bytes == fused.weight_bytes  # no second copy


@pytest.mark.slow
def test_compiled_steps_change_nothing(vlm, prompts, group):
    engine = make_engine(vlm, max_rows=10, compiled=True)
    assert_same(engine.generate(prompts[:12], 4, seeds=range(100, 148)), group)


# ---- bookkeeping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prompts, group_size, rows", [(10, 8, 16), (7, 3, 5), (20, 1, 4), (2, 30, 8), (3, 4, 64)])
def test_schedule(num_prompts, group_size, rows):
    rng = np.random.default_rng(0)
    slots = slots_needed(group_size, rows)
    schedule = Schedule(num_prompts, group_size, rows, slots)
    prefilled, finished, idle = [], [], 0
    while schedule.num_finished < schedule.total:
        for prompt, slot in schedule.new_prompts().items():
            assert 0 <= slot < slots and prompt not in prefilled
            prefilled.append(prompt)
        schedule.admit()
        taken = [row for row, n in enumerate(schedule.owner) if n is not None]
        idle += bool(schedule.waiting) and len(taken) < schedule.width
        cells = [schedule.cell[row] for row in taken]
        assert len(set(cells)) == len(cells) and all(c < schedule.per_slot for _, c in cells)
        for row in taken:
            assert schedule.slot_of[schedule.owner[row] // group_size] == schedule.cell[row][0] < schedule.live_slots
        owners = sorted(schedule.owner[row] for row in taken)
        for _source, target in schedule.compact(range(2, schedule.width, 2)):
            assert schedule.cell[target] is not None
        assert sorted(n for n in schedule.owner if n is not None) == owners
        for row in [r for r, n in enumerate(schedule.owner) if n is not None and rng.random() < 0.3]:
            finished.append(schedule.finish(row))
    assert sorted(finished) == list(range(schedule.total)) and sorted(prefilled) == list(range(num_prompts))
    assert not schedule.slot_of and len(schedule.free_slots) == slots
    assert idle < 0.2 * len(finished)
