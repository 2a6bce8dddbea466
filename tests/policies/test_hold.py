"""Holding still: on every robot that is shipped, whatever its gripper's action is called."""

from __future__ import annotations

import numpy as np
import pytest

from policies.hold import HoldPolicy
from vla.embodiment import Embodiment
from vla.errors import ConfigError
from vla.policy import InferContext, infer
from vla.resources import embodiment_names, load_embodiment
from vla.types import Observation


@pytest.mark.parametrize("name", embodiment_names())
def test_every_robot_can_be_held(name: str) -> None:
    robot = load_embodiment(name)
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in robot.cameras}
    state = np.arange(robot.state_dim, dtype=np.float32) / 100
    actions = infer(HoldPolicy(robot), Observation(images, state, "hold", 0), InferContext()).chunk.actions
    assert actions.shape == (8, robot.action_dim)
    if robot.action_space == "joint_position":
        np.testing.assert_array_equal(actions, np.tile(state, (8, 1)))  # each joint where it is
    else:
        assert not np.any(np.delete(actions, robot.grippers, axis=1))


def test_a_position_that_is_not_in_the_state_is_named() -> None:
    panda = load_embodiment("panda").to_dict()
    with pytest.raises(ConfigError, match=r"without \['panda_finger_joint1'\].*among state_names"):
        HoldPolicy(Embodiment.from_dict(panda | {"state_names": panda["state_names"][:-1]}))
