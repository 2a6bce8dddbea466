"""What colcon builds: the same packages as the wheel, as a ROS package of build type ament_python.

pip never reads this file: pyproject.toml names another build backend. colcon reads nothing else, and the setuptools of
Ubuntu 22.04 and 24.04 cannot read that pyproject.toml (its license is an SPDX expression, PEP 639), so it is kept from
them. The Python packages this needs are pip's business, see docs/how-to/on-your-robot.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import Distribution, find_packages, setup

NAME = "vla_stack"
SHARE = f"share/{NAME}"
PACKAGES = ("vla", "vla.*", "policies", "policies.*", "sim", "sim.*", "ros_nodes")
NODES = ("policy", "command", "sim", "camera", "recorder")


class WithoutPyproject(Distribution):
    def parse_config_files(self, filenames: Any = None, *args: Any, **kwargs: Any) -> None:
        super().parse_config_files(["setup.cfg"], *args, **kwargs)


def files(folder: str, pattern: str = "*") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern) if path.is_file())


def below(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# colcon's --symlink-install runs this in a folder of links without configs/; it is then found beside the real vla/.
CONFIGS = ["vla._configs"] if Path("configs").is_dir() else []

setup(
    distclass=WithoutPyproject,
    name=NAME,
    version="0.1.0",
    packages=[*find_packages(include=PACKAGES), *CONFIGS],
    package_dir=dict.fromkeys(CONFIGS, "configs"),
    package_data={
        **dict.fromkeys(CONFIGS, below("configs")),
        "policies": [name for name in below("policies") if name.startswith("pretrained/")],
        "sim": [name for name in below("sim") if not name.endswith((".py", ".pyc"))],
        "vla": [name for name in below("vla") if not name.endswith((".py", ".pyc"))],
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        (f"{SHARE}/launch", files("launch", "*.launch.py")),
        (f"{SHARE}/launch/params", files("launch/params", "*.yaml")),
    ],
    zip_safe=False,
    entry_points={"console_scripts": [f"{node}_node = ros_nodes.rclpy_shell:{node}_node" for node in NODES]},
)
