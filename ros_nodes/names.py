"""What names our topics have in a graph: a node's namespace and remappings, by ROS 2's rules. No middleware."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ros_nodes.node import CLOCK, DIAGNOSTICS
from vla.errors import ConfigError, explain

_GLOBAL = (CLOCK.topic, DIAGNOSTICS.topic)
_NAME = re.compile(r"(/?[A-Za-z_][A-Za-z0-9_]*)+|/")


def relative(topic: str) -> str:
    """The name under which a node makes a topic, so that its namespace applies to it."""
    return topic if topic in _GLOBAL else topic.lstrip("/")


@dataclass(frozen=True)
class Names:
    """The nodes' namespace, "" for none, and (from, to) of their remappings, of which the first that fits counts."""

    namespace: str = ""
    remaps: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, namespace: str, rules: Sequence[str]) -> Names:
        """rules: FROM:=TO, as after ROS's -r. ConfigError for one that is none."""
        pairs = [rule.partition(":=")[::2] for rule in rules]
        for rule, pair in zip(rules, pairs):
            if not all(map(_NAME.fullmatch, pair)):
                raise ConfigError(explain("--remap", "FROM:=TO, names of topics", repr(rule), "Write it as after -r."))
        if namespace and not _NAME.fullmatch(namespace):
            raise ConfigError(explain("--namespace", "a name such as left", repr(namespace), "Correct it."))
        return cls(namespace, tuple(pairs))

    def __call__(self, topic: str) -> str:
        """The full name that `topic` of ours has in the graph."""
        name = self._full(relative(topic))
        return next((self._full(to) for source, to in self.remaps if self._full(source) == name), name)

    def _full(self, name: str) -> str:
        return name if name.startswith("/") else "/" + "/".join(filter(None, (*self.namespace.split("/"), name)))
