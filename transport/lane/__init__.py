"""Byte channels between two members for threads that compute: no event loop in between."""
