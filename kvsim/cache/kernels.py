"""The hot loops, compiled: look up weights, touch, choose victims, insert, count.

Arrays are flat over lanes: table columns [lanes, slots], rows [row_lanes, stride]. A table lane decides
for `row_lanes / lanes` consecutive row lanes (the KV heads of a layer at layer granularity). Each kernel
is one pass over memory; everything a policy computes stays NumPy (design decision 4).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numba import njit

_JIT = {"cache": True, "nogil": True, "boundscheck": False}


@njit(**_JIT)
def row_totals(row, peak, keys, need, total, used):
    """Per row lane: the row's sum and how many pages are used, by `peak >= need[lane]`."""
    for m in range(row.shape[0]):
        mass = np.float32(0.0)
        count = 0
        limit = need[m]
        for k in range(keys):
            mass += row[m, k]
            count += peak[m, k] >= limit
        total[m] = mass
        used[m] = count


@njit(**_JIT)
def touch(row, peak, key, weights, mass, last, uses, now, renormalise, use, absolute, page_size, missing, need, hit, used):
    """Look up every page's weight and update mass, last and uses; count what was found.

    `need`: float32 [row_lanes], the weight from which a page counts as used on the full row. `renormalise`: divide each
    row by what of it is visible, as the softmax over the surviving pages would; a page is then used when that weight
    reaches `use` (`absolute`) or `use` / visible tokens. `missing`: tokens the newest page still lacks. Returns
    in `hit` the visible mass per row lane and in `used` the visible pages that are used by the full row.
    """
    lanes, slots = key.shape
    group = row.shape[0] // lanes
    for t in range(lanes):
        resident = 0
        for s in range(slots):
            resident += key[t, s] >= 0
        tokens = np.float32(max(1, resident * page_size - missing))
        least = np.float32(0.0)
        for m in range(t * group, (t + 1) * group):
            seen = np.float32(0.0)
            count = 0
            limit = need[m]
            for s in range(slots):
                k = key[t, s]
                if k >= 0:
                    seen += row[m, k]
                    count += peak[m, k] >= limit
            hit[m] = seen
            used[m] = count
            least += limit / group
        if renormalise:
            least = np.float32(use) if absolute else np.float32(use) / tokens
        for s in range(slots):
            k = key[t, s]
            if k < 0:
                weights[t, s] = 0.0
                continue
            w = np.float32(0.0)
            p = np.float32(0.0)
            for m in range(t * group, (t + 1) * group):
                scale = np.float32(1.0)
                if renormalise and hit[m] > 0:
                    scale = np.float32(1.0) / hit[m]
                w += row[m, k] * scale
                p += peak[m, k] * scale
            w /= group
            weights[t, s] = w
            mass[t, s] += w
            if p / group >= least:
                last[t, s] = now
                uses[t, s] += 1


@njit(**_JIT)
def find(row, peak, key, seen, copies, need, selected, and_resident, hit, attended, found, used, missing, read):
    """Offload: what the step needs, what of it is on the GPU, and what it must wait for.

    A page is needed when in one of the lane's rows its largest token weight reaches `need`, or, if `selected`, when it is in
    the read set `seen`. Attention reads the needed pages, and with `and_resident` every page that is on the GPU too. Per row
    lane: `hit` mass on the GPU, `attended` mass read, `used` pages needed and `found` of them on the GPU. `missing`, `read`:
    bool [lanes, slots].
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
                wanted = seen[t, s] >= 0 if selected else peak[m, k] >= need[m]
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


@njit(**_JIT)
def victims(score, key, copies, bit, excess, head, tail, pinned, out, counts):
    """Per lane, the `excess[t]` lowest pages among those with a copy in tier `bit`.

    Order: pages that are not protected first, then by score, then the older (lower) key; so it depends neither on
    slots nor on what was fetched before, and caches of different size agree on it. Protected are keys below `head[t]` and at or above `tail[t]`: they leave last. `pinned`
    is a key that may not leave at all (-1: none). Returns the lane of the first NaN score, or -1.
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
            best = -1
            best_guard = False
            best_score = np.float32(0.0)
            best_key = 0
            for s in range(slots):
                k = key[t, s]
                if k < 0 or not (copies[t, s] & bit) or k == pinned:
                    continue
                x = score[t, s]
                if x != x:
                    return t
                guard = k < head[t] or k >= tail[t]
                if best < 0:
                    better = True
                elif guard != best_guard:
                    better = best_guard
                elif x != best_score:
                    better = x < best_score
                else:
                    better = k < best_key
                if better:
                    best, best_guard, best_score, best_key = s, guard, x, k
            if best >= 0:
                out[t, 0] = best
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
    bits = np.int64(np.float32(x + np.float32(0.0)).view(np.int32))  # adding 0.0 makes -0.0 and 0.0 one score
    ordered = bits + 2147483648 if bits >= 0 else -1 - bits
    value = (np.uint64(ordered) << np.uint64(31)) | np.uint64(key)
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
