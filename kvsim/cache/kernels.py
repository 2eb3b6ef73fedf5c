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

from kvsim.cache.demand import NEARLY

_JIT: Any = {"cache": True, "nogil": True, "boundscheck": False}
TOGETHER = 8  # lanes that `_tally` adds up
_LAST = 2**31 - 1  # above every key and every ordered score
_TINY = np.finfo(np.float32).tiny  # visible mass below this is none: what it is divided by would be infinite


@njit(inline="always")
def spare(slots):
    """Memory that `touch_lane` works in."""
    return np.empty((4, slots), np.float32), (np.empty(64, np.float32), np.empty(64, np.int32))


@njit(**_JIT)
def _sum_and_count(x, least, strands):
    """Sum of a row, and how many are at least `least`.

    In 64 strands, side by side: no chain of additions, and the same order on any machine. `strands`: spare memory for
    their sums and counts, float32 and int32 [64].
    """
    n = x.shape[0]
    many, whole = n - n % 512, n - n % 64
    sums, counts = strands
    sums[:] = 0.0
    counts[:] = 0
    for i in range(0, many, 512):
        p = x[i : i + 512]
        for j in range(64):
            a, b, c, d = p[j], p[j + 64], p[j + 128], p[j + 192]
            e, f, g, h = p[j + 256], p[j + 320], p[j + 384], p[j + 448]
            sums[j] += ((a + b) + (c + d)) + ((e + f) + (g + h))
            low = (np.int32(a >= least) + np.int32(b >= least)) + (np.int32(c >= least) + np.int32(d >= least))
            high = (np.int32(e >= least) + np.int32(f >= least)) + (np.int32(g >= least) + np.int32(h >= least))
            counts[j] += low + high
    for i in range(many, whole, 64):
        p = x[i : i + 64]
        for j in range(64):
            sums[j] += p[j]
            counts[j] += np.int32(p[j] >= least)
    p = x[whole:]
    for j in range(p.shape[0]):
        sums[j] += p[j]
        counts[j] += np.int32(p[j] >= least)
    total, count = np.float32(0.0), np.int32(0)
    for j in range(16):
        total += (sums[j] + sums[j + 16]) + (sums[j + 32] + sums[j + 48])
    for j in range(64):
        count = np.int32(count + counts[j])
    return total, count


@njit(inline="always")
def _is_used(peak, key, need, need_key):
    """The predicate of `kvsim.cache.demand.Use`, for one page of one row lane."""
    return (peak > need) | ((peak == need) & (key >= need_key))


@njit(**_JIT)
def _read(row, peak, keys, need, need_key, page_size, strands):
    """A row's sum, and how many pages are used."""
    total, used = _sum_and_count(row[:keys], need, strands)
    if page_size > 1:
        used = _sum_and_count(peak[:keys], need, strands)[1]
    for k in range(min(keys, need_key)):
        used = np.int32(used - np.int32(peak[k] == need))
    return total, used


@njit(**_JIT)
def row_totals(row, peak, keys, need, need_key, page_size, total, used):
    """Per row lane: the row's sum and how many pages are used."""
    strands = spare(0)[1]
    for m in range(row.shape[0]):
        total[m], used[m] = _read(row[m], peak[m], keys, need[m], need_key[m], page_size, strands)


@njit(inline="always")
def touch_lane(
    t, scratch, pages, key, row, peak, keys, weights, mass, last, uses, now, renormalise, use, absolute, page_size,
    missing, need, need_key, total, used, hit, found, places,
):  # fmt: skip
    """What one step does to lane `t` of the table, in which `pages` lines are not empty.

    `weights`, `mass`, `last`, `uses`: columns, or None for those that nobody reads. `need`, `need_key` [row_lanes]: the
    limits of `Use`, from which a page counts as used on the full row; a lane of several rows compares means of peaks
    and limits. Where pages are of one token, `peak` is `row`. `renormalise`: divide each row by what of it is visible,
    as the softmax over the surviving pages would; a page is then used when that weight reaches `use` (`absolute`) or
    `use` / visible tokens. `missing`: tokens the newest page still lacks. Returns per row lane `total` and `used`, as
    `row_totals` does, the visible mass `hit`, and in `found` the visible pages that are used by the full row; and
    gives back what `weights` is, or would be, in memory of `scratch`. `places`: None, or what `_tally` needs.

    Short loops over one lane, of few arrays each: a processor does eight lines at once only where no more than a few
    arrays could overlap, and one lane stays in its nearest cache.
    """
    group = row.shape[0] // key.shape[0]
    now, (work, strands) = np.int32(now), scratch
    weight, weight_sum, top, top_sum = work[0], work[1], work[2], work[3]
    page, least, least_key, factor = key[t], np.float32(0.0), np.int32(0), np.float32(1.0)
    for m in range(t * group, (t + 1) * group):
        total[m], used[m] = _read(row[m], peak[m], keys, need[m], need_key[m], page_size, strands)
        hit[m], found[m] = _look_up(row[m], page, need[m], need_key[m], strands, weight)
        if renormalise:
            factor = np.float32(1.0) / hit[m] if hit[m] >= _TINY else np.float32(0.0)
        if page_size > 1:
            found[m] = _look_up(peak[m], page, need[m], need_key[m], strands, top)[1]
        if places is not None:
            tops = top if page_size > 1 else weight
            _tally(t, row[m], peak[m], keys, page, weight, tops, need[m], need_key[m], places)
        if group > 1:
            _add(weight_sum, weight, factor, m == t * group)
            if page_size > 1:
                _add(top_sum, top, factor, m == t * group)
        least += need[m]
        least_key = max(least_key, need_key[m])
    if group > 1:
        weight, top, factor = weight_sum, top_sum, np.float32(1.0) / np.float32(group)
        least *= factor
    _note_weights(weight, factor, None if weights is None else weights[t], None if mass is None else mass[t])
    if last is not None or uses is not None:
        if renormalise:
            tokens = np.float32(max(1, pages * page_size - missing))
            least = np.float32(use) if absolute else np.float32(use) / tokens * NEARLY
        if page_size > 1:
            _note_weights(top, factor, None, None)
        peaks, first = top if page_size > 1 else weight, max(np.int32(0), np.int32(least_key))
        if last is not None:
            _note_last(peaks, page, least, first, now, last[t])
        if uses is not None:
            _note_uses(peaks, page, least, first, uses[t])
    return weight


@njit(**_JIT)
def touch(
    begin, end, key, row, peak, keys, weights, mass, last, uses, now, renormalise, use, absolute, page_size, missing,
    need, need_key, total, used, hit, found, places,
):  # fmt: skip
    """Lanes `begin` to `end`: sum their rows, look up every page's weight, update the table, and count.

    Arguments as those of `touch_lane`.
    """
    scratch = spare(key.shape[1])
    for t in range(begin, end):
        touch_lane(
            t, scratch, _filled(key[t]), key, row, peak, keys, weights, mass, last, uses, now, renormalise, use,
            absolute, page_size, missing, need, need_key, total, used, hit, found, places,
        )  # fmt: skip


@njit(**_JIT)
def _note_weights(x, factor, weights, mass):
    """`x` times `factor`, in place, into the columns that are kept."""
    for s in range(x.shape[0]):
        x[s] = value = x[s] * factor
        if weights is not None:
            weights[s] = value
        if mass is not None:
            mass[s] += value


@njit(**_JIT)
def _note_last(peak, key, least, first, now, last):
    """When a page was used; the peak of an empty line is 0, and no limit is below that."""
    if least > 0 and first == 0:  # whatever the key
        for s in range(peak.shape[0]):
            last[s] = now if peak[s] >= least else last[s]
    else:
        for s in range(peak.shape[0]):
            last[s] = now if _is_used(peak[s], key[s], least, first) else last[s]


@njit(**_JIT)
def _note_uses(peak, key, least, first, uses):
    for s in range(key.shape[0]):
        uses[s] = np.int32(uses[s] + np.int32(_is_used(peak[s], key[s], least, first)))


@njit(**_JIT)
def _tally(t, row, peak, keys, page, weight, top, need, need_key, places):
    """Add the weights and the used pages at each place of a stack, which is a slot here (`kvsim.cache.stack`).

    `places`: sums of weights and numbers of pages, [groups, slots + 1], of `TOGETHER` lanes each, which stay in a near
    cache; by lane the number of those that have not entered the stacks (their weights are at 0); the key from which on
    they are; by lane, the first key that is visible.
    """
    mass, found, found_new, entered, visible = places
    mass, found, need_key = mass[t // TOGETHER], found[t // TOGETHER], np.int32(need_key)
    for k in range(max(entered, visible[t]), keys):
        mass[0] += row[k]
        found_new[t] += _is_used(peak[k], k, need, need_key)
    entered = np.int32(entered)
    for s in range(page.shape[0]):
        mass[s + 1] += weight[s] * np.float32(page[s] < entered)
    if need > 0 and need_key <= 0:  # a page of any key; the peak of an empty line is 0
        for s in range(page.shape[0]):
            found[s + 1] += np.int32((top[s] >= need) & (page[s] < entered))
    else:
        for s in range(page.shape[0]):
            standing = (page[s] >= 0) & (page[s] < entered)
            found[s + 1] += np.int32(standing & _is_used(top[s], page[s], need, need_key))


@njit(**_JIT)
def _look_up(row, key, need, need_key, strands, found):
    """What a row says of every page of a lane, 0 on empty lines; their sum, and how many of the pages it uses."""
    for s in range(key.shape[0]):
        found[s] = row[np.uint32(key[s])] if key[s] >= 0 else np.float32(0.0)
    total, used = _sum_and_count(found, need, strands)
    if need == 0 or need_key > 0:  # not the empty lines, nor those that tie but are too old
        first = max(np.int32(0), np.int32(need_key))
        for s in range(key.shape[0]):
            used = np.int32(used - np.int32((found[s] == need) & (key[s] < first)))
    return total, used


@njit(**_JIT)
def _filled(key):
    """Lines with a page."""
    count = np.int32(0)
    for s in range(key.shape[0]):
        count = np.int32(count + np.int32(key[s] >= 0))
    return count


@njit(**_JIT)
def _add(total, x, factor, first):
    """`x` times `factor` onto `total`, which the first one starts."""
    if first:
        total[:] = 0.0
    for s in range(x.shape[0]):
        total[s] += x[s] * factor


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
def insert(columns, copies, free, free_count, new_key, now, slot_of):
    """One page of key `new_key` into a free slot of every lane; `slot_of` says which.

    `columns` [7, lanes, slots]: key, born, arrived, last, then those that start at zero, whatever their type.
    """
    for t in range(copies.shape[0]):
        slot_of[t] = s = take_line(t, columns[0], copies, free, free_count, new_key)
        for i in range(1, columns.shape[0]):
            columns[i, t, s] = now if i < 4 else 0


@njit(inline="always")
def take_line(t, key, copies, free, free_count, new_key):
    """A free slot of one lane, from now on that of `new_key`."""
    free_count[t] -= 1
    s = free[t, free_count[t]]
    copies[t, s] = 1
    key[t, s] = new_key
    return s


@njit(**_JIT)
def land(missing, copies, arrived, now):
    """The pages a step waited for are on the GPU."""
    for t in range(missing.shape[0]):
        for s in range(missing.shape[1]):
            if missing[t, s]:
                copies[t, s] |= 1
                arrived[t, s] = now


@njit(**_JIT)
def filled_lines(key, most):
    """The slots of each lane's pages, up to `most` (the rest: slot 0), and whether their keys ascend in every lane."""
    lines, ascending = np.zeros((key.shape[0], most), np.int64), True
    for t in range(key.shape[0]):
        n, before = 0, np.int32(-1)
        for s in range(key.shape[1]):
            if key[t, s] >= 0:
                ascending = ascending and key[t, s] > before
                lines[t, n], before = s, key[t, s]
                n += 1
    return lines, ascending


@njit(**_JIT)
def copy_lines(order, counts, columns, copies, new_columns, new_copies):
    """The first `counts[t]` lines that `order` lists, side by side into another table."""
    for t in range(order.shape[0]):
        for i in range(columns.shape[0]):
            for n in range(counts[t]):
                new_columns[i, t, n] = columns[i, t, order[t, n]]
        for n in range(counts[t]):
            new_copies[t, n] = copies[t, order[t, n]]


@njit(**_JIT)
def release(key, copies, free, free_count, victims, counts):
    """Drop the chosen slots for good: they become free."""
    for t in range(key.shape[0]):
        release_lane(t, key, copies, free, free_count, victims[t], counts[t])


@njit(inline="always")
def release_lane(t, key, copies, free, free_count, victims, count):
    for i in range(count):
        s = victims[i]
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
def add_up(held, counts, read):
    """`read`: the pages `held` in the lanes of each layer. Returns how many victims there are, or -1 as `victims`."""
    total, group = 0, held.shape[0] // read.shape[0]
    for t in range(held.shape[0]):
        read[t // group] += held[t]
        total = -1 if total < 0 or counts[t] < 0 else total + counts[t]
    return total


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
def _line_up(score, key, low, high, order):
    """`order`: of the keys from `low` to below `high` as their scores are, `_LAST` for all others. Returns the least of
    them, and whether any page's score is NaN."""
    best, bad = np.int32(_LAST), np.int32(0)
    for s in range(key.shape[0]):
        bad = np.int32(bad | np.int32((key[s] >= 0) & (score[s] != score[s])))
        order[s] = _ordered(np.float32(score[s])) if (key[s] >= low) & (key[s] < high) else np.int32(_LAST)
        best = min(best, order[s])
    return best, bad > 0


@njit(**_JIT)
def _line_up_protected(score, key, low, high, pinned, order):
    for s in range(key.shape[0]):
        here = (key[s] >= 0) & (key[s] != pinned) & ((key[s] < low) | (key[s] >= high))
        order[s] = _ordered(np.float32(score[s])) if here else np.int32(_LAST)


@njit(**_JIT)
def _first(order, key, best):
    """The slot of the lowest (oldest) key among those of order `best`; there is one."""
    oldest = np.int32(_LAST)
    for s in range(key.shape[0]):
        oldest = min(oldest, key[s] if order[s] == best else np.int32(_LAST))
    whole = key.shape[0] - key.shape[0] % 64
    for begin in range(0, whole, 64):
        block, found = key[begin : begin + 64], np.int32(0)
        for j in range(64):
            found = np.int32(found | np.int32(block[j] == oldest))
        if found:
            whole = begin
            break
    while key[whole] != oldest:
        whole += 1
    return whole


@njit(**_JIT)
def _append_first(order, key, want, out, n):
    """Up to `want` slots into `out`, which has `n`: those of the lowest (order, key). Returns how many it has then."""
    want = min(want - n, _count_to(order, _LAST - 1))
    if want == 0:
        return n
    limit, last = _nth(order, want), np.int32(_LAST)
    ties = want - _count_to(order, limit - 1)
    if _count_to(order, limit) > want:  # the older ones
        tied = np.empty(key.shape[0], np.int32)
        for s in range(key.shape[0]):
            tied[s] = key[s] if order[s] == limit else np.int32(_LAST)
        last = np.int32(_nth(tied, ties))
    limit, whole = np.int32(limit), key.shape[0] - key.shape[0] % 64
    for begin in range(0, key.shape[0], 64):
        if begin < whole:  # few blocks have any
            o, k, found = order[begin : begin + 64], key[begin : begin + 64], np.int32(0)
            for j in range(64):
                found = np.int32(found | np.int32((o[j] < limit) | ((o[j] == limit) & (k[j] <= last))))
            if not found:
                continue
        for s in range(begin, min(begin + 64, key.shape[0])):
            if order[s] < limit or (order[s] == limit and key[s] <= last):
                out[n] = s
                n += 1
    return n


@njit(**_JIT)
def _count_to(x, most):
    count, most = np.int32(0), np.int32(most)
    for s in range(x.shape[0]):
        count = np.int32(count + np.int32(x[s] <= most))
    return count


@njit(**_JIT)
def _nth(x, nth):
    """A number that `nth` of `x` are not above; where ties leave none, the `nth` smallest. `_LAST` is no number."""
    least, most = np.int32(_LAST), np.int32(-_LAST - 1)
    for s in range(x.shape[0]):
        least = min(least, x[s])
    if _count_to(x, least) >= nth:  # scores often tie
        return np.int64(least)
    for s in range(x.shape[0]):
        most = max(most, x[s] if x[s] < np.int32(_LAST) else np.int32(-_LAST - 1))
    low, high = np.int64(least), np.int64(most)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = _count_to(x, middle)
        if count == nth:
            return middle
        if count > nth:
            high = middle
        else:
            low = middle
    return high


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
    best, bad = _line_up(score, key, low, min(high, pinned) if pinned >= 0 else high, order)  # the newest is pinned
    if bad:
        return -1
    if want == 1 and best < np.int32(_LAST):
        out[0] = _first(order, key, best)
        return 1
    count = _append_first(order, key, want, out, 0)
    if count < want:  # only protected pages are left
        _line_up_protected(score, key, low, high, pinned, order)
        count = _append_first(order, key, want, out, count)
    return count


@njit(**_JIT)
def victims(begin, end, score, key, copies, bit, excess, head, tail, pinned, out, counts):
    """Lanes `begin` to `end`: the `excess[t]` lowest pages among those with a copy in tier `bit` (0: in any).

    Order: pages that are not protected first, then by score, then the older (lower) key; so it depends neither on
    slots nor on what was fetched before, and caches of different size agree on it. Protected are keys below
    `head[t]` and at or above `tail[t]`: they leave last. `pinned` is the newest key if it may not leave at all, or -1.
    `counts` says how many there are, -1 where a score is NaN.
    """
    order = np.empty(key.shape[1], np.int32)
    for t in range(begin, end):
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


def forget_older(loop: Any) -> None:
    """Have the loops of another file, of which `loop` is one, compiled again where this file is newer: numba looks at
    the date of a loop's own file, not at those that it takes helpers from."""
    name = f"{Path(loop.py_func.__code__.co_filename).stem}.*.nbi"
    for index in Path(loop.stats.cache_path).glob(name):
        if index.stat().st_mtime < Path(__file__).stat().st_mtime:
            index.unlink(missing_ok=True)


def compiled() -> bool:
    """Are the kernels in numba's cache on disk, so that a first call need not compile?"""
    return any(Path(touch.stats.cache_path).glob("kernels.touch-*.nbi"))
