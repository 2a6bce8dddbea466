"""The transformer's promises: cached equals uncached, experts share one attention, rollback, layer ranges."""

import pytest
import torch

from vla.models.masks import MaskRule, Span, positions_of, segment_mask
from vla.models.transformer import ExpertConfig, Transformer, TransformerConfig, additive


def make(experts=((48, 96), (32, 64)), **changes) -> Transformer:
    torch.manual_seed(0)
    settings = {"depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, **changes}
    model = Transformer(TransformerConfig(tuple(ExpertConfig(*e) for e in experts), **settings))
    for parameter in model.parameters():  # zero-initialised norms would hide mistakes
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def sequence(model: Transformer, batch: int = 2, prefix: int = 5, suffix: int = 4):
    torch.manual_seed(1)
    widths = [expert.width for expert in model.config.experts]
    x, y = torch.randn(batch, prefix, widths[0]), torch.randn(batch, suffix, widths[-1])
    valid = torch.ones(batch, prefix + suffix, dtype=torch.bool)
    valid[0, 3] = False  # padding inside the prefix of the first sample
    mask = segment_mask([Span("text", prefix, MaskRule.PREFIX), Span("action", suffix, MaskRule.CAUSAL)], valid)
    return x, y, valid, mask


@torch.inference_mode()
def test_cached_suffix_equals_one_uncached_pass() -> None:
    model = make()
    x, y, valid, mask = sequence(model)
    positions = positions_of(valid)
    whole = model([x, y], positions, mask)[1]
    for sizes in ([4], [1, 1, 1, 1], [2, 2], [3, 1]):
        cache = model.new_cache(2, 16)
        model([x, None], positions[:, :5], mask[:, :5, :5], cache, 0)
        cache.advance(5)
        pieces, start = [], 5
        for size in sizes:
            end = start + size
            pieces.append(
                model(
                    [None, y[:, start - 5 : end - 5]], positions[:, start:end], mask[:, start:end, :end], cache, start
                )[1]
            )
            cache.advance(size)
            start = end
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5), sizes


@torch.inference_mode()
def test_rollback_overwrites_and_never_reads_stale_entries() -> None:
    model = make()
    x, y, valid, mask = sequence(model)
    positions = positions_of(valid)
    cache = model.new_cache(2, 16)
    model([x, None], positions[:, :5], mask[:, :5, :5], cache, 0)
    cache.advance(5)
    args = (positions[:, 5:7], mask[:, 5:7, :7], cache, 5)
    first = model([None, y[:, :2]], *args)[1]
    model([None, torch.randn_like(y[:, :2])], *args)
    cache.truncate(5)
    assert cache.length == 5
    assert torch.equal(model([None, y[:, :2]], *args)[1], first)


@torch.inference_mode()
def test_layer_ranges_compose() -> None:
    model = make()
    x, y, valid, mask = sequence(model)
    positions = positions_of(valid)
    whole = model([x, y], positions, mask)
    half = model([x, y], positions, mask, layers=range(0, 2))
    rest = model(half, positions, mask, layers=range(2, 3))
    assert torch.equal(rest[1], whole[1])


@torch.inference_mode()
def test_padding_is_invisible() -> None:
    model = make()
    x, y, valid, mask = sequence(model)
    before = model([x, y], positions_of(valid), mask)[1][0]
    x[0, 3] += 5.0
    assert torch.equal(model([x, y], positions_of(valid), mask)[1][0], before)


def test_segment_mask_rules() -> None:
    valid = torch.ones(1, 7, dtype=torch.bool)
    spans = [
        Span("text", 2, MaskRule.PREFIX),
        Span("label", 2, MaskRule.CAUSAL, hidden_from=("action",)),
        Span("state", 1, MaskRule.PREFIX),
        Span("action", 2, MaskRule.BLOCK),
    ]
    seen = segment_mask(spans, valid)[0].int().tolist()
    assert seen == [
        [1, 1, 0, 0, 1, 0, 0],  # prefix segments see each other, wherever they stand
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],  # causal: itself and what came before
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],  # a prefix segment sees the causal one before it
        [1, 1, 0, 0, 1, 1, 1],  # hidden_from holds; a block sees itself in both directions
        [1, 1, 0, 0, 1, 1, 1],
    ]


def test_a_segment_can_name_the_only_ones_that_see_it() -> None:
    seers = ("image", "registers")
    spans = [
        Span("image", 1, MaskRule.PREFIX, seen_by=seers),
        Span("registers", 1, MaskRule.PREFIX),
        Span("text", 1, MaskRule.PREFIX),
        Span("action", 2, MaskRule.CAUSAL),
    ]
    seen = segment_mask(spans, torch.ones(1, 5, dtype=torch.bool))[0].int().tolist()
    assert seen == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


@torch.inference_mode()
def test_places_made_before_give_the_same_pass() -> None:
    model = make()
    x, y, valid, mask = sequence(model)
    positions = positions_of(valid)
    plain = model([x, y], positions, mask)
    made = model([x, y], model.rotary(positions), additive(mask, x.dtype))
    assert all(torch.equal(a, b) for a, b in zip(plain, made))


def test_adaptive_norm_starts_as_the_plain_one() -> None:
    torch.manual_seed(0)
    config = TransformerConfig((ExpertConfig(32, 64, condition_width=8),), 2, 4, 2, 8)
    model = Transformer(config).eval()
    x, positions = torch.randn(1, 3, 32), torch.arange(3)[None]
    plain = model([x], positions, None)[0]
    assert torch.allclose(model([x], positions, None, condition=torch.randn(1, 8))[0], plain, atol=1e-6)


def test_llama_weights_of_the_public_implementation_agree() -> None:
    """A small Llama made by transformers runs here with the same outputs, when that package is installed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = transformers.LlamaModel(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    config = TransformerConfig((ExpertConfig(64, 96),), 2, 4, 2, 16, norm_eps=reference.config.rms_norm_eps)
    model = Transformer(config).eval()
    with torch.no_grad():
        for ours, theirs in zip(model.layers, reference.layers):
            ours[0].attention_norm.weight.copy_(theirs.input_layernorm.weight - 1)
            attention, mlp = theirs.self_attn, theirs.mlp
            joined = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            ours[0].qkv.weight.copy_(torch.cat(joined))
            ours[0].out.weight.copy_(attention.o_proj.weight)
            ours[0].mlp_norm.weight.copy_(theirs.post_attention_layernorm.weight - 1)
            ours[0].gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            ours[0].down.weight.copy_(mlp.down_proj.weight)
        model.final_norms[0].weight.copy_(reference.norm.weight - 1)
        ids = torch.randint(0, 50, (2, 7))
        expected = reference(input_ids=ids).last_hidden_state
        mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, -1, -1)
        hidden = model([reference.embed_tokens(ids)], torch.arange(7).expand(2, -1), mask)[0]
        assert torch.allclose(model.finish(0, hidden), expected, atol=1e-5)
