"""Attention of a decode step or a verified block over paged keys and values, in one launch; `reference.py` says what it means."""
