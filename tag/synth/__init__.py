"""The embedded default data set: faces drawn from FACS action units, their boxes, and rule-based traces."""
