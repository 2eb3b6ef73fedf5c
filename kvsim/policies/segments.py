"""Policies that know what a token is part of: a trace's facts "kind" and "chunk", whole numbers per token."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from kvsim.cache.view import View, pages
from kvsim.errors import PolicyError
from kvsim.policies.history import Unbudgeted
from kvsim.policies.parameters import whole
from kvsim.registry import policy

# The codes of the fact "kind". OTHER is the frame of a round: time stamps, questions, markup of turns.
SYSTEM, TEXT, VISION, OTHER = range(4)


@policy("streaming-vlm")
class StreamingVlm(Unbudgeted):
    """Recent vision, less recent text, and the first and last of what was said before. arXiv 2510.09608; inference.py.

    Facts of the trace, per token: "kind" (0 system, 1 the model's running text, 2 vision, 3 other: user text and
    markup) and "chunk" (the round, one second of video, ascending; text from before the first round has one below
    0). Kept are the system prompt, vision of the newest `window` chunks, and all else of the newest `rounds` chunks.
    Older text is "previous text", of which the first `text_sink` and the last `text_window` tokens stay; all else
    older goes. There is no budget: what is held levels off, whatever the run's.

    Departures: open-loop rows keep their positions (the code shifts them together by default); older text stays where
    it is instead of moving to the front; a round's first token still sees what leaves as the round begins. A page is
    of the kind and chunk of its first token.
    """

    family = "window"
    evidence = "code"
    granularity = "token"
    needs = frozenset({"kind", "chunk"})
    columns = {"place": np.int32}  # of a text page, among all text pages
    window: int = 16
    rounds: int = 16
    text_sink: int = 512
    text_window: int = 512

    def __post_init__(self):
        super().__post_init__()
        whole(self, "window", "rounds", least=1)
        whole(self, "text_sink", "text_window")
        self._text: list[int] = []  # the chunk of each text page so far
        self._chunk = -(2**31)  # of the newest page

    def observe(self, view):
        fresh = (view.born == view.now) & (view.key >= 0)
        if not fresh.any():
            return
        keys, at = np.unique(view.key[fresh], return_index=True)
        kinds, chunks = (view.fact(name)[fresh][at].astype(np.int64) for name in ("kind", "chunk"))
        if not np.isin(kinds, (SYSTEM, TEXT, VISION, OTHER)).all():
            raise PolicyError(
                f'the fact "kind" holds {sorted(set(kinds.tolist()))} at step {view.now}',
                hint="write 0 for system, 1 for running text, 2 for vision, 3 for other",
            )
        if (np.diff(chunks, prepend=self._chunk) < 0).any():
            raise PolicyError(f'the fact "chunk" falls at step {view.now}', hint="number the rounds as they come")
        self._chunk = int(chunks[-1])
        places = np.zeros(view.keys, np.int32)
        is_text = kinds == TEXT
        places[keys[is_text]] = len(self._text) + np.arange(np.count_nonzero(is_text))
        self._text += chunks[is_text].tolist()
        np.copyto(view["place"], view.gather(places), where=fresh)

    def wanted(self, view: View) -> np.ndarray:
        kind, chunk, place = view.fact("kind").astype(np.intp), view.fact("chunk"), view["place"]
        recent = chunk > self._chunk - self.rounds
        said = bisect_right(self._text, max(self._chunk - self.rounds, -1))  # pages of previous text
        first, last = pages(self.text_sink, view.page_size), pages(self.text_window, view.page_size)
        running = (place < first) | (place >= said - last)
        seen = chunk > self._chunk - self.window
        return np.choose(kind, (np.ones_like(seen), running, seen, recent))
