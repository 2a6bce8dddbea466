"""What a participant tells the ROS 2 graph about its nodes: the message behind `ros2 node list`. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class GraphNode:
    """One node of a participant: its endpoints as 16-byte GUIDs."""

    namespace: str
    name: str
    readers: tuple[bytes, ...]
    writers: tuple[bytes, ...]


@dataclass(frozen=True)
class GraphInfo:
    """rmw_dds_common/ParticipantEntitiesInfo: what `ros2 node list` reads from ros_discovery_info."""

    type_name: ClassVar[str] = "rmw_dds_common/msg/ParticipantEntitiesInfo"
    participant: bytes
    nodes: tuple[GraphNode, ...]


def graph_to(m: GraphInfo, make: Mapping[str, Any], gid_size: int) -> Any:
    kind = make["rmw_dds_common/msg/Gid"]

    def gid(guid: bytes) -> Any:
        return kind(np.frombuffer(guid.ljust(gid_size, b"\0"), np.uint8))

    entry = make["rmw_dds_common/msg/NodeEntitiesInfo"]
    nodes = [entry(n.namespace, n.name, [gid(g) for g in n.readers], [gid(g) for g in n.writers]) for n in m.nodes]
    return make[m.type_name](gid(m.participant), nodes)


def graph_from(r: Any) -> GraphInfo:
    def guids(seq: Sequence[Any]) -> tuple[bytes, ...]:
        return tuple(bytes(g.data[:16]) for g in seq)

    nodes = (
        GraphNode(n.node_namespace, n.node_name, guids(n.reader_gid_seq), guids(n.writer_gid_seq))
        for n in r.node_entities_info_seq
    )
    return GraphInfo(bytes(r.gid.data[:16]), tuple(nodes))
