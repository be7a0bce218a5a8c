"""TRL's trainers on the same weights and records. trl, peft and datasets are imported here alone, when a bench asks.

Two things stand in the way of Qwen2.5-VL in TRL where torchvision is missing, as on a CPU-only machine: the processor
has a video part, and checks the classes of its parts. So the processor is made without its video part, with that check
left out; neither is used by still images. Everything else is TRL as installed.
"""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from tag.boxes import Canvas
from tag.data.images import load_image
from tag.data.records import Record, resolve_image
from tag.errors import UsageError
from tag.linear import use_onednn
from tag.lora import TARGETS
from tag.prompts import TAG_PROMPT
from tag.vlm import VLM

PEERS = ("trl", "accelerate", "peft", "datasets")


def require_trl() -> None:
    """Raise UsageError, one line, if TRL or what it needs for LoRA is not installed."""
    if missing := [name for name in PEERS if find_spec(name) is None]:
        raise UsageError(f"--peer trl needs {' and '.join(missing)}: pip install {' '.join(missing)}, or --peer none")


class _StillProcessor(Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL without its video part."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Whatever it is given."""
        return type(argument)


def processor_of(vlm: VLM) -> Qwen2_5_VLProcessor:
    """The composite processor that TRL wants, of the same tokenizer and image preparation."""
    tokenizer = copy.deepcopy(vlm.tokenizer)
    tokenizer.padding_side = "left"
    return _StillProcessor(vlm.image_processor, tokenizer, None, chat_template=tokenizer.chat_template)


def question(text: str = TAG_PROMPT) -> list[dict]:
    """The prompt of tag/prompts.py as TRL takes it."""
    return [{"role": "user", "content": text}]


def faces(records: Sequence[Record], image_root: str) -> list:
    """The records' images, letterboxed as ours are: decoded before anything is measured."""
    found = []
    for record in records:
        image = load_image(resolve_image(record, image_root))
        found.append(Canvas(*image.size).letterbox(image))
    return found


def lora_config(rank: int, alpha: float) -> Any:
    """The same adapter: every attention and MLP linear of the language model."""
    from peft import LoraConfig

    # Names match whole path ends; the vision tower has layers of the same names.
    pattern = rf".*language_model.*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern, task_type="CAUSAL_LM")


class StepTimes(TrainerCallback):
    """Calls `on_step(step)` after every optimizer step, and stops when it returns True."""

    def __init__(self, on_step) -> None:
        self.call = on_step

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the trainer."""
        if self.call(state.global_step):
            control.should_training_stop = True
        return control


def common(out: str, steps: int, batch_size: int, device: str, bf16: bool, recompute: bool) -> dict:
    """Settings of both trainers: no saving, no reports; activations are recomputed only if ours are."""
    return {
        "output_dir": out,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": recompute,
        "learning_rate": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "optim": "adamw_torch_fused",
    }


def as_users_have_it(vlm: VLM) -> nn.Module:
    """The model with the layers and the vision tower of transformers, without ours."""
    vlm.compute_by(hf_tower=True)
    use_onednn(vlm.hf_model, False)
    return vlm.hf_model


def grpo_steps(
    vlm: VLM,
    records: Sequence[Record],
    image_root: str,
    settings: dict,
    group_size: int,
    length: int,
    beta: float,
    lora: Any,
    reward: Callable[[str, Record], float],
    on_step: Callable[[int], bool],
) -> None:
    """Train with GRPOTrainer, every completion `length` tokens long. settings: those of `common`.

    Fairly configured: all completions of a step in one forward pass, no recomputation, one generation a step, Eq. 2's
    loss, KL to the model without its adapter (which is where training starts, so it is ours), fused AdamW.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completions, index, **_) -> list[float]:
        return [reward(c[0]["content"], records[i]) for c, i in zip(completions, index)]

    config = GRPOConfig(
        **settings, num_generations=group_size, max_completion_length=length, beta=beta, loss_type="grpo",
        temperature=1.0, top_k=0, top_p=1.0, generation_kwargs={"min_new_tokens": length}, use_vllm=False,
        steps_per_generation=1, num_iterations=1,
    )  # fmt: skip
    count = len(records)
    table = {"prompt": [question()] * count, "image": faces(records, image_root), "index": list(range(count))}
    trainer = GRPOTrainer(
        as_users_have_it(vlm), rewards, config, Dataset.from_dict(table), processing_class=processor_of(vlm),
        peft_config=lora, callbacks=[StepTimes(on_step)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    lengths = {
        line["completions/mean_length"] for line in trainer.state.log_history if "completions/mean_length" in line
    }
    if {float(x) for x in lengths} != {float(length)}:
        raise RuntimeError(f"TRL's completions have {sorted(lengths)} tokens on average, expected {length}")


def sft_steps(
    vlm: VLM,
    records: Sequence[Record],
    image_root: str,
    settings: dict,
    context: int,
    lora: Any,
    on_step: Callable[[int], bool],
) -> None:
    """Train with SFTTrainer on prompt and trace, loss on the trace alone.

    Rows are padded to the longest of their batch: where there are images, TRL refuses packing and padding-free batches.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings, max_length=context, packing=False, completion_only_loss=True)
    answers = [[{"role": "assistant", "content": record.trace}] for record in records]
    images = [[face] for face in faces(records, image_root)]
    table = {"prompt": [question()] * len(records), "completion": answers, "images": images}
    trainer = SFTTrainer(
        as_users_have_it(vlm), config, train_dataset=Dataset.from_dict(table), processing_class=processor_of(vlm),
        peft_config=lora, callbacks=[StepTimes(on_step)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
