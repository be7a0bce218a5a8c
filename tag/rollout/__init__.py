"""The rollout engine: fast, reproducible sampling from a Qwen2.5-VL policy in plain PyTorch.

engine = RolloutEngine(vlm, max_rows=64, max_new_tokens=512)
engine.refresh("policy")                                   # merge W + s B A into the engine's own weights
rollouts = engine.generate(prompts, group_size=8, seeds=seeds)   # prompt-major: G rollouts a prompt

engine.py     what runs when: prefill, the rows that decode together, refilling, CUDA graphs
decoder.py    the language model over merged weights and a static KV cache
sampling.py   counter-based random numbers, temperature, top-p
box_limit.py  the at-most-three-boxes mask
hf.py         the same through Hugging Face `generate`: slow, independent, the oracle of the tests
"""

from tag.data.batching import Prompt
from tag.rollout.box_limit import BoxLimit
from tag.rollout.engine import RolloutEngine
from tag.rollout.records import Rollout, RolloutStats

__all__ = ["BoxLimit", "Prompt", "Rollout", "RolloutEngine", "RolloutStats"]
