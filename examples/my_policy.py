"""A whole policy in one file: keep what has been hot lately.

kvsim check examples/my_policy.py
kvsim run TRACE --policy "examples/my_policy.py(half_life=16)" --budget 20%
"""

import numpy as np

from kvsim import policy


@policy("half-life")
class HalfLife:
    """The attention a page has gathered, where what is `half_life` steps old counts half."""

    half_life: float = 32.0
    sink: int = 4  # the first tokens stay, as in StreamingLLM
    columns = {"heat": np.float32}

    def observe(self, view):
        view["heat"][:] = view["heat"] * 0.5 ** (1 / self.half_life) + view.weights

    def score(self, view):
        return view["heat"]
