"""The model as a whole: shapes, the instruction reaches the image encoders, segments and caches agree."""

import pytest
import torch

from vla.models.masks import MaskRule
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.models.vision import CameraEncoder, CameraEncoderConfig, SoftPoints
from vla.models.vla import ModelConfig, TextSummary, Vla


def make(**changes) -> Vla:
    torch.manual_seed(0)
    settings = {
        "cameras": (CameraEncoderConfig("front", 32, 4, (8, 16)), CameraEncoderConfig("wrist", 16, 2, (8, 16))),
        "transformer": TransformerConfig((ExpertConfig(32, 64), ExpertConfig(16, 32)), 2, 4, 2, 8),
        "state_dim": 3, "action_dim": 2, "horizon": 4, "text_vocab": 20, "text_length": 5, "action_vocab": 11,
        "text_queries": 3, **changes,
    }  # fmt: skip
    return Vla(ModelConfig(**settings)).eval()


def inputs(batch: int = 2):
    torch.manual_seed(1)
    images = {"front": torch.randint(0, 255, (batch, 32, 32, 3), dtype=torch.uint8),
              "wrist": torch.randint(0, 255, (batch, 16, 16, 3), dtype=torch.uint8)}  # fmt: skip
    valid = torch.ones(batch, 5, dtype=torch.bool)
    valid[0, 3:] = False
    return images, torch.randint(0, 20, (batch, 5)), valid, torch.randn(batch, 3)


@torch.inference_mode()
def test_cached_suffix_equals_the_training_pass() -> None:
    model = make()
    args = inputs()
    ids = torch.randint(0, 11, (2, 6))
    segments = model.prefix_segments(*args)
    whole = model.head.logits(model.run([*segments, model.action_segment(ids, torch.ones_like(ids).bool())])[-1])
    prefix = model.prefix(model.prefix_segments(*args), 6)
    steps = [model.suffix_logits(prefix, ids[:, i : i + 1]) for i in range(4)]
    steps.append(model.suffix_logits(prefix, ids[:, 4:]))
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert prefix.cache.length == prefix.length + 6


@torch.no_grad()  # not inference_mode: a model made there keeps no count of its writes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("expert", [0, 1])
def test_one_sample_on_a_cpu_runs_in_numpy_and_equals_the_training_pass(expert: int, activation: str) -> None:
    experts = ExpertConfig(32, 64), ExpertConfig(16, 32)
    model = make(suffix_expert=expert, transformer=TransformerConfig(experts, 2, 4, 2, 8, activation=activation))
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.3)
    args = inputs(1)
    ids = torch.randint(0, 11, (1, 6))

    def whole():
        segments = [*model.prefix_segments(*args), model.action_segment(ids, torch.ones_like(ids).bool())]
        return model.head.logits(model.run(segments)[-1])

    prefix = model.prefix(model.prefix_segments(*args), 6)
    assert prefix.host is not None
    for sizes in ([6], [1, 1, 4], [2, 3, 1]):
        prefix.cache.truncate(prefix.length)
        pieces = [model.suffix_logits(prefix, part) for part in ids.split(sizes, dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), whole(), atol=1e-5), sizes
    host, prefix.host = prefix.host, None  # torch goes on in the same cache
    prefix.cache.truncate(prefix.length + 3)
    assert torch.allclose(model.suffix_logits(prefix, ids[:, 3:]), whole()[:, 3:], atol=1e-5)
    model.head.logits.weight.mul_(2)
    again = model.prefix(model.prefix_segments(*args), 6)
    assert torch.allclose(model.suffix_logits(again, ids), whole(), atol=1e-5)  # weights that changed are copied again
    assert again.host is not None and again.host.weights is not host.weights


@torch.inference_mode()
def test_suffix_on_the_backbone_works_the_same() -> None:
    model = make(suffix_expert=0)
    args = inputs()
    ids = torch.randint(0, 11, (2, 3))
    whole = model.head.logits(
        model.run([*model.prefix_segments(*args), model.action_segment(ids, torch.ones_like(ids).bool())])[-1]
    )
    prefix = model.prefix(model.prefix_segments(*args), 3)
    assert torch.allclose(model.suffix_logits(prefix, ids), whole, atol=1e-5)


@torch.inference_mode()
def test_action_tokens_see_no_later_ones() -> None:
    model = make()
    ids = torch.randint(0, 11, (2, 6))

    def logits(tokens):
        return model.run([*model.prefix_segments(*inputs()), model.action_segment(tokens, torch.ones_like(ids).bool())])

    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = logits(ids), logits(changed)
    assert torch.equal(before[-1][:, :4], after[-1][:, :4])
    assert not torch.equal(before[-1][:, 4:], after[-1][:, 4:])
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1]))  # the prefix sees no action at all


def test_the_instruction_reaches_the_encoder_and_starts_as_nothing() -> None:
    torch.manual_seed(0)
    encoder = CameraEncoder(CameraEncoderConfig("front", 32, 4, (8, 16)), 32, text_width=6)
    images, text = torch.randint(0, 255, (2, 32, 32, 3)), torch.randn(2, 6)
    torch.nn.init.normal_(encoder.blocks[0].conv2.weight, std=0.1)
    assert torch.equal(encoder(images, text), encoder(images))
    encoder(images, text).square().sum().backward()
    assert encoder.films["0"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        encoder.films["0"].weight.normal_()
    assert not torch.allclose(encoder(images, text), encoder(images))


def test_points_are_where_the_features_answer_the_words() -> None:
    """A bright cell at a known place, a query that asks for brightness: the point lies there, and moves with it."""
    points = SoftPoints(channels=8, points=1, text_width=4, width=2)
    with torch.no_grad():
        points.keys.weight.zero_()
        points.keys.weight[0, 0] = 8.0
        points.queries.weight.zero_()
        points.queries.bias.zero_()
        points.queries.bias[0] = 8.0
        points.embed.weight.copy_(torch.eye(2) / points.GAIN)
        points.embed.bias.zero_()
    features = torch.zeros(2, 8, 5, 9)
    features[0, 0, 0, 2] = features[1, 0, 4, 8] = 3.0
    token = points(features, torch.randn(2, 4))
    assert token.shape == (2, 1, 2)
    assert torch.allclose(token[:, 0], torch.tensor([[-1.0, -0.5], [1.0, 1.0]]), atol=1e-3)  # y, x


def test_points_depend_on_the_words_and_need_them() -> None:
    torch.manual_seed(0)
    config = CameraEncoderConfig("front", 32, 4, (8, 16), points=3)
    encoder = CameraEncoder(config, 32, text_width=6)
    images, text = torch.randint(0, 255, (2, 32, 32, 3)), torch.randn(2, 6)
    tokens = encoder(images, text)
    assert tokens.shape == (2, config.tokens, 32) and config.tokens == 17
    other = encoder(images, -text)
    assert not torch.allclose(tokens[:, -1], other[:, -1])
    assert torch.equal(tokens[:, :-1], other[:, :-1])  # no modulation before the points
    with pytest.raises(ValueError, match="front: points need text"):
        encoder(images)
    with pytest.raises(ValueError, match="text_width > 0"):
        CameraEncoder(config, 32)


def test_summary_ignores_padding_and_reads_order() -> None:
    torch.manual_seed(0)
    summary = TextSummary(4, 5, 16)
    words, valid = torch.randn(1, 5, 16), torch.tensor([[True, True, True, False, False]])
    first = summary(words, valid)
    words[:, 3:] += 1.0
    assert torch.equal(summary(words, valid), first)
    assert not torch.allclose(summary(words[:, [1, 0, 2, 3, 4]], valid), first)


def test_wrong_images_and_segment_order_are_named() -> None:
    model = make()
    images, *rest = inputs()
    with pytest.raises(KeyError, match="wrist"):
        model.prefix_segments({"front": images["front"]}, *rest)
    with pytest.raises(ValueError, match=r"\[B, 32, 32, 3\]"):
        model.prefix_segments({**images, "front": images["wrist"]}, *rest)
    segments = model.prefix_segments(images, *rest)
    ids = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="ordered by expert"):
        model.run([model.action_segment(ids, torch.ones_like(ids).bool()), *segments])
    assert [s.rule for s in segments] == [MaskRule.PREFIX] * 4
    with pytest.raises(ValueError, match="grid"):
        CameraEncoderConfig("front", 32, 8, (8, 16))
