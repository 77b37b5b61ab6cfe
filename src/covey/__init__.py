"""Covey: the computers people already own run one language model together."""

from .errors import CoveyError

__version__ = "0.1.0"
__all__ = ["CoveyError", "__version__"]
