"""Members that carry bytes between two others who cannot reach each other.

A relay splices two TCP connections and sees ciphertext only: the two ends do the ordinary
handshake with each other inside. Whether a better path exists is not its business.
"""
