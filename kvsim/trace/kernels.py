"""The code of a weight, and the loops that turn rows into codes and back (numba).

A weight is one byte. Code 0 marks an entry that only carries a gap, code c >= 1 stands for 2**-LEVELS[c - 1]: steps
of a twelfth of an octave from 1 down to 2**-12, so with a relative error of at most 2**(1/24) - 1 = 2.93 %, and from
there on each step 3.6 % longer than the one before, down to the smallest normal number: 10 % at 2**-17, 22 % at
2**-25. What policies need of weights that small is their order, and of sharp attention they need it: 40 % of the
shipped reasoner's weights lie below 2**-21, and who evicts by the smallest of them decides among these.
The code is found from the bits of the float by comparing with exact edges, not with a logarithm, so that
the same weights give the same bytes on every machine. A weight with code 255, the floor, is never stored.
"""

from __future__ import annotations

import numpy as np
from numba import njit

PER_OCTAVE, FINE_OCTAVES, GROWTH = 12, 12, 1.036
FLOOR_CODE = 255  # what is smaller than a normal number, zero included
GAP_LIMIT = 65535  # a larger step between kept positions is continued in the next entry
TOLERANCE = 0.01  # how far a row may sum above one: eager bfloat16 weights are off by less

OK, NEGATIVE, NOT_FINITE, ABOVE_ONE, BAD_SHARE, SUM_OFF, PAST_END, REPEATED = range(8)
MEANING = {
    NEGATIVE: "a negative weight",
    NOT_FINITE: "a weight that is not a number",
    ABOVE_ONE: "weights that sum above 1",
    BAD_SHARE: "a residual or sink outside [0, 1]",
    SUM_OFF: "kept weights that disagree with the stored residual",
    PAST_END: "a position at or beyond kv_hi",
    REPEATED: "the same position twice",
}

_STEPS = GROWTH ** np.maximum(0, np.arange(FLOOR_CODE - 2) - PER_OCTAVE * FINE_OCTAVES + 1) / PER_OCTAVE
LEVELS = np.concatenate([[0.0], np.cumsum(_STEPS)])  # octaves below 1, of codes 1 to 254
WEIGHT = np.concatenate([[0.0], 2.0**-LEVELS, [0.0]]).astype(np.float32)
# Sums of integers do not depend on their order, so the compiler may reorder them and results stay the same.
_UNIT = float(2**40)
_FIXED = np.round(WEIGHT.astype(np.float64) * _UNIT).astype(np.int64)
_ERROR = np.concatenate([[0.0], 2.0 ** (np.append(_STEPS, _STEPS[-1]) / 2) - 1, [0.0]])  # at most, relative, by code
_SLACK = np.ceil(_FIXED * _ERROR).astype(np.int64)

# Where codes begin, as bits: the smallest normal number, then the middles between levels. Cells of 1/32 of an octave's
# mantissa hold one such edge at most: how many lie below a cell, and where the one inside it is.
_TINY = np.finfo(np.float32).tiny
_MIDDLES = 2.0 ** (-(LEVELS[1:] + LEVELS[:-1]) / 2)
_EDGES = np.append(_TINY, _MIDDLES[::-1]).astype(np.float32).view(np.int32)
_BELOW = np.searchsorted(_EDGES, np.arange(1 << 13) << 18, side="right").astype(np.int32)
_NEXT = np.append(_EDGES, np.iinfo(np.int32).max)[_BELOW]


@njit(inline="always")
def _code(bits):
    """Code 1 .. 255 of a non-negative float32, given as its bits."""
    cell = bits >> 18
    return FLOOR_CODE - _BELOW[cell] - (bits >= _NEXT[cell])


@njit(cache=True, nogil=True)
def codes(weights):
    """uint8 codes of a flat float32 array of non-negative weights."""
    out = np.empty(weights.size, np.uint8)
    bits = weights.view(np.int32)
    for i in range(weights.size):
        out[i] = _code(bits[i])
    return out


@njit(inline="always")
def _survey(row, code, count, share):
    """Codes of one row, how many weights and how much mass fall on each code; (status, sum)."""
    bits = row.view(np.int32)
    count[:] = 0
    share[:] = 0.0
    for s in range(row.size):
        b = bits[s]
        if b < 0 and row[s] != 0.0:
            return NEGATIVE, 0.0
        if b >= 0x7F800000:
            return NOT_FINITE, 0.0
        c = _code(b & 0x7FFFFFFF)
        code[s] = c
        count[c] += 1
        share[c] += row[s]
    return OK, share.sum()


@njit(inline="always")
def _cut(count, share, total, keep, min_keep, floor):
    """The last code kept (enough mass, enough entries, every weight above the floor), and the mass kept."""
    kept, entries, cut = 0.0, 0, 0
    while cut < FLOOR_CODE - 1 and (keep >= 1 or kept < keep * total or entries < min_keep or cut < floor):
        cut += 1
        kept += share[cut]
        entries += count[cut]
    return cut, kept


@njit(cache=True, nogil=True)
def encode_row(mean, peak, sink, keep, min_keep, floor, gap_lo, gap_hi, w, dmax, at, n, mass):
    """Append the kept entries of one (step, layer) to the byte planes; returns (end, status, head).

    `mean`: float32 [heads, S]; `peak` the same or [0, 0]; `sink`: float32 [heads]. `floor` is a code.
    Whole codes are kept from the largest weight down, which needs no sort. The planes must have room for
    every position. `n`: uint32 [heads] and `mass`: float32 [heads] are filled.
    """
    heads, size = mean.shape
    code = np.empty(size, np.uint8)
    count = np.empty(256, np.int64)
    share = np.empty(256, np.float64)
    with_peak = peak.size > 0
    for h in range(heads):
        row = mean[h]
        status, total = _survey(row, code, count, share)
        if status == OK and total + sink[h] > 1 + TOLERANCE:
            status = ABOVE_ONE
        if status == OK and not 0 <= sink[h] <= 1 + TOLERANCE:
            status = BAD_SHARE
        if status != OK:
            return at, status, h
        cut, kept = _cut(count, share, total, keep, min(min_keep, size), floor)
        begin, last = at, 0
        if with_peak:
            peak_bits = peak[h].view(np.int32)
        for s in range(size):
            c = code[s]
            while c <= cut and s - last >= GAP_LIMIT:
                gap_lo[at], gap_hi[at], w[at] = 255, 255, 0
                if with_peak:
                    dmax[at] = 0
                last += GAP_LIMIT
                at += 1
            gap = s - last  # written in any case, kept by advancing: no branch to mispredict
            gap_lo[at] = gap & 255
            gap_hi[at] = gap >> 8
            w[at] = c
            if with_peak:
                dmax[at] = c - min(c, _code(peak_bits[s] & 0x7FFFFFFF))
            if c <= cut:
                at += 1
                last = s
        n[h] = at - begin
        mass[h] = max(0.0, 1.0 - sink[h] - kept)
    return at, OK, 0


@njit(cache=True, nogil=True)
def check_row(mean, sink):
    """(status, head) of a float32 row [heads, S] that is stored as it is."""
    for h in range(mean.shape[0]):
        total = np.float64(sink[h])
        for s in range(mean.shape[1]):
            x = mean[h, s]
            if x < 0:
                return NEGATIVE, h
            total += x
        if not np.isfinite(total):
            return NOT_FINITE, h
        if total > 1 + TOLERANCE:
            return ABOVE_ONE, h
    return OK, 0


@njit(cache=True, nogil=True)
def decode_rows(begin, end, n, mass, sink, kv_lo, kv_hi, start, gap_lo, gap_hi, w, dmax, spread, out, status, head):
    """Stored entries of the rows `begin` to `end` into `out`; what is wrong with a row into `status`, and `head`.

    n: uint32 [rows, heads]; mass, sink: float32 [rows, heads]; kv_lo, kv_hi: int32 [rows]; start: int64
    [rows], first entry; the byte planes hold all entries of the row group. out: float32 [rows, heads,
    tokens], one row per layer, zero at and beyond kv_hi. status, head: int64 [rows]. Kept weights are scaled to
    sum to 1 - sink - mass; `mass` is spread over the visible positions not stored when `spread` is set, but none of
    them gets more than the smallest weight that is stored: only smaller ones were left out. With `dmax` (else empty)
    the kept values are those of the group's largest query head.
    """
    for r in range(begin, end):
        at, status[r] = start[r], OK
        for h in range(n.shape[1]):
            stop = at + np.int64(n[r, h])
            status[r] = _decode_row(
                at, stop, mass[r, h], sink[r, h], kv_lo[r], kv_hi[r], gap_lo, gap_hi, w, dmax, spread, out[r, h]
            )
            if status[r] != OK:
                head[r] = h
                break
            at = stop


@njit(cache=True, nogil=True)
def _decode_row(begin, end, mass, sink, lo, hi, gap_lo, gap_hi, w, dmax, spread, line):
    with_peak = dmax.size > 0
    residual, lost = np.float64(mass), np.float64(sink)
    target = 1.0 - lost - residual
    if not (residual >= 0 and lost >= 0 and target >= -TOLERANCE):
        return BAD_SHARE
    fixed, slack, gaps, last = np.int64(0), np.int64(0), 0, np.uint8(0)
    for i in range(begin, end):
        fixed += _FIXED[w[i]]
        slack += _SLACK[w[i]]
        gaps += w[i] == 0
        last = max(last, w[i])
    total = fixed / _UNIT
    if abs(total - target) > slack / _UNIT + 1.5 * TOLERANCE:
        return SUM_OFF
    scale = np.float32(target / total if total > 0 else 0.0)
    unstored = (hi - lo) - (end - begin - gaps)
    rest = np.float32(residual / unstored if spread and unstored > 0 else 0.0)
    if last > 0:
        rest = min(rest, WEIGHT[last] * scale)
    line[:lo] = 0
    line[lo:hi] = rest
    position = np.int64(lo)
    chained = True  # the first gap, and one after a continuation, may be zero
    for i in range(begin, end):
        gap = np.int64(gap_lo[i]) | (np.int64(gap_hi[i]) << 8)
        if gap == 0 and not chained:
            return REPEATED
        position += gap
        c = w[i]
        chained = c == 0
        if chained:
            continue
        if position >= hi:
            return PAST_END
        line[position] = WEIGHT[c - min(c - 1, dmax[i])] if with_peak else WEIGHT[c] * scale
    return OK


@njit(cache=True, nogil=True)
def copy_rows(begin, end, w32, sink, kv_lo, kv_hi, start, bounded, out, status, head):
    """Rows stored whole (float32) into `out`; shapes and answer as in `decode_rows`.

    `bounded`: the rows are means, which sum to at most 1; the largest of a group may sum to more.
    """
    for r in range(begin, end):
        size, status[r] = kv_hi[r] - kv_lo[r], OK
        for h in range(out.shape[1]):
            at = start[r] + h * size
            status[r] = _copy_row(w32[at : at + size], sink[r, h], kv_lo[r], bounded, out[r, h])
            if status[r] != OK:
                head[r] = h
                break


@njit(cache=True, nogil=True)
def _copy_row(values, sink, lo, bounded, line):
    line[:lo] = 0
    total = np.float64(sink)
    for i in range(values.shape[0]):
        x = values[i]
        if x < 0:
            return NEGATIVE
        total += x
        line[lo + i] = x
    if not np.isfinite(total):
        return NOT_FINITE
    if bounded and (total > 1 + TOLERANCE or not sink >= 0):
        return ABOVE_ONE
    return OK
