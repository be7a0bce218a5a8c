"""The rollout engine: fast, reproducible sampling from a Qwen2.5-VL policy in plain PyTorch.

    engine = RolloutEngine(vlm, max_rows=64, max_new_tokens=512)
    engine.refresh("policy")                                         # merge W + s B A into the engine's own weights
    rollouts = engine.generate(prompts, group_size=8, seeds=seeds)   # prompt-major, 8 for each prompt

Files, in reading order:

    engine.py     the loop: prefill, steps for all rows, taking out what has finished; CUDA graphs
    schedule.py   who decodes where: waiting completions, rows, prompt slots
    budget.py     how many rows fit into memory
    decoder.py    the language model over merged weights
    cache.py      KV of prompts (once a group) and completions (once a row), and attention over both
    sampling.py   counter-based random numbers, temperature, top-p
    box_limit.py  the at-most-three-boxes mask
    rows.py       the state of the rows
    records.py    what goes in and comes out, and the checks on it
    hf.py         the same through Hugging Face `generate`: slow, independent, the oracle of the tests
"""

from tag.data.batching import Prompt
from tag.rollout.box_limit import BoxLimit
from tag.rollout.budget import kv_plan
from tag.rollout.engine import RolloutEngine
from tag.rollout.records import Rollout, RolloutStats

__all__ = ["BoxLimit", "Prompt", "Rollout", "RolloutEngine", "RolloutStats", "kv_plan"]
