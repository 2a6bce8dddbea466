"""Early exits: sure tokens go through the first layers only, and the deep ones catch up when a token is not sure.

FREE (Bae et al., Fast and Robust Early-Exiting Framework, EMNLP 2023; "synchronized parallel decoding"): one exit,
after a fixed layer. A token is sure when the two most probable tokens lie far apart there; it is emitted, and its
hidden state waits. The first token that is not sure goes through the deep layers together with all that wait, in one
batch. Every deep key and value is then what the whole model computes; nothing is copied from layer to layer.

Other than published: the exit is trained by cross-entropy of the tokens with weight 0.5, without the layer-wise
distillation that pulls shallow layers to deep ones; and the mixture below is estimated within each chunk.

The threshold may be given, or estimated from how confidence and agreement with the whole model go together: a mixture
of two Beta distributions, here `BetaMixture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from scipy.special import betaln, expit

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, Grammar, Hint, Notes, TokenDecoder, find_head
from vla.errors import ConfigError, explain
from vla.models.heads import HeadConfig
from vla.models.suffix import Array, TokenSuffix, best_tokens, joined, tensor_of
from vla.models.vla import Prefix

# (sample, confidence of each token since its last synchronisation, whether the whole model agrees with its exit)
Observe = Callable[[int, Sequence[float], Sequence[bool]], None]


class EarlyExitDecoder(TokenDecoder):
    """Greedy, through `layer` layers where they are sure enough. layer: 0 for the one the head was trained to exit at.

    threshold: a token exits when its two best probabilities, among valid tokens, differ by at least this much; 0 is the
    shallow model, 1 the whole one, token by token. passes: tokens of the longest list, however deep they went. Notes:
    "layers" that ran, a batch of waiting tokens counted once; "exits", share of the tokens that left early, by sample.
    """

    def __init__(self, layer: int = 0, threshold: float = 0.9, head: str = ""):
        super().__init__(head)
        if not 0 <= threshold <= 1:
            raise ConfigError(explain("decoder.threshold", "0..1", threshold, "The paper uses 0.9; 1 never exits."))
        self.layer, self.threshold = layer, threshold
        self.exact = threshold == 1

    def check(self, bundle: Bundle) -> None:
        head = bundle.config.head(self.head_in(bundle))
        exit_of(head, bundle.config.transformer.depth, self.layer)

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        layer = exit_of(suffix.config, suffix.depth, self.layer)
        return synchronised(suffix, grammar, layer, lambda sample: self.threshold)


class AdaptiveEarlyExitDecoder(TokenDecoder):
    """Early exits whose threshold follows the chunk that is being decoded.

    The published estimator learns over all calls. A decoder keeps nothing, so here each sample's mixture starts anew
    from the components given, Beta(low_alpha, low_beta) and Beta(high_alpha, high_beta), and learns from the
    synchronisations of its own chunk, one step each; it corrects the start and does not replace it. `vla calibrate
    exit` finds the start for a policy; the default is the published one and knows nothing of the model. ratio: see
    `BetaMixture.threshold`.
    Notes: those of EarlyExitDecoder, and "threshold" at the end, by sample.
    """

    exact = False

    def __init__(
        self, layer: int = 0, low_alpha: float = 1.0, low_beta: float = 2.0, high_alpha: float = 2.0,
        high_beta: float = 1.0, momentum: float = 0.95, ratio: float = 0.4, head: str = "",
    ):  # fmt: skip
        super().__init__(head)
        self.layer, self.momentum, self.ratio = layer, momentum, ratio
        self.low_alpha, self.low_beta, self.high_alpha, self.high_beta = low_alpha, low_beta, high_alpha, high_beta
        if not 0 < ratio < 1:
            raise ConfigError(explain("decoder.ratio", "between 0 and 1", ratio, "The paper uses 0.4."))
        self._mixture()  # refuses the rest

    def check(self, bundle: Bundle) -> None:
        head = bundle.config.head(self.head_in(bundle))
        exit_of(head, bundle.config.transformer.depth, self.layer)

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        layer = exit_of(suffix.config, suffix.depth, self.layer)
        mixtures = [self._mixture() for _ in hints]
        thresholds = [mixture.threshold(self.ratio) for mixture in mixtures]

        def observe(sample: int, confidence: Sequence[float], agreed: Sequence[bool]) -> None:
            mixtures[sample].update(confidence, agreed)
            thresholds[sample] = mixtures[sample].threshold(self.ratio)

        out = synchronised(suffix, grammar, layer, thresholds.__getitem__, observe)
        out.notes["threshold"] = thresholds
        return out

    def _mixture(self) -> BetaMixture:
        return BetaMixture((self.low_alpha, self.high_alpha), (self.low_beta, self.high_beta), self.momentum)


def exit_of(head: HeadConfig, depth: int, layer: int, key: str = "decoder.layer") -> int:
    """The layer to exit after: `layer`, or for 0 the head's own; ConfigError unless it lies in 1..depth - 1."""
    if not (layer or head.exit_layer):
        remedy = f"Train with heads.{head.name}.exit_layer=2, or name a layer."
        raise ConfigError(explain(key, "a head that was trained to exit", f"{head.name!r}", remedy))
    at = layer or head.exit_layer
    if not 1 <= at < depth:
        raise ConfigError(explain(key, f"1..{depth - 1}", at, "The exit lies inside the depth."))
    return at


def leading(logits: Array) -> tuple[list[list[int]], list[float]]:
    """Constrained logits [B, 1, V] -> the most probable token of each sample, in a list of its own, and how far its
    probability is above the next one's. One wait for the device."""
    if isinstance(logits, np.ndarray):
        last = logits[0, 0]  # on the host a batch is one
        token = int(last.argmax())
        odds = np.exp(last - last[token])
        total, odds[token] = float(odds.sum()), 0.0
        return [[token]], [(1 - float(odds.max())) / total]
    best = logits[:, 0].argmax(dim=-1, keepdim=True)
    two = logits[:, 0].softmax(dim=-1, dtype=torch.float32).topk(2).values
    rows = torch.cat((best.float(), two), dim=1).tolist()  # ids are exact as float32 up to 2^24
    return [[int(row[0])] for row in rows], [row[1] - row[2] for row in rows]


def synchronised(
    suffix: TokenSuffix, grammar: Grammar, layer: int, threshold: Callable[[int], float], observe: Observe | None = None
) -> DecodedTokens:
    """The loop of all early exits. threshold: of each sample, asked anew for every token.

    observe: told what a sample's synchronisation shows, of all tokens since its last one. Samples of a batch share the
    deep passes, so tokens of one may be filled sooner than they would be alone. Neither its tokens nor what is observed
    of it change by that: a sure token stands, and observations wait for the sample's own turn.
    """
    samples = range(suffix.batch)
    ids: list[list[int]] = [[] for _ in samples]
    remaining = [grammar.values] * suffix.batch
    shallow, rest = range(layer), range(layer, suffix.depth)
    chosen = [[suffix.start_id] for _ in samples]
    rows: list[Array] = []
    waiting: list[tuple[Array, list[list[int]], list[int]]] = []  # hidden [B, 1, D], its choices, values then to come
    sure: list[list[float]] = [[] for _ in samples]
    agreed: list[list[bool]] = [[] for _ in samples]
    layers, deepened = 0, [0] * suffix.batch
    while any(remaining):
        left = [[value] for value in remaining]
        x = suffix.through(suffix.embed(chosen), suffix.length + len(waiting), shallow)
        layers += layer
        logits = grammar.constrain(suffix.read(x), left)
        chosen, leads = leading(logits)
        for seen, lead in zip(sure, leads):
            seen.append(lead)
        waiting.append((x, chosen, remaining))
        # A threshold of 1 is never reached, although a token without rival has a confidence of 1.
        unsure = [s for s in samples if remaining[s] and not sure[s][-1] >= threshold(s) < 1]
        for sample in unsure:
            deepened[sample] += 1
        if unsure:
            states, guesses, before = zip(*waiting)
            deep = suffix.through(joined(states), suffix.length, rest)
            layers += len(rest)
            suffix.advance(len(waiting))
            if observe is None:
                whole = grammar.constrain(suffix.read(deep[:, -1:]), left)
            else:
                whole = grammar.constrain(suffix.read(deep), list(zip(*before)))
            said = best_tokens(whole)
            if observe is not None:
                for place, guess in enumerate(guesses):
                    for sample in samples:
                        agreed[sample].append(said[sample][place] == guess[sample][0])
                for sample in unsure:
                    observe(sample, sure[sample], agreed[sample])
                    sure[sample], agreed[sample] = [], []
            waiting.clear()
            if len(unsure) == len(samples):
                logits = whole[:, -1:]
            else:
                picked = torch.tensor(unsure).to(suffix.device, non_blocking=True)
                logits = tensor_of(logits).index_copy(0, picked, tensor_of(whole)[picked, -1:])
            chosen = [said[sample][-1:] if sample in unsure else chosen[sample] for sample in samples]
        rows.append(logits)
        remaining = [grammar.append(*sample) for sample in zip(ids, remaining, chosen)]
    exits = [1 - count / len(row) for count, row in zip(deepened, ids)]
    notes: Notes = {"layers": float(layers), "exits": exits}
    return DecodedTokens.of(ids, len(rows), rows, notes)


# ---- the threshold, from how confidence and agreement go together ----
class BetaMixture:
    """Two Beta distributions of confidence: of tokens the exit gets wrong (the lower mean), and of those it gets right.

    alpha, beta: their parameters at the start, low then high. momentum: of what is known, against each update.

    One update is a step of online EM (Cappé and Moulines 2009): what is averaged are the moments, not the parameters,
    so that a single token is a valid update, and the parameters follow from mean and variance. The published code
    overwrites the E-step by the labels, so its responsibilities are 0 or 1. Here the label is evidence beside the
    confidence: a component is responsible for (x, label) by share * Beta(x) * P(label), with its own P(agree), which is
    learned too; labels alone would be P = 0 and 1. A sure token that the deep layers overrule by chance can then belong
    to the high component, as tokens like it do.
    """

    EDGE = 1e-4  # densities at 0 and 1 may be infinite
    GRAIN = 1e-6  # of the start in every update: a component that explains nothing stays what it was
    _POINTS = np.maximum(np.arange(10) / 10, EDGE)[:, None]  # where a threshold may lie
    _POINT_LOGS = np.log(_POINTS), np.log1p(-_POINTS)

    def __init__(self, alpha: Sequence[float] = (1.0, 2.0), beta: Sequence[float] = (2.0, 1.0), momentum: float = 0.95):
        if len(alpha) != 2 or len(beta) != 2 or min(*alpha, *beta) <= 0:
            got = f"{tuple(alpha)}, {tuple(beta)}"
            raise ConfigError(explain("alpha, beta", "two numbers above 0 each", got, "Start at (1, 2), (2, 1)."))
        if not 0 <= momentum < 1:
            raise ConfigError(explain("momentum", "0 up to below 1", momentum, "The paper uses 0.95."))
        self.momentum = momentum
        a, b = np.array(alpha, float), np.array(beta, float)
        mean = a / (a + b)
        square = mean * (a + 1) / (a + b + 1)
        # [4, 2]: of the responsibilities, and of them times x, x^2 and agreement
        self._start = 0.5 * np.stack((np.ones(2), mean, square, [0.1, 0.9]))
        self._moments = self._start.copy()

    @property
    def share(self) -> np.ndarray:
        """Of each component, float64[2]."""
        return self._moments[0] / self._moments[0].sum()

    @property
    def agreement(self) -> np.ndarray:
        """P(agree) of each component, float64[2]."""
        return self._moments[3] / self._moments[0]

    @property
    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), float64[2] each: those with the mean and variance that were seen."""
        mean, square = self._moments[1] / self._moments[0], self._moments[2] / self._moments[0]
        strength = mean * (1 - mean) / (square - mean**2) - 1
        return mean * strength, (1 - mean) * strength

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Of each component at x, float64[n] in 0..1 -> float64[n, 2]"""
        x = self._inside(np.asarray(x, float))[:, None]
        return self._log_density(np.log(x), np.log1p(-x))

    def update(self, confidences: Sequence[float], agreed: Sequence[bool]) -> None:
        """One step of EM on what one synchronisation (or more) showed; both of one length, at least 1."""
        x, right = self._inside(np.asarray(confidences, float)), np.asarray(agreed, bool)
        agreement = self._inside(self.agreement)
        label = np.log(np.where(right[:, None], agreement, 1 - agreement))
        responsible = _shares(np.log(self.share) + self.log_density(x) + label)
        seen = np.stack((np.ones_like(x), x, x**2, right)) @ responsible / len(x)
        self._moments = self.momentum * self._moments + (1 - self.momentum) * (seen + self.GRAIN * self._start)

    def threshold(self, ratio: float = 0.4) -> float:
        """The confidence to exit from: the smallest of 0, 0.1, ..., 0.9 from which on, up to 0.9, the high component
        has more than `ratio` of the two densities; 1, never, where there is none.

        The paper takes the smallest such point. That is another one only where the ratio falls again with confidence,
        as at the left end of a wide high component: exits among the least sure tokens are not what is wanted.
        """
        high = int(np.argmax(self._moments[1] / self._moments[0]))
        logs = self._log_density(*self._POINT_LOGS)
        # A share above the ratio: odds above its odds.
        above = logs[:, high] - logs[:, 1 - high] > np.log(ratio / (1 - ratio)) + 1e-8
        count = int(np.argmin(above[::-1])) if not above.all() else len(above)
        return (10 - count) / 10 if count else 1.0

    def _log_density(self, log_x: np.ndarray, log_rest: np.ndarray) -> np.ndarray:
        """log_x, log_rest: log(x) and log(1 - x), float64[n, 1] -> float64[n, 2]"""
        alpha, beta = self.parameters
        return (alpha - 1) * log_x + (beta - 1) * log_rest - betaln(alpha, beta)

    def _inside(self, x: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(x, self.EDGE), 1 - self.EDGE)  # np.clip takes several times as long


def _shares(logs: np.ndarray) -> np.ndarray:
    """Softmax over two, float64[n, 2], in three calls where scipy's takes many."""
    odds = logs[:, 1] - logs[:, 0]
    return np.stack((expit(-odds), expit(odds)), axis=1)


def measure(suffix: TokenSuffix, grammar: Grammar, layer: int) -> tuple[list[float], list[bool]]:
    """Decode through the whole depth; of every token, how sure the exit was and whether it would have said the same."""
    confidences: list[float] = []
    agreed: list[bool] = []

    def observe(sample: int, confidence: Sequence[float], same: Sequence[bool]) -> None:
        confidences.extend(confidence)
        agreed.extend(same)

    synchronised(suffix, grammar, layer, lambda sample: 1.0, observe)
    return confidences, agreed


@torch.inference_mode()
def measured(
    bundle: Bundle, prefixes: Iterable[Prefix], layer: int = 0, head: str = ""
) -> tuple[list[float], list[bool]]:
    """`measure` of all tokens of a head behind some prefixes. layer, head: as EarlyExitDecoder's.

    Tens of chunks or more; of scenes that no success is measured on.
    """
    EarlyExitDecoder(layer, head=head).check(bundle)
    name, config = find_head(bundle, head, "tokens"), bundle.config
    confidences: list[float] = []
    agreed: list[bool] = []
    grammar = None
    for prefix in prefixes:
        suffix = TokenSuffix(bundle.model, prefix, name)
        grammar = grammar or Grammar(bundle.action_tokenizers[name], config.horizon, config.action_dim, prefix.device)
        more = measure(suffix, grammar, exit_of(suffix.config, suffix.depth, layer))
        suffix.truncate(0)
        confidences += more[0]
        agreed += more[1]
    if not confidences:
        raise ConfigError(explain("prefixes", "at least one", "none", "Give prefixes of validation frames."))
    return confidences, agreed


def fitted(confidences: Sequence[float], agreed: Sequence[bool], rounds: int = 200) -> BetaMixture:
    """The mixture of what `measured` found. rounds: of EM over all tokens; of the start, 0.95 ** 200 is left."""
    mixture = BetaMixture()
    for _ in range(rounds):
        mixture.update(confidences, agreed)
    return mixture
