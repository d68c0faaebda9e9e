"""Embedding rows of a decode step's tokens; `reference.py` says what it means."""
