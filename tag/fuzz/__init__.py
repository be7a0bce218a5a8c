"""What `tools/fuzz.py` throws at what reads text and files of others: targets, and how inputs are made."""
