"""The hot loops, compiled: look up weights, touch, choose victims, insert, count.

Arrays are flat over lanes: table columns [lanes, slots], rows [row_lanes, stride]. A table lane decides
for `row_lanes / lanes` consecutive row lanes (the KV heads of a layer at layer granularity). Each kernel
is one pass over memory; everything a policy computes stays NumPy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

_JIT: Any = {"cache": True, "nogil": True, "boundscheck": False}
_LAST = 2**31 - 1  # above every key and every ordered score


@njit(**_JIT)
def _sum(x, n):
    """Sum of the first `n` in eight interleaved parts: no chain of additions, the same order on any machine."""
    a = b = c = d = e = f = g = h = np.float32(0.0)
    whole = n - n % 8
    for i in range(0, whole, 8):
        a += x[i]
        b += x[i + 1]
        c += x[i + 2]
        d += x[i + 3]
        e += x[i + 4]
        f += x[i + 5]
        g += x[i + 6]
        h += x[i + 7]
    for i in range(whole, n):
        a += x[i]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@njit(inline="always")
def _is_used(peak, key, need, need_key):
    """The predicate of `kvsim.cache.demand.Use`, for one page of one row lane."""
    return (peak > need) | ((peak == need) & (key >= need_key))


@njit(**_JIT)
def row_totals(row, peak, keys, need, need_key, total, used):
    """Per row lane: the row's sum and how many pages are used."""
    for m in range(row.shape[0]):
        total[m] = _sum(row[m], keys)
        count = 0
        for k in range(keys):
            count += _is_used(peak[m, k], k, need[m], need_key[m])
        used[m] = count


@njit(**_JIT)
def touch(
    row, peak, key, weights, mass, last, uses, now, renormalise, use, absolute, page_size, missing, need, need_key,
    hit, used,
):  # fmt: skip
    """Look up every page's weight and update mass, last and uses; count what was found.

    `need`, `need_key` [row_lanes]: the limits of `Use`, from which a page counts as used on the full row; a lane of
    several rows compares means of peaks and limits. `renormalise`: divide each row by what of it is visible, as the
    softmax over the surviving pages would; a page is then used when that weight reaches `use` (`absolute`) or `use` /
    visible tokens. `missing`: tokens the newest page still lacks. Returns in `hit` the visible mass per row lane and
    in `used` the visible pages that are used by the full row.

    A few short loops over one lane, each of one kind, run faster than one loop that does everything.
    """
    lanes, slots = key.shape
    group = row.shape[0] // lanes
    found, top, most = np.empty(slots, np.float32), np.empty(slots, np.float32), np.empty(slots, np.float32)
    for t in range(lanes):
        resident = 0
        for s in range(slots):
            weights[t, s] = 0.0
            most[s] = 0.0
            resident += key[t, s] >= 0
        least, least_key = np.float32(0.0), np.int32(0)
        for m in range(t * group, (t + 1) * group):
            for s in range(slots):
                k = key[t, s]
                found[s] = row[m, k] if k >= 0 else np.float32(0.0)
            if page_size == 1:  # a page is its token
                top[:] = found
            else:
                for s in range(slots):
                    k = key[t, s]
                    top[s] = peak[m, k] if k >= 0 else np.float32(0.0)
            hit[m] = _sum(found, slots)
            scale = np.float32(1.0) / hit[m] if renormalise and hit[m] > 0 else np.float32(1.0)
            count = 0
            for s in range(slots):
                count += (key[t, s] >= 0) & _is_used(top[s], key[t, s], need[m], need_key[m])
                weights[t, s] += found[s] * scale
                most[s] += top[s] * scale
            used[m] = count
            least += need[m]
            least_key = max(least_key, need_key[m])
        least /= group
        if renormalise:
            tokens = np.float32(max(1, resident * page_size - missing))
            least = np.float32(use) if absolute else np.float32(use) / tokens
        for s in range(slots):
            weights[t, s] /= group
            mass[t, s] += weights[t, s]
        for s in range(slots):
            is_used = (key[t, s] >= 0) & _is_used(most[s] / group, key[t, s], least, least_key)
            last[t, s] = now if is_used else last[t, s]
            uses[t, s] += is_used


@njit(**_JIT)
def find(
    row, peak, key, seen, copies, need, need_key, selected, and_resident, hit, attended, found, used, missing, read
):
    """Offload: what the step needs, what of it is on the GPU, and what it must wait for.

    A page is needed when one of the lane's rows uses it (limits `need` and `need_key`), or, if `selected`, when it is
    in the read set `seen`. Attention reads the needed pages, and with `and_resident` every page that is on
    the GPU too. Per row lane: `hit` mass on the GPU, `attended` mass read, `used` pages needed and `found` of them
    on the GPU. `missing`, `read`: bool [lanes, slots].
    """
    lanes, slots = key.shape
    group = row.shape[0] // lanes
    for t in range(lanes):
        for m in range(t * group, (t + 1) * group):
            hit[m] = 0.0
            attended[m] = 0.0
            found[m] = 0
            used[m] = 0
        for s in range(slots):
            k = key[t, s]
            missing[t, s] = False
            read[t, s] = False
            if k < 0:
                continue
            here = (copies[t, s] & 1) != 0
            needed = selected and seen[t, s] >= 0
            for m in range(t * group, (t + 1) * group):
                wanted = seen[t, s] >= 0 if selected else _is_used(peak[m, k], k, need[m], need_key[m])
                needed = needed or wanted
                used[m] += wanted
                found[m] += wanted and here
                if here:
                    hit[m] += row[m, k]
            missing[t, s] = needed and not here
            read[t, s] = needed or (and_resident and here)
            if read[t, s]:
                for m in range(t * group, (t + 1) * group):
                    attended[m] += row[m, k]


@njit(**_JIT)
def insert(key, copies, born, arrived, last, uses, mass, weights, free, free_count, new_key, now, slot_of):
    """One page of key `new_key` into a free slot of every lane; `slot_of` says which."""
    for t in range(key.shape[0]):
        free_count[t] -= 1
        s = free[t, free_count[t]]
        key[t, s] = new_key
        copies[t, s] = 1
        born[t, s] = now
        arrived[t, s] = now
        last[t, s] = now
        uses[t, s] = 0
        mass[t, s] = 0.0
        weights[t, s] = 0.0
        slot_of[t] = s


@njit(**_JIT)
def land(missing, copies, arrived, now):
    """The pages a step waited for are on the GPU."""
    for t in range(missing.shape[0]):
        for s in range(missing.shape[1]):
            if missing[t, s]:
                copies[t, s] |= 1
                arrived[t, s] = now


@njit(**_JIT)
def release(key, copies, free, free_count, victims, counts):
    """Drop the chosen slots for good: they become free."""
    for t in range(key.shape[0]):
        for i in range(counts[t]):
            s = victims[t, i]
            key[t, s] = -1
            copies[t, s] = 0
            free[t, free_count[t]] = s
            free_count[t] += 1


@njit(**_JIT)
def release_where(gone, key, copies, free, free_count):
    """Drop the slots of a mask for good: they become free."""
    for t in range(key.shape[0]):
        for s in range(key.shape[1]):
            if gone[t, s]:
                key[t, s] = -1
                copies[t, s] = 0
                free[t, free_count[t]] = s
                free_count[t] += 1


@njit(**_JIT)
def mark(chosen, counts, mask):
    """Slots listed per lane, as a mask."""
    for t in range(mask.shape[0]):
        for i in range(counts[t]):
            mask[t, chosen[t, i]] = True


@njit(**_JIT)
def count_copies(copies, bit):
    """Pages per lane with a copy in the tier `bit`."""
    out = np.zeros(copies.shape[0], np.int64)
    for t in range(copies.shape[0]):
        for s in range(copies.shape[1]):
            out[t] += (copies[t, s] & bit) != 0
    return out


@njit(inline="always")
def _ordered(x):
    """A float32 as an int32 of the same order; adding 0.0 makes -0.0 and 0.0 one score."""
    bits = np.float32(x + np.float32(0.0)).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(**_JIT)
def _lowest(score, key, copies, bit, low, high, pinned):
    """Slot of the lowest (score, key) among keys from `low` to below `high`, or -1; and whether any score is NaN."""
    best, bad, keys, nobody = np.int32(_LAST), 0, np.int32(_LAST), np.int32(_LAST)
    for s in range(key.shape[0]):
        x, k = score[s], key[s]
        here = (k >= 0) & ((copies[s] & bit) != 0) & (k != pinned)
        bad += here & (x != x)
        best = min(best, _ordered(x) if here & (k >= low) & (k < high) else nobody)
    for s in range(key.shape[0]):
        k = key[s]
        here = (k >= low) & (k < high) & ((copies[s] & bit) != 0) & (k != pinned) & (_ordered(score[s]) == best)
        keys = min(keys, k if here else nobody)
    if bad or keys == nobody:
        return -1, bad > 0
    for s in range(key.shape[0]):
        if key[s] == keys:
            return s, False
    return -1, False


@njit(**_JIT)
def victims(score, key, copies, bit, excess, head, tail, pinned, out, counts):
    """Per lane, the `excess[t]` lowest pages among those with a copy in tier `bit`.

    Order: pages that are not protected first, then by score, then the older (lower) key; so it depends neither on
    slots nor on what was fetched before, and caches of different size agree on it. Protected are keys below
    `head[t]` and at or above `tail[t]`: they leave last. `pinned` is a key that may not leave at all (-1: none).
    Returns the lane of the first NaN score, or -1.
    """
    slots = key.shape[1]
    rank = np.empty(slots, np.uint64)
    where = np.empty(slots, np.int32)
    for t in range(key.shape[0]):
        counts[t] = 0
        want = excess[t]
        if want <= 0:
            continue
        if want == 1:
            s, bad = _lowest(score[t], key[t], copies[t], bit, max(0, head[t]), tail[t], pinned)
            if s < 0 and not bad:  # only protected pages are left
                s, bad = _lowest(score[t], key[t], copies[t], bit, 0, _LAST, pinned)
            if bad:
                return t
            if s >= 0:
                out[t, 0] = s
                counts[t] = 1
            continue
        n = 0
        for s in range(slots):
            k = key[t, s]
            if k < 0 or not (copies[t, s] & bit) or k == pinned:
                continue
            x = score[t, s]
            if x != x:
                return t
            guard = k < head[t] or k >= tail[t]
            rank[n] = _rank(guard, x, k)
            where[n] = s
            n += 1
        want = min(want, n)
        if want == 0:
            continue
        limit = np.partition(rank[:n], want - 1)[want - 1]
        c = 0
        for i in range(n):
            if rank[i] <= limit:
                out[t, c] = where[i]
                c += 1
        counts[t] = c
    return -1


@njit(inline="always")
def _rank(guard, x, key):
    """A total order as one integer: guard, then the float32 in ascending order, then the key (under 2**31)."""
    value = (np.uint64(np.int64(_ordered(x)) + 2147483648) << np.uint64(31)) | np.uint64(key)
    if guard:
        value |= np.uint64(1) << np.uint64(63)
    return value


@njit(**_JIT)
def largest_sum(row, keys, count, out):
    """Per row lane, the sum of its `count[m]` largest weights: what no cache of that size can exceed."""
    for m in range(row.shape[0]):
        c = count[m]
        if c >= keys:
            total = np.float64(0.0)
            for k in range(keys):
                total += row[m, k]
            out[m] = total
            continue
        limit = np.partition(row[m, :keys], keys - c)[keys - c]
        total = np.float64(0.0)
        above = 0
        for k in range(keys):
            if row[m, k] > limit:
                total += row[m, k]
                above += 1
        out[m] = total + (c - above) * limit


@njit(**_JIT)
def count_runs(mask, key, keys):
    """Per lane, how many runs of neighbouring keys the chosen slots form: what could be one copy."""
    out = np.zeros(mask.shape[0], np.int64)
    for t in range(mask.shape[0]):
        chosen = np.zeros(keys + 1, np.bool_)
        for s in range(mask.shape[1]):
            if mask[t, s]:
                chosen[key[t, s] + 1] = True
        for k in range(1, keys + 1):
            out[t] += chosen[k] and not chosen[k - 1]
    return out


def compiled() -> bool:
    """Are the kernels in numba's cache on disk, so that a first call need not compile?"""
    return any(Path(touch.stats.cache_path).glob("kernels.touch-*.nbi"))
