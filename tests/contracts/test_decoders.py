"""What every decoder promises: exact ones give greedy's tokens, one by one, in fp32, on random and on trained weights;
the others say how far they are from it."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from sim import decode_costs
from sim.decode_entries import ENTRIES, Entry, served
from sim.evaluate import EvalConfig
from tests.conftest import tiny_config
from tests.decoding.test_continuous import bundle_of
from tests.models.test_vla import inputs, make
from vla.configs import load, names
from vla.data.normalize import Normalizer
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Decoded, DecodeInput, Grammar, Hint, drafts
from vla.decoding.capped import CappedJacobiDecoder
from vla.decoding.jacobi import JacobiDecoder
from vla.decoding.speculative import RelaxedDecoder, SpeculativeDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.policy import InferContext
from vla.resources import bundle_path
from vla.tokenizers import BinTokenizer, FastTokenizer
from vla.training.recipes import HeadRecipe, TokenizerRecipe
from vla.training.trainer import Trainer
from vla.types import ActionChunk

JACOBI = {f"jacobi-{window}": JacobiDecoder(window) for window in (1, 2, 5, 16)}


class Case(NamedTuple):
    """config: its name in configs/decoder. options: key=value. It is tried on every kind of head that it accepts."""

    config: str
    options: tuple[str, ...] = ()

    def made(self, head: str):
        return load("decoder", self.config, [*self.options, f"head={head}"])


LISTED = {
    "greedy": Case("autoregressive"),
    "drawn": Case("autoregressive", ("temperature=1.0",)),
    **{f"jacobi, {n}": Case("jacobi", (f"window={n}",)) for n in (0, 1, 2, 5, 16)},
    "jacobi, warm": Case("jacobi", ("window=5", "warm=true")),
    "jacobi, warm, 0": Case("jacobi", ("warm=true",)),
    "speculative": Case("speculative", ("length=3",)),
    "speculative, 0": Case("speculative", ("length=0",)),
    "speculative, shallow": Case("speculative_shallow"),
    "speculative, draft head": Case("speculative_draft"),
    "blockwise": Case("blockwise"),
    "early exit, 1": Case("early_exit", ("threshold=1.0",)),
    "early exit": Case("early_exit"),
    "early exit, adaptive": Case("early_exit_adaptive"),
    "capped": Case("capped", ("passes=2", "window=5")),
    "capped, warm": Case("capped", ("passes=2", "warm=true")),
    "anytime": Case("anytime", ("deadline_ms=1",)),
}
# Of decoders without a line of settings above, the defaults.
CASES = LISTED | {name: Case(name) for name in names("decoder") if name not in {c.config for c in LISTED.values()}}
EXACT = {name: case.made("words") for name, case in CASES.items() if case.made("words").exact and name != "greedy"}


def accepts(decoder, bundle) -> bool:
    try:
        decoder.check(bundle)
    except ConfigError:
        return False
    return True


def test_every_config_is_under_contract() -> None:
    assert {case.config for case in CASES.values()} == set(names("decoder"))
    assert {CASES[name].config for name in EXACT} >= {
        "jacobi", "speculative", "speculative_shallow", "speculative_draft", "blockwise", "early_exit",
    }  # fmt: skip


def test_decoders_accept_the_heads_they_are_for(trained) -> None:
    policy, _ = trained
    kinds = {
        name: {head for head in HEADS if head != "draft" and accepts(case.made(head), policy.bundle)}
        for name, case in CASES.items()
    }
    assert all(kinds.values()), "a decoder that accepts no head is not tested"
    for name in ("greedy", "jacobi, 5", "speculative", "blockwise", "early exit", "continued"):
        assert kinds[name] == {"bins", "fast"}
    for name, kind in (
        ("relaxed", "bins"), ("capped", "bins"), ("forced", "bins"), ("speculative, draft head", "bins"),
        ("anytime", "fast"), ("flow", "flow"), ("realtime", "flow"), ("diffusion", "hybrid"), ("ensemble", "hybrid"),
        ("realtime_diffusion", "hybrid"), ("parallel", "parallel"),
    ):  # fmt: skip
        assert kinds[name] == {kind}, name


def tokenizer_of(kind: str):
    if kind == "bins":
        return BinTokenizer(32)
    steps = np.random.default_rng(0).normal(size=(60, 8, 2)).cumsum(axis=1) / 4
    return FastTokenizer.fit(steps.astype(np.float32), vocab_size=96, scale=2.0)


def model_of(tokenizer, seed: int):
    """A random model with opinions: weights large enough that tokens differ and depend on those before. And a second
    head over the same tokens."""
    words = HeadConfig("words", "tokens", 1, tokenizer.vocab_size, lookahead=2, exit_layer=1)
    model = make(horizon=8, heads=(words, HeadConfig("draft", "tokens", 1, tokenizer.vocab_size)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, std in (
            (model.heads["words"].logits.weight, 1.0), (model.heads["words"].embedding.weight, 0.3),
            (model.text.weight, 1.0),
            *((weight, 0.3) for weight in model.transformer.parameters() if weight.ndim == 2),
        ):  # fmt: skip
            weight.normal_(std=std, generator=generator)
    return model


@torch.inference_mode()
def decode(decoder, model, grammar, prompts):
    suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompts), grammar.values), "words")
    return decoder.generate(suffix, grammar, [Hint()] * len(prompts[-1])), suffix


def prompt(seed: int, batch: int):
    images, text, valid, _ = inputs(batch)
    generator = torch.Generator().manual_seed(seed)
    images = {  # noise of many pixels looks the same every time, a tint does not
        name: (image * torch.rand(batch, 1, 1, 3, generator=generator)).to(torch.uint8)
        for name, image in images.items()
    }
    text = torch.randint(0, 20, text.shape, generator=generator)
    return images, text, valid, 5 * torch.randn(batch, 3, generator=generator)


def bundle_for(tokenizer, seed: int):
    """A model of `model_of` as a bundle of 2 actions."""
    one = np.ones(2)
    return replace(
        bundle_of(), model=model_of(tokenizer, seed), action_normalizer=Normalizer(-one, one, 0 * one),
        action_tokenizers={"words": tokenizer, "draft": tokenizer},
    )  # fmt: skip


def behind(bundle, grammar, prompts, contexts=None, costs=None) -> DecodeInput:
    batch = len(prompts[-1])
    with torch.inference_mode():
        prefix = bundle.model.prefix(bundle.model.prefix_segments(*prompts), grammar.values)
    contexts = contexts or [InferContext()] * batch
    return DecodeInput(
        bundle, prefix, [7] * batch, contexts, lambda head: grammar, costs={} if costs is None else costs
    )


def running(out: Decoded, executed: int) -> list[InferContext]:
    """Contexts in which these chunks are running."""
    chunks = [ActionChunk(actions.copy(), 0, 0.05) for actions in out.actions]
    return [InferContext(chunk, executed, chunk.actions[executed : executed + 1], 1, 0) for chunk in chunks]


class Asked(NamedTuple):
    given: DecodeInput
    greedy: Decoded


@pytest.fixture(scope="module", params=["bins", "fast"])
def asked(request) -> list[Asked]:
    """200 prompts: 80 pairs, which torch runs, and 40 alone, which numpy does, each with a chunk that is running."""
    tokenizer, greedy, costs = tokenizer_of(request.param), AutoregressiveDecoder(head="words"), {}
    grammar = Grammar(tokenizer, 8, 2)
    bundles, out = [bundle_for(tokenizer, seed) for seed in range(20)], []
    for seed in range(120):
        bundle, prompts = bundles[seed % 20], prompt(seed, 2 if seed % 3 else 1)
        near = *prompts[:3], prompts[3] + 0.1  # the state of a moment ago
        contexts = running(greedy.decode(behind(bundle, grammar, near)), seed % 4)
        given = behind(bundle, grammar, prompts, contexts, costs)
        out.append(Asked(given, greedy.decode(given)))
    assert sum(a.given.batch for a in out) == 200
    assert len({tuple(a.greedy.ids) for a in out}) > 60  # the prompts matter: equality is not that of constants
    return out


@pytest.mark.parametrize("name", EXACT)
def test_it_equals_greedy_on_200_prompts(name, asked) -> None:
    decoder = EXACT[name]
    if name in LISTED:
        decoder.check(asked[0].given.bundle)
    elif not accepts(decoder, asked[0].given.bundle):
        pytest.skip("not for these tokens")
    for given, greedy in asked:
        fast = decoder.decode(given)
        assert fast.ids == greedy.ids
        assert fast.confidence == pytest.approx(greedy.confidence, abs=1e-4)
        assert fast.passes <= max(map(len, fast.ids))


@pytest.mark.parametrize("asked", ["bins"], indirect=True)
@pytest.mark.parametrize("warm", [False, True])
def test_after_so_many_passes_so_many_tokens_are_greedys(warm: bool, asked) -> None:
    left = 0
    for number, (given, greedy) in enumerate(asked):
        passes = 1 + number % 15
        out = CappedJacobiDecoder(passes, warm=warm, head="words").decode(given)
        assert out.passes <= passes
        assert [ids[:passes] for ids in out.ids] == [ids[:passes] for ids in greedy.ids]
        left += out.ids != greedy.ids
    assert left > 20  # others were not greedy's yet


@pytest.mark.parametrize("kind", ["bins", "fast"])
@pytest.mark.parametrize("decoder", [AutoregressiveDecoder(), JacobiDecoder(5), SpeculativeDecoder(length=3)])
def test_a_pass_waits_for_the_device_once(kind: str, decoder, monkeypatch) -> None:
    """With tensors that say they are elsewhere: what leaves them is counted, and is the same."""
    tokenizer = tokenizer_of(kind)
    grammar = Grammar(tokenizer, 8, 2)
    plain = [decode(decoder, model_of(tokenizer, seed), grammar, prompt(seed, 1 + seed % 2))[0] for seed in range(4)]
    waits: list[torch.Tensor] = []
    fetch = torch.Tensor.tolist
    monkeypatch.setattr(Vla, "host_weights", lambda self, head: None)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor) or fetch(tensor), raising=False)
    for seed, expected in enumerate(plain):
        model, prompts = model_of(tokenizer, seed), prompt(seed, 1 + seed % 2)
        waits.clear()
        out, _ = decode(decoder, model, grammar, prompts)
        assert out.ids == expected.ids and out.passes == expected.passes
        assert len(waits) == out.passes + 1  # the last one for all probabilities


@pytest.mark.parametrize("window", [5, 16])
def test_a_warm_start_takes_fewer_passes_and_says_the_same(window, asked) -> None:
    """The first guess is a chunk of nearly the same prompt; and where it is greedy's own, one look settles a window."""
    cold, warm = JacobiDecoder(window, head="words"), JacobiDecoder(window, warm=True, head="words")
    passes, own = [0, 0], 0
    for given, greedy in asked[:40]:
        given = replace(given, contexts=[replace(c, executed=0) for c in given.contexts])
        told = replace(given, contexts=running(greedy, 0))
        for index, (decoder, where) in enumerate(((cold, given), (warm, given))):
            out = decoder.decode(where)
            assert out.ids == greedy.ids
            passes[index] += out.passes
        if drafts(told, "words") == greedy.ids:  # not every list is what its chunk is encoded to
            perfect, length = warm.decode(told), max(map(len, greedy.ids))
            assert perfect.ids == greedy.ids and perfect.passes == -(-length // window)
            own += 1
    assert passes[1] < 0.9 * passes[0] and own > 3


@pytest.mark.parametrize("name", JACOBI)
def test_what_does_not_depend_on_the_tokens_before_takes_no_second_look(name) -> None:
    """A model that ignores the action tokens: the second pass over a window finds it right."""
    tokenizer = tokenizer_of("bins")
    model, grammar = model_of(tokenizer, 0), Grammar(tokenizer, 8, 2)
    with torch.no_grad():
        model.heads["words"].embedding.weight.zero_()
    decoder, count = JACOBI[name], grammar.values
    decoded, suffix = decode(decoder, model, grammar, prompt(0, 1))
    greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompt(0, 1))
    assert decoded.ids == greedy.ids and suffix.length == count
    assert decoded.passes == count if decoder.window == 1 else decoded.passes <= 1 + -(-count // (decoder.window - 1))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.window"):
        JacobiDecoder(-1)
    bundle = bundle_for(tokenizer_of("bins"), 0)
    for key, kind in (
        ("window", JacobiDecoder), ("window", CappedJacobiDecoder), ("length", SpeculativeDecoder),
        ("length", RelaxedDecoder),
    ):  # fmt: skip
        kind(**{key: 16}).check(bundle)
        with pytest.raises(ConfigError, match=rf"decoder\.{key}: expected at most 16, the tokens of a chunk, got 1\d+"):
            kind(**{key: 10**9}).check(bundle)


def test_it_equals_greedy_on_the_trained_policy(capsys) -> None:
    """On observations of its own episodes, the lines of the benchmark that are declared exact, with their own last
    chunks as drafts. bf16 may flip near-ties: how often it does is printed."""
    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), threads=1)
    # Greedy again says nothing new, and of windows the chosen one, 16 and the whole block will do.
    exact = [entry for entry in ENTRIES if entry.exact and not entry.name.endswith(("again", ", 4", ", 8"))]
    whole = Entry("early exit bins, never", "early_exit", ("head=bins", "threshold=1"), "greedy bins")
    entries, _ = served(policy, [*exact, whole])
    assert {entry.config for entry in entries} == {CASES[name].config for name in ("greedy", *EXACT)}
    seen = decode_costs.observations(policy, EvalConfig(), 4)[0]
    costs = decode_costs.costs(policy, entries, seen)
    for head in ("bins", "distilled"):  # after j passes over the whole chunk the first j tokens are settled
        capped, _, passes = said(policy, seen, CappedJacobiDecoder(6, head=head))
        assert passes == 6 * len(seen)
        assert [ids[:6] for ids in capped] == [ids[:6] for ids in costs[f"greedy {head}"].ids]
    for entry in entries:
        cost, greedy = costs[entry.name], costs[entry.reference or entry.name]
        assert len(set(greedy.ids)) > 2
        assert cost.ids == greedy.ids, entry.name
        assert all(map(np.array_equal, cost.actions, greedy.actions)), entry.name
        assert (cost.passes <= greedy.passes).all(), entry.name
    flips = ", ".join(f"{entry.name} {costs[entry.name].flips:.0%}" for entry in entries if entry.reference)
    with capsys.disabled():
        print(f"\nchunks that bf16 flips: {flips}")


BINS = TokenizerRecipe("bins")
HEADS = {
    "bins": HeadRecipe("tokens", BINS, 16, 32, lookahead=2, exit_layer=1),
    "fast": HeadRecipe("tokens", TokenizerRecipe("fast", 128, 5.0), 16, 32, lookahead=2, exit_layer=1),
    "draft": HeadRecipe("tokens", BINS, 16, 32),
    "flow": HeadRecipe("flow", None, 16, 32, condition_width=8),
    "hybrid": HeadRecipe("hybrid", BINS, 16, 32, noise_repeats=2),
    "parallel": HeadRecipe("parallel", None, 16, 32),
}


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """A policy with every kind of head, of some seconds of training, and observations of its own episodes."""
    config = tiny_config(
        tiny_dataset, tmp_path_factory.mktemp("every-head"), heads=HEADS, look_steps=0, steps=40, lr=1e-2, ema=0.0,
        batch_size=4,
    )  # fmt: skip
    trainer = Trainer(config)
    frames = trainer.data.train_frames
    trainer.data.train_frames = frames[:: len(frames) // 8][:8]  # few, so that they are learned
    for _ in range(config.steps):
        trainer.step()
    policy = VlaPolicy(trainer.bundle(), AutoregressiveDecoder(head="bins"))
    return policy, decode_costs.observations(policy, EvalConfig(episodes=1), 5)[0]


def said(policy, seen, decoder):
    """(ids, normalised actions, passes) of each observation."""
    decoder.check(policy.bundle)
    policy.decoder = decoder
    results = [policy.infer_batch([observation], [context])[0] for observation, context in seen]
    normalized = [policy.bundle.action_normalizer.normalize(r.chunk.actions) for r in results]
    return [r.report.ids for r in results], np.stack(normalized), sum(r.report.passes for r in results)


def test_all_decoders_on_a_trained_policy(trained, capsys) -> None:
    """Exact ones say what greedy says; of the others the deviation is printed, from greedy of the same tokens, or of
    bins for heads without any."""
    policy, seen = trained
    greedy = {head: said(policy, seen, CASES["greedy"].made(head)) for head in ("bins", "fast")}
    assert min(len(set(ids)) for lists, *_ in greedy.values() for ids in lists) > 2  # no constants
    lines = []
    tried = [(name, head) for name in CASES if name != "greedy" for head in HEADS if head != "draft"]
    for name, head in tried:
        decoder = CASES[name].made(head)
        if not accepts(decoder, policy.bundle):
            continue
        ids, actions, passes = said(policy, seen, decoder)
        base_ids, base, _ = greedy.get(head, greedy["bins"])
        rms = float(np.sqrt(np.mean((actions - base) ** 2)))
        if name in EXACT:
            assert ids == base_ids and rms == 0, (name, head)
            continue
        pairs = [(a, b) for mine, theirs in zip(ids, base_ids) for a, b in zip(mine, theirs)]
        same = f"{np.mean([a == b for a, b in pairs]):.0%} of the tokens equal, " if head in greedy else ""
        assert np.isfinite(actions).all() and passes
        lines.append(f"{name}, {head}: {same}rms {rms:.3f}")
    with capsys.disabled():
        print("\ndeviation from greedy:\n  " + "\n  ".join(lines))


def test_a_warm_start_takes_fewer_passes_on_a_trained_policy(trained) -> None:
    policy, seen = trained
    later = [(observation, context) for observation, context in seen if context.previous is not None]
    cold, warm = (said(policy, later, JacobiDecoder(16, warm, head="bins")) for warm in (False, True))
    assert cold[0] == warm[0] and warm[2] < cold[2]
