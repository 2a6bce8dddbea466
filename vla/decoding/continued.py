"""Any tokens, FAST's above all, continued where the last chunk is: decoded greedily, then projected.

FAST tokens cannot be forced as bins can: each coefficient is a sum over the whole chunk, so d given actions fix no
token, only d linear combinations of the coefficients of each dimension, which are rounded: a list of tokens that gives
those actions may not exist, let alone be greedy's. tests/decoding/test_chunks.py goes through all lists of a small
tokenizer: behind most of its chunks no list begins with the two actions that come next in them. (That says nothing of
how near a list of a large one could come, nor at what price.) But the transform is orthonormal: the chunk with those
actions whose coefficients lie nearest to the decoded ones is the decoded chunk with its first d actions replaced. What
it does not give is a rest that was chosen knowing them, hence the soft mask.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, exactly
from vla.decoding.chunks import check_reach, continued, goals


class ContinuedDecoder:
    """Greedy tokens; then the committed actions, to the last bit as normalised, come first.

    reach: so many actions behind them go over from the last chunk to the new one by RTC's soft mask; None for as far as
    the last one goes, 0 leaves them as decoded. What the last one says there is older than what the new one has seen:
    the shipped bins join smoothly with 2, and lose success with more. inner: what finds the tokens, see `exactly`; it
    changes how long that takes and nothing else. head: name of the token head, "" for the first. The ids are greedy's,
    the actions are not, so not exact; without a previous chunk they are. Notes: inner's, and "moved", largest change of
    a committed action, normalised, by sample.
    """

    exact = False

    def __init__(self, reach: int | None = 2, inner: str = "autoregressive", head: str = ""):
        check_reach(reach)
        self.reach, self.inner, self.head = reach, inner, head
        self._inner = exactly(inner, head)

    def check(self, bundle: Bundle) -> None:
        self._inner.check(bundle)

    def decode(self, given: DecodeInput) -> Decoded:
        out = self._inner.decode(given)
        targets, masks, counts = goals(given, self.reach)
        grippers = given.bundle.embodiment.grippers
        actions = np.stack([continued(*sample, grippers) for sample in zip(out.actions, targets, masks)])
        moved = [
            float(np.abs(a[:count] - b[:count]).max(initial=0)) for a, b, count in zip(actions, out.actions, counts)
        ]
        return replace(out, actions=actions, notes={**out.notes, "moved": moved})
