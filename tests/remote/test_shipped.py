"""The shipped policy for several robots at once: what batching changes, counted."""

from __future__ import annotations

import numpy as np
import pytest

from policies.vla_policy import VlaPolicy
from sim.environment import make
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.policy import InferContext, infer
from vla.resources import bundle_path, pretrained_names
from vla.types import Observation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("tabletop" not in pretrained_names(), reason="no policy is shipped yet: see the README"),
]


@pytest.fixture(scope="module")
def seen() -> list[Observation]:
    environment = make("tabletop")
    out = []
    for seed in range(1_000_000, 1_000_060):
        given, _ = environment.reset(seed=seed)
        images = {name: np.array(given.images[name]) for name in given.images}
        out.append(Observation(images, given.state, given.instruction, given.stamp_ns))
    environment.close()
    return out


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_chunk_hardly_ever_depends_on_its_batch(seen: list[Observation], temperature: float) -> None:
    policy = VlaPolicy.from_bundle(bundle_path("tabletop"), AutoregressiveDecoder(temperature), threads=1)
    contexts = [InferContext(seed=i) for i in range(len(seen))]
    alone = [infer(policy, *asked).chunk.actions for asked in zip(seen, contexts)]
    differ = total = 0
    for size in (2, 4, 8):
        for start in range(0, len(seen) - size + 1, size):
            part = slice(start, start + size)
            for mine, together in zip(alone[part], policy.infer_batch(seen[part], contexts[part])):
                differ += not np.array_equal(mine, together.chunk.actions)
                total += 1
    print(f"{differ} of {total} chunks differ")
    assert total == 176 and differ <= 2
