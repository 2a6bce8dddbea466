"""Task families of the tabletop: which scene a seed lays out, what is said, and when it is done.

pick_place  put one movable object on one plate; distractors share its colour or its shape
stack       set one object on a cube
push        shift one object in one of four directions, at least 8 cm, without touching the others

"Left" and "right" are those of the agentview picture, which faces the arm; "towards the robot" is up in it.
A scene offers many goals; one is drawn with it, and the language-swap control asks for another one in the same scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim.tabletop.scene import COLORS, HALF_HEIGHT_M, PLATE_HEIGHT_M, SHAPES, Placed, Scene
from vla.errors import ConfigError, nearest

FAMILIES = ("pick_place", "stack", "push")

AREA_LOWER = np.array([0.41, -0.20])
AREA_UPPER = np.array([0.63, 0.20])
_OBJECT_GAP_M = 0.100
_PLATE_GAP_M = {False: 0.108, True: 0.125}  # to an object, to another plate

DIRECTIONS = {
    "to the left": (0.0, -1.0),
    "to the right": (0.0, 1.0),
    "towards the robot": (-1.0, 0.0),
    "away from the robot": (1.0, 0.0),
}
PUSH_DISTANCE_M = 0.08
_PUSH_BEFORE_M, _PUSH_AFTER_M, _PUSH_CLEAR_M = 0.10, 0.15, 0.078
_PUSH_LOWER = np.array([0.34, -0.29])
_PUSH_UPPER = np.array([0.70, 0.29])

TEMPLATES = {
    "pick_place": (
        "put the {object} on the {target}",
        "place the {object} on the {target}",
        "pick up the {object} and put it on the {target}",
        "move the {object} onto the {target}",
        "set the {object} down on the {target}",
        "take the {object} and lay it on the {target}",
    ),
    "stack": (
        "stack the {object} on the {target}",
        "stack the {object} on top of the {target}",
        "put the {object} on top of the {target}",
        "pick up the {object} and stack it on the {target}",
        "build a tower with the {object} on the {target}",
        "lift the {object} onto the {target}",
    ),
    "push": (
        "push the {object} {target}",
        "slide the {object} {target}",
        "shove the {object} {target}",
        "nudge the {object} {target}",
        "push the {object} a little {target}",
        "with the gripper closed, push the {object} {target}",
    ),
}


@dataclass(frozen=True)
class Goal:
    """family; object: index of the movable object; target: index of the plate (pick_place) or of the base object
    (stack), or a direction of DIRECTIONS (push)."""

    family: str
    object: int
    target: int | str


@dataclass(frozen=True)
class Layout:
    """Everything a seed decides. goals: all that can be asked in this scene, goals[0] is the one asked."""

    movable: tuple[Placed, ...]
    plates: tuple[Placed, ...]
    goals: tuple[Goal, ...]
    template: int

    def instruction(self, goal: Goal) -> str:
        if goal.family == "pick_place":
            target = self.plates[int(goal.target)].name
        elif goal.family == "stack":
            target = self.movable[int(goal.target)].name
        else:
            target = str(goal.target)
        return TEMPLATES[goal.family][self.template].format(object=self.movable[goal.object].name, target=target)

    def swapped(self) -> Goal:
        """A goal for another object than goals[0], with the same target when the scene allows it."""
        asked = self.goals[0]
        others = [goal for goal in self.goals if goal.object != asked.object]
        return next((goal for goal in others if goal.target == asked.target), others[0])

    def goal_for(self, name: str) -> Goal:
        """The first goal that moves the object called `name`, say `red cube`."""
        for goal in self.goals:
            if self.movable[goal.object].name == name:
                return goal
        known = {self.movable[goal.object].name for goal in self.goals}
        raise ConfigError(f"goal: no object {name!r} that can be asked for in this scene. {nearest(name, known)}")


def sample(family: str, rng: np.random.Generator) -> Layout:
    """Lay out a scene of `family`: a target with at least one distractor of its colour and one of its shape."""
    while True:
        names = _names(family, rng)
        plates_wanted = 2 if family == "pick_place" else 0
        spots = _spots(plates_wanted, len(names), rng)
        if spots is None:
            continue
        plate_colors = rng.permutation(list(COLORS))[:plates_wanted]
        plates = tuple(Placed("plate", str(color), *spot) for color, spot in zip(plate_colors, spots))
        movable = tuple(
            Placed(shape, color, *spot, yaw=float(rng.uniform(-0.1, 0.1)))
            for (color, shape), spot in zip(names, spots[plates_wanted:])
        )
        goals = _goals(family, movable, plates)
        first = [goal for goal in goals if goal.object == 0]
        if not first or len({goal.object for goal in goals}) < 2:
            continue
        asked = first[int(rng.integers(len(first)))]
        rest = [goals[i] for i in rng.permutation(len(goals)) if goals[i] != asked]
        # The asked object must not always be slot 0: nothing may depend on the order of the slots.
        layout = Layout(movable, plates, (asked, *rest), int(rng.integers(len(TEMPLATES[family]))))
        return _shuffled(layout, rng)


def _names(family: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(color, shape): the asked object, one of its colour, one of its shape; stacking needs a cube below."""
    colors = [str(color) for color in rng.permutation(list(COLORS))]
    shape, other = (SHAPES[i] for i in rng.permutation(2))
    names = [(colors[0], shape), (colors[0], other), (colors[1], shape)]
    if family == "stack" and shape == "cylinder":
        names.append((colors[2], "cube"))
    return names


def _spots(plates: int, objects: int, rng: np.random.Generator) -> list[tuple[float, float]] | None:
    """Plates first; None when they did not fit."""
    spots: list[np.ndarray] = []
    for index in range(plates + objects):
        for _ in range(60):
            spot = rng.uniform(AREA_LOWER, AREA_UPPER)
            gaps = [_PLATE_GAP_M[index < plates] if placed < plates else _OBJECT_GAP_M for placed in range(len(spots))]
            if all(np.linalg.norm(spot - there) >= gap for there, gap in zip(spots, gaps)):
                spots.append(spot)
                break
        else:
            return None
    return [(float(x), float(y)) for x, y in spots]


def _goals(family: str, movable: tuple[Placed, ...], plates: tuple[Placed, ...]) -> list[Goal]:
    count = len(movable)
    if family == "pick_place":
        return [Goal(family, i, plate) for i in range(count) for plate in range(len(plates))]
    if family == "stack":
        return [
            Goal(family, i, base) for i in range(count) for base in range(count)
            if base != i and movable[base].shape == "cube"
        ]  # fmt: skip
    if family == "push":
        return [
            Goal(family, i, name) for i in range(count) for name, direction in DIRECTIONS.items()
            if _can_push(movable, i, np.array(direction))
        ]  # fmt: skip
    raise ConfigError(f"task: unknown family {family!r}. {nearest(family, FAMILIES)}")


def _can_push(movable: tuple[Placed, ...], index: int, direction: np.ndarray) -> bool:
    """Whether the gripper fits behind the object and nothing stands in the corridor."""
    start = movable[index].xy
    ends = np.array([start - _PUSH_BEFORE_M * direction, start + _PUSH_AFTER_M * direction])
    if np.any(ends < _PUSH_LOWER) or np.any(ends > _PUSH_UPPER):
        return False
    for other, placed in enumerate(movable):
        if other == index:
            continue
        relative = placed.xy - start
        along = float(relative @ direction)
        aside = float(np.linalg.norm(relative - along * direction))
        if -_PUSH_BEFORE_M - 0.03 < along < _PUSH_AFTER_M + 0.03 and aside < _PUSH_CLEAR_M:
            return False
    return True


def _shuffled(layout: Layout, rng: np.random.Generator) -> Layout:
    order = rng.permutation(len(layout.movable))
    place = {int(old): new for new, old in enumerate(order)}
    goals = tuple(
        Goal(goal.family, place[goal.object], place[int(goal.target)] if goal.family == "stack" else goal.target)
        for goal in layout.goals
    )
    return Layout(tuple(layout.movable[i] for i in order), layout.plates, goals, layout.template)


# ---- when it is done ----
def displacement(scene: Scene, index: int) -> np.ndarray:
    """Horizontal shift [2] of a movable object since the reset, metres."""
    return scene.object_position(index)[:2] - scene.movable[index].xy


def destination(scene: Scene, goal: Goal) -> np.ndarray:
    """Where the object's centre [3] belongs; for a push, the least distance that counts."""
    half = HALF_HEIGHT_M[scene.movable[goal.object].shape]
    if goal.family == "pick_place":
        plate = scene.plates[int(goal.target)]
        return np.array([plate.x, plate.y, PLATE_HEIGHT_M + half])
    if goal.family == "stack":
        base = scene.object_position(int(goal.target))
        return base + np.array([0.0, 0.0, HALF_HEIGHT_M["cube"] + half])
    placed = scene.movable[goal.object]
    return np.append(placed.xy + PUSH_DISTANCE_M * np.array(DIRECTIONS[str(goal.target)]), half)


def at_destination(scene: Scene, goal: Goal, slack: float = 1.0) -> bool:
    """Whether the object stands where a pick_place or stack goal wants it, held or not."""
    offset = scene.object_position(goal.object) - destination(scene, goal)
    radius = 0.035 if goal.family == "pick_place" else 0.019
    return bool(np.linalg.norm(offset[:2]) < slack * radius and abs(offset[2]) < 0.008)


def achieved(scene: Scene, goal: Goal) -> bool:
    """Whether the goal holds right now. Carried objects must be let go, upright and at rest where they belong, a pushed
    one must have gone far enough and straight, and no other object may have been moved by more than 3 cm."""
    others = (index for index in range(len(scene.movable)) if index != goal.object)
    if any(np.linalg.norm(displacement(scene, index)) > 0.03 for index in others):
        return False
    if goal.family == "push":
        direction = np.array(DIRECTIONS[str(goal.target)])
        shift = displacement(scene, goal.object)
        along = float(shift @ direction)
        return along >= PUSH_DISTANCE_M and float(np.linalg.norm(shift - along * direction)) <= 0.04
    return at_destination(scene, goal) and not scene.touched(goal.object) and scene.object_speed(goal.object) < 0.02
