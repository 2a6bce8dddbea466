"""The model as a whole: shapes, the instruction reaches the image encoders, segments and caches agree."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vla.models.heads import HeadConfig
from vla.models.host import MOST_TIMES, HostSuffix
from vla.models.masks import MaskRule
from vla.models.suffix import TokenSuffix
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.models.vision import CameraEncoder, CameraEncoderConfig, SoftPoints
from vla.models.vla import ModelConfig, TextSummary, Vla


def make(**changes) -> Vla:
    torch.manual_seed(0)
    settings = {
        "cameras": (CameraEncoderConfig("front", 32, 4, (8, 16)), CameraEncoderConfig("wrist", 16, 2, (8, 16))),
        "transformer": TransformerConfig((ExpertConfig(32, 64), ExpertConfig(16, 32)), 2, 4, 2, 8),
        "state_dim": 3, "action_dim": 2, "horizon": 4, "text_vocab": 20, "text_length": 5, "text_queries": 3,
        "heads": (HeadConfig("words", "tokens", 1, 11),), **changes,
    }  # fmt: skip
    return Vla(ModelConfig(**settings)).eval()


def inputs(batch: int = 2):
    torch.manual_seed(1)
    images = {"front": torch.randint(0, 255, (batch, 32, 32, 3), dtype=torch.uint8),
              "wrist": torch.randint(0, 255, (batch, 16, 16, 3), dtype=torch.uint8)}  # fmt: skip
    valid = torch.ones(batch, 5, dtype=torch.bool)
    valid[0, 3:] = False
    return images, torch.randint(0, 20, (batch, 5)), valid, torch.randn(batch, 3)


def uncached(model: Vla, args, ids):
    """Logits of the first head in one pass over the whole sequence."""
    name = model.config.heads[0].name
    head = model.heads[name]
    return head.logits(model.run([*model.prefix_segments(*args), model.suffix_segment(name, head.embed(ids))])[-1])


def suffix_of(model: Vla, args, room: int) -> TokenSuffix:
    return TokenSuffix(model, model.prefix(model.prefix_segments(*args), room), model.config.heads[0].name)


@torch.inference_mode()
@pytest.mark.parametrize("expert", [0, 1])
def test_cached_suffix_equals_the_training_pass(expert: int) -> None:
    model, args = make(heads=(HeadConfig("words", "tokens", expert, 11),)), inputs()
    ids = torch.randint(0, 11, (2, 6))
    suffix = suffix_of(model, args, 6)
    assert suffix.host is None  # two samples
    steps = [suffix.logits(ids[:, i : i + 1]) for i in range(4)]
    steps.append(suffix.logits(ids[:, 4:]))
    assert torch.allclose(torch.cat(steps, 1), uncached(model, args, ids), atol=1e-5)
    assert suffix.length == suffix.room == 6


@torch.inference_mode()
def test_lists_of_ids_stay_in_numpy_where_the_pass_does() -> None:
    model, args = make(), inputs(1)
    ids = torch.randint(0, 11, (1, 4))
    expected = suffix_of(model, args, 4).logits(ids)
    alone, two = suffix_of(model, args, 4), suffix_of(make(), inputs(2), 4)
    assert alone.host is not None and isinstance(expected, torch.Tensor)
    assert isinstance(said := alone.logits(ids.tolist()), np.ndarray) and np.array_equal(said, expected.numpy())
    assert isinstance(two.logits([[1], [2]]), torch.Tensor)
    alone.truncate(0)
    part = alone.through(alone.through(alone.embed(ids.tolist()), 0, range(1)), 0, range(1, alone.depth))
    assert isinstance(part, np.ndarray) and np.allclose(alone.read(part), said, atol=1e-6)


@torch.no_grad()  # not inference_mode: a model made there keeps no count of its writes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("expert", [0, 1])
def test_one_sample_on_a_cpu_runs_in_numpy_and_equals_the_training_pass(expert: int, activation: str) -> None:
    experts = ExpertConfig(32, 64), ExpertConfig(16, 32)
    model = make(
        heads=(HeadConfig("words", "tokens", expert, 11),),
        transformer=TransformerConfig(experts, 2, 4, 2, 8, activation=activation),
    )
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.3)
    args, ids = inputs(1), torch.randint(0, 11, (1, 6))
    suffix = suffix_of(model, args, 6)
    assert suffix.host is not None
    for sizes in ([6], [1, 1, 4], [2, 3, 1]):
        suffix.truncate(0)
        pieces = [suffix.logits(part) for part in ids.split(sizes, dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), uncached(model, args, ids), atol=1e-5), sizes
    suffix.truncate(0)
    both = suffix.logits(ids, both_ways=True)
    host, suffix.host = suffix.host, None  # torch goes on in the same cache
    suffix.truncate(0)
    assert torch.allclose(suffix.logits(ids, both_ways=True), both, atol=1e-5)
    suffix.truncate(0)
    suffix.logits(ids[:, :3])
    assert torch.allclose(suffix.logits(ids[:, 3:]), uncached(model, args, ids)[:, 3:], atol=1e-5)
    model.heads["words"].logits.weight.mul_(2)
    again = suffix_of(model, args, 6)
    assert torch.allclose(again.logits(ids), uncached(model, args, ids), atol=1e-5)  # changed weights are copied again
    assert again.host is not None and again.host.weights is not host.weights


@torch.inference_mode()
def test_action_tokens_see_no_later_ones() -> None:
    model = make()
    ids = torch.randint(0, 11, (2, 6))

    def logits(tokens):
        segment = model.suffix_segment("words", model.heads["words"].embed(tokens))
        return model.run([*model.prefix_segments(*inputs()), segment])

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
        model.run([model.suffix_segment("words", model.heads["words"].embed(ids)), *segments])
    assert [s.rule for s in segments] == [MaskRule.PREFIX] * 4
    with pytest.raises(ValueError, match="grid"):
        CameraEncoderConfig("front", 32, 8, (8, 16))


SEVERAL = {
    "transformer": TransformerConfig(
        (ExpertConfig(32, 64), ExpertConfig(16, 32), ExpertConfig(24, 32, 8), ExpertConfig(16, 32)), 2, 4, 2, 8
    ),
    "heads": (
        HeadConfig("words", "tokens", 1, 11),
        HeadConfig("flow", "flow", 2),
        HeadConfig("once", "parallel", 0),
        HeadConfig("both", "hybrid", 3, 9, noise_steps=10),
    ),
}


def several() -> Vla:
    model = make(**SEVERAL)
    with torch.no_grad():
        for weight in model.parameters():  # zero-initialised read-outs would hide mistakes
            weight.normal_(std=0.2)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_every_head_behind_the_cache_equals_the_joint_training_pass(batch: int) -> None:
    model, args = several(), inputs(batch)
    noisy, time, step = torch.randn(batch, 4, 2), torch.rand(batch), torch.randint(0, 10, (batch,))
    ids, words = torch.randint(0, 9, (batch, 8)), torch.randint(0, 11, (batch, 5))
    flow, once, both = model.heads["flow"], model.heads["once"], model.heads["both"]
    segments = [
        *model.prefix_segments(*args),
        model.suffix_segment("once", once.queries[None].expand(batch, -1, -1), rule=MaskRule.BLOCK),
        model.suffix_segment("words", model.heads["words"].embed(words)),
        model.suffix_segment("flow", flow.embed(noisy), rule=MaskRule.BLOCK),
        model.suffix_segment("both", torch.cat((both.embed(noisy, step), both.tokens.embed(ids)), dim=1)),
    ]
    whole = model.run(segments, flow.condition(time))
    prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room)
    assert model.config.suffix_room == 4 * 2 + 4 + 3
    for _ in range(2):  # in turns behind one prefix: each writes over what the last one left
        assert torch.allclose(model.velocity(prefix, "flow", noisy, time), flow.read(whole[-2]), atol=1e-5)
        assert torch.allclose(model.parallel_actions(prefix, "once"), once.read(whole[-4]), atol=1e-5)
        suffix = TokenSuffix(model, prefix, "words")
        assert torch.allclose(suffix.logits(words), model.heads["words"].logits(whole[-3]), atol=1e-5)
        suffix.truncate(0)
        model.noise(prefix, "both", torch.randn_like(noisy), step)
        assert torch.allclose(model.noise(prefix, "both", noisy, step), both.noise(whole[-1][:, 2:6]), atol=1e-5)
        prefix.cache.advance(4 + 3)
        suffix = TokenSuffix(model, prefix, "both")
        assert suffix.lead == 7 and suffix.length == 0
        pieces = [suffix.logits(part) for part in ids.split([1, 3, 4], dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), both.tokens.logits(whole[-1][:, 7:]), atol=1e-5)
        prefix.cache.truncate(prefix.length)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_continuous_heads_of_one_sample_run_in_numpy_and_equal_torch(activation: str, monkeypatch) -> None:
    model = make(**{**SEVERAL, "transformer": replace(SEVERAL["transformer"], activation=activation)})
    args, step = inputs(1), torch.tensor([3])

    def answers():
        noisy = torch.linspace(-1, 1, 8).view(1, 4, 2)
        prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room)
        flow = [model.velocity(prefix, "flow", noisy, torch.tensor([time])) for time in (1.0, 0.3, 1.0)]
        return torch.stack([*flow, model.parallel_actions(prefix, "once"), model.noise(prefix, "both", noisy, step)])

    ran, usual = [], HostSuffix.hidden
    monkeypatch.setattr(HostSuffix, "hidden", lambda *given: ran.append(1) or usual(*given))
    for _ in range(3):
        for weight in model.parameters():  # copies, and what they keep of each time, are made anew
            weight.normal_(std=0.2)
        ran.clear()
        host = answers()
        assert len(ran) == 5
        with monkeypatch.context() as patched:
            patched.setattr(Vla, "host_weights", lambda self, head: None)
            assert torch.allclose(host, answers(), atol=1e-5)
        assert torch.equal(host[0], host[2]) and not torch.allclose(host[0], host[1], atol=1e-3)
    for time in torch.linspace(0, 1, 2 * MOST_TIMES):
        model.host_weights("flow").norms(float(time))
    assert len(model.host_weights("flow")._norms) <= MOST_TIMES  # whatever a caller asks for


@torch.inference_mode()
def test_a_model_in_bf16_runs_every_head() -> None:
    model, args = several().to(torch.bfloat16), inputs(1)
    prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room)
    noisy = torch.randn(1, 4, 2)
    suffix = TokenSuffix(model, prefix, "words")
    assert suffix.host is None  # numpy knows no bf16
    for out in (
        suffix.logits(torch.zeros(1, 2, dtype=torch.long)),
        model.velocity(prefix, "flow", noisy.bfloat16(), torch.rand(1)),
        model.parallel_actions(prefix, "once"),
        model.noise(prefix, "both", noisy, torch.tensor([3])),
    ):
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


@torch.inference_mode()
def test_labels_do_not_leak_into_the_denoiser() -> None:
    """The tokens behind the noisy actions may change as they like: the predicted noise stays."""
    model, args = several(), inputs()
    both = model.heads["both"]
    lead = both.embed(torch.randn(2, 4, 2), torch.tensor([3, 4]))

    def run(ids):
        segment = model.suffix_segment("both", torch.cat((lead, both.tokens.embed(ids)), dim=1))
        return model.run([*model.prefix_segments(*args), segment])[-1]

    one, other = run(torch.zeros(2, 8, dtype=torch.long)), run(torch.randint(1, 9, (2, 8)))
    assert torch.equal(both.noise(one[:, 2:6]), both.noise(other[:, 2:6]))
    assert not torch.allclose(one[:, 8:], other[:, 8:])


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"heads\.a\.kind"):
        HeadConfig("a", "tolkens", 0)
    with pytest.raises(ValueError, match=r"heads\.a\.vocab"):
        HeadConfig("a", "flow", 0, 5)
    with pytest.raises(ValueError, match="its own name"):
        make(heads=(HeadConfig("a", "parallel", 1), HeadConfig("a", "parallel", 1)))
    with pytest.raises(ValueError, match="condition_width above 0"):
        make(heads=(HeadConfig("a", "flow", 1),))
    with pytest.raises(ValueError, match=r"heads\.a\.expert"):
        make(heads=(HeadConfig("a", "parallel", 5),))
