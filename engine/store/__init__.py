"""The store: runs of pages on disk that every process on a host shares, and the prefix cache an engine keeps in it (docs/store.md)."""
