"""TAG: Thinking with Action Unit Grounding for facial expression recognition, in plain PyTorch."""

__version__ = "0.1.0"
