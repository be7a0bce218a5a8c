#!/usr/bin/env python3
"""Merge an adapter into its base model: a plain Hugging Face checkpoint that needs none of our code.

    python tools/merge_lora.py --adapter runs/tag/best --out runs/tag/merged
    python tools/merge_lora.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/tag-7b/best --out tag-7b

W + s B A goes in for every adapted layer, and the modules that the adapter holds in full (the projector) go in as they
are. The folder is written beside OUT, loaded again with plain transformers and compared with base + adapter before it
gets its name:

  weights  every tensor read back is bit for bit the one that was merged
  inputs   tokenizer, chat template and image processor make of the TAG prompt and a face what ours make of them
  logits   over prompt, face and a short answer they differ by at most TOLERANCE of the largest logit; and if the
           adapter does more than that, the merged model is nearer to base + adapter than to the base

If anything differs the exit code is 2 and OUT is not created.
"""

import argparse
import gc
import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from tag import dist
from tag.args import Parser, check, run
from tag.boxes import MODEL_SIZE, Canvas
from tag.errors import DataError
from tag.lora import load_adapter, lora_layers, read_adapter_config, set_adapter
from tag.prompts import TAG_PROMPT
from tag.synth.dataset import make_record, split_seeds
from tag.vlm import DTYPES, TINY_MODEL, VLM, load_vlm

# Largest difference of a logit, as a share of the largest logit. In float32 only the order of summation differs. In
# bfloat16 the merged weight is rounded once (2^-9) where base and adapter were rounded apart, in every layer anew.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}

# What a checkpoint folder holds beside its weights; those that are there are copied as they are, so that any loader
# finds what it found in the base. The others are written from what we loaded.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json", "LICENSE",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--model", help='base: checkpoint folder, hub name or "tiny" (default: the one the adapter names)')
    p.add_argument("--adapter", required=True, help="adapter folder in PEFT's format, ours or another's")
    p.add_argument("--out", required=True, help="folder to create")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the weights written")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    return p.parse_args(argv)


@dataclass
class Probe:
    """The TAG prompt, a synthetic face and an answer to it, as inputs of the Hugging Face model."""

    input_ids: Tensor  # (1, L)
    pixel_values: Tensor  # (patches, 3 * 2 * 14 * 14)
    num_answer: int  # the last tokens, which the answer takes

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """Logits over the answer and the token before it, (num_answer + 1, V) float32, by Hugging Face's forward."""
        device = next(model.parameters()).device
        side = MODEL_SIZE // model.config.vision_config.patch_size
        out = model(
            input_ids=self.input_ids.to(device),
            pixel_values=self.pixel_values.to(device, model.dtype),
            image_grid_thw=torch.tensor([[1, side, side]], device=device),
            mm_token_type_ids=(self.input_ids == model.config.image_token_id).int().to(device),
            logits_to_keep=self.num_answer + 1,
        )
        return out.logits[0].float().cpu()


def our_probe(vlm: VLM) -> Probe:
    """The probe as training and evaluation would make it."""
    record, face = make_record(split_seeds("val", 1)[0], "val")
    answer = vlm.encode_completion(record.trace)[:24]
    input_ids = torch.cat([vlm.prompt().input_ids, torch.tensor(answer)])[None]  # (1, L)
    return Probe(input_ids, vlm.pixel_values([face])[0], len(answer))


def plain_probe(folder: Path, image_token_id: int) -> Probe:
    """The same by transformers alone, from the files in `folder`."""
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
    )
    record, face = make_record(split_seeds("val", 1)[0], "val")
    content = [{"type": "image"}, {"type": "text", "text": TAG_PROMPT}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    size = {"shortest_edge": MODEL_SIZE**2, "longest_edge": MODEL_SIZE**2}
    image = processor(images=[Canvas(*face.size).letterbox(face)], return_tensors="pt", size=size)
    places = int(image["image_grid_thw"].prod()) // processor.merge_size**2  # visual tokens of one face
    pad = tokenizer.convert_ids_to_tokens(image_token_id)
    prompt = tokenizer.encode(chat.replace(pad, pad * places), add_special_tokens=False)
    answer = [*tokenizer.encode(record.trace, add_special_tokens=False), tokenizer.eos_token_id][:24]
    return Probe(torch.tensor([prompt + answer]), image["pixel_values"], len(answer))


@torch.no_grad()
def merge(model: nn.Module, name: str = "policy") -> int:
    """Replace every adapted layer by a plain linear one with W + s B A; returns how many."""
    layers = lora_layers(model)
    for path, layer in layers.items():
        plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], device="meta")
        plain.weight = nn.Parameter(layer.merged_weight(name), requires_grad=False)
        plain.bias = layer.bias
        parent, child = path.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, plain)
    return len(layers)


def digests(model: nn.Module) -> dict[str, str]:
    """Name -> hash of the bytes of every parameter: two models can be compared without holding both."""
    return {
        name: hashlib.sha256(p.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, p in model.named_parameters()
    }


def write(vlm: VLM, folder: Path) -> None:
    """A complete checkpoint folder: weights, configuration, tokenizer, chat template, image processor."""
    vlm.hf_model.save_pretrained(folder)
    source = str(TINY_MODEL) if vlm.source == "tiny" else vlm.source
    files = Path(cached_file(source, "config.json")).parent  # the folder, or the hub's snapshot in the local cache
    if not (files / "tokenizer_config.json").is_file():
        vlm.tokenizer.save_pretrained(folder)
    if not (files / "preprocessor_config.json").is_file():
        vlm.image_processor.save_pretrained(folder)
    for name in SIDE_FILES:
        if (files / name).is_file():
            shutil.copyfile(files / name, folder / name)


def compare(folder: Path, probe: Probe, expected: Tensor, base: Tensor, written: dict[str, str], args) -> str:
    """Load `folder` with plain transformers and compare; returns the figures. Raises UsageError where it differs."""
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPES[args.dtype], output_loading_info=True, use_safetensors=True
    )
    check(not report["missing_keys"], f"{len(report['missing_keys'])} tensors of the merged checkpoint are missing")
    found = digests(model)
    wrong = [name for name in written if found.get(name) != written[name]]
    check(
        not wrong, f"{len(wrong)} tensors of the merged checkpoint read back differently, e.g. {next(iter(wrong), '')}"
    )

    plain = plain_probe(folder, model.config.image_token_id)
    check(torch.equal(plain.input_ids, probe.input_ids), "the merged checkpoint's tokenizer gives other tokens")
    check(torch.equal(plain.pixel_values, probe.pixel_values), "the merged checkpoint's image processor differs")

    logits = plain.logits(model.to(dist.setup(args.device).device).eval())  # (T, V)
    scale, limit = float(expected.abs().max()), TOLERANCE[args.dtype]
    off, effect = float((logits - expected).abs().max()) / scale, float((base - expected).abs().max()) / scale
    check(
        off <= limit,  # NaN is not, either
        f"logits of the merged model differ by {off:.1e} of the largest (allowed in {args.dtype}: {limit:.0e})",
    )
    mean_off, mean_effect = float((logits - expected).abs().mean()), float((base - expected).abs().mean())
    check(
        effect <= limit or mean_off < mean_effect,
        f"the merged model is no nearer to base + adapter (mean logit difference {mean_off:.1e}) than the base is "
        f"({mean_effect:.1e})",
    )
    return (
        f"logits differ by {off:.1e} of the largest (allowed in {args.dtype}: {limit:.0e}), mean {mean_off:.1e}; the "
        f"adapter moves them by {effect:.1e}, mean {mean_effect:.1e}"
    )


def main(argv: list[str] | None = None) -> None:
    """Merge, write, compare, rename."""
    args = parse_args(argv)
    device = dist.setup(args.device, args.threads).device
    out = Path(args.out)
    check(not out.exists() or (out.is_dir() and not any(out.iterdir())), f"{out} exists; choose another --out")
    config = read_adapter_config(args.adapter)
    source = args.model or config.get("base_model_name_or_path")
    check(bool(source), f"{args.adapter} does not name its base model; give --model")

    vlm = load_vlm(source, args.dtype, device)
    probe = our_probe(vlm)
    base = probe.logits(vlm.hf_model)
    whole = load_adapter(vlm.hf_model, args.adapter)
    set_adapter(vlm.hf_model, "policy")
    expected = probe.logits(vlm.hf_model)
    merged = merge(vlm.hf_model)
    print(f"{source}: {merged} layers merged" + (f", {', '.join(whole)} replaced" if whole else ""), flush=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))  # a name that is nobody's
    try:
        write(vlm, partial)
        written = digests(vlm.hf_model)
        del vlm  # the model that is read back takes its place in memory
        gc.collect()
        figures = compare(partial, probe, expected, base, written, args)
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.replace(out)
    except OSError as e:
        raise DataError(f"{out} cannot be written or read back ({e.strerror or e})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{figures}\nmerged checkpoint: {out}")


if __name__ == "__main__":
    run(main)
