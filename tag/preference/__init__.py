"""Two models' responses to the same faces, compared by a judge model (`tools/judge.py`) or by people
(`tools/preference_study.py`)."""
