"""Decoders of continuous heads: samplers find known answers, caches change nothing, the ensemble has its gate."""

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from tests.models.test_vla import SEVERAL, inputs, make
from vla.checkpoints.bundle import Bundle
from vla.configs import load
from vla.data.normalize import Normalizer
from vla.decoding.base import DecodeInput, Grammar
from vla.decoding.diffusion import DiffusionDecoder, ddim, ladder
from vla.decoding.ensemble import EnsembleDecoder, fuse
from vla.decoding.flow import FlowDecoder, euler
from vla.decoding.parallel import ParallelDecoder
from vla.embodiment import Camera, Embodiment
from vla.errors import ConfigError
from vla.models.heads import HeadConfig, signal_shares
from vla.models.masks import MaskRule
from vla.policy import InferContext, infer
from vla.tokenizers import BinTokenizer, FastTokenizer
from vla.tokenizers.text import TextTokenizer
from vla.types import ControlMode, Observation

T, A = 4, 3
BINS = 9
HEADS = (
    HeadConfig("flow", "flow", 2), HeadConfig("once", "parallel", 0), HeadConfig("both", "hybrid", 3, BINS),
)  # fmt: skip
DECODERS = {
    "flow": FlowDecoder(4), "diffusion": DiffusionDecoder(), "parallel": ParallelDecoder(),
    "ensemble": EnsembleDecoder(threshold=0.5), "tokens": EnsembleDecoder(mode="tokens"),
    "averaged": EnsembleDecoder(threshold=0.0),
}  # fmt: skip
RANDOM = sorted(set(DECODERS) - {"parallel"})


def bundle_of(tokenizer=None, zero: bool = False, heads=HEADS, **changes) -> Bundle:
    """A random model with three continuous heads. zero: the read-outs as training begins with them."""
    tokenizer = tokenizer or BinTokenizer(BINS)
    model = make(**{**SEVERAL, "heads": heads, "action_dim": A, **changes})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not (zero and ("flow.read" in name or "both.noise.2" in name)):
                weight.normal_(std=0.2)
        if "both" in model.heads:  # opinions that depend on the tokens before
            model.heads["both"].tokens.logits.weight.normal_(std=1.0)
            model.heads["both"].tokens.embedding.weight.normal_(std=1.0)
    robot = Embodiment(
        "toy", 20, "osc_delta", ("dx", "dy", "gripper"), ("m", "m", "1"), ("x", "y", "z"), "none", 1,
        ControlMode.OSC_DELTA, (Camera("front", 32, 32), Camera("wrist", 16, 16)),
    )  # fmt: skip
    one = np.ones(3)
    normalizer = Normalizer(-one, one, 0 * one)
    words = TextTokenizer.fit(["push"], max_length=5)
    tokenizers = {head.name: tokenizer for head in heads if head.vocab}
    return Bundle(model, robot, normalizer, normalizer, tokenizers, words)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of()


@torch.inference_mode()
def given(bundle: Bundle, seeds=(5, 6), samples=None) -> DecodeInput:
    """samples: which of the two of `inputs`."""
    model, chosen = bundle.model, list(range(len(seeds))) if samples is None else samples
    images, *rest = inputs(2)
    args = {name: image[chosen] for name, image in images.items()}, *(item[chosen] for item in rest)
    prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room)
    return DecodeInput(
        bundle, prefix, seeds, [InferContext()] * len(seeds), lambda head: Grammar(bundle.action_tokenizers[head], T, A)
    )


def noises(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a seed draws: noise of the diffusion, noise before the tokens, the timestep there."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(T, A, generator=draw), torch.randn(T, A, generator=draw), torch.randint(100, (), generator=draw)


# ---- samplers with known answers ----
CLEAN = torch.randn(5, T, A, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(5, T, A, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_euler_follows_a_straight_path_to_its_end(steps: int) -> None:
    assert torch.allclose(euler(lambda x, time: NOISE - CLEAN, NOISE, steps), CLEAN, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 4, 99, 100])
def test_ddim_with_the_true_noise_finds_the_actions(steps: int) -> None:
    shares = signal_shares(100)

    def oracle(noisy, step):
        return (noisy - shares[step].sqrt() * CLEAN) / (1 - shares[step]).sqrt()

    assert torch.allclose(ddim(oracle, NOISE, steps, 100), CLEAN, atol=1e-4)


def test_samplers_turn_noise_into_the_distribution_of_the_actions() -> None:
    """Actions from N(mean, std^2): the best velocity and the best guess of the noise are known, and noise x should end
    as mean + std * x. The error falls with the number of steps; Euler's with its first power."""
    mean, std = 0.6, 0.3
    shares = signal_shares(100).tolist()

    def velocity(noisy, time):
        off = (noisy - (1 - time) * mean) / (time**2 + ((1 - time) * std) ** 2)
        return time * off - (mean + (1 - time) * std**2 * off)

    def predict(noisy, step):
        share = shares[step]
        return (1 - share) ** 0.5 * (noisy - share**0.5 * mean) / (share * std**2 + 1 - share)

    expected = mean + std * NOISE
    flow = {n: float((euler(velocity, NOISE, n) - expected).abs().max()) for n in (10, 100)}
    assert flow[10] < 0.2 and flow[100] < flow[10] / 8
    diffusion = {n: float((ddim(predict, NOISE, n, 100) - expected).abs().max()) for n in (4, 20, 100)}
    assert diffusion[4] < 0.4 and diffusion[20] < diffusion[4] / 2 and diffusion[100] < diffusion[20]


def test_the_published_timesteps_are_taken() -> None:
    assert ladder(4, 100) == [75, 50, 25, 0]
    assert ladder(100, 100) == list(range(99, -1, -1))
    assert ladder(3, 100) == [66, 33, 0]


# ---- behind the cache ----
def uncached_flow(bundle, args, noise, steps):
    model, flow = bundle.model, bundle.model.heads["flow"]
    x = noise
    for time in torch.linspace(1, 0, steps + 1)[:-1]:
        segment = model.suffix_segment("flow", flow.embed(x), rule=MaskRule.BLOCK)
        hidden = model.run([*model.prefix_segments(*args), segment], flow.condition(time.expand(len(x))))
        x = x - flow.read(hidden[-1]) / steps
    return x


def uncached_diffusion(bundle, args, noise):
    model, both = bundle.model, bundle.model.heads["both"]
    shares = torch.cat((signal_shares(100), torch.ones(1))).double()
    x = noise.double()
    for step, after in ((75, 50), (50, 25), (25, 0), (0, 100)):
        lead = both.embed(x.float(), torch.full((len(x),), step))
        hidden = model.run([*model.prefix_segments(*args), model.suffix_segment("both", lead)])[-1]
        ratio = (shares[after] / shares[step]).sqrt()
        x = ratio * x + ((1 - shares[after]).sqrt() - ratio * (1 - shares[step]).sqrt()) * both.noise(hidden[:, 2:-1])
    return x.float()


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_cached_decoding_equals_uncached(bundle, batch: int) -> None:
    images, *rest = inputs(2)
    args = {name: image[:batch] for name, image in images.items()}, *(item[:batch] for item in rest)
    seeds = (5, 6)[:batch]
    noise = torch.stack([noises(seed)[0] for seed in seeds])
    model, once = bundle.model, bundle.model.heads["once"]
    flow = FlowDecoder(4).decode(given(bundle, seeds))
    assert flow.passes == 4 and flow.actions.dtype == np.float32
    assert np.allclose(flow.actions, uncached_flow(bundle, args, noise, 4), atol=1e-4)
    diffusion = DiffusionDecoder().decode(given(bundle, seeds))
    assert diffusion.passes == 4
    assert np.allclose(diffusion.actions, uncached_diffusion(bundle, args, noise), atol=1e-4)
    assert not np.allclose(diffusion.actions, noise / signal_shares(100)[75].sqrt(), atol=0.1)  # the head has a say
    queries = model.suffix_segment("once", once.queries[None].expand(batch, -1, -1), rule=MaskRule.BLOCK)
    parallel = ParallelDecoder().decode(given(bundle, seeds))
    assert parallel.passes == 1
    assert np.allclose(parallel.actions, once.read(model.run([*model.prefix_segments(*args), queries])[-1]), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("samples", [[0], [0, 1]])
def test_tokens_behind_noise_equal_uncached_greedy_and_so_does_their_confidence(bundle, samples) -> None:
    seeds = [5, 6][: len(samples)]
    tokens = EnsembleDecoder(mode="tokens").decode(given(bundle, seeds))
    gated = EnsembleDecoder(threshold=0.0).decode(given(bundle, seeds))
    assert tokens.passes == 1 + T * A and gated.passes == 4 + 1 + T * A
    model, both = bundle.model, bundle.model.heads["both"]
    images, *rest = inputs(2)
    for sample in samples:
        chosen = [sample]
        args = {name: image[chosen] for name, image in images.items()}, *(item[chosen] for item in rest)
        _, noisy, step = noises(seeds[sample])
        ids, likely = [], []
        for _ in range(T * A):
            embedded = both.embed(noisy[None], step[None]), both.tokens.embed(torch.tensor([[BINS, *ids]]))
            segment = model.suffix_segment("both", torch.cat(embedded, dim=1))
            hidden = model.run([*model.prefix_segments(*args), segment])[-1]
            probabilities = both.tokens.logits(hidden)[0, -1].softmax(-1)
            likely.append(float(probabilities.max()))
            ids.append(int(probabilities.argmax()))
        assert tokens.ids[sample] == gated.ids[sample] == tuple(ids) and len(set(ids)) > 2
        assert tokens.confidence[sample] == pytest.approx(np.mean(likely), abs=1e-4)
        assert gated.confidence[sample] == pytest.approx(np.mean(likely[:2]), abs=1e-4)  # dx and dy of the first action
        assert gated.at(sample)[3] == {"confidence": gated.confidence[sample], "averaged": 1.0}


def test_decoders_take_turns_behind_one_prefix(bundle) -> None:
    """Each leaves the cache at the prefix's own length, and none finds what another left."""
    shared = given(bundle)
    for _ in range(2):
        for name, decoder in DECODERS.items():
            together = decoder.decode(shared)
            assert shared.prefix.cache.length == shared.prefix.length, name
            alone = decoder.decode(given(bundle))
            assert np.array_equal(together.actions, alone.actions), name


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_gives_what_single_samples_give(bundle, name: str) -> None:
    decoder = DECODERS[name]
    both = decoder.decode(given(bundle))
    for sample, seed in enumerate((5, 6)):
        alone = decoder.decode(given(bundle, [seed], [sample]))
        assert np.allclose(both.actions[sample], alone.actions[0], atol=1e-5)
        assert both.at(sample)[:2] == alone.at(0)[:2]
        assert both.at(sample)[2] == pytest.approx(alone.at(0)[2], abs=1e-5)
        assert both.at(sample)[3] == pytest.approx(alone.at(0)[3], abs=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_repeat_and_matter(bundle, name: str) -> None:
    first, same, other = (DECODERS[name].decode(given(bundle, seeds)).actions for seeds in ((5, 6), (5, 6), (5, 7)))
    assert np.array_equal(first, same) and np.array_equal(first[0], other[0])
    assert not np.allclose(first[1], other[1], atol=1e-3)


def test_untrained_read_outs_give_the_noise_back() -> None:
    """Velocity 0 leaves the noise as it is; noise 0 is all signal, scaled up from what step 75 leaves of it."""
    fresh = bundle_of(zero=True)
    noise = torch.stack([noises(seed)[0] for seed in (5, 6)]).numpy()
    assert np.array_equal(FlowDecoder().decode(given(fresh)).actions, noise)
    scale = float(signal_shares(100)[75]) ** -0.5
    assert np.allclose(DiffusionDecoder().decode(given(fresh)).actions, noise * scale, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_half_precision_weights_give_float32_actions(name: str) -> None:
    half = bundle_of(text_queries=0)
    half.model.bfloat16()
    actions = DECODERS[name].decode(given(half)).actions
    assert actions.dtype == np.float32 and np.isfinite(actions).all()


# ---- the ensemble ----
@pytest.mark.parametrize(("confidence", "averaged"), [(0.95, False), (0.96, False), (0.97, True)])
def test_the_gate_takes_the_published_branch(confidence: float, averaged: bool) -> None:
    diffused, spoken = np.full((1, 2, 3), 0.5, np.float32), np.full((1, 2, 3), -0.75, np.float32)
    diffused[..., 2], spoken[..., 2] = [0.9, -0.4], [-0.99, 0.99]
    actions, used = fuse(diffused, spoken, np.array([confidence]), EnsembleDecoder().threshold, [2])
    assert used.tolist() == [averaged] and actions.dtype == np.float32
    expected = [[[-0.125, -0.125, -1.0], [-0.125, -0.125, 1.0]]] if averaged else diffused.tolist()
    assert actions.tolist() == expected


def test_the_ensemble_is_made_of_its_two_answers(bundle) -> None:
    diffused = EnsembleDecoder(mode="diffusion").decode(given(bundle))
    assert np.array_equal(diffused.actions, DiffusionDecoder().decode(given(bundle)).actions)
    spoken = EnsembleDecoder(mode="tokens").decode(given(bundle))
    never = EnsembleDecoder(threshold=1.0).decode(given(bundle))
    assert np.array_equal(never.actions, diffused.actions)
    assert never.notes["averaged"] == [0.0, 0.0] and never.ids == [(), ()]
    always = EnsembleDecoder(threshold=0.0).decode(given(bundle))
    assert always.notes["averaged"] == [1.0, 1.0] and always.ids == spoken.ids
    mean = (diffused.actions + spoken.actions) / 2
    assert np.array_equal(always.actions[..., :2], mean[..., :2])
    assert np.array_equal(always.actions[..., 2], np.sign(mean[..., 2]))
    assert set(np.unique(always.actions[..., 2])) == {-1.0, 1.0}


def test_every_sample_of_a_batch_has_its_own_gate(bundle) -> None:
    low, high = sorted(EnsembleDecoder(threshold=0.0).decode(given(bundle)).confidence)
    assert high - low > 1e-3
    out = EnsembleDecoder(threshold=(low + high) / 2).decode(given(bundle))
    sure = int(np.argmax(out.confidence))
    assert [out.at(sample)[3]["averaged"] for sample in (sure, 1 - sure)] == [1.0, 0.0]
    for sample, threshold in ((sure, 0.0), (1 - sure, 1.0)):
        expected = EnsembleDecoder(threshold=threshold).decode(given(bundle))
        assert np.array_equal(out.actions[sample], expected.actions[sample])


# ---- what cannot work is refused ----
@pytest.mark.parametrize(
    ("name", "kind"), [("flow", "flow"), ("parallel", "parallel"), ("diffusion", "hybrid"), ("ensemble", "hybrid")]
)
def test_a_bundle_without_the_head_is_refused_with_the_remedy(bundle, name: str, kind: str) -> None:
    load("decoder", name).check(bundle)
    others = bundle_of(heads=tuple(head for head in HEADS if head.kind != kind))
    with pytest.raises(ConfigError, match=rf"decoder\.head: .*Train one: vla train head=\[\.\.\.,{kind}\]"):
        load("decoder", name).check(others)
    with pytest.raises(ConfigError, match=r"named 'nobody'.*Choose one of"):
        load("decoder", name, ["head=nobody"]).check(bundle)


def test_the_ensemble_needs_a_token_per_value() -> None:
    chunks = np.random.default_rng(0).normal(size=(60, T, A)).cumsum(axis=1).astype(np.float32) / 4
    fast = FastTokenizer.fit(chunks, vocab_size=96, scale=2.0)
    mixed = bundle_of(fast, heads=(*HEADS[:2], HeadConfig("both", "hybrid", 3, fast.vocab_size)))
    with pytest.raises(ConfigError, match=r"tokenizer of both: expected one token per value.*mode=tokens"):
        EnsembleDecoder().check(mixed)
    for mode in ("tokens", "diffusion"):
        decoder = EnsembleDecoder(mode=mode)
        decoder.check(mixed)
        both = decoder.decode(given(mixed))
        alone = decoder.decode(given(mixed, [6], [1]))
        assert np.allclose(both.actions[1], alone.actions[0], atol=1e-5)


@pytest.mark.parametrize(
    ("make_decoder", "message"),
    [
        (lambda: FlowDecoder(0), r"decoder\.steps: expected at least 1"),
        (lambda: DiffusionDecoder(1), r"decoder\.steps: expected at least 2"),
        (lambda: EnsembleDecoder(steps=0), r"decoder\.steps"),
        (lambda: EnsembleDecoder(threshold=96), r"decoder\.threshold: expected 0 to 1"),
        (lambda: EnsembleDecoder(mode="token"), "Did you mean 'tokens'"),
    ],
)
def test_settings_out_of_range_are_refused(make_decoder, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_decoder()


@pytest.mark.parametrize("kind", [DiffusionDecoder, EnsembleDecoder])
def test_more_steps_than_the_head_has_are_refused(bundle, kind) -> None:
    kind(steps=100).check(bundle)
    with pytest.raises(ConfigError, match=r"decoder\.steps: expected at most 100, got 101"):
        kind(steps=101).check(bundle)


@pytest.mark.parametrize("name", ["flow", "diffusion", "parallel", "ensemble"])
def test_shipped_configs_drive_a_policy(name: str) -> None:
    bundle = bundle_of(text_vocab=TextTokenizer.fit(["push"], max_length=5).vocab_size).check()
    policy = VlaPolicy(bundle, load("decoder", name))
    rng = np.random.default_rng(0)
    observations = [
        Observation(
            {c.name: rng.integers(0, 255, (c.height, c.width, 3), np.uint8) for c in bundle.embodiment.cameras},
            rng.normal(size=3).astype(np.float32), "push", 0,
        )
        for _ in range(2)
    ]  # fmt: skip
    contexts = [InferContext(seed=3), InferContext(seed=4)]
    results = policy.infer_batch(observations, contexts)
    for result, observation, context in zip(results, observations, contexts):
        alone = infer(policy, observation, context)
        assert result.chunk.actions.shape == (T, A)
        assert np.allclose(result.chunk.actions, alone.chunk.actions, atol=1e-5)
        assert result.report.passes == alone.report.passes > 0
