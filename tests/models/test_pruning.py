"""Pruning: scores are those of the SVD, keeping all changes nothing, and what stays is a shorter prefix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from policies.vla_policy import VlaPolicy
from tests.decoding.test_continuous import bundle_of
from tests.models.test_vla import SEVERAL, inputs, make
from vla.configs import load, names
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.masks import positions_of, segment_mask
from vla.models.pruning import TokenSelection, contributions, prefix_flops
from vla.models.suffix import TokenSuffix
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.models.vision import CameraEncoderConfig
from vla.models.vla import Prefix, Vla
from vla.policy import infer
from vla.types import Observation

POINTS = (CameraEncoderConfig("front", 32, 4, (8, 16), points=2), CameraEncoderConfig("wrist", 16, 2, (8, 16)))
GRID = [*range(16), *range(17, 21)]  # place 16 is the token of points
TEXT_AND_STATE = [*range(21, 27)]


def model_of(depth: int = 3, **changes) -> Vla:
    transformer = TransformerConfig((ExpertConfig(32, 64), ExpertConfig(16, 32)), depth, 4, 2, 8)
    model = make(**{"cameras": POINTS, "transformer": transformer, **changes})
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


@torch.inference_mode()
def prefix_of(model: Vla, args, selection=None, room: int = 6) -> Prefix:
    return model.prefix(model.prefix_segments(*args), room, selection)


# ---- scores ----
def by_svd(rows: np.ndarray) -> np.ndarray:
    u, sizes, _ = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    shares = sizes / sizes.sum()
    rank = int(np.ceil(np.exp(-(shares * np.log(shares.clip(1e-300))).sum())))
    return np.abs(u * sizes)[:, :rank].sum(axis=1)


@pytest.mark.parametrize("shape", [(20, 32), (20, 7)])
def test_scores_are_those_of_the_svd_sample_by_sample(shape) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, *shape) * torch.logspace(0, -2, shape[1])  # one direction matters more than the next
    scores = contributions(rows)
    for sample, expected in zip(scores, rows.numpy()):
        np.testing.assert_allclose(sample.numpy(), by_svd(expected), rtol=2e-4)
    assert torch.allclose(contributions(rows[1:2]), scores[1:2], rtol=1e-4)


def test_scores_belong_to_tokens_not_to_axes() -> None:
    """Turning or mirroring the feature axes changes nothing, reordering tokens reorders scores, a zero row scores 0."""
    torch.manual_seed(0)
    rows = torch.randn(1, 12, 16) * torch.logspace(0, -2, 16)
    rows[:, 3] = 0
    scores = contributions(rows)
    turned = rows @ torch.linalg.qr(torch.randn(16, 16))[0]
    assert torch.allclose(contributions(turned), scores, rtol=1e-3, atol=1e-4)
    assert torch.allclose(contributions(-rows), scores, rtol=1e-3, atol=1e-4)
    order = torch.randperm(12)
    assert torch.allclose(contributions(rows[:, order]), scores[:, order], rtol=1e-3, atol=1e-4)
    assert scores[0, 3] < 1e-4 * scores.max() and scores.argmin() == 3
    assert torch.equal(contributions(torch.zeros(1, 4, 5)), torch.zeros(1, 4))


def test_only_the_effective_rank_counts() -> None:
    """Four equal axes and rounding noise around them: rank 4, so the noise of many axes adds up to nothing."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 4))[0].T
    rows = torch.cat((torch.eye(4) @ basis, 1e-4 * torch.randn(28, 64)))
    scores = contributions(rows[None])[0]
    assert scores[:4].min() > 0.9 and scores[4:].max() < 0.02


# ---- the prefix ----
@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("selection", [TokenSelection(2, 1.0), TokenSelection(1, 20), TokenSelection(2, 5, drop=False)])
def test_keeping_all_changes_no_bit(batch, selection) -> None:
    model, args = model_of(), inputs(batch)
    plain, kept = prefix_of(model, args), prefix_of(model, args, selection)
    assert torch.equal(plain.cache.keys, kept.cache.keys) and torch.equal(plain.cache.values, kept.cache.values)
    assert torch.equal(plain.bias, kept.bias) and all(map(torch.equal, plain.rotary, kept.rotary))
    assert plain.length == kept.length and plain.cache.length == kept.cache.length
    ids = torch.randint(0, 11, (batch, 4))
    one, other = TokenSuffix(model, plain, "words").logits(ids), TokenSuffix(model, kept, "words").logits(ids)
    assert torch.equal(one, other)
    assert plain.kept is None and kept.kept.shape == (batch, selection.count(20))


@torch.inference_mode()
@pytest.mark.parametrize("layer", [1, 2])
def test_the_survivors_go_on_as_a_shorter_prefix_with_their_old_positions(layer) -> None:
    """By hand: all tokens through the first layers, then the rest of the depth over the survivors alone."""
    model, args, keep = model_of(), inputs(2), 7
    prefix = prefix_of(model, args, TokenSelection(layer, keep))
    segments = model.prefix_segments(*args)
    valid = torch.cat([s.valid for s in segments], dim=1)
    mask, positions = segment_mask([s.span for s in segments], valid), positions_of(valid)
    whole = model.transformer.new_cache(2, 27)
    x = torch.cat([s.embeddings for s in segments], dim=1)
    x = model.transformer([x, None], positions, mask, whole, 0, range(layer))[0]
    assert prefix.length == 27 - 20 + keep and prefix.cache.capacity == prefix.length + 6
    assert prefix.cache.length == prefix.length
    for sample in range(2):
        best = np.argsort(-by_svd(x[sample, GRID].numpy()))[:keep]
        expected = sorted(GRID[place] for place in best)
        assert prefix.kept[sample].tolist() == expected
        stay = sorted([*expected, 16, *TEXT_AND_STATE])
        rest = model.transformer.new_cache(1, len(stay))
        model.transformer(
            [x[sample : sample + 1, stay], None], positions[sample : sample + 1, stay],
            mask[sample : sample + 1, stay][:, :, stay], rest, 0, range(layer, 3),
        )  # fmt: skip
        for index in range(3):
            source, places = (whole.keys[index, sample], stay) if index < layer else (rest.keys[index, 0], slice(None))
            mine = prefix.cache.keys[index, sample, :, : prefix.length]
            assert torch.allclose(mine, source[:, places], atol=1e-5), (sample, index)
    assert prefix.kept[0].tolist() != prefix.kept[1].tolist()  # chosen by each sample for itself


@torch.inference_mode()
def test_a_suffix_goes_on_behind_the_original_length_and_sees_no_padding() -> None:
    model, args = model_of(), inputs(2)  # the first sample has two padded words
    plain, pruned = prefix_of(model, args), prefix_of(model, args, TokenSelection(1, 0.25))
    assert all(map(torch.equal, plain.rotary, pruned.rotary))
    assert [(row == -torch.inf).sum().item() for row in pruned.bias[:, -1]] == [2, 0]
    images, text, valid, state = args
    other = text.clone()
    other[0, 3:] = (other[0, 3:] + 1) % 20
    unpadded = prefix_of(model, (images, other, valid, state), TokenSelection(1, 0.25))
    padded = prefix_of(model, args, TokenSelection(1, 0.25))
    ids = torch.randint(0, 11, (2, 3))
    logits = [TokenSuffix(model, prefix, "words").logits(ids) for prefix in (unpadded, padded)]
    assert torch.allclose(logits[0], logits[1], atol=1e-6)


@torch.inference_mode()
def test_a_batch_gives_what_single_samples_give_and_each_head_and_host_passes_go_on() -> None:
    model, args = make(**SEVERAL), inputs(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    selection, ids = TokenSelection(1, 6), torch.randint(0, 11, (2, 5))
    noisy, time = torch.randn(2, 4, 2), torch.rand(2)
    together = prefix_of(model, args, selection, model.config.suffix_room)
    logits = TokenSuffix(model, together, "words").logits(ids)
    together.cache.truncate(together.length)
    flow, once = model.velocity(together, "flow", noisy, time), model.parallel_actions(together, "once")
    for sample in range(2):
        row = slice(sample, sample + 1)
        images, *rest = args
        single = {name: image[row] for name, image in images.items()}, *(part[row] for part in rest)
        alone = prefix_of(model, single, selection, model.config.suffix_room)
        assert torch.equal(alone.kept, together.kept[row])
        suffix = TokenSuffix(model, alone, "words")
        assert suffix.host is not None and suffix.room == model.config.suffix_room
        assert torch.allclose(suffix.logits(ids[row]), logits[row], atol=1e-5)
        suffix.truncate(0)
        assert torch.allclose(model.velocity(alone, "flow", noisy[row], time[row]), flow[row], atol=1e-5)
        assert torch.allclose(model.parallel_actions(alone, "once"), once[row], atol=1e-5)


def test_padded_pictures_go_first() -> None:
    hidden = torch.randn(1, 6, 8)
    valid = torch.tensor([[True, False, True, False, True, True]])
    kept = TokenSelection(1, 3).choose(100 * hidden, torch.arange(5), valid)
    assert kept.tolist() == [[0, 2, 4]]


# ---- settings, costs, policy ----
def test_settings_that_cannot_work_are_named() -> None:
    for changes in ({"layer": 0}, {"keep": 0}, {"keep": 0.0}, {"keep": 1.5}):
        with pytest.raises(ConfigError, match=rf"pruning\.{next(iter(changes))}"):
            TokenSelection(**changes)
    config = model_of().config
    with pytest.raises(ConfigError, match=r"pruning\.layer: expected below the depth, 3"):
        TokenSelection(3).check(config)
    with pytest.raises(ConfigError, match=r"pruning\.keep: expected at most 20"):
        TokenSelection(1, 21).check(config)
    assert TokenSelection(1, 0.01).count(20) == 1 and TokenSelection(1, 1).count(20) == 1
    assert [load("pruning", name).layer for name in names("pruning")] == [2] * len(names("pruning"))


@torch.inference_mode()
@pytest.mark.parametrize(
    "selection", [None, TokenSelection(1, 0.5), TokenSelection(2, 3), TokenSelection(1, 3, drop=False)]
)
def test_flops_are_those_that_are_counted(selection) -> None:
    model, args = model_of(), inputs(1)
    segments = model.prefix_segments(*args)
    with FlopCounterMode(display=False) as counter:
        model.prefix(segments, 4, selection)
    eigen = 0 if selection is None else 9 * 20**3
    assert counter.get_total_flops() + eigen == prefix_flops(model.config, selection)


def test_half_the_tokens_save_what_later_layers_cost() -> None:
    transformer = TransformerConfig((ExpertConfig(512, 2048),), 8, 8, 2, 64)
    camera, head = CameraEncoderConfig("front", 128, 16, (64, 128)), HeadConfig("a", "tokens", 0, 9)
    config = replace(model_of().config, transformer=transformer, cameras=(camera,), heads=(head,))
    shares = [prefix_flops(config, TokenSelection(2, keep)) / prefix_flops(config) for keep in (0.25, 0.5, 0.9)]
    assert shares == sorted(shares) and 0.45 < shares[0] < 0.5 < 0.6 < shares[1] < 0.7
    assert 0.93 < shares[2] < 0.97  # of the tenth that goes, choosing takes a part


def test_the_policy_passes_the_selection_on_and_reports_what_stayed() -> None:
    bundle = bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),), text_vocab=512)
    images = {"front": np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8),
              "wrist": np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8)}  # fmt: skip
    seen = Observation(images, np.zeros(3, np.float32), "push", 1)
    plain = infer(VlaPolicy(bundle), seen)
    scored = infer(VlaPolicy(bundle, selection=TokenSelection(1, 5, drop=False)), seen)
    pruned = infer(VlaPolicy(bundle, selection=TokenSelection(1, 5)), seen)
    assert plain.report.kept_tokens is None
    assert scored.report.ids == plain.report.ids  # nothing was dropped
    assert scored.report.kept_tokens.tolist() == pruned.report.kept_tokens.tolist()
    assert scored.report.kept_tokens.shape == (5,) and (scored.report.kept_tokens < 20).all()
    with pytest.raises(ConfigError, match=r"pruning\.layer"):
        VlaPolicy(bundle, selection=TokenSelection(5))
