"""Package metadata. Exact versions that were tested together stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="tag-fer",
    version="0.1.0",
    description="TAG: thinking with action unit grounding for facial expression recognition, in plain PyTorch",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["tag", "tag.*"]),
    package_data={
        "tag": ["assets/tiny-qwen2.5-vl/*", "au/*.json", "synth/*.json", "report/*.css", "report/*.js"]
        + ["datagen/prompts/*.txt", "preference/*.txt"]
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11",
        "tqdm>=4.66",
    ],
    extras_require={
        "api": ["openai>=3"],  # traces written, and responses judged, by models behind OpenAI-compatible servers
        "data": ["mediapipe>=0.10.30"],  # face landmarks and blendshapes; older ones drag in JAX and numpy < 2
        "flash": ["flash-attn>=2.7"],  # a source build; used when importable, never required
        "fuzz": ["atheris>=3"],  # coverage-guided fuzzing in tools/fuzz.py; wheels for Linux
        "plots": ["matplotlib>=3.8"],  # figures for papers, tools/make_figures.py
        "track": ["tensorboard>=2.17"],  # metrics.jsonl is written in any case
        "dev": ["pytest>=8", "pytest-timeout", "pytest-xdist", "ruff==0.17.6", "hypothesis>=6.100"]
        + [
            "peft>=0.18",
            "accelerate",
            "matplotlib>=3.8",
            "mediapipe>=0.10.30",
            "openai>=3",
            "tensorboard>=2.17",
        ]  # peft imports accelerate
        + ["scikit-learn>=1.5", "scipy>=1.14"]  # oracles of the metrics and of the paired tests
        + ["trl==1.16.0"],  # the oracle of tests/test_against_trl.py, which calls one of its private methods
    },
)
