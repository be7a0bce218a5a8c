"""What the benches under tools/ share: measuring, ceilings, workloads, the peer's side, tables and pictures.

measure.py    hardware, rounds of timed calls, peak memory, what the machine can do at most
workload.py   models, prompts and completion lengths of the benches
trl_side.py   TRL's trainers on the same weights and records; the only place that imports trl
output.py     tables, JSON, stacked bars
"""
