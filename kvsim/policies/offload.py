"""Where evicted pages go."""

from __future__ import annotations

import numpy as np

from kvsim.registry import offload


@offload("drop")
class Drop:
    """Nowhere: an evicted page is gone. This is the lossy regime."""

    def place(self, view, victims):
        return np.int8(-1)


@offload("spill")
class Spill:
    """To host memory; pages are written once, so one that has a copy on the host or the SSD just leaves the GPU.

    A full host gives its lowest scores to the SSD.
    """

    def place(self, view, victims):
        return np.int8(1)
