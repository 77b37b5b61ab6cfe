"""Tensor-parallel groups: several members that share each block of a span."""
