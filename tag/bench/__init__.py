"""What the benches under tools/ share: measuring, ceilings, workloads, the peer's side, tables and pictures.

flags.py          the flags they share
measure.py        hardware, rounds of timed calls, peak memory, what the machine can do at most
workload.py       models, prompts and completion lengths
our_side.py       our training scripts as they are, timed
trl_side.py       TRL's trainers on the same weights and records; the only place that imports trl
communication.py  collectives, counted and by the formula
output.py         tables, JSON, stacked bars
"""
