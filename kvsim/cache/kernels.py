"""The hot loops, compiled: look up weights, touch, choose victims, insert, count.

Arrays are flat over lanes: table columns [lanes, slots], rows [row_lanes, stride]. A table lane decides
for `row_lanes / lanes` consecutive row lanes (the KV heads of a layer at layer granularity). Each kernel
is one pass over memory, lane by lane; what a policy computes is NumPy's, or `fused`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

_JIT: Any = {"cache": True, "nogil": True, "boundscheck": False}
_LAST = 2**31 - 1  # above every key and every ordered score


@njit(**_JIT)
def _sum(x, strands):
    """Sum of a row in 64 `strands`, side by side: no chain of additions, and the same order on any machine."""
    n = x.shape[0]
    many, whole = n - n % 512, n - n % 64
    strands[:] = 0.0
    for i in range(0, many, 512):
        p = x[i : i + 512]
        for j in range(64):
            first = (p[j] + p[j + 64]) + (p[j + 128] + p[j + 192])
            strands[j] += first + ((p[j + 256] + p[j + 320]) + (p[j + 384] + p[j + 448]))
    for i in range(many, whole, 64):
        p = x[i : i + 64]
        for j in range(64):
            strands[j] += p[j]
    p = x[whole:]
    for j in range(p.shape[0]):
        strands[j] += p[j]
    total = np.float32(0.0)
    for j in range(16):
        total += (strands[j] + strands[j + 16]) + (strands[j + 32] + strands[j + 48])
    return total


@njit(inline="always")
def _is_used(peak, key, need, need_key):
    """The predicate of `kvsim.cache.demand.Use`, for one page of one row lane."""
    return (peak > need) | ((peak == need) & (key >= need_key))


@njit(**_JIT)
def _count_used(peak, need, need_key):
    """How many pages of one row are used."""
    first = max(0, min(peak.shape[0], need_key))
    older, newer, count = peak[:first], peak[first:], np.int32(0)
    for k in range(older.shape[0]):
        count = np.int32(count + np.int32(older[k] > need))
    for k in range(newer.shape[0]):
        count = np.int32(count + np.int32(newer[k] >= need))
    return count


@njit(**_JIT)
def row_totals(row, peak, keys, need, need_key, total, used):
    """Per row lane: the row's sum and how many pages are used."""
    strands = np.empty(64, np.float32)
    for m in range(row.shape[0]):
        total[m] = _sum(row[m, :keys], strands)
        used[m] = _count_used(peak[m, :keys], need[m], need_key[m])


@njit(**_JIT)
def touch(
    begin, end, row, peak, keys, key, weights, mass, last, uses, now, renormalise, use, absolute, page_size, missing,
    need, need_key, total, used, hit, found,
):  # fmt: skip
    """Lanes `begin` to `end`: sum their rows, look up every page's weight, update mass, last and uses, and count.

    `need`, `need_key` [row_lanes]: the limits of `Use`, from which a page counts as used on the full row; a lane of
    several rows compares means of peaks and limits. `renormalise`: divide each row by what of it is visible, as the
    softmax over the surviving pages would; a page is then used when that weight reaches `use` (`absolute`) or `use` /
    visible tokens. `missing`: tokens the newest page still lacks. Returns per row lane `total` and `used`, as
    `row_totals` does, the visible mass `hit`, and in `found` the visible pages that are used by the full row.

    Short loops over one lane, of few arrays each: a processor does eight lines at once only where no more than a few
    arrays could overlap, and one lane stays in its nearest cache.
    """
    slots = key.shape[1]
    group = row.shape[0] // key.shape[0]
    now, strands = np.int32(now), np.empty(64, np.float32)
    weight, weight_sum = np.empty(slots, np.float32), np.empty(slots, np.float32)
    top, top_sum = np.empty(slots, np.float32), np.empty(slots, np.float32)
    for t in range(begin, end):
        page, least, least_key, factor, pages = key[t], np.float32(0.0), np.int32(0), np.float32(1.0), np.int32(0)
        for m in range(t * group, (t + 1) * group):
            total[m] = _sum(row[m, :keys], strands)
            used[m] = _count_used(peak[m, :keys], need[m], need_key[m])
            pages, found[m] = _look_up(row[m], page, need[m], need_key[m], weight)
            hit[m] = _sum(weight, strands)
            factor = np.float32(1.0) / hit[m] if renormalise and hit[m] > 0 else np.float32(1.0)
            if page_size > 1:
                pages, found[m] = _look_up(peak[m], page, need[m], need_key[m], top)
            if group > 1:
                _add(weight_sum, weight, factor, m == t * group)
                if page_size > 1:
                    _add(top_sum, top, factor, m == t * group)
            least += need[m]
            least_key = max(least_key, need_key[m])
        if group > 1:
            factor = np.float32(1.0) / np.float32(group)
            least *= factor
        if renormalise:
            tokens = np.float32(max(1, pages * page_size - missing))
            least = np.float32(use) if absolute else np.float32(use) / tokens
        _note_weights(weight_sum if group > 1 else weight, factor, weights[t], mass[t])
        if page_size > 1:
            tops = top_sum if group > 1 else top
            for s in range(slots):
                top[s] = tops[s] * factor
        _note_uses(top if page_size > 1 else weights[t], page, least, least_key, now, last[t], uses[t])


@njit(**_JIT)
def _look_up(row, key, need, need_key, found):
    """What a row says of every page of a lane, 0 on empty lines; how many pages there are, and how many it uses."""
    pages, used, first = np.int32(0), np.int32(0), max(np.int32(0), np.int32(need_key))
    for s in range(key.shape[0]):
        found[s] = row[max(key[s], np.int32(0))]
    for s in range(key.shape[0]):
        x = found[s] if key[s] >= 0 else np.float32(0.0)
        found[s] = x
        pages = np.int32(pages + np.int32(key[s] >= 0))
        used = np.int32(used + np.int32(_is_used(x, key[s], need, first)))
    return pages, used


@njit(**_JIT)
def _add(total, x, factor, first):
    """`x` times `factor` onto `total`, which the first one starts."""
    if first:
        total[:] = 0.0
    for s in range(x.shape[0]):
        total[s] += x[s] * factor


@njit(**_JIT)
def _note_weights(weight, factor, weights, mass):
    """This step's weights into the columns of a lane."""
    for s in range(weight.shape[0]):
        x = weight[s] * factor
        weights[s] = x
        mass[s] += x


@njit(**_JIT)
def _note_uses(peak, key, least, least_key, now, last, uses):
    """Which pages of a lane this step used: the peak of an empty line is 0, and no limit is below that."""
    first = max(np.int32(0), np.int32(least_key))
    for s in range(key.shape[0]):
        is_used = _is_used(peak[s], key[s], least, first)
        last[s] = now if is_used else last[s]
        uses[s] = np.int32(uses[s] + np.int32(is_used))


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
def _lowest(score, key, low, high, pinned, order):
    """Slot of the lowest (score, key) among keys from `low` to below `high`, or -1; and whether any score is NaN."""
    nobody, bad = np.int32(_LAST), np.int32(0)
    best, oldest, slot = nobody, nobody, nobody
    for s in range(key.shape[0]):
        here = (key[s] >= 0) & (key[s] != pinned)
        bad = np.int32(bad | np.int32(here & (score[s] != score[s])))
        order[s] = _ordered(score[s]) if here & (key[s] >= low) & (key[s] < high) else nobody
        best = min(best, order[s])
    if bad or best == nobody:
        return -1, bad > 0
    for s in range(key.shape[0]):
        oldest = min(oldest, key[s] if order[s] == best else nobody)
    for s in range(key.shape[0]):
        slot = min(slot, np.int32(s) if key[s] == oldest else nobody)
    return np.int64(slot), False


@njit(**_JIT)
def _lowest_many(score, key, low, high, pinned, want, out):
    """The `want` lowest of one lane, into `out`, those not from `low` to below `high` last: how many, -1 for a NaN."""
    slots = key.shape[0]
    rank, where, n = np.empty(slots, np.uint64), np.empty(slots, np.int32), 0
    for s in range(slots):
        k, x = key[s], score[s]
        if k < 0 or k == pinned:
            continue
        if x != x:
            return -1
        rank[n] = _rank(k < low or k >= high, x, k)
        where[n] = s
        n += 1
    want = min(want, n)
    if want == 0:
        return 0
    limit = _smallest(rank[:n].copy(), want)
    count = 0
    for i in range(n):
        if rank[i] <= limit:
            out[count] = where[i]
            count += 1
    return count


@njit(**_JIT)
def _smallest(x, nth):
    """The `nth` smallest, from 1, of distinct numbers, which change places (Hoare's selection)."""
    low, high = 0, x.shape[0] - 1
    while low < high:
        pivot, i, j = x[(low + high) // 2], low, high
        while i <= j:
            while x[i] < pivot:
                i += 1
            while x[j] > pivot:
                j -= 1
            if i <= j:
                x[i], x[j] = x[j], x[i]
                i += 1
                j -= 1
        if nth - 1 <= j:
            high = j
        elif nth - 1 >= i:
            low = i
        else:
            break
    return x[nth - 1]


@njit(**_JIT)
def lowest(score, key, copies, bit, low, high, pinned, want, order, out):
    """The `want` lowest-scored pages of one lane, into `out`: how many there are, or -1 if a score is NaN.

    Arguments as those of `victims`, for its lane; `order`: spare memory, int32 [slots].
    """
    if bit:
        there = np.empty(key.shape[0], np.int32)
        for s in range(key.shape[0]):
            there[s] = key[s] if copies[s] & bit else np.int32(-1)
        key = there
    low, high, pinned = np.int32(max(0, low)), np.int32(high), np.int32(pinned)
    if want != 1:
        return _lowest_many(score, key, low, high, pinned, want, out)
    s, bad = _lowest(score, key, low, high, pinned, order)
    if s < 0 and not bad:  # only protected pages are left
        s, bad = _lowest(score, key, np.int32(0), np.int32(_LAST), pinned, order)
    out[0] = s
    return -1 if bad else np.int64(s >= 0)


@njit(**_JIT)
def victims(score, key, copies, bit, excess, head, tail, pinned, out, counts):
    """Per lane, the `excess[t]` lowest pages among those with a copy in tier `bit` (0: in any).

    Order: pages that are not protected first, then by score, then the older (lower) key; so it depends neither on
    slots nor on what was fetched before, and caches of different size agree on it. Protected are keys below
    `head[t]` and at or above `tail[t]`: they leave last. `pinned` is a key that may not leave at all (-1: none).
    `counts` says how many there are, -1 where a score is NaN.
    """
    order = np.empty(key.shape[1], np.int32)
    for t in range(key.shape[0]):
        counts[t] = 0
        if excess[t] > 0:
            counts[t] = lowest(
                score[t], key[t], copies[t], bit, head[t], tail[t], pinned, excess[t], order, out[t]
            )  # fmt: skip


@njit(inline="always")
def _rank(guard, x, key):
    """A total order as one integer: guard, then the float32 in ascending order, then the key (under 2**31)."""
    value = (np.uint64(np.int64(_ordered(x)) + 2147483648) << np.uint64(31)) | np.uint64(key)
    if guard:
        value |= np.uint64(1) << np.uint64(63)
    return value


@njit(**_JIT)
def largest_sum(begin, end, row, keys, count, out):
    """Row lanes `begin` to `end`: the sum of the `count[m]` largest weights: what no cache of that size can exceed."""
    bits, strands = row.view(np.int32), np.empty(32, np.float64)  # not negative, so the bits have the weights' order
    for m in range(begin, end):
        want = min(count[m], keys)
        limit = _limit(bits[m, :keys], want)
        out[m] = _sum_above(row[m, :keys], bits[m, :keys], limit, want, strands)


@njit(**_JIT)
def _limit(x, want):
    """Of integers from 0, a number that `want` of them are above; where ties leave none, the `want`th largest."""
    low, high = np.int32(-1), np.int32(_LAST)  # at least `want` are above `low`; as many or fewer above `high`
    while high - low > 1:
        middle, above = np.int32(low + (high - low) // 2), np.int32(0)
        for k in range(x.shape[0]):
            above = np.int32(above + np.int32(x[k] > middle))
        if above == want:
            return middle
        if above > want:
            low = middle
        else:
            high = middle
    return high


@njit(**_JIT)
def _sum_above(x, bits, limit, want, strands):
    """The sum of `x` where `bits` are above `limit`, and of so many equal to it that they are `want`."""
    n, above = x.shape[0], np.int32(0)
    whole = n - n % 32
    strands[:] = 0.0
    for i in range(0, whole, 32):
        p, b = x[i : i + 32], bits[i : i + 32]
        for j in range(32):
            strands[j] += np.float64(p[j] if b[j] > limit else np.float32(0.0))
    for k in range(whole, n):
        strands[k - whole] += np.float64(x[k] if bits[k] > limit else np.float32(0.0))
    for k in range(n):
        above = np.int32(above + np.int32(bits[k] > limit))
    total = np.float64(np.int32(limit).view(np.float32)) * (want - above) if above < want else 0.0
    for j in range(32):
        total += strands[j]
    return total


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
