"""Final norm, output projection and greedy choice of a few tokens; `reference.py` says what it means."""
