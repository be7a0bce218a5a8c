"""What the benches under tools/ share: measuring, ceilings, workloads, tables and pictures.

flags.py          the flags they share
measure.py        hardware, rounds of timed calls, peak memory, what the machine can do at most
workload.py       models, prompts and completion lengths
our_side.py       our training scripts as they are, timed
communication.py  collectives, counted and by the formula
output.py         tables, JSON, stacked bars

The peer's side, TRL's trainers on the same weights and records, is tools/peers/trl_side.py: no peer is imported here.
"""
