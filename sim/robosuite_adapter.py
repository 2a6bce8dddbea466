"""robosuite's single-arm tasks (Zhu et al. 2020, arXiv:2009.12293) behind the one contract.

    env = RobosuiteEnvironment("Lift")
    env.reset(seed=7)

robosuite has no language: each task gets one sentence here. Success is the task's own `_check_success`.
"""

from __future__ import annotations

from typing import Any

from sim.libero.assets import import_robosuite
from sim.robosuite_base import RobosuiteArm

# Tasks that one Panda with its default gripper can do, and what to say to it.
INSTRUCTIONS = {
    "Lift": "lift the red cube",
    "Stack": "stack the red cube on the green cube",
    "PickPlaceMilk": "put the milk carton into its bin",
    "PickPlaceBread": "put the bread into its bin",
    "PickPlaceCereal": "put the cereal box into its bin",
    "PickPlaceCan": "put the red can into its bin",
    "PickPlace": "put every object into its bin",
    "NutAssemblySquare": "put the square nut on the square peg",
    "NutAssemblyRound": "put the round nut on the round peg",
    "NutAssembly": "put each nut on the peg of its shape",
    "Door": "open the door",
    "ToolHang": "put the frame into its stand and hang the tool on it",
}


class RobosuiteEnvironment(RobosuiteArm):
    """task: a key of INSTRUCTIONS. max_steps: truncation; robosuite itself names none. Other arguments: RobosuiteArm.

    Sizes that robosuite draws while it builds a scene (the cube of Lift) are the same in all episodes; poses and the
    arm's start are drawn from the seed.
    """

    def __init__(
        self, task: int | str = "Lift", *, image_size: int = 128, fast_render: bool = False, max_steps: int = 500
    ):
        import_robosuite()
        self.max_steps = max_steps
        super().__init__(task, image_size=image_size, fast_render=fast_render)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(INSTRUCTIONS)

    @property
    def family(self) -> str:
        return "robosuite"

    def _task_instruction(self, task: int) -> str:
        return INSTRUCTIONS[self.tasks[task]]

    def _build(self, task: int) -> Any:
        import robosuite

        return robosuite.make(
            self.tasks[task],
            robots="Panda",
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=round(self.embodiment.rate_hz),
            ignore_done=True,
            hard_reset=False,
        )
