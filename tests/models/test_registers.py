"""Registers: the only way from pictures into deeper layers, a shorter cache behind them, and any head or decoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from policies.reuse_policy import ReusePolicy
from policies.vla_policy import VlaPolicy
from tests.contracts.test_decoders import EXACT, decode, model_of, prompt, tokenizer_of
from tests.decoding.test_continuous import DECODERS, bundle_of, given
from tests.models.test_vla import SEVERAL, inputs, make
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.masks import MaskRule
from vla.models.pruning import RegisterConfig, TokenSelection, prefix_flops
from vla.models.suffix import TokenSuffix
from vla.models.vision import CameraEncoderConfig
from vla.models.vla import Vla
from vla.policy import infer
from vla.types import Observation

POINTS = (CameraEncoderConfig("front", 32, 4, (8, 16), points=2), CameraEncoderConfig("wrist", 16, 2, (8, 16)))
GRID = 20  # visual tokens
REST = 1 + 5 + 1  # points, text, state
DEPTH = 3


def model_with(layer: int = 1, count: int = 3, **changes) -> Vla:
    transformer = replace(SEVERAL["transformer"], depth=DEPTH)
    registers = RegisterConfig(count, layer) if count else None
    model = make(**{**SEVERAL, "cameras": POINTS, "transformer": transformer, "registers": registers, **changes})
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model


def branches_of(model: Vla, batch: int) -> tuple[list, dict]:
    """One branch of every head, in the order of experts, and what went into them."""
    torch.manual_seed(2)
    flow, once, both = model.heads["flow"], model.heads["once"], model.heads["both"]
    put = {"noisy": torch.randn(batch, 4, 2), "time": torch.rand(batch), "step": torch.randint(0, 10, (batch,)),
           "ids": torch.randint(0, 9, (batch, 8)), "words": torch.randint(0, 11, (batch, 5))}  # fmt: skip
    lead = both.embed(put["noisy"], put["step"])
    return [
        model.suffix_segment("once", once.queries[None].expand(batch, -1, -1), rule=MaskRule.BLOCK),
        model.suffix_segment("words", model.heads["words"].embed(put["words"])),
        model.suffix_segment("flow", flow.embed(put["noisy"]), rule=MaskRule.BLOCK),
        model.suffix_segment("both", torch.cat((lead, both.tokens.embed(put["ids"])), dim=1)),
    ], put  # fmt: skip


def cut(segments: list) -> list:
    """The same with registers that nobody sees."""
    return [replace(s, valid=torch.zeros_like(s.valid)) if s.kind == "registers" else s for s in segments]


# ---- training and cached inference are one thing ----
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layer", [1, 2, DEPTH])
def test_every_head_behind_the_short_cache_equals_the_joint_training_pass(layer: int, batch: int) -> None:
    model, args = model_with(layer), inputs(batch)
    branches, put = branches_of(model, batch)
    flow, once, both = model.heads["flow"], model.heads["once"], model.heads["both"]
    condition = flow.condition(put["time"])
    whole = model.run([*model.prefix_segments(*args), *branches], condition)
    prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room)
    assert torch.allclose(model.velocity(prefix, "flow", put["noisy"], put["time"]), flow.read(whole[-2]), atol=1e-5)
    assert torch.allclose(model.parallel_actions(prefix, "once"), once.read(whole[-4]), atol=1e-5)
    expected = model.heads["words"].logits(whole[-3])
    for sizes in ([5], [1, 1, 3]):
        suffix = TokenSuffix(model, prefix, "words")
        assert (suffix.host is not None) == (batch == 1)  # one sample runs in numpy
        pieces = [suffix.logits(part) for part in put["words"].split(sizes, dim=1)]
        assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-5)
        suffix.truncate(0)
    noise = model.noise(prefix, "both", put["noisy"], put["step"])
    assert torch.allclose(noise, both.noise(whole[-1][:, 2:6]), atol=1e-5)
    prefix.cache.advance(4 + 3)
    suffix = TokenSuffix(model, prefix, "both")
    assert torch.allclose(suffix.logits(put["ids"]), both.tokens.logits(whole[-1][:, 7:]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, DEPTH])
def test_branches_behind_a_trunk_without_gradient_equal_the_joint_pass_at_every_exit(layer: int) -> None:
    model, args = model_with(layer), inputs(2)
    branches, put = branches_of(model, 2)
    trunk, condition = model.prefix_segments(*args), model.heads["flow"].condition(put["time"])
    joint = model.run_with_exits([*trunk, *branches], (1, 2), condition)
    behind = model.run_behind(trunk, branches, (1, 2), condition)
    assert len(joint) == len(behind) == 3
    for one, other in zip(joint, behind):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one[len(trunk) :], other))
    sizes = [[hidden.shape[1] for hidden in depth[: len(trunk)]] for depth in joint]
    full, left = [16, 1, 4, 3, 5, 1], [0, 1, 0, 3, 5, 1]  # grid, points, grid, registers, text, state
    assert sizes == [full, full if layer > 1 else left, full if layer == DEPTH else left]


@torch.no_grad()
def test_dropping_equals_hiding_and_positions_stay() -> None:
    """By hand: nothing leaves, but from layer K on nobody else's row may look at a visual token."""
    model, args = model_with(1), inputs(2)
    segments = model.prefix_segments(*args)
    valid = torch.cat([s.valid for s in segments], dim=1)
    visual = torch.tensor([s.kind.startswith("image:") for s in segments for _ in range(s.embeddings.shape[1])])
    register = torch.tensor([s.kind == "registers" for s in segments for _ in range(s.embeddings.shape[1])])
    assert visual.sum() == GRID and register.nonzero().flatten().tolist() == [21, 22, 23]  # behind all pictures
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    first = valid[:, None] & (~visual[None, :] | visual[:, None] | register[:, None]) | torch.eye(30, dtype=torch.bool)
    later = first & ~(visual[None, :] & ~visual[:, None])
    x = [torch.cat([s.embeddings for s in segments], dim=1), None, None, None]
    x = model.transformer(x, positions, first, layers=range(1))
    x = model.transformer(x, positions, later, layers=range(1, DEPTH))
    assert torch.allclose(
        torch.cat(model.run(segments), dim=1), model.transformer.finish(0, x[0])[:, ~visual], atol=1e-5
    )
    prefix = model.prefix(segments, 6)
    assert torch.equal(prefix.rotary[0], model.transformer.rotary(valid.sum(1)[:, None] + torch.arange(6))[0])


# ---- what is left ----
@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layer", [1, 2, DEPTH])
def test_the_cache_holds_registers_and_the_rest(layer: int, count: int) -> None:
    model = model_with(layer, count)
    prefix = model.prefix(model.prefix_segments(*inputs(2)), 6)
    length = count + REST + (GRID if layer == DEPTH else 0)
    assert prefix.length == prefix.cache.length == length
    assert prefix.cache.capacity == length + 6 == prefix.bias.shape[2]
    assert prefix.kept is None  # nobody chose


@torch.no_grad()
def test_at_the_depth_with_masked_registers_it_is_the_model_without() -> None:
    model, plain, args = model_with(DEPTH), model_with(count=0), inputs(2)
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name != "registers"})
    branches, put = branches_of(model, 2)
    condition = model.heads["flow"].condition(put["time"])
    mine = model.run([*cut(model.prefix_segments(*args)), *branches], condition)
    theirs = plain.run([*plain.prefix_segments(*args), *branches], condition)
    del mine[3]  # the registers' own
    assert len(mine) == len(theirs) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))
    behind = [m.prefix(segments, 4) for m, segments in
              ((model, cut(model.prefix_segments(*args))), (plain, plain.prefix_segments(*args)))]  # fmt: skip
    logits = [TokenSuffix(m, prefix, "words").logits(put["words"][:, :4]) for m, prefix in zip((model, plain), behind)]
    assert torch.allclose(*logits, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_reach_the_vision_tower_through_registers_only(layer: int) -> None:
    """Words do not enter these encoders, and there are no points: what is left is the grid."""
    cameras = tuple(replace(camera, points=0) for camera in POINTS)
    model, args = model_with(layer, cameras=cameras), inputs(2)
    branches, put = branches_of(model, 2)

    def reached(change) -> list[float]:
        model.zero_grad()
        hidden = model.run(
            change([*model.prefix_segments(*args), *branches]), model.heads["flow"].condition(put["time"])
        )
        sum(x.square().sum() for x in hidden[3:]).backward()  # text, state and every head
        gradients = [p.grad for p in model.cameras.parameters()]
        return [0.0 if g is None else float(g.abs().sum()) for g in gradients]

    branches = [replace(s, embeddings=s.embeddings.detach()) for s in branches]
    assert min(reached(lambda segments: segments)) > 0
    assert max(reached(cut)) == 0
    registers = model.registers.grad.clone()
    assert not registers.any()  # cut off themselves
    reached(lambda segments: segments)
    assert model.registers.grad.abs().sum(dim=1).min() > 0


@torch.no_grad()
def test_a_batch_gives_what_single_samples_give() -> None:
    model, args = model_with(), inputs(2)
    words = torch.randint(0, 11, (2, 5))
    together = TokenSuffix(model, model.prefix(model.prefix_segments(*args), 6), "words").logits(words)
    images, *rest = args
    for sample in range(2):
        row = slice(sample, sample + 1)
        single = {name: image[row] for name, image in images.items()}, *(part[row] for part in rest)
        alone = TokenSuffix(model, model.prefix(model.prefix_segments(*single), 6), "words")
        assert alone.host is not None
        assert torch.allclose(alone.logits(words[row]), together[row], atol=1e-5)


@torch.inference_mode()
def test_a_model_in_bf16_runs() -> None:
    model = model_with().to(torch.bfloat16)
    prefix = model.prefix(model.prefix_segments(*inputs(1)), model.config.suffix_room)
    out = TokenSuffix(model, prefix, "words").logits(torch.zeros(1, 2, dtype=torch.long))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


# ---- what it saves ----
def token_layers(model: Vla, run) -> int:
    """Tokens that go through a layer of the backbone, summed over layers."""
    seen = []
    hooks = [
        layer[0].qkv.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
        for layer in model.transformer.layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return sum(seen)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, DEPTH])
def test_deeper_layers_run_without_visual_tokens(layer: int) -> None:
    model, args = model_with(layer), inputs(1)
    branches, put = branches_of(model, 1)
    condition = model.heads["flow"].condition(put["time"])
    expected = (GRID + 3 + REST) * layer + (3 + REST) * (DEPTH - layer)
    segments = model.prefix_segments(*args)
    assert token_layers(model, lambda: model.prefix(segments, 4)) == expected
    assert token_layers(model, lambda: model.run(segments)) == expected
    assert token_layers(model, lambda: model.run_behind(segments, branches[1:], (), condition)) == expected
    own = branches[0].embeddings.shape[1] * DEPTH  # one head runs on the backbone
    assert token_layers(model, lambda: model.run([*segments, *branches], condition)) == expected + own
    with FlopCounterMode(display=False) as counter:
        model.prefix(segments, 4)
    assert counter.get_total_flops() == prefix_flops(model.config)


def test_eight_registers_save_most_of_what_later_layers_cost() -> None:
    config = replace(model_with().config, transformer=replace(SEVERAL["transformer"], depth=8))
    camera = (CameraEncoderConfig("front", 128, 16, (64, 128)),)
    plain = replace(config, cameras=camera, registers=None)
    shares = [prefix_flops(replace(plain, registers=RegisterConfig(8, k))) / prefix_flops(plain) for k in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] < 0.25 < 0.4 < shares[2] < 0.7
    assert shares[3] > 1  # eight more tokens, and nothing leaves


# ---- decoders ----
def with_registers(model: Vla) -> Vla:
    out = Vla(replace(model.config, registers=RegisterConfig(3, 1))).eval()
    out.load_state_dict(model.state_dict(), strict=False)
    torch.nn.init.normal_(out.registers)
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bins", "fast"])
def test_exact_decoders_equal_greedy_and_greedy_equals_the_training_pass(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    grammar, different = Grammar(tokenizer, 8, 2), set()
    for seed in range(4):
        model, prompts = with_registers(model_of(tokenizer, seed)), prompt(seed, 2)
        greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompts)
        for name, decoder in EXACT.items():
            assert decode(decoder, model, grammar, prompts)[0].ids == greedy.ids, name
        head = model.heads["words"]
        for sample, ids in enumerate(greedy.ids):
            rows = torch.tensor([ids, ids])
            segment = model.suffix_segment("words", head.embed(head.shift(rows)))
            logits = head.logits(model.run([*model.prefix_segments(*prompts), segment])[-1])
            left = grammar.before_each(grammar.values, ids)[:-1]
            said = grammar.constrain(logits, [left, left]).argmax(-1)[sample]
            assert said.tolist() == ids
        different.add(str(greedy.ids))
    assert len(different) == 4


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_continuous_heads_run_and_a_batch_changes_nothing(name: str) -> None:
    bundle, plain = (bundle_of(registers=registers) for registers in (RegisterConfig(3, 1), None))
    decoder = DECODERS[name]
    decoder.check(bundle)
    together = decoder.decode(given(bundle))
    assert together.actions.shape == (2, 4, 3) and np.isfinite(together.actions).all()
    for sample, seed in enumerate((5, 6)):
        alone = decoder.decode(given(bundle, (seed,), [sample]))
        assert np.allclose(alone.actions[0], together.actions[sample], atol=1e-5)
    assert not np.allclose(decoder.decode(given(plain)).actions, together.actions)


# ---- refusals ----
def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.registers: expected at least 1"):
        RegisterConfig(0)
    with pytest.raises(ConfigError, match=r"model\.register_layer: expected at least 1"):
        RegisterConfig(8, 0)
    with pytest.raises(ConfigError, match=r"model\.register_layer: expected at most the depth, 3"):
        model_with(DEPTH + 1)


def test_selection_and_reuse_are_refused_where_registers_are() -> None:
    heads = (HeadConfig("words", "tokens", 0, 9),)
    bundle = bundle_of(heads=heads, text_vocab=512, registers=RegisterConfig(3, 1))
    for drop in (True, False):
        selection = TokenSelection(1, 5, drop=drop)
        with pytest.raises(ConfigError, match="pruning: expected a model without registers, got 3 registers"):
            VlaPolicy(bundle, selection=selection)
        with pytest.raises(ConfigError, match="without registers"):
            bundle.model.prefix(bundle.model.prefix_segments(*inputs(1)), 4, selection)
    images = {"front": np.zeros((32, 32, 3), np.uint8), "wrist": np.zeros((16, 16, 3), np.uint8)}
    seen = Observation(images, np.zeros(3, np.float32), "push", 1)
    policy = VlaPolicy(bundle)
    assert infer(policy, seen).report.kept_tokens is None
    with pytest.raises(ConfigError, match="reuse: expected a policy that reports important visual tokens"):
        infer(ReusePolicy(policy), seen)
