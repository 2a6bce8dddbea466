"""Cheaper pictures of scenes whose meshes are far finer than a small image: thin what is only looked at.

LIBERO's scanned objects have up to 100 000 triangles each, and software rendering is bound by triangles, not pixels.
Vertices of a purely visual mesh are merged on a grid inside the compiled model: no file is touched, and a mesh that
anything can collide with stays as it is, so physics is unchanged bit for bit.

Measured on LIBERO-Object, both cameras at 128 px in software, against the full picture: 118 ms full; 40 ms thinned,
PSNR 38 dB; 20 ms thinned and without anti-aliasing, PSNR 31 dB.
"""

from __future__ import annotations

import mujoco
import numpy as np

CELL_M = 0.004  # grid of the merged vertices
CELLS_ACROSS = 48  # but at most this many cells along the longest side, for large meshes such as rooms
MIN_FACES = 1500  # smaller meshes cost nothing


def thin_visual_meshes(model: mujoco.MjModel) -> tuple[int, int]:
    """Merge the vertices of visual meshes in place (vertex clustering, Rossignac and Borrel 1993).

    Call before a renderer is made: it uploads meshes once. Returns the number of triangles before and after.
    """
    before = after = 0
    for mesh, collides in _meshes_in_use(model).items():
        faces = int(model.mesh_facenum[mesh])
        before += faces
        after += faces if collides or faces < MIN_FACES else _thin(model, mesh)
    return before, after


def _meshes_in_use(model: mujoco.MjModel) -> dict[int, bool]:
    """{mesh: whether any geom with that mesh can collide}."""
    found: dict[int, bool] = {}
    for geom in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH):
        mesh = int(model.geom_dataid[geom])
        found[mesh] = found.get(mesh, False) or bool(model.geom_contype[geom] or model.geom_conaffinity[geom])
    return found


def _thin(model: mujoco.MjModel, mesh: int) -> int:
    first_vertex, vertices = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    first_face, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    points = model.mesh_vert[first_vertex : first_vertex + vertices]
    cell = max(CELL_M, float(np.ptp(points, axis=0).max()) / CELLS_ACROSS)
    grid = np.floor((points - points.min(0)) / cell).astype(np.int64)
    _, first, inverse = np.unique(grid, axis=0, return_index=True, return_inverse=True)
    merged = first[inverse.ravel()][model.mesh_face[first_face : first_face + faces]]  # [faces, 3]
    ordered = np.sort(merged, axis=1)
    solid = np.flatnonzero((ordered[:, 0] != ordered[:, 1]) & (ordered[:, 1] != ordered[:, 2]))
    _, unique = np.unique(ordered[solid], axis=0, return_index=True)
    keep = solid[np.sort(unique)]
    kept = len(keep)
    for name in ("mesh_facenormal", "mesh_facetexcoord"):  # they belong to face corners and move along
        values = getattr(model, name)
        values[first_face : first_face + kept] = values[first_face : first_face + faces][keep]
    model.mesh_face[first_face : first_face + kept] = merged[keep]
    model.mesh_facenum[mesh] = kept
    return kept
