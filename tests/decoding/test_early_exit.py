"""Early exits: the ends of the threshold are the two models, waiting tokens are filled exactly, the estimate learns."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts.test_decoders import prompt, tokenizer_of
from tests.decoding.test_continuous import bundle_of
from tests.models.test_vla import make
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import DecodeInput, Grammar, Hint, TokenDecoder
from vla.decoding.early_exit import (
    AdaptiveEarlyExitDecoder,
    BetaMixture,
    EarlyExitDecoder,
    fitted,
    leading,
    measure,
    measured,
)
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.models.vla import Vla
from vla.policy import InferContext
from vla.tokenizers import BinTokenizer

DEPTH, EXIT = 4, 2
DEEP = TransformerConfig((ExpertConfig(32, 64), ExpertConfig(16, 32)), DEPTH, 4, 2, 8)


def model_of(tokenizer, seed: int = 0):
    """Random, with opinions; the deep layers speak more softly, so that the exit agrees with them now and then."""
    heads = (HeadConfig("words", "tokens", 1, tokenizer.vocab_size, exit_layer=EXIT),)
    model, generator = make(horizon=8, heads=heads, transformer=DEEP), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, std in (
            (model.heads["words"].logits.weight, 1.2), (model.heads["words"].embedding.weight, 0.3),
            (model.text.weight, 1.0),
            *((weight, 0.3 if layer < EXIT else 0.25) for layer in range(DEPTH)
              for weight in model.transformer.layers[layer].parameters() if weight.ndim == 2),
        ):  # fmt: skip
            weight.normal_(std=std, generator=generator)
    return model


class Setting:
    def __init__(self, kind: str):
        self.tokenizer = tokenizer_of(kind)
        self.models = [model_of(self.tokenizer, seed) for seed in range(3)]
        self.grammar = Grammar(self.tokenizer, 8, 2)

    @torch.inference_mode()
    def suffix(self, seed: int, prompts) -> TokenSuffix:
        model = self.models[seed % len(self.models)]
        return TokenSuffix(model, model.prefix(model.prefix_segments(*prompts), self.grammar.values), "words")

    @torch.inference_mode()
    def decode(self, decoder: TokenDecoder, seed: int, prompts):
        suffix = self.suffix(seed, prompts)
        return decoder.generate(suffix, self.grammar, [Hint()] * len(prompts[-1])), suffix


@pytest.fixture(scope="module", params=["bins", "fast"])
def setting(request) -> Setting:
    return Setting(request.param)


def sample_of(prompts, row: int):
    images, *rest = prompts
    return {name: image[row : row + 1] for name, image in images.items()}, *(part[row : row + 1] for part in rest)


@torch.inference_mode()
def shallow_greedy(model, grammar, prompts) -> list[int]:
    """Greedy decoding of the first layers alone, without a cache."""
    head, ids = model.heads["words"], []
    while remaining := grammar.before_each(grammar.values, ids)[-1]:
        inputs = torch.tensor([[head.start_id, *ids]])
        segments = [*model.prefix_segments(*prompts), model.suffix_segment("words", head.embed(inputs))]
        hidden = model.run_with_exits(segments, (EXIT,))[0][-1]
        ids.append(int(grammar.constrain(head.logits(hidden)[:, -1:], [[remaining]]).argmax()))
    return ids


def test_threshold_1_is_the_whole_model(setting) -> None:
    decoder = EarlyExitDecoder(threshold=1.0)
    assert decoder.exact and not EarlyExitDecoder(threshold=0.99).exact
    for seed in range(5):
        prompts = prompt(seed, 2)
        greedy, _ = setting.decode(AutoregressiveDecoder(), seed, prompts)
        out, suffix = setting.decode(decoder, seed, prompts)
        assert out.ids == greedy.ids and out.passes == greedy.passes
        assert out.confidence == pytest.approx(greedy.confidence, abs=1e-4)
        assert out.notes == {"layers": out.passes * DEPTH, "exits": [0.0, 0.0]}
        assert suffix.length == out.passes  # nothing waits


def test_threshold_0_is_the_shallow_model(setting) -> None:
    different = 0
    for seed in range(5):
        prompts = prompt(seed, 1)
        out, suffix = setting.decode(EarlyExitDecoder(threshold=0.0), seed, prompts)
        assert out.ids == [shallow_greedy(setting.models[seed % 3], setting.grammar, prompts)]
        assert out.notes == {"layers": out.passes * EXIT, "exits": [1.0]}
        assert suffix.length == 0  # no token was ever whole
        greedy, _ = setting.decode(AutoregressiveDecoder(), seed, prompts)
        different += out.ids != greedy.ids
    assert different > 2  # the two models do not say the same


@pytest.mark.parametrize("batch", [1, 2])
def test_keys_and_values_behind_a_synchronisation_are_those_of_the_whole_model(setting, batch) -> None:
    exits, compared = [], 0
    for seed in range(6):
        prompts = prompt(seed, batch)
        out, suffix = setting.decode(EarlyExitDecoder(threshold=0.4), seed, prompts)
        assert (suffix.host is None) == (batch > 1)  # both ways of running a part of the depth
        exits += out.notes["exits"]
        count = min(suffix.length, *map(len, out.ids))  # behind the end of a sample stands what nobody reads
        if not count:
            continue
        compared += count
        inputs = torch.tensor([[suffix.start_id, *row[: count - 1]] for row in out.ids])
        whole = setting.suffix(seed, prompts)
        whole.host = None
        with torch.inference_mode():
            whole.logits(inputs)
        cache, end = suffix.prefix.cache, suffix.prefix.length + count
        assert cache.length == suffix.prefix.length + suffix.length
        for mine, other in ((cache.keys, whole.prefix.cache.keys), (cache.values, whole.prefix.cache.values)):
            assert torch.allclose(mine[..., :end, :], other[..., :end, :], atol=1e-5)
    assert 0.2 < np.mean(exits) < 0.8 and compared > 10


@pytest.mark.parametrize("decoder", [EarlyExitDecoder(threshold=0.4), AdaptiveEarlyExitDecoder(low_beta=4.0)])
def test_a_pass_waits_for_the_device_once(setting, decoder, monkeypatch) -> None:
    """With tensors that say they are elsewhere: what leaves them is counted, and is the same."""
    plain = [setting.decode(decoder, seed, prompt(seed, 1 + seed % 2))[0] for seed in range(4)]
    waits: list[Tensor] = []
    fetch = torch.Tensor.tolist
    monkeypatch.setattr(Vla, "host_weights", lambda self, head: None)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor) or fetch(tensor), raising=False)
    exits = []
    for seed, expected in enumerate(plain):
        waits.clear()
        out, _ = setting.decode(decoder, seed, prompt(seed, 1 + seed % 2))
        assert out.ids == expected.ids and out.notes == expected.notes
        deep = (out.notes["layers"] - out.passes * EXIT) / (DEPTH - EXIT)
        assert len(waits) == out.passes + deep + 1  # the last one for all probabilities
        exits += out.notes["exits"]
    assert 0 < np.mean(exits) < 1


def test_waiting_tokens_are_counted_once() -> None:
    setting = Setting("bins")
    out, suffix = setting.decode(EarlyExitDecoder(threshold=0.4), 1, prompt(1, 1))
    exits = round(out.notes["exits"][0] * setting.grammar.values)
    deep_calls = setting.grammar.values - exits  # one sample: every token that stays calls the deep layers
    assert out.passes == setting.grammar.values
    assert out.notes["layers"] == out.passes * EXIT + deep_calls * (DEPTH - EXIT)
    assert suffix.length <= out.passes


@pytest.mark.parametrize(
    "decoder",
    [EarlyExitDecoder(threshold=0.4), EarlyExitDecoder(layer=1, threshold=0.2), AdaptiveEarlyExitDecoder(momentum=0.5)],
)
def test_a_batch_gives_what_single_samples_give(setting, decoder) -> None:
    different = set()
    for seed in range(3):
        prompts = prompt(seed, 3)
        together, _ = setting.decode(decoder, seed, prompts)
        alone = [setting.decode(decoder, seed, sample_of(prompts, row))[0] for row in range(3)]
        assert together.ids == [one.ids[0] for one in alone]
        assert together.confidence == pytest.approx([one.confidence[0] for one in alone], abs=1e-4)
        for name in set(together.notes) - {"layers"}:
            assert together.notes[name] == pytest.approx([one.notes[name][0] for one in alone])
        different |= {round(value, 6) for value in together.notes.get("threshold", ())}
    assert len(different) != 1  # an adaptive threshold moves


def test_what_is_measured_is_what_two_plain_models_say() -> None:
    setting = Setting("bins")
    suffix = setting.suffix(0, prompt(3, 1))
    with torch.inference_mode():
        confidences, agreed = measure(suffix, setting.grammar, EXIT)
    greedy, _ = setting.decode(AutoregressiveDecoder(), 0, prompt(3, 1))
    model, head = setting.models[0], setting.models[0].heads["words"]
    inputs = torch.tensor([[head.start_id, *greedy.ids[0][:-1]]])
    with torch.inference_mode():
        segments = [*model.prefix_segments(*prompt(3, 1)), model.suffix_segment("words", head.embed(inputs))]
        logits = head.logits(model.run_with_exits(segments, (EXIT,))[0][-1])[0]
    best = logits.softmax(-1).topk(2)
    assert confidences == pytest.approx((best.values[:, 0] - best.values[:, 1]).tolist(), abs=1e-4)
    assert agreed == [a == b for a, b in zip(best.indices[:, 0].tolist(), greedy.ids[0])]
    assert 0 < sum(agreed) < len(agreed)


# ---- the mixture ----
def drawn(low, high, agree, count: int = 4000, share: float = 0.4):
    """Confidences and labels of a known mixture."""
    rng = np.random.default_rng(0)
    is_high = rng.random(count) >= share
    x = np.where(is_high, rng.beta(*high, count), rng.beta(*low, count))
    return x, rng.random(count) < np.where(is_high, agree[1], agree[0])


def test_the_mixture_finds_two_known_components() -> None:
    low, high, agree = (2.0, 6.0), (8.0, 2.0), (0.2, 0.95)
    mixture = fitted(*drawn(low, high, agree), 400)
    alpha, beta = mixture.parameters
    assert alpha == pytest.approx([2.0, 8.0], rel=0.15) and beta == pytest.approx([6.0, 2.0], rel=0.15)
    assert mixture.share == pytest.approx([0.4, 0.6], abs=0.03)
    assert mixture.agreement == pytest.approx(agree, abs=0.05)


def test_labels_are_evidence_and_not_the_responsibilities() -> None:
    """One confident token in ten is overruled. Labels alone would drag the low component's mean up to them."""
    x, agreed = drawn((2.0, 8.0), (18.0, 2.0), (0.0, 0.9), share=0.2)
    mixture = fitted(x, agreed, 400)
    alpha, beta = mixture.parameters
    assert alpha[0] / (alpha[0] + beta[0]) == pytest.approx(0.2, abs=0.04)
    assert x[~agreed].mean() > 0.35


def test_the_threshold_is_where_the_densities_cross() -> None:
    assert BetaMixture().threshold() == 0.5  # 2x > 0.4 * 2 is first true of the grid at 0.5
    assert BetaMixture().threshold(0.55) == 0.6
    mirror = BetaMixture((2.0, 6.0), (6.0, 2.0))
    assert mirror.threshold(0.49) == 0.5 and mirror.threshold(0.999) > 0.8
    # worse exits, a higher threshold
    thresholds = [
        fitted(*drawn((mean * 10, (1 - mean) * 10), (9.0, 1.0), (0.1, 0.95), 1000), rounds=100).threshold()
        for mean in (0.2, 0.4, 0.6)
    ]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[-1]
    # a wide high component is denser than a narrow low one near 0 too: no reason to exit there
    wide = BetaMixture((5.0, 0.9), (15.0, 0.6))
    assert np.exp(wide.log_density(np.zeros(1)))[0].argmax() == 1 and wide.threshold() > 0.3
    # where the surest tokens are more often wrong, nothing exits
    assert BetaMixture((0.5, 30.0), (0.5, 20.0)).threshold() == 1.0


def test_one_sided_observations_keep_the_mixture_finite() -> None:
    for confidence, agreed in ((1.0, True), (0.0, False), (0.5, True)):
        mixture = BetaMixture(momentum=0.0)
        for _ in range(500):
            mixture.update([confidence], [agreed])
        alpha, beta = mixture.parameters
        assert np.isfinite([*alpha, *beta, *mixture.share]).all() and min(*alpha, *beta) > 0
        assert 0 <= mixture.threshold() <= 1


def test_one_update_moves_by_what_momentum_leaves() -> None:
    x, agreed = drawn((2.0, 6.0), (8.0, 2.0), (0.2, 0.95), count=50)
    before, slow, fast = BetaMixture(), BetaMixture(momentum=0.95), BetaMixture(momentum=0.0)
    slow.update(x, agreed)
    fast.update(x, agreed)
    assert slow.share - before.share == pytest.approx(0.05 * (fast.share - before.share), rel=1e-3)


# ---- with a bundle ----
def bundle(kind: str = "bins", **head):
    tokenizer = BinTokenizer(9) if kind == "bins" else tokenizer_of(kind)
    words = HeadConfig("words", "tokens", 1, tokenizer.vocab_size, **head)
    return bundle_of(tokenizer, heads=(HeadConfig("once", "parallel", 0), words), transformer=DEEP)


def test_calibration_measures_this_policy() -> None:
    policy = bundle(exit_layer=EXIT)
    config = policy.config
    with torch.inference_mode():
        prefixes = [
            policy.model.prefix(policy.model.prefix_segments(*_inputs(policy, seed)), config.suffix_room)
            for seed in range(6)
        ]
    confidences, agreed = measured(policy, prefixes)
    assert len(confidences) == len(agreed) == 6 * 12 and 0 < sum(agreed) < len(agreed)
    mixture = fitted(confidences, agreed, rounds=50)
    assert 0 <= mixture.threshold() <= 1
    assert mixture.share != pytest.approx([0.5, 0.5], abs=0.01)
    assert prefixes[0].cache.length == prefixes[0].length  # given back as they were
    given = DecodeInput(policy, prefixes[0], [0], [InferContext()], _grammar(policy))
    alpha, beta = mixture.parameters
    out = AdaptiveEarlyExitDecoder(0, alpha[0], beta[0], alpha[1], beta[1]).decode(given)
    assert out.actions.shape == (1, 4, 3) and out.repaired == [0] and 0 <= out.notes["threshold"][0] <= 1
    with pytest.raises(ConfigError, match="prefixes"):
        measured(policy, [])


def _inputs(policy, seed: int):
    images, text, valid, state = prompt(seed, 1)
    return images, text % policy.config.text_vocab, valid, state


def _grammar(policy):
    return lambda head: Grammar(policy.action_tokenizers[head], policy.config.horizon, policy.config.action_dim)


@pytest.mark.parametrize("decoder", [EarlyExitDecoder, AdaptiveEarlyExitDecoder])
def test_what_cannot_exit_is_refused(decoder) -> None:
    trained, plain = bundle(exit_layer=EXIT), bundle()
    decoder().check(trained)
    decoder(layer=1).check(plain)
    with pytest.raises(ConfigError, match=r"heads\.words\.exit_layer=2"):
        decoder().check(plain)
    for layer in (-1, DEPTH, DEPTH + 1):
        with pytest.raises(ConfigError, match=r"decoder\.layer: expected 1\.\.3"):
            decoder(layer=layer).check(trained)
    with pytest.raises(ConfigError, match=r"decoder\.head"):
        decoder(head="once").check(trained)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_settings_out_of_range_are_refused(threshold) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.threshold"):
        EarlyExitDecoder(threshold=threshold)
    with pytest.raises(ConfigError, match=r"decoder\.ratio"):
        AdaptiveEarlyExitDecoder(ratio=threshold)
    with pytest.raises(ConfigError, match="momentum"):
        AdaptiveEarlyExitDecoder(momentum=threshold)
    with pytest.raises(ConfigError, match="alpha, beta"):
        AdaptiveEarlyExitDecoder(low_alpha=min(0.0, threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_ids_survive_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 1, 1500, dtype=dtype)
    logits[0, 0, 1233], logits[1, 0, 301] = 20.0, 9.0
    chosen, leads = leading(logits)
    assert chosen == [[1233], [301]] and leads == pytest.approx([1.0, 0.84], abs=0.01)
