"""Object caches that are queues: ARC, S3-FIFO, 2Q, LIRS, CLOCK and GDSF as machines that requests pass through.

Each lane has a machine of its own: linked lists of page numbers, some of them *ghosts*, pages that are not in the
cache but remembered. It gets the step's requests and its contents say which pages stay on the GPU. With one request
per step it is the published algorithm, request by request. All of them have in common:

- A step is one moment. First come the pages on the GPU that it uses, then those that join it (fetched or new), each in
  ascending order of key: nothing that a step reads leaves before it is read, and room is made one newcomer at a time.
  The prompt arrives as one moment, and its rows are no hits. A newcomer is always admitted, though one of many may have
  to leave in the step it came.
- What is protected (`sink`, `recent`, a page still being filled) is no part of the algorithm: the machine has what
  these pages leave of the budget, and a page enters it once it is not protected. `recent=0` is the bare algorithm.
- Sizes are counted in pages. A page larger than all of the machine is not admitted and moves nothing in it.
- Pages that leave for another reason (a batch, a smaller split, a sliding window) are forgotten without a ghost. They
  leave in the order in which the machine would have let them go.
- In the lossy regime an evicted page never returns, so no ghost is ever hit: ARC is then LRU with a second list that
  never adapts, S3-FIFO and 2Q are their first two queues, and LIRS is what hits alone promote.

Departures: the ones named at each policy, and that eviction follows attention, so that a step sees up to one page more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kvsim.cache.view import locked, protected
from kvsim.policies.parameters import choice, flag, number, refuse, whole
from kvsim.registry import policy

_JIT: Any = {"cache": True, "nogil": True, "boundscheck": False}
# parts of the one kernel that Python calls: no way in from Python halves the time to compile them
_PART: Any = {"nogil": True, "boundscheck": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_KIND: Any = {"inline": "always"}  # parts that say what a kind does: where the kind is known, only that is compiled

_ARC, _S3, _2Q, _CLOCK, _LIRS, _GDSF = range(6)
_ONE, _TWO, _THREE, _FOUR = (
    1,
    2,
    3,
    4,
)  # lists; the first two hold what is in the cache (LIRS: see there), others ghosts
# columns of `page`: links of the list a page is in, links of LIRS's stack, and what is known of it
_LIST, _STACK, _FREQ, _SEEN, _LEFT, _RANK, _MARK = 0, 3, 6, 7, 8, 9, 10
_P, _COUNT, _LEAVERS = 0, 1, 2  # of `memory`: a number of the algorithm's own, pages in the cache, how many have left
_LIR, _HIR, _AWAY = 1, 2, 3  # LIRS: long reuse distance or short, and short ones that only the stack remembers
_NOTHING, _USED, _JOINS = 0, 1, 2  # what a step asks for
_ELSEWHERE, _TOP = np.float32(-(2**30)), np.float32(2**24)


class Machine(NamedTuple):
    """One lane. Keys are page numbers; a list's newest end is `ends[list, 0]`, its oldest `ends[list, 1]`."""

    page: np.ndarray  # int32 [keys, 11]
    ends: np.ndarray  # int32 [5, 2]; -1: empty
    load: np.ndarray  # float64 [5]: sizes in each list
    memory: np.ndarray  # float64 [3]
    value: np.ndarray  # float64 [keys]: GDSF's H
    size: np.ndarray  # float64 [keys], in pages
    rule: np.ndarray  # float64: parameters


# -- lists -----------------------------------------------------------------------------------------------------


@njit(**_PART)
def _push(m, k, where, link=_LIST):
    """Page `k`, which is in no list, becomes the newest of a list."""
    newest = m.ends[where, 0]
    m.page[k, link], m.page[k, link + 1], m.page[k, link + 2] = where, newest, -1
    if newest >= 0:
        m.page[newest, link + 2] = k
    else:
        m.ends[where, 1] = k
    m.ends[where, 0] = k
    m.load[where] += m.size[k]


@njit(**_PART)
def _pull(m, k, link=_LIST):
    """Page `k` out of the list it is in."""
    where, older, newer = m.page[k, link], m.page[k, link + 1], m.page[k, link + 2]
    if newer >= 0:
        m.page[newer, link + 1] = older
    else:
        m.ends[where, 0] = older
    if older >= 0:
        m.page[older, link + 2] = newer
    else:
        m.ends[where, 1] = newer
    m.page[k, link] = 0
    m.load[where] -= m.size[k]
    if m.ends[where, 0] < 0:
        m.load[where] = 0.0


@njit(**_PART)
def _move(m, k, where):
    _pull(m, k)
    _push(m, k, where)


@njit(**_PART)
def _admit(m, k, where):
    _push(m, k, where)
    m.memory[_COUNT] += 1


@njit(**_PART)
def _leaves(m, k):
    """Note that `k` is no longer in the cache, and when."""
    m.memory[_COUNT] -= 1
    m.memory[_LEAVERS] += 1
    m.page[k, _LEFT] = int(m.memory[_LEAVERS])


@njit(**_PART)
def _remember(m, k, where, most):
    """`k` as the newest ghost of a list that holds at most `most`."""
    if m.size[k] > most:
        return
    while m.load[where] + m.size[k] > most:
        _pull(m, m.ends[where, 1])
    _push(m, k, where)


@njit(**_KIND)
def _inside(kind, m, k):
    if kind == _LIRS:
        return m.page[k, _FREQ] == _LIR or m.page[k, _FREQ] == _HIR
    return m.page[k, _LIST] == _ONE or m.page[k, _LIST] == _TWO


@njit(**_KIND)
def _held(kind, m):
    """Sizes of all that is in the cache."""
    return m.memory[_P] + m.load[_ONE] if kind == _LIRS else m.load[_ONE] + m.load[_TWO]


# -- ARC: T1, T2, ghosts B1, B2; `memory[_P]` is p --------------------------------------------------------------


@njit(**_PART)
def _arc_replace(m, in_b2):
    one = m.load[_ONE]
    if (one > 0 and (one > m.memory[_P] or (one == m.memory[_P] and in_b2))) or m.load[_TWO] == 0:
        k, ghosts = m.ends[_ONE, 1], _THREE
    else:
        k, ghosts = m.ends[_TWO, 1], _FOUR
    _move(m, k, ghosts)
    _leaves(m, k)


@njit(**_PART)
def _arc_miss(m, k, room):
    was, need = m.page[k, _LIST], m.size[k]
    if was:  # a ghost: its list was too short
        one, two = m.load[_THREE], m.load[_FOUR]
        if was == _THREE:
            m.memory[_P] = min(m.memory[_P] + max(two / one, 1.0), room)
        else:
            m.memory[_P] = max(m.memory[_P] - max(one / two, 1.0), 0.0)
        _pull(m, k)
        while m.load[_ONE] + m.load[_TWO] + need > room:
            _arc_replace(m, was == _FOUR)
        _admit(m, k, _TWO)
        return
    while m.load[_ONE] + m.load[_TWO] + need > room:
        if m.load[_ONE] + m.load[_THREE] + need > room:
            if m.load[_THREE] > 0:
                _pull(m, m.ends[_THREE, 1])
                _arc_replace(m, False)
            else:
                out = m.ends[_ONE, 1]
                _pull(m, out)
                _leaves(m, out)
        else:
            if m.load[_ONE] + m.load[_TWO] + m.load[_THREE] + m.load[_FOUR] >= 2 * room and m.load[_FOUR] > 0:
                _pull(m, m.ends[_FOUR, 1])
            _arc_replace(m, False)
    _admit(m, k, _ONE)


# -- S3-FIFO: small and main, ghosts of small; `memory[_P]`: has anything been evicted yet? --------------------------


@njit(**_PART)
def _small(m, room):
    return max(1.0, np.floor(room * m.rule[0]))


@njit(**_PART)
def _s3_evict(m, room):
    m.memory[_P] = 1.0
    if m.load[_TWO] > room - _small(m, room) or m.load[_ONE] == 0:
        while True:
            k = m.ends[_TWO, 1]
            if m.page[k, _FREQ] == 0:
                _pull(m, k)
                _leaves(m, k)
                return
            m.page[k, _FREQ] = min(m.page[k, _FREQ], 3) - 1
            _move(m, k, _TWO)
    while m.load[_ONE] > 0:
        k = m.ends[_ONE, 1]
        if m.page[k, _FREQ] < m.rule[2]:
            _pull(m, k)
            _remember(m, k, _THREE, np.floor(room * m.rule[1]))
            _leaves(m, k)
            return
        m.page[k, _FREQ] = 0
        _move(m, k, _TWO)


@njit(**_PART)
def _s3_miss(m, k, room):
    ghost = m.page[k, _LIST] == _THREE
    if ghost:
        _pull(m, k)
    while m.load[_ONE] + m.load[_TWO] + m.size[k] > room:
        _s3_evict(m, room)
    spill = m.rule[3] > 0 and m.memory[_P] == 0 and m.load[_ONE] >= _small(m, room)
    m.page[k, _FREQ] = 0
    _admit(m, k, _TWO if ghost or spill else _ONE)


# -- 2Q: A1in, Am, ghosts A1out ---------------------------------------------------------------------------------


@njit(**_PART)
def _2q_evict(m, room):
    if m.load[_ONE] > max(1.0, np.floor(room * m.rule[0])) or m.load[_TWO] == 0:
        k = m.ends[_ONE, 1]
        _pull(m, k)
        _remember(m, k, _THREE, np.floor(room * m.rule[1]))
    else:
        k = m.ends[_TWO, 1]
        _pull(m, k)
    _leaves(m, k)


@njit(**_PART)
def _2q_miss(m, k, room):
    ghost = m.page[k, _LIST] == _THREE
    if ghost:
        _pull(m, k)
    while m.load[_ONE] + m.load[_TWO] + m.size[k] > room:
        _2q_evict(m, room)
    _admit(m, k, _TWO if ghost else _ONE)


# -- CLOCK: one queue with counters -----------------------------------------------------------------------------


@njit(**_PART)
def _clock_evict(m):
    while True:
        k = m.ends[_ONE, 1]
        if m.page[k, _FREQ] == 0:
            _pull(m, k)
            _leaves(m, k)
            return
        m.page[k, _FREQ] -= 1
        _move(m, k, _ONE)


@njit(**_PART)
def _clock_miss(m, k, room):
    while m.load[_ONE] + m.size[k] > room:
        _clock_evict(m)
    m.page[k, _FREQ] = 0
    _admit(m, k, _ONE)


# -- GDSF: one list in order of the last request; `memory[_P]` is L ------------------------------------------------


@njit(**_PART)
def _worth(m, k):
    by_size = m.size[k] if m.rule[0] > 0 else 1.0  # a cost that grows with the size cancels it
    m.value[k] = m.memory[_P] + m.page[k, _FREQ] * abs(m.rule[0]) / by_size


@njit(**_PART)
def _gdsf_evict(m):
    k = least = m.ends[_ONE, 1]
    while k >= 0:
        if m.value[k] < m.value[least]:
            least = k
        k = m.page[k, _LIST + 2]
    m.memory[_P] = m.value[least]
    _pull(m, least)
    _leaves(m, least)


@njit(**_PART)
def _gdsf_miss(m, k, room):
    compete = m.rule[1] > 0
    while not compete and m.load[_ONE] + m.size[k] > room:
        _gdsf_evict(m)
    m.page[k, _FREQ] = 1
    _worth(m, k)
    _admit(m, k, _ONE)
    while m.load[_ONE] > room:
        _gdsf_evict(m)


# -- LIRS: queue Q, ghosts by when they left, stack S in links of its own; `memory[_P]`: sizes of the LIR pages -------


@njit(**_PART)
def _short(m, room):
    return max(1.0, np.floor(room * m.rule[0]))


@njit(**_PART)
def _to_top(m, k):
    if m.page[k, _STACK]:
        _pull(m, k, _STACK)
    _push(m, k, _THREE, _STACK)


@njit(**_PART)
def _prune(m):
    """The stack ends with a LIR page."""
    k = m.ends[_THREE, 1]
    while k >= 0 and m.page[k, _FREQ] != _LIR:
        _pull(m, k, _STACK)
        if m.page[k, _FREQ] == _AWAY:
            _pull(m, k)
            m.page[k, _FREQ] = 0
        k = m.ends[_THREE, 1]


@njit(**_PART)
def _evict_hir(m):
    k = m.ends[_ONE, 1]
    _pull(m, k)
    _leaves(m, k)
    m.page[k, _FREQ] = _AWAY if m.page[k, _STACK] else 0
    if m.page[k, _STACK]:
        _push(m, k, _TWO)


@njit(**_PART)
def _queue(m, k, room):
    """`k` joins the end of Q, which makes room for it."""
    while m.load[_ONE] > 0 and m.load[_ONE] + m.size[k] > _short(m, room):
        _evict_hir(m)
    m.page[k, _FREQ] = _HIR
    _push(m, k, _ONE)


@njit(**_PART)
def _demote(m, room):
    """The LIR page at the end of the stack becomes a HIR page outside it."""
    k = m.ends[_THREE, 1]
    _pull(m, k, _STACK)
    m.memory[_P] -= m.size[k]
    m.page[k, _FREQ] = 0
    if m.size[k] > _short(m, room):
        _leaves(m, k)
    else:
        _queue(m, k, room)
    _prune(m)


@njit(**_PART)
def _promote(m, k, room):
    """`k`, on top of the stack, becomes a LIR page, and others make room for it."""
    m.page[k, _FREQ] = _LIR
    m.memory[_P] += m.size[k]
    while m.memory[_P] > room - _short(m, room) and m.ends[_THREE, 1] >= 0:
        _demote(m, room)


@njit(**_PART)
def _lirs_hit(m, k, room):
    if m.page[k, _FREQ] == _LIR:
        _to_top(m, k)
        _prune(m)
    elif m.page[k, _STACK]:
        _pull(m, k)
        _to_top(m, k)
        _promote(m, k, room)
    else:
        _to_top(m, k)
        _move(m, k, _ONE)
    _limit(m, room)


@njit(**_PART)
def _lirs_miss(m, k, room):
    short = _short(m, room)
    if m.page[k, _FREQ] == _AWAY:  # in the stack: a shorter reuse distance than that of some LIR page
        _pull(m, k)
        _to_top(m, k)
        m.memory[_COUNT] += 1
        _promote(m, k, room)
    elif m.size[k] <= short:
        m.memory[_COUNT] += 1
        if m.memory[_P] + m.size[k] <= room - short:
            m.page[k, _FREQ] = _LIR
            m.memory[_P] += m.size[k]
        else:
            _queue(m, k, room)
        _to_top(m, k)
        _prune(m)
    _limit(m, room)


@njit(**_PART)
def _limit(m, room):
    """The longest gone ghosts leave a stack that has grown too tall."""
    while m.load[_THREE] > m.rule[1] * room and m.load[_TWO] > 0:
        k = m.ends[_TWO, 1]
        _pull(m, k)
        _pull(m, k, _STACK)
        m.page[k, _FREQ] = 0


# -- one step of any machine ------------------------------------------------------------------------------------


@njit(**_KIND)
def _hit(kind, m, k, room):
    if kind == _ARC:
        _move(m, k, _TWO)
    elif kind == _2Q:
        if m.page[k, _LIST] == _TWO:
            _move(m, k, _TWO)
    elif kind == _LIRS:
        _lirs_hit(m, k, room)
    elif kind == _CLOCK:
        m.page[k, _FREQ] = min(m.page[k, _FREQ] + 1, int(m.rule[0]))
    else:
        m.page[k, _FREQ] += 1
        if kind == _GDSF:
            _worth(m, k)
            _move(m, k, _ONE)


@njit(**_KIND)
def _miss(kind, m, k, room):
    if kind == _ARC:
        _arc_miss(m, k, room)
    elif kind == _S3:
        _s3_miss(m, k, room)
    elif kind == _2Q:
        _2q_miss(m, k, room)
    elif kind == _CLOCK:
        _clock_miss(m, k, room)
    elif kind == _LIRS:
        _lirs_miss(m, k, room)
    else:
        _gdsf_miss(m, k, room)


@njit(**_KIND)
def _evict(kind, m, room):
    if kind == _ARC:
        m.memory[_P] = min(m.memory[_P], room)
        _arc_replace(m, False)
    elif kind == _S3:
        _s3_evict(m, room)
    elif kind == _2Q:
        _2q_evict(m, room)
    elif kind == _CLOCK:
        _clock_evict(m)
    elif kind == _LIRS:
        if m.load[_ONE] > 0:
            _evict_hir(m)
        else:
            _demote(m, room)
    else:
        _gdsf_evict(m)


@njit(**_KIND)
def _forget(kind, m, k):
    """`k` left the cache, or became protected, without the machine's doing."""
    _leaves(m, k)
    if kind != _LIRS:
        if kind == _ARC and m.page[k, _LIST] == _TWO:  # T1 may grow to all but what is left of T2
            while m.load[_THREE] > 0 and m.load[_THREE] > m.load[_TWO] - m.size[k]:
                _pull(m, m.ends[_THREE, 1])
        _pull(m, k)
        return
    if m.page[k, _STACK]:
        _pull(m, k, _STACK)
    if m.page[k, _FREQ] == _LIR:
        m.memory[_P] -= m.size[k]
    else:
        _pull(m, k)
    m.page[k, _FREQ] = 0
    _prune(m)


@njit(**_KIND)
def _rank(kind, m, room):
    """Number what is in the cache by the order in which it would leave if nothing more were asked for."""
    n, most = 0, 3
    if kind in (_ARC, _2Q):
        a, b, one = m.ends[_ONE, 1], m.ends[_TWO, 1], m.load[_ONE]
        least = m.memory[_P] if kind == _ARC else max(1.0, np.floor(room * m.rule[0]))
        while a >= 0 or b >= 0:
            if a >= 0 and (one > least or b < 0):
                m.page[a, _RANK] = n
                one -= m.size[a]
                a = m.page[a, _LIST + 2]
            else:
                m.page[b, _RANK] = n
                b = m.page[b, _LIST + 2]
            n += 1
        return
    if kind == _LIRS:
        a = m.ends[_ONE, 1]
        while a >= 0:
            m.page[a, _RANK] = n
            n += 1
            a = m.page[a, _LIST + 2]
        a = m.ends[_THREE, 1]
        while a >= 0:
            if m.page[a, _FREQ] == _LIR:
                m.page[a, _RANK] = n
                n += 1
            a = m.page[a, _STACK + 2]
        return
    if kind == _GDSF:
        count = int(m.memory[_COUNT])
        keys, values = np.empty(count, np.int64), np.empty(count, np.float64)
        a = m.ends[_ONE, 1]
        while a >= 0:
            keys[n], values[n] = a, m.value[a]
            n += 1
            a = m.page[a, _LIST + 2]
        order = np.argsort(values, kind="mergesort")
        for n in range(count):
            m.page[keys[order[n]], _RANK] = n
        return
    if kind == _S3:  # the small queue first; then what main and the promoted have in chances left
        a = m.ends[_ONE, 1]
        while a >= 0:
            if m.page[a, _FREQ] < m.rule[2]:
                m.page[a, _RANK] = n
                n += 1
            a = m.page[a, _LIST + 2]
    else:
        most = int(m.rule[0])
    for chances in range(most + 1):
        a = m.ends[_TWO if kind == _S3 else _ONE, 1]
        while a >= 0:
            if min(m.page[a, _FREQ], most) == chances:
                m.page[a, _RANK] = n
                n += 1
            a = m.page[a, _LIST + 2]
        if kind == _S3 and chances == 0:
            a = m.ends[_ONE, 1]
            while a >= 0:
                if m.page[a, _FREQ] >= m.rule[2]:
                    m.page[a, _RANK] = n
                    n += 1
                a = m.page[a, _LIST + 2]


def _machine(kind):
    """The kernel of one kind, which is compiled when it is first used."""

    @njit(**_JIT)
    def step(
        rule, now, keys, key, resident, last, arrived, sizes, budget, head, tail,
        page, ends, load, memory, value, size, rank,
    ):  # fmt: skip
        """One moment of every lane; table columns [lanes, slots], machines [lanes, ...]. Fills `rank`."""
        slots = key.shape[1]
        asked = np.empty(keys, np.uint8)
        for t in range(key.shape[0]):
            m = Machine(page[t], ends[t], load[t], memory[t], value[t], size, rule)
            room, found = float(budget[t]), 0
            asked[:] = _NOTHING
            for s in range(slots):
                k = key[t, s]
                if k < 0 or not resident[t, s]:
                    continue
                size[k] = sizes[t, s]
                if k < head[t] or k >= tail[t]:
                    room -= size[k]
                    m.page[k, _SEEN] = 0
                    continue
                again = m.page[k, _SEEN] != arrived[t, s] + 1
                if _inside(kind, m, k) and not again:
                    m.page[k, _MARK] = now + 1
                    found += 1
                    if last[t, s] == now:
                        asked[k] = _USED
                elif again or last[t, s] == now:
                    m.page[k, _SEEN] = arrived[t, s] + 1
                    asked[k] = _JOINS
            if found != m.memory[_COUNT]:
                for k in range(keys):
                    if _inside(kind, m, k) and m.page[k, _MARK] != now + 1:
                        _forget(kind, m, k)
            for k in range(keys):
                if asked[k] == _USED:
                    _hit(kind, m, k, room)
            for k in range(keys):
                if asked[k] == _JOINS and m.size[k] <= room:
                    _miss(kind, m, k, room)
            while m.memory[_COUNT] > 0 and _held(kind, m) > room:
                _evict(kind, m, room)
            _rank(kind, m, room)
            for s in range(slots):
                k = key[t, s]
                if k < 0 or not resident[t, s]:
                    rank[t, s] = _ELSEWHERE
                elif k < head[t] or k >= tail[t]:
                    rank[t, s] = _TOP
                elif _inside(kind, m, k):
                    rank[t, s] = m.page[k, _RANK]
                else:
                    rank[t, s] = m.page[k, _LEFT] - m.memory[_LEAVERS] - 1

    return step


class _Queue:
    """What the machines have in common. `_rule` are a kind's parameters."""

    family = "classic"
    columns = {"rank": np.float32}
    state_bytes = 44  # of a page in its machine
    _kind: int
    _step: Any

    def __init_subclass__(cls) -> None:
        cls._step = staticmethod(_machine(cls._kind))

    def observe(self, view):
        lanes = view.shape[0] * view.shape[1]
        self._grow(lanes, view.keys)
        head, tail = protected(self, view.budget.reshape(lanes), view.page_size)
        tail = view.keys - np.maximum(tail, int(view.tokens % view.page_size > 0))
        seen = (view.key, view.resident, view.last, view.arrived, view.size)
        self._step(
            self._rule, view.now, view.keys, *(locked(x.reshape(lanes, -1)) for x in seen),
            locked(view.budget.reshape(lanes)), head, tail, *self._machines, view["rank"].reshape(lanes, -1),
        )  # fmt: skip

    def score(self, view):
        """What the machine holds, by its order; below it what it let go; on top what joined since it looked."""
        rank = view["rank"]
        elsewhere = np.where(view.resident, _TOP, view.last - view.now - 1)
        return np.where(rank == _ELSEWHERE, elsewhere, rank)

    def queues(self, lane: int = 0) -> list[list[int]]:
        """The keys in each list of a lane, oldest first (LIRS: Q, ghosts, and the stack from its end)."""
        page, ends = self._machines[0][lane], self._machines[1][lane]
        found: list[list[int]] = []
        for where in range(1, len(ends)):
            link = _STACK if self._kind == _LIRS and where == _THREE else _LIST
            found.append(keys := [])
            k = ends[where, 1]
            while k >= 0:
                keys.append(int(k))
                k = page[k, link + 2]
        return found

    def holds(self, key: int, lane: int = 0) -> bool:
        """Is a page in the machine's cache? Ghosts are not."""
        page = self._machines[0][lane, key]
        return page[_FREQ] in (_LIR, _HIR) if self._kind == _LIRS else page[_LIST] in (_ONE, _TWO)

    def memory(self, lane: int = 0) -> float:
        """A lane's number: ARC's p, GDSF's L, the sizes of LIRS's LIR pages."""
        return float(self._machines[3][lane, _P])

    @property
    def _rule(self) -> np.ndarray:
        raise NotImplementedError

    def _grow(self, lanes: int, keys: int) -> None:
        old = getattr(self, "_machines", None)
        have = 0 if old is None else len(old[-1])
        if keys <= have:
            return
        n = max(64, 2 * have, keys)
        page, value, size = np.zeros((lanes, n, 11), np.int32), np.zeros((lanes, n)), np.zeros(n)
        ends, load, memory = np.full((lanes, 5, 2), -1, np.int32), np.zeros((lanes, 5)), np.zeros((lanes, 3))
        if old is not None:
            page[:, :have], ends, load, memory, value[:, :have], size[:have] = old
        self._machines = page, ends, load, memory, value, size


@policy("arc")
class Arc(_Queue):
    """Adaptive replacement: pages seen once (T1) and more often (T2), and a boundary p between them that ghosts move.

    Megiddo and Modha, FAST 2003, figure 4; libCacheSim's ARC.c. A hit makes a page the newest of T2. A ghost of T1 that
    is asked for again adds max(1, |B2| / |B1|) to p, a ghost of T2 takes max(1, |B1| / |B2|) from it, within 0 and the
    capacity c. Room is made by the oldest of T1 where |T1| > p (or = p, for a ghost of T2), else by the oldest of T2.
    T1 and its ghosts hold at most c, all four lists 2 c. p is a real number, as in the paper's formula.
    """

    evidence = "code"
    _kind = _ARC

    @property
    def _rule(self):
        return np.zeros(3)


@policy("s3-fifo")
class S3Fifo(_Queue):
    """A small queue that most pages only pass, a main queue with second chances, and ghosts of the small one.

    Yang et al., SOSP 2023; libCacheSim's S3FIFO.c. `small` and `ghost` are shares of the capacity (rounded down, small
    to one at least), `threshold` the hits that take a page from the small queue to the main one instead of to the
    ghosts. The main queue puts a page with hits back, its count capped at 3 and less one. A ghost that is asked for
    enters the main queue. `warm="main"`: until the first eviction, pages that find the small queue full enter the main
    one, as in libCacheSim since the end of 2024; "small", as in the paper, lets all of them queue up in the small one.

    Departures: libCacheSim admits no page as large as the small queue or larger; this admits it.
    """

    evidence = "code"
    small: float = 0.1
    ghost: float = 0.9
    threshold: int = 2
    warm: str = "small"
    _kind = _S3

    def __post_init__(self):
        number(self, "small", most=1)
        number(self, "ghost")
        whole(self, "threshold")
        choice(self, "warm", "small", "main")

    @property
    def _rule(self):
        return np.array([self.small, self.ghost, self.threshold, self.warm == "main"], np.float64)


@policy("2q")
class TwoQ(_Queue):
    """New pages queue up in A1in; those asked for again after they left it, while A1out remembers them, live in an LRU.

    Johnson and Shasha, VLDB 1994, the full version; libCacheSim's TwoQ.c. `a1in` (a hit there changes nothing) and
    `a1out` (page numbers only) are shares of the capacity, rounded down, A1in to one at least. Room is made by the
    oldest of A1in where that holds more than its share, else by the LRU.

    Departures: a page of A1out that is asked for leaves it before room is made, as in libCacheSim; the paper is silent.
    """

    evidence = "code"
    a1in: float = 0.25
    a1out: float = 0.5
    _kind = _2Q

    def __post_init__(self):
        number(self, "a1in", most=1)
        number(self, "a1out")

    @property
    def _rule(self):
        return np.array([self.a1in, self.a1out, 0.0])


@policy("clock")
class Clock(_Queue):
    """A FIFO queue with second chances: the oldest page that was hit goes round once more instead of leaving.

    Corbató 1968; libCacheSim's Clock.c. `bits`: of a page's counter of hits; each round takes one from it, as in GCLOCK
    (Smith, ACM TODS 3, 1978).
    """

    evidence = "code"
    bits: int = 1
    _kind = _CLOCK

    def __post_init__(self):
        whole(self, "bits", least=1, most=16)

    @property
    def _rule(self):
        return np.array([2**self.bits - 1, 0.0, 0.0])


@policy("lirs")
class Lirs(_Queue):
    """Ranks by reuse distance: pages whose last two uses were close (LIR) keep the cache, others share a small queue.

    Jiang and Zhang, SIGMETRICS 2002. A stack S in order of last use holds the LIR pages, others more recent than the
    oldest of them, and ghosts; a page asked for again while it is in S becomes LIR, and the oldest LIR page joins
    the queue Q, a share `hir` of the capacity (the paper's 1 %, at least one). While LIR pages have room left, every
    new page is one. `stack`: S holds at most so many times the capacity, and ghosts that left first go first; the paper
    has no bound and names it as a choice, libCacheSim's is 2. A page larger than Q is not admitted; like a
    page that Q let go, it stays only while there is room, as there may be with pages of many sizes.

    Departures: with a capacity of one, every page is in Q. libCacheSim's LIRS.c also demotes a LIR page whenever
    a page of Q outside S is hit, which the paper does not.
    """

    evidence = "code"
    hir: float = 0.01
    stack: float = 2.0
    _kind = _LIRS

    def __post_init__(self):
        number(self, "hir", most=1)
        number(self, "stack", least=1)

    @property
    def _rule(self):
        return np.array([self.hir, self.stack, 0.0])


@policy("gdsf")
class Gdsf(_Queue):
    """Greedy-dual size-frequency: the lowest H = L + uses * cost / size leaves, and L becomes its H.

    Cherkasova, HPL-98-69R1; libCacheSim's GDSF.cpp. H is computed at each use with L as it is then; among equals the
    one used longest ago leaves. `cost`: a number, or "fetch", the time to bring the page back in units of one
    page's, which is its size: H is then L + uses, LFU with ageing, as it is with pages of one size. `compete`: a
    newcomer gets its H before room is made and may be the lowest itself, as in libCacheSim since 2024; by default it is
    admitted, with the L of those that made room.
    """

    evidence = "code"
    state_bytes = 52  # with H
    cost: float | str = 1.0
    compete: bool = False
    _kind = _GDSF

    def __post_init__(self):
        numeric = isinstance(self.cost, (int, float)) and not isinstance(self.cost, bool) and 0 < self.cost < np.inf
        if not numeric and self.cost != "fetch":
            refuse(self, "cost", 'write a number above zero, or "fetch"')
        flag(self, "compete")

    @property
    def _rule(self):
        return np.array([-1.0 if self.cost == "fetch" else self.cost, self.compete, 0.0], np.float64)
