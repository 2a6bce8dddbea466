"""Bin tokens behind a forced prefix: the actions that are executed meanwhile come first, and only the rest is decoded.

With one token per value, in the order of the actions, a chunk that begins with given actions is a token list that
begins with given tokens. What follows is then chosen behind what really happens, which a chunk decoded from scratch
knows nothing of, and the forced tokens cost one pass together.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from vla.decoding.autoregressive import one_by_one
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, encoded_again, probabilities
from vla.models.suffix import Array, TokenSuffix, best_tokens


class ForcedPrefixDecoder(TokenDecoder):
    """Greedy decoding under the constraint that the context's committed actions come first; greedy without any.

    Not exact where actions are committed: it gives what greedy decoding gives behind those tokens, token by token. The
    committed actions come back as their bins, half a bin off at most inside [-1, 1]. The draft of its hints is binding.
    Confidence: of the tokens that were chosen, 1.0 if none was. Notes: "forced", forced tokens, by sample.
    """

    exact = False
    tokenizer = "bins"  # a FAST token says something of all actions: for those there is ContinuedDecoder

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        normalizer, tokenizer = given.bundle.action_normalizer, given.bundle.action_tokenizers[head]
        horizon = given.bundle.config.horizon
        return [
            Hint(seed)
            if context.committed is None or not len(context.committed)
            else Hint(seed, encoded_again(tokenizer, normalizer.normalize(context.committed[:horizon])))
            for seed, context in zip(given.seeds, given.contexts)
        ]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        forced = [hint.draft for hint in hints]
        common = min(len(draft) for draft in forced)  # the cache has one length: what all have forced goes in at once
        ids = [list(draft[:common]) for draft in forced]

        def choose(logits: Array) -> list[list[int]]:
            return [
                [draft[len(row)]] if len(row) < len(draft) else best
                for draft, row, best in zip(forced, ids, best_tokens(logits))
            ]

        rows = one_by_one(suffix, grammar, ids, choose)
        confidence = [1.0] * len(ids)
        if rows:
            sure = probabilities(rows, [row[common:] for row in ids])
            chosen = [row[len(draft) - common :] for row, draft in zip(sure, forced)]
            confidence = [fmean(row) if row else 1.0 for row in chosen]
        return DecodedTokens(ids, len(rows), confidence, {"forced": [float(len(draft)) for draft in forced]})
