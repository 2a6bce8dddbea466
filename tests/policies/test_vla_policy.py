"""The policy of a bundle: deterministic, batched equals single, bad observations named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.vla_policy import VlaPolicy
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.errors import BundleError, ConfigError, ObservationError
from vla.policy import InferContext, Policy, infer
from vla.types import Observation


@pytest.fixture(scope="module")
def policy(tiny_bundle) -> VlaPolicy:
    return VlaPolicy.from_bundle(tiny_bundle)


def observation(seed: int = 0, **changes) -> Observation:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (128, 128, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    state = np.array([0.5, 0, 0.2, 0, 0, 0, 0.08], np.float32)
    return replace(Observation(images, state, "put the red cube on the blue plate", 5_000), **changes)


def test_chunk_has_due_times_units_and_a_report(policy) -> None:
    assert isinstance(policy, Policy)
    result = infer(policy, observation())
    chunk, report = result.chunk, result.report
    assert chunk.actions.shape == (16, 7) and chunk.actions.dtype == np.float32
    assert chunk.start_ns == 5_000 and chunk.period_s == 0.05
    lengths = policy.bundle.action_tokenizers["fast"].token_lengths
    assert sum(int(lengths[i]) for i in report.ids) == 16 * 7 and report.repaired == 0
    assert report.passes == len(report.ids) and 0 < report.confidence <= 1
    # dimensions that never moved in the demonstrations do not move now
    assert (chunk.actions[:, 3:6] == 0).all()


def test_repeats_bit_for_bit_and_keeps_no_state(policy) -> None:
    first = infer(policy, observation(1)).chunk.actions
    infer(policy, observation(2))
    assert np.array_equal(infer(policy, observation(1)).chunk.actions, first)


def test_a_batch_gives_what_single_inferences_give(policy) -> None:
    observations = [observation(i) for i in range(3)]
    together = policy.infer_batch(observations, [InferContext()] * 3)
    for one, alone in zip(together, (infer(policy, o) for o in observations)):
        assert one.report.ids == alone.report.ids


def test_every_robot_of_a_batch_gets_its_own_notes(tiny_bundle) -> None:
    class Noting(AutoregressiveDecoder):
        def decode(self, given):
            return replace(super().decode(given), notes={"layers": 7.0, "cut": [1.0, 2.0]})

    policy = VlaPolicy.from_bundle(tiny_bundle, Noting())
    results = policy.infer_batch([observation(1), observation(2)], [InferContext()] * 2)
    assert [r.report.notes for r in results] == [{"layers": 7.0, "cut": 1.0}, {"layers": 7.0, "cut": 2.0}]


def test_sampling_follows_the_seed(tiny_bundle) -> None:
    policy = VlaPolicy.from_bundle(tiny_bundle, AutoregressiveDecoder(temperature=1.0))
    draw = [infer(policy, observation(), InferContext(seed=s)).report.ids for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    policy.reset(7)
    assert infer(policy, observation(), InferContext(seed=1)).report.ids != draw[0]


def test_cached_greedy_equals_uncached_greedy(policy) -> None:
    """One growing uncached pass per token gives the same ids as the cache; positions are contiguous."""
    model, bundle = policy.bundle.model, policy.bundle
    images = {
        c.name: torch.from_numpy(policy._image(observation(), c.name, c.size))[None] for c in bundle.config.cameras
    }
    ids, valid = bundle.text_tokenizer.encode_padded([observation().instruction])
    inputs = (torch.from_numpy(ids), torch.from_numpy(valid), torch.from_numpy(policy._state(observation()))[None])
    expected = infer(policy, observation()).report.ids
    emitted: list[int] = []
    grammar, head = policy.grammar("fast"), model.heads["fast"]
    remaining = grammar.values
    with torch.inference_mode():
        while remaining:
            shifted = torch.tensor([[head.start_id, *emitted]])
            segments = model.prefix_segments(images, *inputs)
            segments.append(model.suffix_segment("fast", head.embed(shifted)))
            logits = head.logits(model.run(segments)[-1])[0, -1]
            token = int((logits + grammar.bias[remaining]).argmax())
            emitted.append(token)
            remaining -= grammar.lengths[token]
    assert tuple(emitted) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.array([0.5, np.nan, 0.2, 0, 0, 0, 0.08], np.float32)}, r"state: expected finite.*index \[1\]"),
        ({"state": np.zeros(5, np.float32)}, "ee_x"),
        ({"instruction": "  "}, "instruction"),
        ({"instruction": "a" * 10_000}, "instruction"),
        ({"instruction": "word " * 150}, "tokens"),
        ({"images": {"agentview": np.zeros((128, 128, 3), np.uint8)}}, "camera 'wrist'"),
        ({"images": {n: np.zeros((64, 128, 3), np.uint8) for n in ("agentview", "wrist")}}, r"\[128, 128, 3\]"),
        ({"images": {n: np.zeros((128, 128, 3), np.float32) for n in ("agentview", "wrist")}}, "float32"),
    ],
)
def test_bad_observations_are_named(policy, changes, message) -> None:
    with pytest.raises(ObservationError, match=message):
        infer(policy, observation(**changes))


def test_a_bundle_that_wants_older_frames_is_refused_not_half_obeyed(policy) -> None:
    with pytest.raises(BundleError, match=r"observation_offsets: expected \[0\], got \[0, -4\]"):
        VlaPolicy(replace(policy.bundle, observation_offsets=(0, -4)))


def test_negative_temperature_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        AutoregressiveDecoder(-1.0)
