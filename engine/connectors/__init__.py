"""Foretold's storage inside other engines."""
