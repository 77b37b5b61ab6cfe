"""Runs a span of blocks: stages with their KV caches, the head, and the reference generation.

Hidden states cross its border as numpy arrays, so that an engine without torch fits behind the
same interface. Knows no peer, link or plan.
"""
