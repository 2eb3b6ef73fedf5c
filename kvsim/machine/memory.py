"""GPU memory, host memory and SSD space as SimPy containers of free bytes."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import simpy

TIERS = ("gpu", "host", "ssd")


class Memory:
    """What requests hold at most, reserved before it is needed. `sizes`: bytes by tier ("gpu" without the weights).

    A request that could never fit gets all there is, so that it runs alone: what is wrong with that is for the caller
    to say.
    """

    def __init__(self, env: simpy.Environment, sizes: Mapping[str, float]):
        self.free = {tier: _container(env, max(1.0, sizes[tier])) for tier in TIERS}

    def fits(self, need: Mapping[str, float]) -> bool:
        """Is there room now for `need`, bytes by tier?"""
        return all(self.free[tier].level >= asked for tier, asked in self._possible(need).items())

    def reserve(self, need: Mapping[str, float]) -> Generator[simpy.Event, None, None]:
        """Wait until there is room, and take it."""
        for tier, asked in self._possible(need).items():
            yield self.free[tier].get(asked)

    def release(
        self, need: Mapping[str, float], keep: Mapping[str, float] | None = None
    ) -> Generator[simpy.Event, None, None]:
        """Give back what `reserve` took for the same `need`, but for what it would take for `keep`."""
        kept = self._possible(keep or {})
        for tier, asked in self._possible(need).items():
            if (back := asked - kept.get(tier, 0.0)) > 0:
                yield self.free[tier].put(back)

    def _possible(self, need: Mapping[str, float]) -> dict[str, float]:
        return {tier: min(asked, self.free[tier].capacity) for tier, asked in need.items() if asked > 0}


def _container(env: simpy.Environment, size: float) -> simpy.Container:
    return simpy.Container(env, capacity=size, init=size)
