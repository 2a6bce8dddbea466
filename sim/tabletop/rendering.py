"""Offscreen rendering with a GL context that is chosen late and fails with a remedy.

mujoco picks its GL library from MUJOCO_GL while it is imported, and then fails with whatever the loader says. Here the
context classes are imported on first use instead: MUJOCO_GL when it is set, else EGL where an NVIDIA device is
present, else OSMesa, else EGL in software.
"""

from __future__ import annotations

import ctypes.util
import importlib
import os
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from vla.errors import SimulationError, explain

_LIBRARIES = {"osmesa": "OSMesa", "egl": "EGL"}
_REMEDY = "Install an offscreen GL library: apt-get install -y libosmesa6 (or libegl1), or set MUJOCO_GL."


def backend() -> str:
    """`egl`, `osmesa` or `glfw`. Raises SimulationError when no library is found, or MUJOCO_GL names an unknown one."""
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked in ("egl", "osmesa", "glfw"):
        return asked
    if asked:
        raise SimulationError(explain("MUJOCO_GL", "egl, osmesa or glfw", asked, "Unset it to choose automatically."))
    order = ("egl", "osmesa") if Path("/dev/nvidia0").exists() else ("osmesa", "egl")
    for name in order:
        if ctypes.util.find_library(_LIBRARIES[name]):
            return name
    raise SimulationError(explain("offscreen GL", "libOSMesa or libEGL", "neither", _REMEDY))


def _context(width: int, height: int) -> Any:
    name = backend()
    try:
        context = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
        context.make_current()
    except Exception as error:  # PyOpenGL raises AttributeError, ImportError or its own, depending on what is absent
        raise SimulationError(explain("offscreen GL", f"a working {name} context", repr(error), _REMEDY)) from error
    return context


class OffscreenRenderer:
    """RGB images of a model's cameras.

    By default no shadows, reflections, haze or sites: they cost more than the physics of a light scene. full: draw
    the scene as its author made it. hidden_groups: geom groups that are not drawn.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        width: int,
        height: int,
        *,
        full: bool = False,
        hidden_groups: tuple[int, ...] = (),
        max_geoms: int = 200,
    ):
        self._model, self._rect = model, mujoco.MjrRect(0, 0, width, height)
        self._gl: Any = _context(width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=max_geoms)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[list(hidden_groups)] = 0
        if not full:
            for flag in (
                mujoco.mjtRndFlag.mjRND_SHADOW,
                mujoco.mjtRndFlag.mjRND_REFLECTION,
                mujoco.mjtRndFlag.mjRND_HAZE,
            ):
                self._scene.flags[flag] = 0
            self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._pixels = np.zeros((height, width, 3), np.uint8)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8[H, W, 3], RGB, row 0 at the top. `data` must have had its kinematics computed."""
        self._gl.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._mjr)
        return np.ascontiguousarray(self._pixels[::-1])

    def close(self) -> None:
        """Free the context. Safe to call twice."""
        if self._gl is None:
            return
        self._gl.make_current()
        self._mjr.free()
        self._gl.free()
        self._gl = None
