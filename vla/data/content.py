"""What training data looks like, in a few numbers, and whether a robot still looks like it. numpy only.

A camera's print says what a picture should be like where the state is: per pixel a linear function of the state, and
the spread around it, over pictures scaled to 16 x 16 and freed of brightness and contrast. A live picture is compared
with the print of every camera, as it is, turned, mirrored, and with red and blue swapped: swapped cables, a camera
mounted upside down and a driver's bgr8 are then the better fit. By how much the truth fits better is measured on the
data set; what cannot be told there, as left from right where the scene is symmetrical, is not claimed here.

A state is compared with the range of each of its values: degrees for radians, a wrong sign or zero lie outside of it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vla.data.lerobot import LeRobotDataset
from vla.data.transforms import resize
from vla.errors import DataError, explain

SIDE = 16
FRAMES = 512  # of a data set, evenly spaced: enough for one in a hundred
AS_TRAINED = "as trained"
_LEAST_SPREAD = 0.05  # of a pixel, in contrasts of its picture: noise, light, compression
_FAR = 9.0  # squared spreads: a pixel further off than three of them says no more (an object in the way)
_FLAT = 2.0 / 255.0  # contrast of a picture without any
_FURTHEST = 3.0  # standard deviations of a state value, beyond which the line is not drawn
_STILL = 1e-4  # rad or m; a value that varies less explains nothing
_RIDGE = 1e-2
_TOLD = 0.02  # least advantage, in `misfit`, that can be relied upon
_SLACK = 0.1  # of a value's range, beyond its ends
_LEAST_SLACK = 1e-3  # rad or m
_RIVAL = 0.25  # what lags the best explanation by less than this share of what that one gains, is possible too

# Brightness, red against blue, green against both. Neighbours in colour vary together, so that in red, green and blue
# a swap drowns in changes of brightness; here it is a sign.
_OPPONENT = np.array([[1 / 3, 1.0, -0.5], [1 / 3, 0.0, 1.0], [1 / 3, -1.0, -0.5]], np.float32)
_RED_BLUE = np.array([1.0, -1.0, 1.0], np.float32)
Change = Callable[[np.ndarray], np.ndarray]


def _both(first: Change, then: Change) -> Change:
    return lambda x: then(first(x))


# {how pictures may have been changed: what undoes it, on [N, 16, 16, 3]}
_TURNS: dict[str, Change] = {
    "": lambda x: x,
    "upside down": lambda x: x[:, ::-1, ::-1],
    "mirrored left to right": lambda x: x[:, :, ::-1],
    "mirrored top to bottom": lambda x: x[:, ::-1],
    "turned a quarter to the left": lambda x: np.rot90(x, -1, (1, 2)),
    "turned a quarter to the right": lambda x: np.rot90(x, 1, (1, 2)),
}
_COLOURS: dict[str, Change] = {
    "": lambda x: x,
    "red and blue swapped": lambda x: x * _RED_BLUE,
}
VIEWS: dict[str, Change] = {
    ", ".join(filter(None, (turn, colour))) or AS_TRAINED: _both(undo, recolour)
    for turn, undo in _TURNS.items()
    for colour, recolour in _COLOURS.items()
}


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """uint8[N, H, W, 3] -> float32[N, 16, 16, 3] of opponent colours; NaN for pictures of one colour."""
    small = resize(pictures, SIDE, SIDE).astype(np.float32) / 255.0
    flat = small.reshape(len(small), -1)
    contrast = flat.std(axis=1)
    contrast[contrast < _FLAT] = np.nan
    return ((flat - flat.mean(axis=1, keepdims=True)) / contrast[:, None]).reshape(small.shape) @ _OPPONENT


@dataclass(frozen=True, eq=False)
class CameraPrint:
    """weights: float32[1 + S, 768]: a thumbnail from 1 and the standardised state. spread: float32[768] around it.

    usual: median and 99 % quantile of `misfit` over pictures of the data set. bounds: {camera: {view: (slope, level)}}:
    the truth fits better than that explanation by slope * promise + level in 99 of 100 pictures of the data set;
    `promise` is by how much it would for a picture just as expected.
    """

    weights: np.ndarray
    spread: np.ndarray
    usual: tuple[float, float] = (0.0, 0.0)
    bounds: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    def expected(self, features: np.ndarray) -> np.ndarray:
        """float[N, 16, 16, 3]: thumbnails where the state is as `features` float[N, 1 + S] say."""
        return (features @ self.weights).reshape(-1, SIDE, SIDE, 3)

    def misfit(self, thumbs: np.ndarray, features: np.ndarray, view: str = AS_TRAINED) -> np.ndarray:
        """float[N]: how badly thumbnails fit pictures of this camera that were changed to `view`; the negative
        log-likelihood per pixel of independent normals, cut off far away."""
        undone = VIEWS[view](thumbs).reshape(len(thumbs), -1)
        off = np.minimum(((undone - features @ self.weights) / self.spread) ** 2, _FAR)
        return np.asarray((off / 2 + np.log(self.spread)).mean(axis=1))

    @property
    def limit(self) -> float:
        """A picture with a larger misfit is unlike those of the data set."""
        return self.usual[1] + (self.usual[1] - self.usual[0])

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": _text(self.weights),
            "spread": _text(self.spread),
            "usual": [round(value, 4) for value in self.usual],
            "bounds": {
                name: {view: [round(value, 4) for value in line] for view, line in views.items()}
                for name, views in self.bounds.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CameraPrint:
        low, high = data["usual"]
        bounds = {
            str(name): {str(view): (float(slope), float(level)) for view, (slope, level) in views.items()}
            for name, views in data["bounds"].items()
        }
        return cls(_array(data["weights"]), _array(data["spread"])[0], (float(low), float(high)), bounds)


@dataclass(frozen=True)
class StateRange:
    """One value of the state over a data set: extremes, mean, standard deviation; first_min, first_max: extremes
    at the first frames of episodes."""

    min: float
    max: float
    mean: float
    std: float
    first_min: float
    first_max: float

    @property
    def slack(self) -> float:
        return _SLACK * (self.max - self.min) + _LEAST_SLACK

    def holds(self, value: float) -> bool:
        return self.min - self.slack <= value <= self.max + self.slack

    def starts(self, value: float) -> bool:
        return self.first_min - self.slack <= value <= self.first_max + self.slack


@dataclass(frozen=True, eq=False)
class DataContent:
    """cameras: {name: CameraPrint}, of those that showed something. state: {name: StateRange}, in the order of the
    state. frames: how many pictures of each camera were looked at."""

    cameras: Mapping[str, CameraPrint]
    state: Mapping[str, StateRange]
    frames: int

    def features(self, states: np.ndarray) -> np.ndarray:
        """float[N, S] -> float[N, 1 + S]: 1, then the states standardised and held within _FURTHEST."""
        return _features(states, *(np.array([getattr(r, key) for r in self.state.values()]) for key in ("mean", "std")))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; arrays as base64 of little-endian float16."""
        cameras = {name: found.to_dict() for name, found in self.cameras.items()}
        return {"frames": self.frames, "cameras": cameras, "state": {n: asdict(r) for n, r in self.state.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DataContent:
        """Inverse of `to_dict`; DataError for what is none."""
        try:
            cameras = {str(name): CameraPrint.from_dict(item) for name, item in data["cameras"].items()}
            state = {
                str(name): StateRange(**{key: float(value) for key, value in item.items()})
                for name, item in data["state"].items()
            }
            shapes = {x.weights.shape for x in cameras.values()} | {(1 + len(state), SIDE * SIDE * 3)}
            if len(shapes) != 1 or any(
                len(x.spread) != SIDE * SIDE * 3 or x.spread.min() <= 0 for x in cameras.values()
            ):
                raise ValueError(f"prints of shapes {sorted(shapes)}")
            return cls(cameras, state, int(data["frames"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            remedy = "Make it again: vla calibrate content."
            raise DataError(
                explain("data", "prints of cameras and ranges of the state", repr(error), remedy)
            ) from error


def content_of(
    dataset: LeRobotDataset, cameras: Sequence[str], state_names: Sequence[str], rows: np.ndarray,
    pictures: Callable[[str, np.ndarray], np.ndarray],
) -> DataContent:  # fmt: skip
    """The content of a data set.

    rows: ascending rows of the data set to take pictures from, of which FRAMES are. pictures(camera, rows int[N]) ->
    uint8[N, H, W, 3].
    """
    rows = np.asarray(rows)[np.linspace(0, len(rows) - 1, min(FRAMES, len(rows))).astype(int)]
    values = np.asarray(dataset.column("observation.state"), np.float64)
    firsts = values[[episode.start for episode in dataset.episodes]]
    table = np.stack([f(values, axis=0) for f in (np.min, np.max, np.mean, np.std)] + [firsts.min(0), firsts.max(0)])
    state = {name: StateRange(*column) for name, column in zip(state_names, table.T.tolist())}
    thumbs: dict[str, np.ndarray] = {}
    features: dict[str, np.ndarray] = {}
    for name in cameras:
        made = thumbnails(pictures(name, rows))
        seen = np.isfinite(made).all(axis=(1, 2, 3))
        if not seen.any():  # of one colour each: there is nothing to tell it by
            continue
        thumbs[name], features[name] = made[seen], _features(values[rows[seen]], table[2], table[3])
    prints = {name: _fitted(thumbs[name], features[name]) for name in thumbs}
    measured = {name: _measured(name, prints, thumbs[name], features[name]) for name in prints}
    return DataContent(measured, state, len(rows))


def _features(states: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    scaled = np.where(std > _STILL, (states - mean) / np.maximum(std, _STILL), 0.0)
    return np.concatenate([np.ones((len(states), 1)), np.clip(scaled, -_FURTHEST, _FURTHEST)], axis=1)


def _fitted(thumbs: np.ndarray, features: np.ndarray) -> CameraPrint:
    """Line and spread, from every second picture each: a spread around a line through its own points is too small."""
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float64)
    x, y = features[::2], flat[::2]
    weights = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    other = slice(1, None, 2) if len(flat) > 1 else slice(None)
    spread = np.sqrt(((flat[other] - features[other] @ weights) ** 2).mean(axis=0))
    return CameraPrint(weights.astype(np.float32), np.maximum(spread, _LEAST_SPREAD).astype(np.float32))


def _measured(name: str, prints: Mapping[str, CameraPrint], thumbs: np.ndarray, features: np.ndarray) -> CameraPrint:
    """The print with `usual` and `bounds`, from the camera's own pictures."""
    right = prints[name].misfit(thumbs, features)
    bounds: dict[str, dict[str, tuple[float, float]]] = {}
    for other, found in prints.items():
        for view, promise in _promised(name, other, prints, features).items():
            gained = found.misfit(thumbs, features, view) - right
            slope = float(np.cov(promise, gained, ddof=0)[0, 1] / max(promise.var(), 1e-12))
            bounds.setdefault(other, {})[view] = (slope, float(np.quantile(gained - slope * promise, 0.01)))
    middle, high = np.quantile(right, [0.5, 0.99])
    return replace(prints[name], usual=(float(middle), float(high)), bounds=bounds)


def _promised(name: str, other: str, prints: Mapping[str, CameraPrint], features: np.ndarray) -> dict[str, np.ndarray]:
    """{view: float[N]}: by how much a picture just as expected of `name` fits better than one of `other`, changed."""
    expected = prints[name].expected(features)
    right = prints[name].misfit(expected, features)
    views = [view for view in VIEWS if (other, view) != (name, AS_TRAINED)]
    return {view: prints[other].misfit(expected, features, view) - right for view in views}


# ---- cameras ----
SAME, CHANGED, UNLIKE, BLANK = "same", "changed", "unlike", "blank"


@dataclass(frozen=True)
class Look:
    """What a camera's pictures show. kind: SAME; CHANGED, they fit `explanations`, (camera, view), the simplest one
    first, clearly better; UNLIKE, neither; BLANK, of one colour. misfit, limit: see CameraPrint. untold: explanations
    that cannot be told from the truth where the state is."""

    kind: str
    misfit: float = 0.0
    limit: float = 0.0
    explanations: tuple[tuple[str, str], ...] = ()
    untold: tuple[tuple[str, str], ...] = ()


def look(content: DataContent, camera: str, pictures: np.ndarray, states: np.ndarray) -> Look:
    """Judge pictures uint8[N, H, W, 3] that come under the name of `camera`, and the states float[N, S] of their time,
    by the median over them."""
    thumbs = thumbnails(pictures)
    seen = np.isfinite(thumbs).all(axis=(1, 2, 3))
    if not seen.any():
        return Look(BLANK)
    thumbs, features = thumbs[seen], content.features(states[seen])
    own = content.cameras[camera]
    right = own.misfit(thumbs, features)
    misfit, untold, doubtful = float(np.median(right)), [], False
    gains: dict[tuple[str, str], float] = {}  # by how much explanations that are better than the truth fit better
    for other, found in content.cameras.items():
        for view, promised in _promised(camera, other, content.cameras, features).items():
            slope, level = own.bounds[other][view]
            bound = float(np.median(slope * promised + level))
            if bound < _TOLD:
                untold.append((other, view))
                continue
            gain = float(np.median(right - found.misfit(thumbs, features, view)))
            doubtful |= gain > -bound / 2
            if gain >= bound / 2 and misfit - gain <= found.limit:
                gains[other, view] = gain
    most = max(gains.values(), default=0.0)
    best = [key for key in gains if most - gains[key] < _RIVAL * most]
    best.sort(key=lambda key: (key[1] != AS_TRAINED, "," in key[1], -gains[key]))
    kind = CHANGED if best else UNLIKE if doubtful or misfit > own.limit else SAME
    return Look(kind, misfit, own.limit, tuple(best), tuple(untold))


# ---- state ----
_ANGLES = {"degrees where radians were trained": np.pi / 180, "radians where degrees were trained": 180 / np.pi}
_LENGTHS = {"millimetres where metres were trained": 1e-3, "metres where millimetres were trained": 1e3}
_TURNED = {"a quarter turn": np.pi / 2, "half a turn": np.pi, "a whole turn": 2 * np.pi}
_PERCENT = (1.0, 100.0)  # what some grippers count up to
_POSITIONS = ("ee_x", "ee_y", "ee_z")


def explanations(value: float, low: float, high: float, slack: float, angle: bool, gripper: bool) -> list[str]:
    """What would bring `value`, which is outside of low..high, inside. angle, gripper: what it is of."""

    def inside(other: float) -> bool:
        return low - slack <= other <= high + slack

    scales = {**(_ANGLES if angle else _LENGTHS), "the opposite sign": -1.0}
    out = [text for text, scale in scales.items() if inside(value * scale)]
    if angle:
        turns = _TURNED.items()
        out += [f"a zero that is off by {text}" for text, turn in turns if inside(value - turn) or inside(value + turn)]
    if gripper:
        out += [f"a gripper that counts from 0 to {top:g}" for top in _PERCENT if high < top and 0 <= value <= top]
    return out


@dataclass(frozen=True)
class Value:
    """One value of the state. inside: of its range. causes: what would explain that it is not. flipped: everything is
    where episodes began, only this gripper is at the other end."""

    name: str
    value: float
    range: StateRange
    inside: bool
    causes: tuple[str, ...] = ()
    flipped: bool = False


def values(content: DataContent, states: np.ndarray) -> list[Value]:
    """Judge live states float[N, S], by the median over them."""
    middle = dict(zip(content.state, np.median(states, axis=0).tolist()))
    out = []
    for name, value in middle.items():
        known, gripper = content.state[name], is_gripper(name)
        inside = known.holds(value)
        angle = not gripper and name not in _POSITIONS
        causes = [] if inside else explanations(value, known.min, known.max, known.slack, angle, gripper)
        rest = all(content.state[n].starts(v) for n, v in middle.items() if not is_gripper(n))
        other = known.min + known.max - value
        flipped = gripper and inside and rest and not known.starts(value) and known.starts(other)
        out.append(Value(name, value, known, inside, tuple(causes), flipped))
    return out


def is_gripper(name: str) -> bool:
    return "gripper" in name or "finger" in name


# ---- plain data ----
def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f2").tobytes()).decode()


def _array(text: str) -> np.ndarray:
    """float32[N, 768]."""
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    if not np.all(np.isfinite(values)):
        raise ValueError("NaN or infinity")
    return values.reshape(-1, SIDE * SIDE * 3)
