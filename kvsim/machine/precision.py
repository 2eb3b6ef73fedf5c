"""Precision as a property of a tier: what a page takes there, what turning it into another costs, how wrong it gets.

A format is bytes and arithmetic, not a policy: a tier that stores 2 bits holds more pages and moves fewer bytes, and
the recorded attention stays what it was. What quantisation does to keys and values is measured apart, on a trace that
holds them (`errors`). The time model is derived, not measured: recoding streams both forms through the GPU's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kvsim.errors import ConfigError, PolicyError, TraceError
from kvsim.registry import parse_spec
from kvsim.trace.access import Trace

_SCALE_BITS = 32  # of a group: its scale and its least value, both FP16


@dataclass(frozen=True)
class Format:
    """How keys and values are stored: "fp16" is the model's own precision, whatever that is.

    `bits` per element and a scale and a least value in FP16 for each `group` of them. The newest `residual` and the
    first `sink` tokens stay as they are, on the GPU; a page that leaves it is encoded whole.

    int: keys and values per token, in groups of channels. kivi: keys per channel in groups of tokens, sealed whenever
    `residual` are waiting, values per token once they leave the residual window (arXiv 2402.02750; jy-yuan/KIVI
    models/llama_kivi.py). rotatekv: as int, after a Hadamard rotation of the keys over the channels of `heads` KV heads
    together (arXiv 2501.16383; ZunhaiSu/RotateKV), whose fake quantisation has bits^2 steps where there are 2^bits:
    the same for 2 and 4 bits, not for 3 and 8.

    Departures of rotatekv: where a trace does not say the frequencies of its position rotation, keys are quantised
    after it, not before; channels are not reordered; the first `sink` tokens stand for those that its detection of
    massive activations would keep.
    """

    name: str = "fp16"
    bits: int = 16
    group: int = 0
    residual: int = 0
    sink: int = 0
    heads: int = 1

    @property
    def plain(self) -> bool:
        """Is it the model's own precision?"""
        return not self.group

    @property
    def levels(self) -> int:
        """The largest code of an element."""
        return (self.bits**2 if self.name == "rotatekv" else 2**self.bits) - 1

    @property
    def kept(self) -> int:
        """Tokens that stay at full precision."""
        return self.residual + self.sink

    @property
    def element_bytes(self) -> float:
        """Bytes of one quantised element, its part of the group's scale and least value among them."""
        return self.bits / 8 + (_SCALE_BITS / 8 / self.group if self.group else 0.0)

    def ratio(self, value_bytes: float) -> float:
        """Bytes of a quantised element over `value_bytes`, those of one at full precision."""
        return 1.0 if self.plain else self.element_bytes / value_bytes

    def check(self, head_dim: int, where: str) -> None:
        """Raise ConfigError unless whole groups of channels make up a head."""
        if self.group and head_dim % self.group:
            raise ConfigError(
                f"groups of {self.group} channels do not fit heads of {head_dim}",
                where=where,
                hint=f"use a group that divides {head_dim}",
            )

    def quantised(
        self, k: np.ndarray, v: np.ndarray, angles: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as they come back, float32; both [kv_heads, tokens, head_dim], of one layer.

        `angles` [tokens, rotated / 2]: by which the keys were rotated for their positions, dimension i with i + half.
        """
        k, v = (x.astype(np.float32) for x in (k, v))
        n = k.shape[1]
        if self.plain:
            return k, v
        self.check(k.shape[-1], self.name)
        if self.name == "kivi":
            sealed = n - n % self.residual
            k[:, :sealed] = self._fake(k[:, :sealed].swapaxes(1, 2)).swapaxes(1, 2)
            v[:, : max(0, n - self.residual)] = self._fake(v[:, : max(0, n - self.residual)])
        else:
            k[:, self.sink :] = self._keys(k[:, self.sink :], None if angles is None else angles[self.sink :])
            v[:, self.sink :] = self._fake(v[:, self.sink :])
        return k, v

    def _fake(self, x: np.ndarray) -> np.ndarray:
        """Rounded to the codes of each group along the last axis, scale and least value in FP16."""
        parts = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
        least = parts.min(-1, keepdims=True)
        scale = ((parts.max(-1, keepdims=True) - least) / self.levels).astype(np.float16).astype(np.float32)
        least = least.astype(np.float16).astype(np.float32)
        code = np.divide(parts - least, scale, out=np.zeros_like(parts), where=scale > 0)
        return (np.clip(np.rint(code), 0, self.levels) * scale + least).reshape(x.shape)

    def _keys(self, k: np.ndarray, angles: np.ndarray | None) -> np.ndarray:
        """Per token; for rotatekv in a rotated basis that `heads` KV heads (as many as divide them) share."""
        if self.name != "rotatekv":
            return self._fake(k)
        if angles is not None:
            k = positioned(k, -angles)
        heads, tokens, width = k.shape
        joint = math.gcd(heads, self.heads)
        turn = hadamard(joint * width)
        flat = k.reshape(-1, joint, tokens, width).swapaxes(1, 2).reshape(-1, tokens, joint * width)
        back = self._fake(flat @ turn) @ turn.T
        back = back.reshape(-1, tokens, joint, width).swapaxes(1, 2).reshape(k.shape)
        return back if angles is None else positioned(back, angles)


PLAIN = Format()
_DEFAULTS: dict[str, dict[str, int]] = {
    "kivi": {"bits": 2, "group": 32, "residual": 128},
    "rotatekv": {"bits": 2, "group": 32, "sink": 4, "heads": 4},
    **{f"int{bits}": {"group": 64} for bits in (2, 3, 4, 8)},
}
_HINT = '"fp16", "int4(group=64)", "kivi(bits=2, group=32, residual=128)" or "rotatekv(bits=2, group=32)"'


def parse_format(text: str, where: str = "format") -> Format:
    """A format from its spec string; what is not said has the paper's value. Raises ConfigError, naming `where`."""
    try:
        spec = parse_spec(text)
    except PolicyError as bad:
        raise ConfigError(f"{where}: {bad.what}", hint=f"use {_HINT}") from None
    if spec.name == "fp16" and not spec.parameters:
        return PLAIN
    given = _DEFAULTS.get(spec.name)
    if given is None or not set(spec.parameters) <= set(given):
        raise ConfigError(f'{where}: unknown format "{text}"', hint=f"use {_HINT}")
    values: dict[str, Any] = given | spec.parameters
    name = "int" if spec.name.startswith("int") else spec.name
    if name == "int":
        values["bits"] = int(spec.name.removeprefix("int"))
    sound = all(type(n) is int and n >= (key == "group" or key == "heads") for key, n in values.items())
    if not sound or values["bits"] not in (2, 3, 4, 8):
        raise ConfigError(f'{where}: "{text}" cannot be stored', hint=f"2, 3, 4 or 8 bits, whole numbers: {_HINT}")
    if name == "kivi" and (values["residual"] < 1 or values["residual"] % values["group"]):
        raise ConfigError(f'{where}: "{text}" never seals a group', hint="make residual a multiple of group")
    return Format(name, **{f.name: values[f.name] for f in fields(Format) if f.name in values})


def recode_seconds(source: Format, target: Format, nbytes: Any, value_bytes: float, bandwidth: float) -> Any:
    """Seconds on the GPU for keys and values of `nbytes` at full precision: one form read, the other written."""
    if source == target:
        return 0.0 * nbytes
    return nbytes * (source.ratio(value_bytes) + target.ratio(value_bytes)) / bandwidth


def hadamard(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix, Sylvester's. Raises ConfigError where `size` is no power of two."""
    if size & (size - 1):
        raise ConfigError(f"there is no rotation of {size} channels", hint="join heads to a power of two")
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(size))


def positioned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Vectors [..., tokens, head_dim] rotated by their positions: dimension i with i + half, the rest as it is."""
    half = angles.shape[-1]
    cos, sin = (f(angles).astype(x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def errors(trace: Trace, form: Format) -> dict[str, np.ndarray]:
    """What a format does to a trace with vectors, at the end of its requests: float64 [layers, kv_heads].

    "logit": root mean square, over keys and the group's query heads, of the last query's q.(k - k') / sqrt(head_dim);
    "value": mean of |v - v'| / |v|. Over all tokens, those at full precision among them; the mean of the requests.
    Raises TraceError where the trace holds no q, k and v.
    """
    found: dict[str, list[np.ndarray]] = {"logit": [], "value": []}
    for source in trace.sources:
        layers: dict[int, list[Any]] = {}
        for part in source.vectors():
            layers.setdefault(part.layer, []).append(part)
        if not layers:
            raise TraceError(f"request {source.id} holds no tokens", where=trace.path)
        lines: dict[str, list[np.ndarray]] = {"logit": [], "value": []}
        for layer in sorted(layers):
            k, v = (np.concatenate([getattr(part, n) for part in layers[layer]], axis=1) for n in ("k", "v"))
            positions = np.concatenate([part.positions for part in layers[layer]])
            angles = None if source.inv_freq is None else positions[:, None] * source.inv_freq
            back_k, back_v = form.quantised(k, v, angles)
            q = layers[layer][-1].q[:, -1].astype(np.float32).reshape(len(k), -1, k.shape[-1])
            wrong = q @ (k.astype(np.float32) - back_k).swapaxes(1, 2) / math.sqrt(k.shape[-1])
            lines["logit"].append(np.sqrt((wrong.astype(float) ** 2).mean((1, 2))))
            size, off = (np.linalg.norm(x.astype(float), axis=-1) for x in (v, v.astype(np.float32) - back_v))
            lines["value"].append(np.divide(off, size, out=np.zeros_like(off), where=size > 0).mean(1))
        for name, values in lines.items():
            found[name].append(np.stack(values))
    return {name: np.mean(values, axis=0) for name, values in found.items()}
