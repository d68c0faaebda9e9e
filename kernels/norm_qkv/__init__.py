"""RMS norm, QKV product, norms of queries and keys, RoPE and cache write of a few tokens; `reference.py` says what it means."""
