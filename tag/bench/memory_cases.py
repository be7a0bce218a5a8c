"""Steps of both stages on models of any size, with what each allocates: what tag/plan/memory.py is held against.

The steps call the project's parts in the order of the training scripts. Faces are tower states of zeros, completions
random tokens of given lengths; neither changes what memory is needed.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig

from tag import dist
from tag.bench.memory import AllocatedBytes
from tag.bench.workload import Unending
from tag.data.batching import Group, collate
from tag.grpo import grpo_loss, loss_normaliser
from tag.lora import add_lora, copy_adapter, set_adapter, set_dropout, set_trainable
from tag.plan.memory import memory, refreshing, rollout, sampling, step_inputs, weights
from tag.plan.run import Run
from tag.plan.shape import Shape, shape_of
from tag.random_vlm import config_7b, random_vlm
from tag.rollout import RolloutEngine
from tag.tiny.checkpoint import build_config
from tag.trainable import adamw, train_projector, trained_parameters
from tag.vlm import DTYPES, TINY_MODEL, VLM


@dataclass(frozen=True)
class Case:
    """What is measured: a model's sizes, and a step of `passes` passes of `groups` groups on each rank."""

    name: str
    stage: str  # sft, grpo, rollout
    world: int = 1
    config: str = "small"  # small, tiny, 7b, or the sizes hidden-mlp-layers-heads-kv-vocab
    dtype: str = "float32"
    lora_rank: int = 8
    checkpointing: bool = False
    groups: int = 2
    group: int = 1
    passes: int = 1
    completion: int = 64
    rows: int = 16
    dropout: float = 0.0


def case_config(config: str, tokenizer) -> Qwen2_5_VLConfig:
    """The configuration that `Case.config` names."""
    if config in ("small", "tiny"):
        return build_config(tokenizer, small=config == "small")
    if config == "7b":
        return config_7b(tokenizer)
    H, I, N, heads, kv, vocab = map(int, config.split("-"))
    found = build_config(tokenizer, small=True)
    D = H // heads
    text = found.text_config.to_dict() | {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": N}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "layer_types": None}
    text["tie_word_embeddings"] = False
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [D // 2 - 2 * (D // 8), D // 8, D // 8]}
    vision = found.vision_config.to_dict() | {"out_hidden_size": H}
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(found, name) for name in special}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def case_shape(config: Qwen2_5_VLConfig) -> Shape:
    """Dimensions of a configuration."""
    whole = {"tie_word_embeddings": config.tie_word_embeddings}
    return shape_of(config.text_config.to_dict(), config.vision_config.to_dict(), whole)


def case_run(case: Case, prompt: int) -> Run:
    """The same step as a plan."""
    return Run(
        "sft" if case.stage == "sft" else "grpo",
        ranks=case.world,
        ranks_per_node=case.world,
        item=DTYPES[case.dtype].itemsize,
        lora_rank=case.lora_rank,
        dropout=case.dropout > 0,
        train_projector=case.stage == "sft",
        checkpointing=case.checkpointing,
        micro_tokens=case.groups * (prompt + case.group * case.completion),
        sequences=case.world * case.passes * case.groups * case.group,
        group=case.group,
        prompt=prompt,
        completion=case.completion,
        longest=case.completion,
        rows=case.rows,
        kv_budget=2**40,
        cache=0,
        evaluates=False,
        gpu=False,
    )


def measure_case(case: Case, here: dist.Dist) -> tuple[Shape, Run, dict[str, int]]:
    """Run a case in this process, one of `case.world`: its dimensions, its plan, and bytes at most in each stage."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, trust_remote_code=False)
    config = case_config(case.config, tokenizer)
    step = {"sft": sft_case, "grpo": grpo_case, "rollout": rollout_case}[case.stage]
    with AllocatedBytes(here.device) as found:
        vlm = random_vlm(config, tokenizer, here.device, DTYPES[case.dtype], 0)
        found.lap("load")
        prompt = len(vlm.prompt().input_ids)
        step(case, vlm, here, found)
    run = replace(case_run(case, prompt), gpu=here.device.type == "cuda")
    return case_shape(config), run, found.peaks


def _passes(case: Case, vlm: VLM, here: dist.Dist) -> tuple[list, torch.Tensor]:
    """Batches of a step and the tower states (faces, patches, D) they index; completion n of the step is row n."""
    prompt, generator = vlm.prompt(), torch.Generator().manual_seed(here.rank)
    batches, G = [], case.group
    for k in range(case.passes):
        groups = []
        for b in range(k * case.groups, (k + 1) * case.groups):
            tokens = torch.randint(1000, (G, case.completion), generator=generator).tolist()
            groups.append(Group(prompt, b, tokens, list(range(b * G, b * G + G))))
        batches.append(collate([groups], vlm.pad_id).to(here.device))
    patches, width = vlm.tokens_per_image * vlm.merge_size**2, vlm.hf_model.config.vision_config.hidden_size
    tower = torch.zeros(case.passes * case.groups, patches, width, dtype=vlm.compute_dtype, device=here.device)
    return batches, tower


def _update(params: dict, optimizer, here: dist.Dist) -> None:
    dist.sum_replicated_gradients(list(params.values()), here)
    dist.clip_gradients(list(params.values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sft_case(case: Case, vlm: VLM, here: dist.Dist, found: AllocatedBytes) -> None:
    """Steps as in train_sft.py."""
    add_lora(vlm.hf_model, case.lora_rank, 2.0 * case.lora_rank, case.dropout)
    train_projector(vlm)
    if case.checkpointing:
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    dist.shard(vlm, here)
    params = trained_parameters(vlm)
    optimizer = adamw(params, 2e-5, 0.01)
    vlm.train()
    found.lap("build")
    for _ in range(2):  # the first makes the optimizer's moments
        batches, tower = _passes(case, vlm, here)
        found.lap("lay out")
        for k, batch in enumerate(batches):
            dist.set_gradient_sync(vlm, k == len(batches) - 1)
            logprobs, _ = vlm(batch, tower)
            (-logprobs.sum()).backward()
        del logprobs
        _update(params, optimizer, here)
        found.lap("update")


def grpo_case(case: Case, vlm: VLM, here: dist.Dist, found: AllocatedBytes) -> None:
    """Steps as in train_grpo.py, sampled tokens left aside: random ones are scored."""
    add_lora(vlm.hf_model, case.lora_rank, 2.0 * case.lora_rank, 0.0)
    vlm.keep_projector("base")
    vlm.keep_projector("sft")
    copy_adapter(vlm.hf_model, "policy", "reference")
    set_trainable(vlm.hf_model, "policy")
    set_dropout(vlm.hf_model, 0.0)
    if case.checkpointing:
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
        vlm.train()
    dist.shard(vlm, here)
    params = trained_parameters(vlm)
    optimizer = adamw(params, 1e-6, 0.01)
    engine = RolloutEngine(Unending(vlm), case.rows, case.completion, max_kv_bytes=2**40)
    found.lap("build")
    N, T = case.passes * case.groups * case.group, case.completion
    for moments in (False, True):  # the first step makes the optimizer's moments
        batches, tower = _passes(case, vlm, here)
        found.lap("lay out")
        if moments:  # once, when everything else that stays is there
            _sample(engine, vlm, tower, case.group, found)
        set_adapter(vlm.hf_model, "reference")
        reference = torch.zeros(N, T, device=here.device)
        with torch.no_grad():
            for batch in batches:
                reference += batch.scatter(vlm(batch, tower, projector="sft")[0], N, T)
        set_adapter(vlm.hf_model, "policy")
        found.lap("reference")
        mask = torch.ones(N, T, device=here.device)
        old = torch.zeros(N, T, device=here.device)
        normaliser = here.sum(loss_normaliser(mask))
        for k, batch in enumerate(batches):
            dist.set_gradient_sync(vlm, k == len(batches) - 1)
            logprobs, _ = vlm(batch, tower)
            here_mask = batch.scatter(torch.ones_like(logprobs), N, T)
            logprobs = batch.scatter(logprobs, N, T)
            terms = grpo_loss(
                logprobs, old, torch.ones(N, device=here.device), here_mask, ref_logprobs=reference,
                normaliser=normaliser,
            )  # fmt: skip
            terms.loss.backward()
        del terms, logprobs
        _update(params, optimizer, here)
        found.lap("update")


def _sample(engine: RolloutEngine, vlm: VLM, tower: torch.Tensor, group: int, found: AllocatedBytes) -> None:
    with torch.no_grad():
        prompts = [replace(vlm.prompt(), image_features=f) for f in vlm.project(tower)]
    engine.refresh("policy")
    found.lap("first refresh")
    engine.generate(prompts, group, seeds=range(len(prompts) * group))
    found.lap("sample")
    engine.refresh("policy")  # with the cache there, as from the second step on
    found.lap("refresh")


def rollout_case(case: Case, vlm: VLM, here: dist.Dist, found: AllocatedBytes) -> None:
    """Sampling alone, with the weights merged."""
    add_lora(vlm.hf_model, case.lora_rank, 2.0 * case.lora_rank, 0.0)
    engine = RolloutEngine(Unending(vlm), case.rows, case.completion, max_kv_bytes=2**40)
    _, tower = _passes(case, vlm, here)
    found.lap("build")
    _sample(engine, vlm, tower, case.group, found)


def compare(case: Case, shape: Shape, run: Run, peaks: dict[str, int]) -> list[dict]:
    """Measured and predicted bytes of each stage that the case has, side by side."""
    if case.stage == "rollout":  # no optimizer, no reference: what is there is the model and the engine
        held = weights(shape, run)
        held = {k: held[k] for k in ("language model", "vision tower, projector", "adapter")}
        held |= rollout(shape, run) | {"faces and batches": step_inputs(shape, run)["faces and batches of a step"]}
        predicted = {"sample": held | sampling(shape, run), "refresh": held | refreshing(shape, run)}
    else:
        predicted = memory(shape, run)
    lines = []
    for stage in ("sample", "refresh", "reference", "update"):
        if stage in peaks and stage in predicted:
            total = sum(predicted[stage].values())
            line = {"case": case.name, "model": case.config, "dtype": case.dtype, "processes": case.world}
            line |= {"stage": f"{case.stage}, {stage}", "measured_mib": peaks[stage] / 2**20}
            lines.append(line | {"predicted_mib": total / 2**20, "error": total / peaks[stage] - 1})
    return lines
