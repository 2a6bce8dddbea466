"""docs/how-to/add-a-decoder.md: the decoder on the page is run as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from tests.contracts.test_decoders import decode, model_of, prompt, tokenizer_of
from tests.decoding.test_continuous import bundle_of
from vla.configs import build, describe
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Grammar, Hint
from vla.errors import ConfigError
from vla.models.heads import HeadConfig
from vla.models.suffix import TokenSuffix

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/how-to/add-a-decoder.md").read_text(encoding="utf-8")


def file_of(language: str) -> tuple[str, str]:
    """(path, text) of the only block in this language; the path stands in the line before it."""
    ((path, text),) = re.findall(rf"`([\w/.]+)`[^\n]*\n\n```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return path, text


@pytest.fixture
def config(monkeypatch) -> dict:
    """The page's config, after its Python file was put where the page says."""
    path, text = file_of("python")
    assert not (ROOT / path).exists(), "the page shows how to write a file that is there already"
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, path, "exec"), vars(module))
    path, text = file_of("yaml")
    loaded = yaml.safe_load(text)
    assert path.startswith("configs/decoder/") and loaded["_target_"].startswith(f"{module.__name__}.")
    return loaded


def test_the_config_holds_every_argument_with_its_default(config) -> None:
    decoder = build(config)
    assert describe(decoder) == config == describe(type(decoder)())
    name = Path(file_of("yaml")[0]).stem
    (option,) = re.findall(rf"vla eval decoder={name} decoder\.(\S+)", PAGE)
    assert f"vla demo --decoder {name} {option}" in PAGE and option.partition("=")[0] in config


@pytest.mark.parametrize("kind", ["bins", "fast"])
def test_it_decodes_whole_chunks_and_does_what_it_says(config, kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    grammar, different = Grammar(tokenizer, 8, 2), 0
    for seed in range(4):
        model, prompts = model_of(tokenizer, seed), prompt(seed, 2)
        greedy, _ = decode(AutoregressiveDecoder(), model, grammar, prompts)
        never, _ = decode(build({**config, "below": 0.0}), model, grammar, prompts)
        assert never.ids == greedy.ids and never.passes == greedy.passes
        always, _ = decode(build({**config, "below": 2.0}), model, grammar, prompts)
        for ids in always.ids:
            assert tokenizer.decode_report(ids, 8, 2)[1] == 0
        different += always.ids != greedy.ids
        with torch.inference_mode():
            suffix = TokenSuffix(model, model.prefix(model.prefix_segments(*prompts), grammar.values), "words")
            drawn = AutoregressiveDecoder(1.0).generate(suffix, grammar, [Hint()] * 2)
        assert always.ids == drawn.ids  # drawn everywhere, it is sampling
    assert different


def test_it_is_refused_where_the_page_says_it_is(config) -> None:
    decoder = build(config)
    decoder.check(bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),)))
    with pytest.raises(ConfigError, match=r"decoder\.head"):
        decoder.check(bundle_of(heads=(HeadConfig("flow", "flow", 2),)))
    for kind in re.findall(r'`tokenizer = "(\w+)"`', PAGE):
        limited = type("Limited", (type(decoder),), {"tokenizer": kind})()
        (other,) = {"bins", "fast"} - {kind}
        tokenizer = tokenizer_of(other)
        with pytest.raises(ConfigError, match=f"over {kind}, got words .*over {other}"):
            limited.check(bundle_of(tokenizer, heads=(HeadConfig("words", "tokens", 0, tokenizer.vocab_size),)))
