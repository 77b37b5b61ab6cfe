"""Bytes between two peers: identity, membership, discovery, links, paths and RPC.

Knows no model, no tensor arithmetic and no CRDT. `libp2p`, `trio`, `aiortc` and `ssl` are
imported in this folder only.
"""
