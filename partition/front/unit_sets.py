"""Which units can go together: every set of them that names no device twice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .instance import Instance, Ints


@dataclass(frozen=True, slots=True)
class UnitSets:
    """The sets of one number of units, m in all."""

    units: Ints  # [m, k], by hub
    hubs: Ints  # [m], a bit for each


def unit_sets(instance: Instance, *, max_sets: int) -> list[UnitSets] | None:
    """The sets of 1, 2, ... units; None where there are more than `max_sets`."""
    lowest = instance.mask & -instance.mask
    most = min(instance.n_devices, instance.n_blocks)
    no_units = np.zeros((1, 0), dtype=np.int64)
    by_size = [no_units, *(np.zeros((0, k), dtype=np.int64) for k in range(1, most + 1))]
    used = [np.zeros(len(units), dtype=np.int64) for units in by_size]
    for device in range(instance.n_devices):
        here = np.flatnonzero(lowest == 1 << device)
        for k in reversed(range(most)):
            apart = used[k][:, None] & instance.mask[here] == 0
            rows, which = np.nonzero(apart)
            new = np.column_stack([by_size[k][rows], here[which]])
            by_size[k + 1] = np.concatenate([by_size[k + 1], new])
            used[k + 1] = np.concatenate([used[k + 1], used[k][rows] | instance.mask[here[which]]])
        if sum(len(units) for units in by_size) > max_sets:
            return None
    found = []
    for units in by_size[1:]:
        hubs = instance.hub[units]
        order = np.argsort(hubs, axis=1, kind="stable")
        sorted_units = np.take_along_axis(units, order, axis=1)
        found.append(UnitSets(sorted_units, (1 << hubs).sum(axis=1)))
    return found
