"""The Python client; speaks HTTP to a node."""
