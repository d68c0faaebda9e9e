"""RMS norm, gate and up products and the SiLU gate of a few tokens; `reference.py` says what it means."""
