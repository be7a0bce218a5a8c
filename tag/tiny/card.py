"""The model card of the tiny base model, written from what its making measured."""

import json
from pathlib import Path

import numpy as np

from tag.labels import CLASSES
from tag.prompts import TAG_PROMPT
from tag.synth.dataset import describe, split_seeds
from tag.synth.params import sample_face
from tag.tiny.checkpoint import VOCAB_SIZE

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# Tiny Qwen2.5-VL for faces

The base model of the embedded default: the Qwen2.5-VL architecture and file layout at {parameters:.2f} M parameters,
trained from scratch on synthetic faces (`tag/synth`). It plays the part that Qwen2.5-VL-7B-Instruct
plays in the paper: it sees faces and answers free-form questions about them (which expression, which action units,
where), but it has never seen the TAG prompt or the think / bbox / answer format. It knows drawn faces only; it is of
no use on photographs.

| | |
|---|---|
| Files | bf16 safetensors, whole folder {megabytes:.1f} MB |
| Vision | 4 layers, 128 wide, windows of 112 px, 224 x 224 px -> 64 visual tokens |
| Language | 4 layers, 160 wide, 4 heads (2 KV), tied embeddings, vocabulary {vocab} |
| Tokenizer | byte-level BPE with Qwen's pre-tokenizer; `<bbox>` is several ordinary tokens |
| Tokens | TAG prompt {prompt_tokens}; traces {trace_tokens:.0f} on average, {trace_tokens_max} at most (of 300) |

## How it was made

```
{command}
```

Seconds on this run: {seconds}. Versions: {versions}.

1. Vision tower and merger alone, through throw-away heads on the 64 merged tokens: AU intensities, class, and the
   box of every AU as coordinate bins. On language-model loss alone a model of this size does not learn to look.
2. The language model on the frozen visual features, cross-entropy on answer tokens: expression, AU list, AU and part
   coordinates (bare `[x1, y1, x2, y2]` on the 512 canvas), descriptions in words.
3. The same, mixed with text: exercises (repeat a passage, set passages in tags of any name), and a stream of idioms,
   fixed phrases of random tokens to be learnt by heart (`tag/tiny/idioms.py`). Every token has then been written where
   nothing else was right, as a real base model's has; without it LoRA spends hundreds of steps on teaching tokens, and
   sampled traces break where greedy ones do not.

Faces come from seeds outside the train, val and test ranges of `tag.synth.dataset.SPLITS`.

## Held out (300 shaded faces, greedy)

{table}

`class_accuracy` asks for the expression; `box_iou` asks "Where is AU..?" for two random AUs a face, `box_iou_active` is
the part of them that is present; `au_list_jaccard` compares the named AUs with those of intensity 0.35 or more.
"""


def write_card(folder: Path, facts: dict, tokenizer) -> None:
    """Write `README.md` and `training.json` (the same figures for machines) into a checkpoint folder."""
    traces = [describe(sample_face(s), "val").trace for s in split_seeds("val", 300)]
    lengths = [len(tokenizer(t).input_ids) for t in traces]
    weights = (folder / "model.safetensors").stat().st_size
    facts = facts | {
        "prompt_tokens": len(tokenizer(TAG_PROMPT).input_ids),
        "trace_tokens": round(float(np.mean(lengths)), 1),
        "trace_tokens_max": max(lengths),
        "classes": list(CLASSES),
    }
    names = list(facts["held_out"]["bf16"])
    rows = [f"| {k} | " + " | ".join(f"{v[n]:.3f}" for n in names) + " |" for k, v in facts["held_out"].items()]
    table = "\n".join([f"| weights | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows])
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = _CARD.format(
        parameters=weights / 2e6,
        megabytes=(sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) + 3000) / 1e6,
        vocab=VOCAB_SIZE,
        prompt_tokens=facts["prompt_tokens"],
        trace_tokens=facts["trace_tokens"],
        trace_tokens_max=facts["trace_tokens_max"],
        command=facts["command"],
        seconds=", ".join(f"{k} {v}" for k, v in facts["seconds"].items()),
        versions=", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
        table=table,
    )
    (folder / "README.md").write_text(text)
