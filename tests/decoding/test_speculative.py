"""Drafts change how many passes decoding takes: not greedy's tokens, not what is drawn, not what the cache holds."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from policies.vla_policy import VlaPolicy
from tests.contracts.test_decoders import prompt, tokenizer_of
from tests.decoding.test_continuous import BINS, bundle_of
from tests.models.test_vla import inputs, make
from vla.configs import describe, load
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.decoding.blockwise import BlockwiseDecoder, Lookahead
from vla.decoding.speculative import Greedy, Previous, RelaxedDecoder, SpeculativeDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.kv_cache import KVCache
from vla.models.suffix import TokenSuffix
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.policy import InferContext, infer
from vla.tokenizers import BinTokenizer
from vla.tokenizers.text import TextTokenizer
from vla.types import Observation

DEPTH = 3
EXACT = {
    **{f"previous-{n}": SpeculativeDecoder(length=n) for n in (1, 3, 40)},
    **{f"shallow-{n}": SpeculativeDecoder("shallow", n, layers=layers) for n, layers in ((1, 2), (4, 0))},
    **{f"head-{n}": SpeculativeDecoder("head", n, draft_head="small") for n in (1, 4)},
    **{f"blockwise-{n}": BlockwiseDecoder(n) for n in (0, 1)},
}


def model_of(vocab: int, seed: int = 0, unlike: float = 0.1):
    """A random model with opinions, whose drafts are sometimes right: its last layers add `unlike` of what the first
    do, and the small head differs by as much from the one it drafts for."""
    experts = ExpertConfig(32, 64), ExpertConfig(16, 32), ExpertConfig(16, 32)
    model = make(
        horizon=8, transformer=TransformerConfig(experts, DEPTH, 4, 2, 8),
        heads=(
            HeadConfig("words", "tokens", 1, vocab, lookahead=2, exit_layer=1),
            HeadConfig("small", "tokens", 2, vocab),
        ),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    words, small = model.heads["words"], model.heads["small"]
    with torch.no_grad():
        for module, std in ((words, 0.5), (model.text, 1.0), (model.transformer, 0.3)):
            for weight in module.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=std, generator=draw)
        words.logits.weight.normal_(generator=draw)
        for layer in model.transformer.layers:
            for target, source in zip(layer[2].parameters(), layer[1].parameters()):
                target.copy_(source + unlike * torch.randn(source.shape, generator=draw))
        for layer in model.transformer.layers[1:]:
            for expert in layer[1:]:
                expert.out.weight.mul_(unlike)
                expert.down.weight.mul_(unlike)
        small.embedding.weight.copy_(words.embedding.weight)
        small.logits.weight.copy_(words.logits.weight)
    return model


@torch.inference_mode()
def decode(decoder, model, grammar, prompts, hints=None):
    suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompts), grammar.values), "words")
    return decoder.generate(suffix, grammar, hints or [Hint()] * len(prompts[-1])), suffix


def single(prompts, sample: int):
    images, *rest = prompts
    return {k: v[sample : sample + 1] for k, v in images.items()}, *(item[sample : sample + 1] for item in rest)


def drafts_of(ids, vocab: int, rng) -> dict[str, tuple[int, ...]]:
    noise = rng.integers(0, vocab, 40).tolist()
    wrong = [int(noise[i]) if rng.random() < 0.3 else token for i, token in enumerate(ids)]
    return {
        "right": tuple(ids), "partly wrong": tuple(wrong), "none": (), "short": tuple(ids[: len(ids) // 2]),
        "long": (*ids, *noise), "shifted": tuple(ids[1:]), "against the grammar": tuple(noise),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["bins", "fast"])
def setting(request):
    """A few models over one tokenizer, prompts of two samples, and what greedy decoding makes of them."""
    tokenizer = tokenizer_of(request.param) if request.param == "fast" else BinTokenizer(8)
    grammar = Grammar(tokenizer, 8, 2)
    cases = []
    for seed in range(3):
        model, prompts = model_of(tokenizer.vocab_size, seed), prompt(seed, 2)
        cases.append((model, prompts, *decode(AutoregressiveDecoder(), model, grammar, prompts)))
    return tokenizer, grammar, cases


@pytest.mark.parametrize("name", EXACT)
def test_it_equals_greedy_and_leaves_greedys_cache(name, setting) -> None:
    tokenizer, grammar, cases = setting
    rng = np.random.default_rng(0)
    fewer, different = 0, set()
    for model, prompts, greedy, reference in cases:
        choices = [drafts_of(ids, tokenizer.vocab_size, rng) for ids in greedy.ids]
        kinds = list(choices[0]) if "previous" in name else ["none"]
        for kind, other in zip(kinds, kinds[3:] + kinds[:3]):
            hints = [Hint(draft=choices[0][kind]), Hint(draft=choices[1][other])]
            for samples in ((0, 1), (1,)):
                given = prompts if len(samples) == 2 else single(prompts, 1)
                out, suffix = decode(EXACT[name], model, grammar, given, [hints[s] for s in samples])
                assert out.ids == [greedy.ids[s] for s in samples], (kind, other)
                longest = max(map(len, out.ids))
                assert suffix.length == longest and out.passes <= longest
                assert all(0 <= accepted <= longest for accepted in out.notes["accepted"])
                held, expected = suffix.prefix.cache, reference.prefix.cache
                for row, sample in enumerate(samples):
                    assert out.probabilities[row] == pytest.approx(greedy.probabilities[sample], abs=1e-4)
                    until = suffix.prefix.length + len(out.ids[row])
                    for mine, theirs in ((held.keys, expected.keys), (held.values, expected.values)):
                        assert torch.allclose(mine[:, row, :, :until], theirs[:, sample, :, :until], atol=5e-5)
                fewer += out.passes < longest
                different.add(tuple(map(tuple, out.ids)))
    # Some drafts were right; guesses that nobody trained hit one of 8 tokens now and then, one of 96 hardly ever.
    assert fewer or ("blockwise" in name and tokenizer.vocab_size > 8)
    assert len(different) == 2 * len(cases)  # the prompts matter


def passes(count: int, length: int) -> int:
    return -(-count // (length + 1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 3, 5, 40])
def test_a_perfect_draft_settles_one_token_more_than_it_has(length: int, batch: int, setting) -> None:
    tokenizer, grammar, cases = setting
    model, prompts, greedy, _ = cases[0]
    prompts = prompts if batch == 2 else single(prompts, 0)
    hints = [Hint(draft=tuple(ids)) for ids in greedy.ids[:batch]]
    count = max(map(len, greedy.ids[:batch]))
    out, _ = decode(SpeculativeDecoder(length=length), model, grammar, prompts, hints)
    assert out.passes == passes(count, length) and out.notes["layers"] == out.passes * DEPTH
    same = model_of(tokenizer.vocab_size, 0, unlike=0.0)
    expected = decode(AutoregressiveDecoder(), same, grammar, prompts)[0].ids
    count = max(map(len, expected))
    shallow = SpeculativeDecoder("shallow", length, layers=2)
    small = SpeculativeDecoder("head", length, draft_head="small")
    for decoder in (shallow, small):
        out, _ = decode(decoder, same, grammar, prompts)
        assert out.ids == expected and out.passes == passes(count, length)
    if length == 3 and batch == 1 and count == 16:  # bins
        notes = [decode(decoder, same, grammar, prompts)[0].notes for decoder in (shallow, small)]
        assert [note["layers"] for note in notes] == [4 * (4 * 2 + 1), 4 * (3 + 1) * DEPTH]
        assert [note["accepted"] for note in notes] == [[3], [3]]


def test_a_wrong_token_costs_one_pass_and_the_draft_goes_on_behind_it(setting) -> None:
    """In FAST too, where the wrong token may stand for another number of values."""
    _, grammar, cases = setting
    model, prompts, greedy, _ = cases[1]
    ids, decoder = greedy.ids[0], SpeculativeDecoder(length=40)
    for place in range(len(ids)):
        length = grammar.lengths[ids[place]]
        one = next(token for token, covers in enumerate(grammar.lengths) if covers == 1 and token != ids[place])
        draft = (*ids[:place], *[one] * length, *ids[place + 1 :])
        out, _ = decode(decoder, model, grammar, single(prompts, 0), [Hint(draft=draft)])
        assert out.ids == [ids]
        assert out.passes == 1 + (place < len(ids) - 1)


def test_the_previous_chunk_is_taken_up_where_values_begin_together() -> None:
    grammar = SimpleNamespace(values=8, lengths=[1, 2, 3, 0])
    previous = Previous(SimpleNamespace(depth=1), grammar, [Hint(draft=(1, 2, 3, 0, 1, 2))])  # begin at 0, 2, 5, 6, 8
    for covered, count, expected in (
        (0, 9, [1, 2]),  # 3 stands for nothing, and is not proposed
        (0, 1, [1]), (1, 9, []), (2, 9, [2]), (3, 9, []), (5, 9, [0, 1]),
        (6, 9, [1]),  # the last token would be one too many
        (7, 9, []), (8, 0, []),
    ):  # fmt: skip
        (proposal,) = previous.propose([[0]], [8 - covered], [count])
        assert proposal.tokens == expected, covered


class AtOnce(Lookahead):
    """As on a device."""

    def __init__(self, *args):
        super().__init__(*args)
        assert not self.at_once
        self.at_once = True


@pytest.mark.parametrize("reader", [Lookahead, AtOnce])
def test_blockwise_guesses_follow_the_token_that_was_decided(reader, monkeypatch) -> None:
    """A model that counts: the token after t is t + 1, and the guesses name the ones behind it. The first pass has no
    guesses, every other one settles three tokens."""
    monkeypatch.setattr("vla.decoding.blockwise.Lookahead", reader)
    vocab, width = 8, 16
    model, grammar = model_of(vocab), Grammar(BinTokenizer(vocab), 8, 2)
    after = [(token + 1) % vocab for token in range(vocab)] + [0]  # the start token is number `vocab`
    step = torch.zeros(width, width)
    step[after, range(vocab + 1)] = 1
    head = model.heads["words"]
    with torch.no_grad():
        for layer in model.transformer.layers:
            layer[1].out.weight.zero_()
            layer[1].down.weight.zero_()
        head.embedding.weight.copy_(torch.eye(width)[: vocab + 1])
        head.logits.weight.copy_(step[:vocab])
        for power, (enter, _, leave) in enumerate(head.lookahead, start=1):
            for linear in (enter, leave):
                linear.weight.zero_()
                linear.bias.zero_()
            enter.weight[:width] = 100 * torch.eye(width)  # SiLU leaves large numbers above 0 as they are
            leave.weight[:, :width] = (torch.matrix_power(step, power) - torch.eye(width)) / 100
    for batch in (1, 2):
        for guesses, expected in ((0, 1 + 5), (2, 1 + 5), (1, 1 + 8)):
            out, _ = decode(BlockwiseDecoder(guesses), model, grammar, inputs(batch))
            assert out.ids == [[place % vocab for place in range(16)]] * batch
            assert out.passes == expected


# ---- sampling ----
DRAWN = {
    "previous": SpeculativeDecoder(length=3, temperature=0.6),
    "shallow": SpeculativeDecoder("shallow", 3, 0.6, layers=1),
    "head": SpeculativeDecoder("head", 3, 0.6, draft_head="small"),
}


def test_draws_with_the_previous_chunk_are_those_without(setting) -> None:
    """One draw per token in their order: the same seed gives the same tokens, drafts or none, alone or in a batch."""
    tokenizer, grammar, cases = setting
    rng = np.random.default_rng(0)
    reference, saved = AutoregressiveDecoder(temperature=0.6), 0
    for seed, (model, prompts, greedy, _) in enumerate(cases):
        hints = [Hint(seed), Hint(seed + 100)]
        drawn = decode(reference, model, grammar, prompts, hints)[0].ids
        assert drawn != greedy.ids
        for kind in ("right", "partly wrong", "against the grammar"):
            hinted = [
                replace(hint, draft=drafts_of(ids, tokenizer.vocab_size, rng)[kind]) for hint, ids in zip(hints, drawn)
            ]
            out, _ = decode(DRAWN["previous"], model, grammar, prompts, hinted)
            assert out.ids == drawn
            alone, _ = decode(DRAWN["previous"], model, grammar, single(prompts, 1), hinted[1:])
            assert alone.ids == drawn[1:]
            saved += len(drawn[1]) - alone.passes
    assert saved > 0


@pytest.mark.parametrize("name", ["shallow", "head"])
def test_a_batch_draws_what_its_samples_draw_alone(name: str, setting) -> None:
    _, grammar, cases = setting
    for seed, (model, prompts, _, _) in enumerate(cases):
        hints = [Hint(seed), Hint(seed + 100)]
        out, suffix = decode(DRAWN[name], model, grammar, prompts, hints)
        alone = [decode(DRAWN[name], model, grammar, single(prompts, s), hints[s : s + 1])[0] for s in (0, 1)]
        assert out.ids == [one.ids[0] for one in alone]
        assert max(one.passes for one in alone) <= out.passes <= max(map(len, out.ids)) == suffix.length


class Pieces:
    """Tokens of 1, 1, 2 and 3 values."""

    vocab_size, token_lengths = 4, np.array([1, 1, 2, 3])

    def valid_next(self, remaining: int) -> np.ndarray:
        return self.token_lengths <= remaining


@torch.inference_mode()
def many(model, grammar: Grammar, count: int, head: str = "words") -> TokenSuffix:
    """A prefix of one observation, count times."""
    one = model.prefix(model.prefix_segments(*inputs(1)), grammar.values)
    depth, _, *shape = one.cache.keys.shape
    cache = KVCache(depth, count, *shape)
    cache.keys.copy_(one.cache.keys)
    cache.values.copy_(one.cache.values)
    cache.advance(one.length)
    rotary = tuple(part.expand(count, -1, -1, -1) for part in one.rotary)
    return TokenSuffix(model, replace(one, cache=cache, rotary=rotary, bias=one.bias.expand(count, -1, -1)), head)


@torch.inference_mode()
def distribution(model, grammar: Grammar, temperature: float, head: str = "words") -> dict[tuple[int, ...], float]:
    """Probability of every complete list of tokens, read off one pass over all lists of one length."""
    out = {}
    for count in range(1, grammar.values + 1):
        lists = [
            ids
            for ids in product(range(len(grammar.lengths)), repeat=count)
            if sum(grammar.lengths[i] for i in ids) == grammar.values
        ]
        if lists:
            suffix = many(model, grammar, len(lists), head)
            logits = suffix.logits(torch.tensor([[suffix.start_id, *ids[:-1]] for ids in lists]))
            left = [grammar.before_each(grammar.values, ids)[:-1] for ids in lists]
            weights = (grammar.constrain(logits, left) / temperature).softmax(dim=-1)
            out |= {ids: float(row[range(count), ids].prod()) for row, ids in zip(weights, lists)}
    return out


@pytest.mark.parametrize("name", DRAWN)
@torch.inference_mode()
def test_what_is_drawn_is_distributed_as_the_models_own_draws(name: str) -> None:
    draws, grammar, decoder = 2000, Grammar(Pieces(), 4, 1), DRAWN[name]
    model = model_of(4, unlike=1.0)
    with torch.no_grad():
        for head in ("words", "small"):
            model.heads[head].logits.weight.mul_(0.3)
    expected = distribution(model, grammar, decoder.temperature)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4) and len(expected) > 20

    def p_value(probabilities) -> float:
        likely = [ids for ids, p in probabilities.items() if p * draws >= 5]
        seen = [out.ids.count(list(ids)) for ids in likely]
        wanted = [probabilities[ids] * draws for ids in likely]
        return chisquare([*seen, draws - sum(seen) + 1e-9], [*wanted, draws - sum(wanted) + 1e-9]).pvalue

    out = decoder.generate(many(model, grammar, draws), grammar, [Hint(seed, (2, 0, 1)) for seed in range(draws)])
    assert 0.1 < np.mean(out.notes["accepted"]) < 2
    assert p_value(expected) > 0.01
    # it would be noticed if the temperature were lost, or if the draft had its will
    assert p_value(distribution(model, grammar, 1.0)) < 1e-4
    assert p_value(distribution(model, grammar, decoder.temperature, "small")) < 1e-4


# ---- relaxed ----
@torch.inference_mode()
def test_relaxed_tokens_are_near_what_the_model_says_behind_them() -> None:
    grammar = Grammar(BinTokenizer(8), 8, 2)
    rng = np.random.default_rng(0)
    for distance, batch in product((1, 3), (1, 2)):
        off, saved = [], 0
        for seed in range(4):
            model, prompts = model_of(8, seed), prompt(seed, batch)
            greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompts)
            hints = [Hint(draft=tuple(np.clip(np.add(ids, rng.integers(-1, 2, 16)), 0, 7))) for ids in greedy.ids]
            hints = [Hint(draft=tuple(map(int, hint.draft))) for hint in hints]
            out, suffix = decode(RelaxedDecoder(distance, length=5), model, grammar, prompts, hints)
            strict, _ = decode(SpeculativeDecoder(length=5), model, grammar, prompts, hints)
            saved += strict.passes - out.passes
            assert suffix.length == 16
            suffix.truncate(0)
            said = suffix.logits(torch.tensor([[8, *ids[:-1]] for ids in out.ids])).argmax(dim=-1)
            off += (said - torch.tensor(out.ids)).abs().flatten().tolist()
        assert 0 < max(off) <= distance and saved > 0
    anything = tuple(rng.integers(0, 8, 16).tolist())
    out, _ = decode(RelaxedDecoder(7, length=15), model_of(8), grammar, prompt(0, 1), [Hint(draft=anything)])
    assert tuple(out.ids[0][:15]) == anything[:15] and out.passes == 1


def test_where_the_length_changes_the_tokens_no_measured_time_chooses_it(setting) -> None:
    """Draws from a draft's own distributions, and which near tokens stand, follow from the length; draws behind the
    previous chunk and greedy tokens do not, and there 0 is allowed."""
    tokenizer, grammar, cases = setting
    model, prompts, greedy, _ = cases[0]
    near = [Hint(3, tuple(min(token + 1, 7) for token in ids)) for ids in greedy.ids]

    def kinds(make) -> int:
        lists = [decode(make(length), model, grammar, prompts, near)[0].ids for length in (2, 4, 7)]
        return len({str(ids) for ids in lists})

    if tokenizer.vocab_size == 8:
        assert kinds(lambda n: RelaxedDecoder(3, length=n)) > 1
    for draft, head in (("shallow", ""), ("head", "small")):
        assert kinds(lambda n, d=draft, h=head: SpeculativeDecoder(d, n, 1.0, 0, h)) > 1
        assert kinds(lambda n, d=draft, h=head: SpeculativeDecoder(d, n, 0.0, 0, h)) == 1
        SpeculativeDecoder(draft, 0, draft_head=head)
    assert kinds(lambda n: SpeculativeDecoder("previous", n, 1.0)) == 1
    SpeculativeDecoder("previous", 0, 1.0)


def test_only_a_near_draft_token_stands() -> None:
    judge = Greedy(2).judge
    assert [judge(5, 0, guess, None) for guess in (2, 3, 5, 7, 8, None)] == [5, 3, 5, 7, 5, 5]


# ---- in a policy, and what is refused ----
def test_the_previous_chunk_of_a_policy_is_its_draft() -> None:
    """Seen again, an observation costs the passes of a perfect draft; after some actions the draft is shifted."""
    vocab = TextTokenizer.fit(["push"], max_length=5).vocab_size
    bundle = bundle_of(heads=(HeadConfig("words", "tokens", 1, BINS),), text_vocab=vocab).check()
    torch.manual_seed(2)
    with torch.no_grad():
        bundle.model.heads["words"].logits.weight.normal_(std=2.0)
        bundle.model.heads["words"].embedding.weight.normal_(std=2.0)
        bundle.model.heads["words"].logits.bias[BINS - 1] = -100.0  # that bin decodes to the one below it
    policy = VlaPolicy(bundle, SpeculativeDecoder(length=3))
    images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in bundle.embodiment.cameras}
    observation = Observation(images, np.zeros(3, np.float32), "push", 0)
    first = infer(policy, observation)
    again = infer(policy, observation, InferContext(first.chunk))
    assert len(set(first.report.ids)) > 2
    assert again.report.ids == first.report.ids and again.report.passes == passes(len(first.report.ids), 3)
    shifted = infer(policy, observation, InferContext(first.chunk, executed=2))
    assert shifted.report.ids == first.report.ids and shifted.report.passes > again.report.passes


@pytest.mark.parametrize(
    ("key", "make"),
    [
        (r"decoder\.draft: unknown choice 'shalow'.*shallow", lambda: SpeculativeDecoder("shalow")),
        (r"decoder\.length", lambda: SpeculativeDecoder(length=-1)),
        (r"decoder\.length: .*near tokens", lambda: RelaxedDecoder(length=0)),
        *(
            (
                r"decoder\.length: .*draws depend on it",
                lambda args=args: SpeculativeDecoder(args[0], 0, 0.5, 0, args[1]),
            )
            for args in (("shallow", ""), ("head", "small"))
        ),
        (r"decoder\.temperature", lambda: SpeculativeDecoder(temperature=-1.0)),
        (r"decoder\.layers", lambda: SpeculativeDecoder(layers=2)),
        (r"decoder\.layers", lambda: SpeculativeDecoder("shallow", layers=-1)),
        (r"decoder\.draft_head", lambda: SpeculativeDecoder("head")),
        (r"decoder\.draft_head", lambda: SpeculativeDecoder(draft_head="small")),
        (r"decoder\.distance", lambda: RelaxedDecoder(0)),
        (r"decoder\.guesses", lambda: BlockwiseDecoder(-1)),
    ],
)
def test_settings_out_of_range_are_refused(key: str, make) -> None:
    with pytest.raises(ConfigError, match=key):
        make()


def test_bundles_that_lack_what_a_decoder_needs_are_refused() -> None:
    words, fast = BinTokenizer(8), tokenizer_of("fast")
    heads = (
        HeadConfig("words", "tokens", 1, 8, lookahead=2, exit_layer=1), HeadConfig("small", "tokens", 1, 8),
        HeadConfig("fast", "tokens", 1, fast.vocab_size),
    )  # fmt: skip
    bundle = SimpleNamespace(
        config=make(heads=heads).config, action_tokenizers={"words": words, "small": BinTokenizer(8), "fast": fast}
    )
    for decoder in (
        SpeculativeDecoder(), SpeculativeDecoder("shallow"), SpeculativeDecoder("shallow", layers=1, head="fast"),
        SpeculativeDecoder("head", draft_head="small"), RelaxedDecoder(), RelaxedDecoder(7), BlockwiseDecoder(),
        BlockwiseDecoder(2),
    ):  # fmt: skip
        decoder.check(bundle)
    for key, decoder in (
        (r"decoder\.layers.*exit_layer", SpeculativeDecoder("shallow", head="small")),
        (r"decoder\.layers: expected 1\.\.1, got 2", SpeculativeDecoder("shallow", layers=2)),
        (r"decoder\.draft_head: .* got 'fast'\. Choose one of small", SpeculativeDecoder("head", draft_head="fast")),
        (r"decoder\.draft_head: .* got 'words'", SpeculativeDecoder("head", draft_head="words")),
        (r"decoder\.draft_head: .*Train a narrow", SpeculativeDecoder("head", draft_head="small", head="fast")),
        (r"decoder\.head: .*over bins named 'fast', .*Choose one of words, small", RelaxedDecoder(head="fast")),
        (r"decoder\.distance: expected at most 7: head 'words' has 8 bins, got 8\. Lower it", RelaxedDecoder(8)),
        (r"heads\.small\.lookahead: .*lookahead=3", BlockwiseDecoder(head="small")),
        (r"heads\.words\.lookahead: .*or set guesses=2", BlockwiseDecoder(4)),
        (r"decoder\.head", SpeculativeDecoder(head="nobody")),
    ):
        with pytest.raises(ConfigError, match=key):
            decoder.check(bundle)


@pytest.mark.parametrize("name", ["speculative", "speculative_shallow", "speculative_draft", "blockwise", "relaxed"])
def test_configs_name_every_argument(name: str) -> None:
    decoder = load("decoder", name)
    assert decoder.exact == (name != "relaxed")
    assert describe(load("decoder", name, ["head=x"])) == {**describe(decoder), "head": "x"}
