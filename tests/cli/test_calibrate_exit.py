"""`vla calibrate exit` on a tiny model: what it prints is what was measured, and can be typed as it stands."""

import json
import shlex

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from tests.decoding.test_continuous import bundle_of
from tests.decoding.test_early_exit import DEEP, EXIT
from vla.cli import main
from vla.cli.calibrate_exit import options, rows
from vla.configs import build, load
from vla.decoding.early_exit import AdaptiveEarlyExitDecoder, EarlyExitDecoder
from vla.models.heads import HeadConfig
from vla.policy import InferContext, infer
from vla.tokenizers import BinTokenizer
from vla.types import Observation


def observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    tint = rng.random(3)
    images = {
        name: (rng.integers(0, 255, (size, size, 3)) * tint).astype(np.uint8)
        for name, size in (("front", 32), ("wrist", 16))
    }
    return Observation(images, rng.normal(size=3).astype(np.float32) * 3, "push", 1)


@pytest.fixture
def bundle(monkeypatch):
    """Any policy is this one, and its episodes show random pictures."""
    torch.manual_seed(0)
    heads = (HeadConfig("once", "parallel", 0), HeadConfig("words", "tokens", 1, 9, exit_layer=EXIT))
    made = bundle_of(BinTokenizer(9), heads=heads, transformer=DEEP, text_vocab=512)
    asked = []

    def observations(policy, config, count):
        asked.append(config)
        return [(observation(seed), InferContext()) for seed in range(count)], None

    monkeypatch.setattr("vla.checkpoints.bundle.load", lambda path, device: made)
    monkeypatch.setattr("vla.resources.bundle_path", lambda name: name)
    monkeypatch.setattr("sim.decode_costs.observations", observations)
    yield made
    assert all(config.seed == 1_900_000 for config in asked)  # not the seeds of vla eval


def test_what_it_prints_constructs_the_decoders_it_found(bundle, capsys) -> None:
    assert main.main(["calibrate", "exit", "--policy", "mine", "--observations", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["observations"] == 8 and [row["threshold"] for row in said["thresholds"]] == [i / 10 for i in range(10)]
    exits = [row["exits"] for row in said["thresholds"]]
    assert exits[0] == 1 and exits == sorted(exits, reverse=True) and exits[-1] < 1
    fixed, adaptive = (build(said[name]) for name in ("early_exit", "early_exit_adaptive"))
    assert isinstance(fixed, EarlyExitDecoder) and isinstance(adaptive, AdaptiveEarlyExitDecoder)
    start = AdaptiveEarlyExitDecoder()
    assert (adaptive.low_alpha, adaptive.high_beta) != (start.low_alpha, start.high_beta)
    assert adaptive._mixture().threshold() == pytest.approx(fixed.threshold, abs=0.11)  # parameters are rounded

    assert main.main(["calibrate", "exit", "--policy", "mine", "--observations", "8"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("vla ")]
    for (evaluate, demo), decoder in zip((lines[:2], lines[2:]), (fixed, adaptive)):
        name, *settings = demo[demo.index("--decoder") + 1 :]
        assert vars(load("decoder", name, settings)) == vars(decoder)
        assert evaluate[2:] == ["policy=mine", f"decoder={name}", *(f"decoder.{setting}" for setting in settings)]


def test_the_table_is_what_the_decoder_does_on_the_same_pictures(bundle, capsys) -> None:
    """Where the deep layers change nothing every exit agrees, so the tokens before any exit are the measured ones."""
    with torch.no_grad():
        bundle.model.heads["words"].logits.weight.normal_(std=1.5)
        for layer in bundle.model.transformer.layers[EXIT:]:
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.zero_()
    assert main.main(["calibrate", "exit", "--policy", "mine", "--observations", "6", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["thresholds"]
    greedy = [infer(VlaPolicy(bundle), observation(seed)).report.ids for seed in range(6)]
    assert len({row["exits"] for row in table}) > 5
    for row in table:
        policy = VlaPolicy(bundle, EarlyExitDecoder(threshold=row["threshold"]))
        early = [infer(policy, observation(seed)).report for seed in range(6)]
        assert [report.ids for report in early] == greedy and row["agree"] in (1.0, None)
        assert np.mean([report.notes["exits"] for report in early]) == pytest.approx(row["exits"], abs=1e-4)


def test_rows_count_and_options_differ() -> None:
    table = rows([0.05, 0.35, 0.95], [False, True, True])
    assert table[0] == {"threshold": 0.0, "exits": 1.0, "agree": 0.6667}
    assert table[3]["exits"] == 0.6667 and table[4] == {"threshold": 0.4, "exits": 0.3333, "agree": 1.0}
    assert rows([0.1], [True])[9] == {"threshold": 0.9, "exits": 0.0, "agree": None}
    assert options("early_exit", EarlyExitDecoder()) == []
    assert options("early_exit", EarlyExitDecoder(3, 0.5)) == ["layer=3", "threshold=0.5"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--layer", "9"), "decoder.layer: expected 1..3, got 9"),
        (("--head", "once"), "decoder.head"),
        (("--ratio", "1"), "decoder.ratio"),
        (("--observations", "0"), "--observations: expected at least 1"),
    ],
)
def test_what_cannot_be_calibrated_is_one_message(bundle, words, says, capsys) -> None:
    assert main.main(["calibrate", "exit", "--policy", "mine", *words]) == 2
    assert says in capsys.readouterr().err
