"""Chunks that go on where the last one is: ensembles, forced tokens, projections, steered flows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dct

from policies.vla_policy import VlaPolicy
from tests.contracts.test_decoders import decode, model_of, prompt, tokenizer_of
from tests.decoding.test_continuous import A, T, bundle_of, given
from tests.models.test_vla import inputs, uncached
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.decoding.chunks import continued, ensembled, goals, soft_mask
from vla.decoding.continued import ContinuedDecoder
from vla.decoding.diffusion import DiffusionDecoder, ddim, ladder
from vla.decoding.flow import FlowDecoder, euler
from vla.decoding.forced import ForcedPrefixDecoder
from vla.decoding.realtime import RealTimeFlowDecoder, guided
from vla.decoding.realtime_diffusion import RealTimeDiffusionDecoder, inpainted
from vla.errors import ConfigError
from vla.models.heads import HeadConfig, signal_shares
from vla.models.masks import MaskRule
from vla.models.pruning import TokenSelection
from vla.models.suffix import TokenSuffix
from vla.policy import InferContext, infer
from vla.tokenizers import BinTokenizer, FastTokenizer
from vla.types import ActionChunk, Observation

PERIOD_NS = 50_000_000


# ---- ensembles ----
def random_chunks(*starts: int, count: int = 6, jitter_ns: int = 0) -> list[ActionChunk]:
    rng = np.random.default_rng(0)
    return [
        ActionChunk(rng.normal(size=(count, 3)).astype(np.float32), start * PERIOD_NS + jitter_ns * (i % 2), 0.05)
        for i, start in enumerate(starts)
    ]


@pytest.mark.parametrize("decay", [-0.5, 0.0, 0.01, 1.0])
@pytest.mark.parametrize("jitter_ns", [0, 20_000_000])
def test_each_moment_is_the_weighted_mean_of_those_that_know_it_oldest_first(decay, jitter_ns) -> None:
    starts = (1, 2, 4, 5)
    chunks = random_chunks(*starts, jitter_ns=jitter_ns)
    out = ensembled(chunks, 5 * PERIOD_NS, decay)
    assert out.start_ns == 5 * PERIOD_NS and len(out) == 6 and out.actions.dtype == np.float32
    for slot in range(5, 11):
        said = [c.actions[slot - start] for c, start in zip(chunks, starts) if slot - start < 6]
        weights = [np.exp(-decay * i) for i in range(len(said))]
        expected = sum(w * a for w, a in zip(weights, said)) / sum(weights)
        np.testing.assert_allclose(out.actions[slot - 5], expected, atol=1e-6)
    alone = ensembled(chunks[-1:], 6 * PERIOD_NS, decay)
    np.testing.assert_allclose(alone.actions, chunks[-1].actions[1:], atol=1e-6)


@pytest.mark.parametrize("decay", [-2.0, 0.0, 0.01, 2.0])
def test_the_newest_chunk_that_knows_a_moment_decides_the_gripper(decay) -> None:
    chunks = [ActionChunk(np.full((4, 2), value, np.float32), 0, 0.05) for value in (0.08, 0.0, 0.03)]
    out = ensembled([chunks[0], chunks[1], replace(chunks[2], start_ns=2 * PERIOD_NS)], 0, decay, grippers=[1])
    np.testing.assert_array_equal(out.actions[:, 1], np.float32([0.0, 0.0, 0.03, 0.03, 0.03, 0.03]))
    assert (out.actions[:4, 0] > 0).all() and (out.actions[:2, 0] < 0.08).all()  # what is no gripper is averaged


def test_steep_weights_are_the_chunk_they_prefer() -> None:
    chunks = random_chunks(0, 0, 0)
    for decay, chosen in ((-1e4, chunks[2]), (1e4, chunks[0])):
        np.testing.assert_array_equal(ensembled(chunks, 0, decay).actions, chosen.actions)


def test_what_cannot_be_averaged_is_named() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ensembled([], 0)
    with pytest.raises(ConfigError, match="one period"):
        ensembled([*random_chunks(0), replace(random_chunks(0)[0], period_s=0.1)], 0)
    with pytest.raises(ConfigError, match=r"start_ns.*-1 slots"):
        ensembled(random_chunks(0), 7 * PERIOD_NS)
    with pytest.raises(ConfigError, match=r"start_ns.*12 slots.*10 of them"):  # a hole between the two
        ensembled(random_chunks(0, 7, count=5), 0)


# ---- what a new chunk has to agree with ----
def test_the_mask_is_one_then_falls_then_nothing() -> None:
    falling = [c * (np.exp(c) - 1) / (np.e - 1) for c in (0.8, 0.6, 0.4, 0.2)]
    np.testing.assert_allclose(soft_mask(2, 6, 10), [1, 1, *falling, 0, 0, 0, 0])
    assert soft_mask(0, 0, 4).tolist() == [0] * 4 and soft_mask(4, 4, 4).tolist() == [1] * 4
    for committed in range(5):
        assert (np.diff(soft_mask(committed, 9, 12)) <= 0).all()


def contexts(*executed: int | None, committed: int = 2, length: int = T) -> list[InferContext]:
    """A running chunk per sample, of which so many actions were executed; None for a sample without one."""
    rng, out = np.random.default_rng(3), []
    for done in executed:
        actions = rng.uniform(-0.9, 0.9, (length, A)).astype(np.float32)
        actions[:, 2] = np.sign(actions[:, 2])
        context = InferContext(ActionChunk(actions, 0, 0.05), done or 0, actions[done or 0 :][:committed], 1, 0)
        out.append(InferContext(start_ns=1) if done is None else context)
    return out


def test_goals_follow_what_was_executed_and_committed() -> None:
    bundle = bundle_of()
    asked = contexts(1, None, 3, 0)
    asked[3] = replace(asked[3], committed=None)
    targets, masks, counts = goals(replace(given(bundle, (1, 2, 3, 4), [0, 1, 0, 1]), contexts=asked))
    assert counts == [2, 0, 1, 0]  # of the third chunk one action was left to commit
    for sample in (0, 2, 3):
        left = asked[sample].previous.actions[asked[sample].executed :]
        np.testing.assert_allclose(targets[sample, : len(left)], left, atol=1e-6)
        np.testing.assert_array_equal(masks[sample], soft_mask(counts[sample], len(left), T))
    assert not masks[1].any()
    long = replace(given(bundle, (1,)), contexts=contexts(0, length=6))
    for reach, end in ((0, 2), (1, 3), (2, 4), (9, 4), (None, 4)):  # as far as the old chunk goes, at most
        np.testing.assert_array_equal(goals(long, reach)[1][0], soft_mask(2, end, T))
    short = replace(given(bundle, (1,)), contexts=contexts(0, length=2, committed=1))  # what a reuse leaves behind
    assert goals(short)[0].shape == (1, T, A) and goals(short)[1][0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("committed", [0, 1, 3, 7])
def test_replacing_the_first_actions_is_the_projection_in_coefficients(committed) -> None:
    """Least squares under the constraint, solved in the coefficients of the orthonormal DCT."""
    rng = np.random.default_rng(0)
    horizon = 8
    actions, target = rng.normal(size=(2, horizon, 2)).astype(np.float32)
    mask = (np.arange(horizon) < committed).astype(float)
    transform = dct(np.eye(horizon), axis=0, norm="ortho")  # coefficients = transform @ actions
    inverse_rows = transform.T[:committed]  # the first actions, of coefficients
    wanted = transform @ actions
    step = np.linalg.pinv(inverse_rows) @ (target[:committed] - inverse_rows @ wanted)
    np.testing.assert_allclose(continued(actions, target, mask), transform.T @ (wanted + step), atol=1e-5)


def test_a_soft_seam_is_smaller_and_nothing_leaves_the_two_chunks() -> None:
    rng = np.random.default_rng(1)
    actions, target = rng.normal(size=(2, 10, 3)).astype(np.float32)
    actions[:, 2], target[:, 2] = -1, 1
    mask = soft_mask(3, 8, 10)
    out = continued(actions, target, mask, [2])
    np.testing.assert_array_equal(out[:3], target[:3])
    np.testing.assert_array_equal(out[8:], actions[8:])
    np.testing.assert_allclose((out - target)[3, :2], (1 - mask[3]) * (actions - target)[3, :2], atol=1e-6)
    assert ((out >= np.minimum(actions, target) - 1e-6) & (out <= np.maximum(actions, target) + 1e-6)).all()
    assert set(out[:, 2]) == {-1, 1} and (np.diff(out[:, 2]) <= 0).all()


# ---- forced tokens ----
@pytest.fixture(scope="module")
def words():
    tokenizer = tokenizer_of("bins")
    return [model_of(tokenizer, seed) for seed in range(4)], Grammar(tokenizer, 8, 2)


@pytest.mark.parametrize("counts", [(0, 0), (2, 2), (4, 10), (16, 3), (0, 16), (16, 16)])
def test_forced_decoding_is_greedy_behind_the_forced_tokens(counts, words) -> None:
    models, grammar = words
    rng, changed = np.random.default_rng(0), 0
    for seed in range(4):
        model, prompts = models[seed], prompt(seed, 2)
        forced = [tuple(rng.integers(0, 31, count).tolist()) for count in counts]
        with torch.inference_mode():
            suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompts), grammar.values), "words")
            out = ForcedPrefixDecoder().generate(suffix, grammar, [Hint(0, draft) for draft in forced])
            ids = torch.tensor(out.ids)
            logits = uncached(model, prompts, model.heads["words"].shift(ids))
        greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompts)
        for sample, draft in enumerate(forced):
            assert tuple(out.ids[sample][: len(draft)]) == draft
            assert out.ids[sample][len(draft) :] == logits[sample].argmax(-1)[len(draft) :].tolist()
            sure = logits[sample].softmax(-1).max(-1).values[len(draft) :]
            expected = float(sure.mean()) if len(sure) else 1.0
            assert out.confidence[sample] == pytest.approx(expected, abs=1e-4)
            changed += out.ids[sample][len(draft) :] != greedy.ids[sample][len(draft) :]
        assert out.passes == 16 - min(counts) and out.notes == {"forced": list(counts)}
    assert (changed > 0) == any(0 < count < 16 for count in counts)  # what was forced matters for what follows


def test_forcing_what_greedy_says_changes_nothing(words) -> None:
    models, grammar = words
    for seed in range(4):
        greedy, _ = decode(AutoregressiveDecoder(), models[seed], grammar, prompt(seed, 2))
        model = models[seed]
        with torch.inference_mode():
            suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompt(seed, 2)), grammar.values), "words")
            hints = [Hint(0, tuple(ids[:6])) for ids in greedy.ids]
            assert ForcedPrefixDecoder().generate(suffix, grammar, hints).ids == greedy.ids


# ---- through the policy ----
def observation() -> Observation:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (size, size, 3), np.uint8) for name, size in (("front", 32), ("wrist", 16))}
    return Observation(images, np.zeros(3, np.float32), "push", 1)


def fast() -> FastTokenizer:
    rng = np.random.default_rng(0)
    return FastTokenizer.fit(rng.uniform(-1, 1, (40, T, A)).astype(np.float32), vocab_size=64, scale=5.0)


def policies(kind: str, *decoders) -> list[VlaPolicy]:
    tokenizer = BinTokenizer(32) if kind == "bins" else fast()
    bundle = bundle_of(tokenizer, heads=(HeadConfig("words", "tokens", 1, tokenizer.vocab_size),), text_vocab=512)
    return [VlaPolicy(bundle, decoder) for decoder in decoders]


def test_committed_actions_come_back_as_their_bins() -> None:
    greedy, forced = policies("bins", AutoregressiveDecoder(), ForcedPrefixDecoder())
    (context,) = contexts(1)
    chunk = infer(forced, observation(), context).chunk.actions
    np.testing.assert_allclose(chunk[:2], context.committed, atol=1 / 31 + 1e-6)
    plain = InferContext(start_ns=1)
    assert infer(forced, observation(), plain).report.ids == infer(greedy, observation(), plain).report.ids
    with pytest.raises(ConfigError, match=r"decoder\.head: .*over bins, got words.*over fast.*,bins\]"):
        policies("fast", ForcedPrefixDecoder())


@pytest.mark.parametrize("kind", ["bins", "fast"])
def test_any_tokens_are_continued_by_projection(kind) -> None:
    decoders = AutoregressiveDecoder(), ContinuedDecoder(), ContinuedDecoder(reach=0)
    plain, soft, hard = (
        policy.infer_batch([observation()] * 2, contexts(1, None)) for policy in policies(kind, *decoders)
    )
    assert [r.report.ids for r in plain] == [r.report.ids for r in soft] == [r.report.ids for r in hard]
    np.testing.assert_array_equal(soft[1].chunk.actions, plain[1].chunk.actions)  # nothing to go on from
    context, mask = contexts(1)[0], soft_mask(2, 3, T)
    for result in (soft[0], hard[0]):
        np.testing.assert_allclose(result.chunk.actions[:2], context.committed, atol=1e-6)
    np.testing.assert_array_equal(hard[0].chunk.actions[2:], plain[0].chunk.actions[2:])
    old, new = context.previous.actions[3, :2], plain[0].chunk.actions[2, :2]
    np.testing.assert_allclose(soft[0].chunk.actions[2, :2], mask[2] * old + (1 - mask[2]) * new, atol=1e-6)


def test_no_list_of_fast_tokens_may_begin_with_what_another_one_committed() -> None:
    """All lists of a small tokenizer, each once running, and the next two actions of its chunk committed: hardly any of
    them is where a list begins, and half of the time every list is more than 0.1 away, in units of -1 to 1."""
    chunks = np.random.default_rng(0).uniform(-1, 1, (200, 3, 1)).astype(np.float32)
    fast = FastTokenizer.fit(chunks, vocab_size=24, scale=1.5)

    def lists(ids: list[int], left: int) -> list[list[int]]:
        fitting = np.flatnonzero(fast.valid_next(left)).tolist()
        return [ids] if not left else [row for t in fitting for row in lists([*ids, t], left - fast.token_lengths[t])]

    every = lists([], 3)
    made = np.stack([fast.decode(ids, 3, 1)[:, 0] for ids in every])
    assert len(every) > len(np.unique(made, axis=0)) == (fast.upper - fast.lower + 1) ** 3  # merges leave out none

    def nearest(committed: np.ndarray) -> np.ndarray:
        return np.abs(made[None, :, :2] - committed[:, None]).max(axis=2).min(axis=1)

    assert (nearest(made[:, :2]) == 0).all()  # what is there is found
    gaps = nearest(made[:, 1:])
    assert np.mean(gaps > 1e-3) > 0.9 and 0.3 < np.mean(gaps > 0.1) < 0.7


# ---- real-time chunking ----
def smooth_flow(horizon: int = 12):
    """The true velocity towards smooth Gaussian trajectories [B, T, 1], and their covariance."""
    places = torch.arange(horizon, dtype=torch.float64)
    covariance = torch.exp(-((places[:, None] - places) ** 2) / 18) + 1e-3 * torch.eye(horizon, dtype=torch.float64)

    def velocity(noisy, time):
        clean = 1 - time
        spread = clean**2 * covariance + time**2 * torch.eye(horizon, dtype=torch.float64)
        mean = clean * covariance @ torch.linalg.solve(spread, noisy)  # of the actions, given the noisy ones
        return (noisy - clean * mean) / time - mean

    return velocity, covariance


@pytest.mark.parametrize("steps", [5, 20])
def test_guidance_meets_the_committed_actions_and_bends_the_rest_to_them(steps) -> None:
    velocity, covariance = smooth_flow()
    torch.manual_seed(0)
    roots = torch.linalg.cholesky(covariance)
    target = roots @ torch.randn(200, 12, 1, dtype=torch.float64)
    noise = torch.randn(200, 12, 1, dtype=torch.float64)
    mask = torch.from_numpy(soft_mask(3, 9, 12)).expand(200, -1)
    free, led = (euler(guided(velocity, target, mask, beta), noise, steps) for beta in (0.0, 5.0))
    assert torch.allclose(free, euler(velocity, noise, steps))
    missed = [(out - target)[:, :3].abs().mean().item() for out in (free, led)]
    seam = [(out[:, 3] - target[:, 2]).abs().mean().item() for out in (free, led)]
    assert missed[1] < 0.25 * missed[0] and seam[1] < 0.4 * seam[0]
    drift = (led - target).abs().mean(dim=(0, 2))
    assert drift[-1] > 3 * drift[:3].max()  # and the far end is free
    assert (led.diff(dim=1).abs().mean() < 1.2 * target.diff(dim=1).abs().mean()).item()  # still a smooth trajectory


def published(bundle, args, noise, targets, masks, steps, beta):
    """The paper's algorithm in its own time, with whole Jacobians of one uncached pass per sample."""
    model, flow = bundle.model, bundle.model.heads["flow"]

    def velocity(x, tau):  # towards actions
        condition = flow.condition(torch.full((1,), 1 - tau))
        segment = model.suffix_segment("flow", flow.embed(x.view(1, T, A)), rule=MaskRule.BLOCK)
        return -flow.read(model.run([*model.prefix_segments(*args), segment], condition)[-1]).flatten()

    x = noise.flatten()
    weights = torch.from_numpy(masks).float().repeat_interleave(A)
    for step in range(steps):
        tau = step / steps
        v = velocity(x, tau)
        jacobian = torch.autograd.functional.jacobian(lambda y, tau=tau: y + (1 - tau) * velocity(y, tau), x)
        error = torch.from_numpy(targets).flatten() - (x + (1 - tau) * v)
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = beta if tau == 0 else min(beta, (1 - tau) / (tau * r2))
        x = (x + (v + weight * (error * weights) @ jacobian) / steps).detach()
    return x.view(T, A).numpy()


def test_a_steered_flow_is_the_published_one_whatever_else_is_in_the_batch() -> None:
    bundle, asked = bundle_of(), contexts(1, None)
    batch = replace(given(bundle, (5, 6)), contexts=asked)
    out = RealTimeFlowDecoder(3, 4.0).decode(batch)
    targets, masks, counts = goals(batch)
    images, *rest = inputs(2)
    for sample, seed in enumerate((5, 6)):
        args = {k: v[sample : sample + 1] for k, v in images.items()}, *(r[sample : sample + 1] for r in rest)
        noise = torch.randn(T, A, generator=torch.Generator().manual_seed(seed))
        expected = published(bundle, args, noise, targets[sample], masks[sample], 3, 4.0)
        expected[: counts[sample]] = targets[sample, : counts[sample]]
        np.testing.assert_allclose(out.actions[sample], expected, atol=1e-4)
    assert out.passes == 3 and out.notes["missed"][0] > 0 == out.notes["missed"][1]  # the second has no last chunk
    assert all(weight.grad is None for weight in bundle.model.parameters())
    free = FlowDecoder(3).decode(given(bundle, (5, 6))).actions
    assert not np.allclose(out.actions[0, 2:], free[0, 2:], atol=1e-3)
    np.testing.assert_array_equal(RealTimeFlowDecoder(3).decode(given(bundle, (5, 6))).actions, free)


@pytest.mark.parametrize("selection", [None, TokenSelection(1, 0.5)])
def test_a_steered_flow_runs_in_the_policy_and_repeats(selection) -> None:
    policy = VlaPolicy(bundle_of(text_vocab=512), RealTimeFlowDecoder(), selection)
    (context,) = contexts(1)
    one, other = (infer(policy, observation(), context).chunk.actions for _ in range(2))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one[:2], context.committed, atol=1e-6)


# ---- real-time chunking of a diffusion ----
SHARES = signal_shares(100).double()


def causal_denoiser(horizon: int = 12):
    """What an unlimited causal head would predict for smooth Gaussian trajectories: of each action the mean given the
    noisy ones up to it. Returns predict, the matrices noisy -> clean by step, and the covariance."""
    _, covariance = smooth_flow(horizon)
    eye, matrices = torch.eye(horizon, dtype=torch.float64), {}
    for step, share in enumerate(SHARES):
        rows = torch.zeros(horizon, horizon, dtype=torch.float64)
        for row in range(horizon):
            seen = slice(0, row + 1)
            spread = share * covariance[seen, seen] + (1 - share) * eye[seen, seen]
            rows[row, seen] = share.sqrt() * torch.linalg.solve(spread, covariance[row, seen])
        matrices[step] = rows

    def predict(noisy, step):
        clean = matrices[step] @ noisy
        return (noisy - SHARES[step].sqrt() * clean) / (1 - SHARES[step]).sqrt()

    return predict, matrices, covariance


def guided_ddim(matrices, noise, target, mask, steps):
    """DDIM with pseudo-inverse guidance (Song et al. 2023, RTC's for a diffusion): the vector-Jacobian product of the
    error through the denoiser, over the variance 1 - share of actions of unit variance."""
    noisy, taken = noise, ladder(steps, 100)
    for step, after in zip(taken, [*(SHARES[i] for i in taken[1:]), torch.tensor(1.0)]):
        share, jacobian = SHARES[step], matrices[step]
        clean = jacobian @ noisy
        clean = clean + jacobian.T @ ((target - clean) * mask) / share.sqrt()
        predicted = (noisy - share.sqrt() * clean) / (1 - share).sqrt()
        noisy = after.sqrt() * clean + (1 - after).sqrt() * predicted
    return noisy


@pytest.mark.parametrize("steps", [4, 20])
def test_painted_rows_run_along_their_own_path_and_the_rest_is_plain_ddim_behind_them(steps) -> None:
    """By definition of the replacement method: before each step the committed rows are noised from their target."""
    predict, *_ = causal_denoiser()
    torch.manual_seed(0)
    target, noise = torch.randn(2, 3, 12, 1, dtype=torch.float64)
    mask = (torch.arange(12) < 3).double()[:, None]
    out = inpainted(predict, noise, target, mask.expand(3, -1, 1), steps, 100)
    noisy, taken = noise.clone(), ladder(steps, 100)
    for step, after in zip(taken, [*(SHARES[i] for i in taken[1:]), torch.tensor(1.0)]):
        noisy[:, :3] = SHARES[step].sqrt() * target[:, :3] + (1 - SHARES[step]).sqrt() * noise[:, :3]
        predicted = predict(noisy, step)
        clean = (noisy - (1 - SHARES[step]).sqrt() * predicted) / SHARES[step].sqrt()
        noisy = after.sqrt() * clean + (1 - after).sqrt() * predicted
    assert torch.allclose(out[:, 3:], noisy[:, 3:], atol=1e-4)
    assert torch.allclose(out[:, :3], target[:, :3], atol=1e-5)
    assert torch.allclose(inpainted(predict, noise, target, 0 * mask, steps, 100), ddim(predict, noise, steps, 100))


@pytest.mark.parametrize("steps", [4, 20])
def test_the_rest_is_bent_towards_its_mean_given_what_is_committed(steps) -> None:
    """On Gaussians that mean is known: how far are the regressions on the committed actions from it?"""
    predict, matrices, covariance = causal_denoiser()
    torch.manual_seed(0)
    target = torch.linalg.cholesky(covariance) @ torch.randn(2000, 12, 1, dtype=torch.float64)
    noise = torch.randn(2000, 12, 1, dtype=torch.float64)
    mask = torch.from_numpy(soft_mask(3, 9, 12))[:, None].expand(2000, -1, 1)
    known = torch.linalg.solve(covariance[:3, :3], covariance[:3, 3:])

    def off(out):
        slopes = torch.linalg.lstsq(target[:, :3, 0], out[:, 3:, 0]).solution
        return (target[:, :3, 0] @ (slopes - known)).square().mean().sqrt() / known.square().sum().sqrt()

    free, painted = ddim(predict, noise, steps, 100), inpainted(predict, noise, target, mask, steps, 100)
    assert off(painted) < 0.4 * off(free)
    assert off(painted) < (0.9, 1.1)[steps > 4] * off(guided_ddim(matrices, noise, target, mask, steps))
    jump = [(out[:, 3] - target[:, 2]).abs().mean() for out in (free, painted, target)]
    assert jump[1] < 0.3 * jump[0] and jump[1] < 1.1 * jump[2]  # the seam is as smooth as the trajectories are
    assert (painted - target)[:, -1].abs().mean() > 0.9 * (free - target)[:, -1].abs().mean()  # the far end is free


def test_an_inpainted_diffusion_runs_behind_the_cache_whatever_else_is_in_the_batch() -> None:
    bundle, asked = bundle_of(), contexts(1, None)
    batch = replace(given(bundle, (5, 6)), contexts=asked)
    out = RealTimeDiffusionDecoder().decode(batch)
    free = DiffusionDecoder().decode(given(bundle, (5, 6))).actions
    np.testing.assert_array_equal(RealTimeDiffusionDecoder().decode(given(bundle, (5, 6))).actions, free)
    np.testing.assert_allclose(out.actions[1], free[1], atol=1e-5)  # nothing to go on from
    targets, masks, _ = goals(batch)
    np.testing.assert_array_equal(out.actions[0, :2], targets[0, :2])
    assert out.passes == 4 and max(out.notes["missed"]) < 1e-4
    # Uncached: every step as one pass over the whole sequence.
    model, both, shares = bundle.model, bundle.model.heads["both"], torch.cat((SHARES, torch.ones(1))).tolist()
    images, *rest = inputs(2)
    args = {name: image[:1] for name, image in images.items()}, *(item[:1] for item in rest)
    noise = torch.randn(T, A, generator=torch.Generator().manual_seed(5))[None].double()
    mask = torch.from_numpy(masks[0])[:, None].repeat(1, A)
    mask[:, 2] = (mask[:, 2] >= 0.5).double()  # the gripper
    target = torch.from_numpy(targets[:1]).double()
    x = noise + mask * (shares[75] ** 0.5 * target + (1 - shares[75]) ** 0.5 * noise - noise)
    for step, after in ((75, 50), (50, 25), (25, 0), (0, 100)):
        lead = model.suffix_segment("both", both.embed(x.float(), torch.full((1,), step)))
        with torch.inference_mode():
            guess = both.noise(model.run([*model.prefix_segments(*args), lead])[-1][:, 2:-1]).double()
        clean = (x - (1 - shares[step]) ** 0.5 * guess) / shares[step] ** 0.5
        clean = mask * target + (1 - mask) * clean
        guess = (x - shares[step] ** 0.5 * clean) / (1 - shares[step]) ** 0.5
        x = shares[after] ** 0.5 * clean + (1 - shares[after]) ** 0.5 * guess
    np.testing.assert_allclose(out.actions[0], x[0].numpy(), atol=1e-3)
    assert not np.allclose(out.actions[0, 2:], free[0, 2:], atol=1e-3)


def test_an_inpainted_diffusion_runs_in_the_policy_and_repeats() -> None:
    policy = VlaPolicy(bundle_of(text_vocab=512), RealTimeDiffusionDecoder())
    (context,) = contexts(1)
    one, other = (infer(policy, observation(), context).chunk.actions for _ in range(2))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one[:2], context.committed, atol=1e-6)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.steps"):
        RealTimeFlowDecoder(0)
    with pytest.raises(ConfigError, match=r"decoder\.beta"):
        RealTimeFlowDecoder(beta=-1)
    for decoder in (ContinuedDecoder, RealTimeDiffusionDecoder):
        with pytest.raises(ConfigError, match=r"decoder\.reach: expected 0 or more, or null, got -1"):
            decoder(reach=-1)
    with pytest.raises(ConfigError, match=r"decoder\.steps: expected at least 2"):
        RealTimeDiffusionDecoder(1)
    with pytest.raises(ConfigError, match=r"decoder\.steps: expected at most 100"):
        RealTimeDiffusionDecoder(101).check(bundle_of())
    with pytest.raises(ConfigError, match=r"decoder\.head.*vla train head=\[\.\.\.,hybrid\]"):
        RealTimeDiffusionDecoder().check(bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),)))
    with pytest.raises(ConfigError, match=r"decoder\.head"):
        RealTimeFlowDecoder().check(bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),)))
