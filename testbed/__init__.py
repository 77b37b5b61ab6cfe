"""The lab: hosts in network namespaces on one machine. Never shipped."""
