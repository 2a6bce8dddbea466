"""The shipped policy: complete, small, made for the shipped robot, and it does what it is told.

Simulated time, fixed seeds: the numbers of the card are measured by `vla eval`; these few episodes catch a bundle that
does not fit the code any more.
"""

import numpy as np
import pytest

from policies.vla_policy import VlaPolicy
from sim.evaluate import EvalConfig, evaluate
from vla.policy import infer
from vla.resources import load_embodiment, pretrained_dir, pretrained_names

BUNDLE = pretrained_dir() / "tabletop"
pytestmark = pytest.mark.skipif("tabletop" not in pretrained_names(), reason="no policy is shipped yet: see the README")


@pytest.fixture(scope="module")
def policy() -> VlaPolicy:
    return VlaPolicy.from_bundle(BUNDLE, threads=1)


def test_it_is_small_documented_and_made_for_this_robot(policy) -> None:
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    assert (BUNDLE / "CARD.md").is_file()
    policy.embodiment.require_same(load_embodiment("tabletop"), "shipped policy and shipped robot")


def test_it_succeeds_on_unseen_seeds(policy) -> None:
    report = evaluate(policy, EvalConfig(env="tabletop", episodes=12))
    assert report.success.successes >= 8, report


def test_without_images_it_fails(policy) -> None:
    report = evaluate(policy, EvalConfig(env="tabletop", episodes=6), control="blank")
    assert report.success.successes <= 2, report


def test_its_first_chunk_depends_on_the_words(policy) -> None:
    """Same scene, same state, another object: the arm sets off in another direction."""
    from sim.environment import make

    environment = make("tabletop", task="pick_place")
    differences = []
    for seed in range(1_000_000, 1_000_004):
        chunks = []
        for swap in (False, True):
            observation, _ = environment.reset(seed=seed, options={"swap": swap})
            chunks.append(infer(policy, observation).chunk.actions[:, :2].sum(axis=0))
        differences.append(float(np.linalg.norm(chunks[0] - chunks[1])))
    environment.close()
    assert np.median(differences) > 0.02  # metres
