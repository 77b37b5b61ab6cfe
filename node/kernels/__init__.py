"""The native engine: a small C++ library behind the same `Stage` and `Head` as the torch one.

Knows no peer and imports no torch. Where the library cannot be loaded, `load_library` says why.
"""
