"""Every decoder behind a prefix that pruning made shorter, and behind one whose pictures are registers: exact ones give
greedy's tokens there too, the others finite chunks."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.contracts.test_decoders import accepts, running, tokenizer_of
from tests.decoding import test_continuous
from tests.decoding.test_continuous import BINS, A, T, bundle_of
from tests.models.test_vla import inputs
from vla.checkpoints.bundle import Bundle
from vla.configs import load, names
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Decoded, DecodeInput, Grammar
from vla.models.heads import HeadConfig
from vla.models.pruning import RegisterConfig, TokenSelection
from vla.policy import InferContext
from vla.tokenizers import BinTokenizer

TOKENIZERS = {"bins": BinTokenizer(BINS), "draft": BinTokenizer(BINS), "fast": tokenizer_of("fast")}
TOKENS = [
    HeadConfig(name, "tokens", 1, tokenizer.vocab_size, *((0, 0) if name == "draft" else (2, 1)))
    for name, tokenizer in TOKENIZERS.items()
]
HEADS = (*TOKENS, *test_continuous.HEADS)
SHORTER = {"pruned": (None, TokenSelection(1, 6)), "registers": (RegisterConfig(3, 1), None)}
# With passes enough for a block, and with no exit, those are greedy decoding.
GREEDY = {"capped": f"passes={T * A}", "early_exit": "threshold=1.0"}


class Asked(NamedTuple):
    """given: two samples, then one, each while a chunk runs. greedy: by head."""

    bundle: Bundle
    given: list[DecodeInput]
    greedy: list[dict[str, Decoded]]


@torch.inference_mode()
def behind(bundle: Bundle, selection, samples: list[int]) -> DecodeInput:
    images, *rest = inputs(2)
    model, args = bundle.model, ({k: v[samples] for k, v in images.items()}, *(item[samples] for item in rest))
    prefix = model.prefix(model.prefix_segments(*args), model.config.suffix_room, selection)
    grammars = {name: Grammar(tokenizer, T, A) for name, tokenizer in bundle.action_tokenizers.items()}
    costs = {name: {1: 1.0, T * A: 1.5} for name in grammars}  # as on a GPU, and none is measured
    return DecodeInput(bundle, prefix, samples, [InferContext()] * len(samples), grammars.__getitem__, costs=costs)


@pytest.fixture(scope="module", params=SHORTER)
def asked(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # passes are so small that two threads wait for each other
    registers, selection = SHORTER[request.param]
    bundle = bundle_of(heads=HEADS, registers=registers)
    bundle = replace(bundle, action_tokenizers={**bundle.action_tokenizers, **TOKENIZERS})
    with torch.no_grad():
        torch.manual_seed(2)
        for name in TOKENIZERS:  # opinions that depend on the tokens before
            bundle.model.heads[name].logits.weight.normal_(std=1.0)
            bundle.model.heads[name].embedding.weight.normal_(std=1.0)
    given = [behind(bundle, selection, samples) for samples in ([0, 1], [1])]
    whole = sum(camera.tokens for camera in bundle.config.cameras) + bundle.config.text_length + 1
    assert all(g.prefix.length < whole for g in given)
    plain = AutoregressiveDecoder(head="bins")
    given = [replace(g, contexts=running(plain.decode(g), 1)) for g in given]
    greedy = [{name: AutoregressiveDecoder(head=name).decode(g) for name in TOKENIZERS} for g in given]
    assert all(len(set(ids)) > 2 for out in greedy for said in out.values() for ids in said.ids)
    assert greedy[0]["bins"].ids[0] != greedy[0]["bins"].ids[1]
    yield Asked(bundle, given, greedy)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", names("decoder"))
def test_any_decoder_runs_behind_any_prefix_and_exact_ones_equal_greedy(name: str, asked) -> None:
    tried = 0
    for options in ([], [GREEDY[name]] if name in GREEDY else None):
        for head in (head.name for head in HEADS if options is not None):
            decoder = load("decoder", name, [*options, f"head={head}"])
            if not accepts(decoder, asked.bundle):
                continue
            tried += 1
            for given, greedy in zip(asked.given, asked.greedy):
                out = decoder.decode(given)
                assert out.actions.shape == (given.batch, T, A) and np.isfinite(out.actions).all()
                assert given.prefix.cache.length == given.prefix.length, "something stays behind the prefix"
                if decoder.exact or options:
                    assert out.ids == greedy[head].ids
                    np.testing.assert_array_equal(out.actions, greedy[head].actions)
    assert tried
