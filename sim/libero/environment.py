"""LIBERO (Liu et al. 2023, arXiv:2306.03310): the suites spatial, object, goal and 10 behind the one contract.

    env = LiberoEnvironment("libero_object", task=3)
    env.reset(seed=7)                                  # objects and fixtures drawn from the seed
    env.reset(seed=7, options={"init_state": 0})       # objects as in the suite's fixed initial state 0
    env.reset(seed=1_000_012)                          # an evaluation seed: fixed initial state 12

Initial states do not hold the poses of fixtures (cabinet, stove, rack): these come from the seed in either case.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from sim.environment import EVAL_SEED_START
from sim.libero.assets import import_libero
from sim.robosuite_base import RobosuiteArm
from vla.errors import ConfigError, SimulationError, explain, nearest

# Step limits of the evaluation in OpenVLA-OFT and openpi; the ten settling steps are not counted.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}


class LiberoEnvironment(RobosuiteArm):
    """One suite of LIBERO. Changing the task builds another scene (2 to 7 s); a reset takes a fraction of a second.

    suite: a key of MAX_STEPS. task: index in the suite's order, or name. image_size, fast_render: see RobosuiteArm.
    assets: folder of the meshes, else $VLA_LIBERO_ASSETS or what `vla setup libero` found.
    """

    _option_names = ("task", "instruction", "init_state")

    def __init__(
        self,
        suite: str = "libero_object",
        task: int | str = 0,
        *,
        image_size: int = 128,
        fast_render: bool = False,
        assets: str | None = None,
    ):
        if suite not in MAX_STEPS:
            raise ConfigError(f"suite: {suite!r} is unknown. {nearest(suite, MAX_STEPS)}")
        import_libero(assets)
        from libero.libero.benchmark import task_maps

        self._suite, self._entries = suite, tuple(task_maps[suite].values())
        self.max_steps = MAX_STEPS[suite]
        self._initial: dict[int, np.ndarray] = {}
        super().__init__(task, image_size=image_size, fast_render=fast_render)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._entries)

    @property
    def family(self) -> str:
        return self._suite

    def initial_states(self) -> np.ndarray:
        """float64[N, nq + nv + 1]: the fixed initial states of the current task (time, positions, velocities)."""
        if self._task not in self._initial:
            self._initial[self._task] = _load_initial_states(self._entries[self._task])
        return self._initial[self._task]

    def _task_instruction(self, task: int) -> str:
        return str(self._entries[task].language)

    def _build(self, task: int) -> Any:
        import robosuite
        from libero.libero import get_libero_path
        from libero.libero.envs import TASK_MAPPING
        from libero.libero.envs.bddl_utils import get_problem_info

        entry = self._entries[task]
        path = f"{get_libero_path('bddl_files')}/{entry.problem_folder}/{entry.bddl_file}"
        with contextlib.redirect_stdout(io.StringIO()):
            return TASK_MAPPING[get_problem_info(path)["problem_name"]](
                path,
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                control_freq=round(self.embodiment.rate_hz),
                ignore_done=True,
                hard_reset=False,
            )

    def _place(self, seed: int, options: dict[str, Any]) -> dict[str, Any]:
        chosen = options.get("init_state")
        if chosen is None and seed >= EVAL_SEED_START:
            chosen = (seed - EVAL_SEED_START) % len(self.initial_states())
        if chosen is None:
            return {"init_state": None}
        states = self.initial_states()
        if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(states):
            raise ConfigError(
                explain(
                    "init_state", f"0 to {len(states) - 1}", chosen, "Leave it out to draw the scene from the seed."
                )
            )
        if states.shape[1] != self._model.nq + self._model.nv + 1:
            raise SimulationError(
                explain(
                    f"initial state of {self.task}",
                    f"{self._model.nq + self._model.nv + 1} numbers",
                    states.shape[1],
                    "The assets do not belong to this version of hf-libero. Run `vla setup libero`.",
                )
            )
        scene = self._robosuite
        scene.sim.set_state_from_flattened(states[chosen])
        scene.sim.forward()
        scene._post_process()
        return {"init_state": chosen}


def _load_initial_states(entry: Any) -> np.ndarray:
    """The published file is a pickled array: read with torch's restricted unpickler, which builds arrays only."""
    import torch
    from libero.libero import get_libero_path

    path = f"{get_libero_path('init_states')}/{entry.problem_folder}/{entry.init_states_file}"
    rebuild = np.zeros(1).__reduce__()[0]  # numpy's own constructor, whose module numpy 2 renamed
    allowed: list[Any] = [
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    with torch.serialization.safe_globals(allowed):
        return np.asarray(torch.load(path, weights_only=True), np.float64)
