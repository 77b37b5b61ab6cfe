"""The lab: networks of emulated homes on one Linux machine, and what is measured in them.

Never shipped. It reads from below: `namespaces` (machines that the kernel keeps apart), `topology`
(what a lab consists of, as data), `nat` (what routers do to packets), `links` (what cables do to
them), `lab` (builds a topology and ends it), `probe` (proves that a NAT is what it says), `faults`,
`devices`, `scenario` (all of these in one value, and its runner). The labs that `python -m testbed`
runs are in `labs/`. No claim of a lab counts before its routers are proved; see `Lab.prove`.
"""
