"""What names a node and its topics have in a graph: namespace and remappings, by ROS 2's rules. No middleware.

Launch files read this with ROS's own Python, so it imports no codec.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vla.errors import ConfigError, explain

_GLOBAL = ("/clock", "/diagnostics")  # of the whole graph, in whatever namespace a node is
_NAME = re.compile(r"(/?[A-Za-z_][A-Za-z0-9_]*)+|/")
_NODE, _NAMESPACE = "__node", "__ns"  # what remaps the node itself and not a topic


def relative(topic: str) -> str:
    """The name under which a node makes a topic, so that its namespace applies to it."""
    return topic if topic in _GLOBAL else topic.lstrip("/")


def spoken(full: str) -> str:
    """The name under which a node speaks on /diagnostics, which all namespaces share: the full one, so that one arm is
    not taken for the other; without a namespace its own."""
    return full.lstrip("/") if full.count("/") == 1 else full


@dataclass(frozen=True)
class Names:
    """A node's namespace, "" for none, and (from, to) of the topics it remaps, of which the first that fits counts.
    node: its own name, "" for the one it is made with."""

    namespace: str = ""
    remaps: tuple[tuple[str, str], ...] = ()
    node: str = ""

    @staticmethod
    def add_arguments(parser: argparse._ActionsContainer) -> None:
        """What `of` reads."""
        parser.add_argument(
            "--namespace", default="", metavar="NAME", help="of nodes and topics, as `ros2 launch ... namespace:=`"
        )
        parser.add_argument(
            "-r", "--remap", action="append", default=[], metavar="FROM:=TO",
            help="another name for a topic of the nodes, as after --ros-args -r; repeatable",
        )  # fmt: skip

    @classmethod
    def of(cls, namespace: str, rules: Sequence[str]) -> Names:
        """rules: FROM:=TO of topics, __node:=NAME or __ns:=NAMESPACE, as after ROS's -r, which say more than
        `namespace`. ConfigError for one that is none."""
        pairs = [rule.partition(":=")[::2] for rule in rules]
        for rule, (source, to) in zip(rules, pairs):
            if not (_NAME.fullmatch(source) and _NAME.fullmatch(to)) or (source == _NODE and "/" in to):
                expected = f"FROM:=TO of topics, {_NODE}:=NAME or {_NAMESPACE}:=NAMESPACE"
                raise ConfigError(explain("remap", expected, repr(rule), "Write it as after -r."))
        if namespace and not _NAME.fullmatch(namespace):
            raise ConfigError(explain("namespace", "a name such as left", repr(namespace), "Correct it."))
        said = dict(reversed(pairs))  # as for topics, the first rule counts
        topics = tuple(pair for pair in pairs if pair[0] not in (_NODE, _NAMESPACE))
        return cls(said.get(_NAMESPACE, namespace), topics, said.get(_NODE, ""))

    def __call__(self, topic: str) -> str:
        """The full name that `topic` of ours has in the graph."""
        name = self.full(relative(topic))
        return next((self.full(to) for source, to in self.remaps if self.full(source) == name), name)

    def full(self, name: str = "") -> str:
        """A relative name, of a node or a topic, with the namespace before it; for "" the namespace itself."""
        return name if name.startswith("/") else "/" + "/".join(filter(None, (*self.namespace.split("/"), name)))
