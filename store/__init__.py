"""Signed documents that every member holds a copy of, their sync and their place on disk.

Knows no network and no model. `pycrdt` is imported in this folder only.
"""
