"""What is registered, as a person wants to read it: one entry per policy, for the command line and for the docs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from kvsim import registry

EVIDENCE = {
    "code": "read in the published code",
    "abs": "from the paper's abstract",
    "3rd": "from a third party's account",
    "mem": "from memory of the paper",
    "derived": "our completion of what the source leaves open",
    "own": "textbook or our own",
}
FAMILIES = (
    "reference",
    "classic",
    "window",
    "heavy hitter",
    "recurrence",
    "prefill vote",
    "key geometry",
    "gate",
    "read set",
    "allocator",
    "wrapper",
)


@dataclass(frozen=True)
class Entry:
    """One policy. `kind`: "oracle", "read set", "once" (after the prompt) or "online"; `decides`: per "head",
    "layer" or "token"; `parameters`: name -> default; `text`: the class's docstring.
    """

    name: str
    family: str
    kind: str
    regimes: tuple[str, ...]
    decides: str
    needs: tuple[str, ...]
    evidence: str
    parameters: dict[str, Any]
    text: str

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        return self.text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".:")

    @property
    def defaults(self) -> str:
        """What may be set, as in a spec string; protection only where it differs from everybody's."""
        usual = {**{name: value for name, (_, value) in registry.PROTECTION.items()}}
        own = {k: v for k, v in self.parameters.items() if k not in usual or v not in (usual[k], None)}
        return ", ".join(f"{k}={v!r}" for k, v in own.items())


def entry(name: str) -> Entry:
    """The policy registered as `name`. Raises PolicyError for one that is not known."""
    cls: Any = registry.find(name)
    instance = registry.build(name)
    kind = "oracle" if hasattr(cls, "foresee") else "read set" if hasattr(cls, "select") else "online"
    return Entry(
        name=name,
        family=getattr(cls, "family", ""),
        kind="once" if cls.once else kind,
        regimes=tuple(cls.regimes),
        decides=instance.granularity,
        needs=tuple(sorted(instance.needs)),
        evidence=cls.evidence,
        parameters={f.name: f.default for f in fields(cls)},
        text=inspect.cleandoc(cls.__doc__ or ""),
    )


def entries() -> list[Entry]:
    """All registered policies, family by family."""
    order = {family: i for i, family in enumerate(FAMILIES)}
    found = [entry(name) for name in registry.names()]
    return sorted(found, key=lambda e: (order.get(e.family, len(order)), e.family, e.name))
