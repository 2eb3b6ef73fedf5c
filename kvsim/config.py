"""What a run is: one flat, frozen configuration, read from flags or TOML, with the error naming the key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvsim.cache.demand import parse_demand, parse_use
from kvsim.errors import ConfigError, nearest
from kvsim.registry import parse_spec
from kvsim.units import parse_budget, parse_bytes

PREFIX = "hardware."


class RunConfig(BaseModel):
    """Everything that decides a run's result, together with the trace's content and a plug-in's source.

    `budget`: "20%" of each request's final length, a number of pages per lane, or bytes over all lanes of a request.
    `use`: a share of the visible tokens, or "weight(1e-4)". `host`, `ssd`: bytes for all requests together; None
    takes the hardware file's. `gpu_format`, `host_format`, `ssd_format`: how each stores pages, "fp16" (the model's own
    precision), "int4(group=64)", "kivi(...)" or "rotatekv(...)". `model`: time the run as this model (a name, or a
    Hugging Face config.json) instead of the captured one. `constants`: hardware constants by dotted key, as in
    `--set hardware.link.h2d.bandwidth=50GB/s`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = "h2o"
    budget: str = "20%"
    regime: Literal["lossy", "offload"] | None = None
    offload: str | None = None
    demand: str = "dense"
    use: str = "1.0"
    page_size: int | None = Field(None, ge=1)
    granularity: Literal["head", "layer", "token"] | None = None
    hardware: str = "h100-pcie5"
    model: str | None = None
    host: str | None = None
    ssd: str | None = None
    gpu_format: str = "fp16"
    host_format: str = "fp16"
    ssd_format: str = "fp16"
    overlap: Literal["layer", "step", "none"] = "layer"
    concurrency: int = Field(1, ge=1)
    requests: list[int] | None = None
    seed: int = Field(0, ge=0)
    constants: dict[str, Any] = {}

    @field_validator("budget", "use", "host", "ssd", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    def resolved(self) -> RunConfig:
        """The same run with every default that depends on another key written out. Raises ConfigError, PolicyError."""
        offload = self.offload and parse_spec(self.offload).name
        regime = self.regime or ("offload" if offload not in (None, "drop") or self.demand != "dense" else "lossy")
        if (regime == "lossy") != (offload in (None, "drop")) and offload is not None:
            raise ConfigError(
                f'offload = "{self.offload}" contradicts regime = "{regime}"',
                hint="lossy: evicted pages are gone (drop); offload: they move one tier down (spill)",
            )
        if regime == "lossy" and self.demand != "dense":
            raise ConfigError(
                f'demand = "{self.demand}" has no meaning in the lossy regime', hint="use --regime offload"
            )
        parse_budget(self.budget)
        parse_demand(self.demand, parse_use(self.use))
        for key in ("host", "ssd"):
            if getattr(self, key) is not None:
                parse_bytes(getattr(self, key))
        return self.model_copy(
            update={
                "regime": regime,
                "offload": self.offload or ("drop" if regime == "lossy" else "spill"),
                "page_size": self.page_size or (1 if regime == "lossy" else 16),
            }
        )


KEYS = tuple(RunConfig.model_fields)


def run_config(values: Mapping[str, Any], where: str | None = None) -> RunConfig:
    """A configuration from flat keys; keys such as "hardware.link.h2d.bandwidth" become `constants`.

    Raises ConfigError, naming the key and `where` it stands.
    """
    flat: dict[str, Any] = {}
    constants = dict(values.get("constants", {}))
    for key, value in values.items():
        if key.startswith(PREFIX):
            constants[key.removeprefix(PREFIX)] = value
        elif key not in KEYS:
            raise ConfigError(f'unknown key "{key}"', where=where, hint=nearest(key, KEYS, "`kvsim run --help`"))
        elif key != "constants" and value is not None:
            flat[key] = value
    try:
        return RunConfig(**flat, constants=constants)
    except ValidationError as bad:
        first = bad.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        wrong = f"{key} = {first['input']!r} is not understood"
        raise ConfigError(wrong, where=where, hint=first["msg"][0].lower() + first["msg"][1:]) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML document. Raises ConfigError for a file that is not there or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a TOML file: {error}", where=str(path)) from None


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`--set KEY=VALUE`: the value is TOML where it reads as TOML, otherwise text."""
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f'cannot read "--set {pair}"', hint="write it like --set seed=3")
        try:
            settings[key.strip()] = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = text.strip()
    return settings
