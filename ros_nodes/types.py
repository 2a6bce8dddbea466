"""ROS 2 message types as DDS types: complete IdlStructs and type hashes, generated from rosbags' definitions.

A DDS reader and writer match by type name, and by type object where both sides announce one, so the types must be
complete even though our bytes never pass through the IDL serialiser.
"""

from __future__ import annotations

import functools
from typing import Any

import cyclonedds.idl.types as idl_types
from cyclonedds.idl import IdlStruct, make_idl_struct
from cyclonedds.idl import annotations as idl_annotations
from rosbags.interfaces import Nodetype

from ros_nodes.messages import typestore
from vla.errors import TransportError, nearest

idl: Any = idl_types  # its generics are made by subscription at run time, which no type checker follows
_BASE: dict[str, Any] = {
    "bool": bool, "byte": idl.uint8, "octet": idl.uint8, "char": idl.uint8,
    "int8": idl.int8, "uint8": idl.uint8, "int16": idl.int16, "uint16": idl.uint16,
    "int32": idl.int32, "uint32": idl.uint32, "int64": idl.int64, "uint64": idl.uint64,
    "float32": idl.float32, "float64": idl.float64,
}  # fmt: skip


@functools.cache
def dds_type(type_name: str, distro: str = "jazzy") -> type[IdlStruct]:
    """The DDS type of `pkg/msg/Name`: `pkg::msg::dds_::Name_`, final, keyless. TransportError when unknown."""
    definitions = typestore(distro).fielddefs
    if type_name not in definitions:
        raise TransportError(f"message type {type_name!r} is unknown to {distro}. {nearest(type_name, definitions)}")
    *package, name = type_name.split("/")
    fields = {key: _field(kind, distro) for key, kind in definitions[type_name][1]}
    # IDL has no empty struct; rosidl puts this member into one.
    fields = fields or {"structure_needs_at_least_one_member": idl.uint8}
    return idl_annotations.final(make_idl_struct(f"{name}_", ".".join([*package, "dds_", f"{name}_"]), fields))


def _field(kind: Any, distro: str) -> Any:
    tag, value = kind
    if tag == Nodetype.BASE:
        base, limit = value
        if base == "string":
            return idl.bounded_str[limit] if limit else str
        return _BASE[base]
    if tag == Nodetype.NAME:
        return dds_type(value, distro)
    element, limit = _field(value[0], distro), value[1]
    if tag == Nodetype.ARRAY:
        return idl.array[element, limit]
    return idl.sequence[element, limit] if limit else idl.sequence[element]


@functools.cache
def type_hash(type_name: str, distro: str = "jazzy") -> str:
    """`RIHS01_<sha256>` (REP 2011), announced in USER_DATA so that Jazzy and later do not warn about each endpoint."""
    return str(typestore(distro).hash_rihs01(type_name))
