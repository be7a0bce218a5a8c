"""The tiny Qwen2.5-VL that plays the base model in the embedded default, and how it is made."""
