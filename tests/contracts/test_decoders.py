"""What every exact decoder promises: greedy's tokens, one by one, in fp32, and a cache that holds nothing else."""

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from sim import decode_costs
from sim.decode_entries import ENTRIES
from sim.evaluate import EvalConfig
from tests.models.test_vla import inputs, make
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.decoding.blockwise import BlockwiseDecoder
from vla.decoding.early_exit import EarlyExitDecoder
from vla.decoding.jacobi import JacobiDecoder
from vla.decoding.speculative import SpeculativeDecoder
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix
from vla.resources import bundle_path
from vla.tokenizers import BinTokenizer, FastTokenizer

JACOBI = {f"jacobi-{window}": JacobiDecoder(window) for window in (1, 2, 5, 16, 64)}
EXACT = {
    **JACOBI,
    "speculative-previous": SpeculativeDecoder("previous", 3),
    "speculative-shallow": SpeculativeDecoder("shallow", 3),
    "blockwise": BlockwiseDecoder(),
    "early-exit-1": EarlyExitDecoder(threshold=1.0),
}


def tokenizer_of(kind: str):
    if kind == "bins":
        return BinTokenizer(32)
    steps = np.random.default_rng(0).normal(size=(60, 8, 2)).cumsum(axis=1) / 4
    return FastTokenizer.fit(steps.astype(np.float32), vocab_size=96, scale=2.0)


def model_of(tokenizer, seed: int):
    """A random model with opinions: weights large enough that tokens differ and depend on those before."""
    model = make(horizon=8, heads=(HeadConfig("words", "tokens", 1, tokenizer.vocab_size, lookahead=2, exit_layer=1),))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, std in (
            (model.heads["words"].logits.weight, 1.0), (model.heads["words"].embedding.weight, 0.3),
            (model.text.weight, 1.0),
            *((weight, 0.3) for weight in model.transformer.parameters() if weight.ndim == 2),
        ):  # fmt: skip
            weight.normal_(std=std, generator=generator)
    return model


@pytest.fixture(scope="module", params=["bins", "fast"])
def setting(request):
    """20 models over one tokenizer."""
    tokenizer = tokenizer_of(request.param)
    return [model_of(tokenizer, seed) for seed in range(20)], Grammar(tokenizer, 8, 2), tokenizer


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


@pytest.mark.parametrize("name", EXACT)
def test_it_equals_greedy_on_200_prompts(name, setting) -> None:
    models, grammar, _ = setting
    different = set()
    for seed in range(100):
        model, prompts = models[seed % len(models)], prompt(seed, 2)
        greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompts)
        fast, suffix = decode(EXACT[name], model, grammar, prompts)
        assert fast.ids == greedy.ids
        assert fast.confidence == pytest.approx(greedy.confidence, abs=1e-4)
        longest = max(map(len, fast.ids))
        assert fast.passes <= longest
        assert longest <= suffix.length  # a batch ends with its slowest sample
        assert EXACT[name].exact
        different.add(tuple(map(tuple, fast.ids)))
    assert len(different) > 50  # the prompts matter: equality is not that of constants


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


def test_it_equals_greedy_on_the_trained_policy(capsys) -> None:
    """On observations of its own episodes, with the chunks that were running there as drafts. bf16 may flip near-ties:
    how often it does is printed."""
    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), threads=1)
    seen = decode_costs.observations(policy, EvalConfig(), 10)
    names = ("greedy FAST", "jacobi FAST", "jacobi FAST, 4", "speculative FAST, previous chunk")
    entries = [entry for entry in ENTRIES if entry.name in names]
    costs = decode_costs.costs(policy, entries, seen)
    greedy = costs["greedy FAST"]
    assert len(set(greedy.ids)) > 5
    for name in names[1:]:
        assert costs[name].ids == greedy.ids, name
        assert (costs[name].passes <= greedy.passes).all()
    with capsys.disabled():
        print("\nchunks that bf16 flips: " + ", ".join(f"{name} {costs[name].flips:.0%}" for name in names[1:]))
