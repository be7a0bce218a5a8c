"""What a run will take, computed from the model's configuration alone: parameters, memory, operations, bytes, hours.

    shape.py        dimensions of a Qwen2.5-VL, and its parameters by role
    run.py          the run that is planned: stage, GPUs, sizes of a step
    activations.py  what a forward pass keeps for its backward
    memory.py       memory of one GPU, stage by stage and item by item
    fit.py          the largest rows and micro-batches that fit
    hardware.py     what GPUs can do, by their data sheets
    work.py         operations, bytes moved, seconds of a step, hours of a run
    startup.py      what the training scripts print and refuse before they start

Pure functions, no model and no GPU. docs/planning.md has the formulas in words and the predicted beside the measured.
"""
