"""rosbag2 recordings: written as MCAP (what `ros2 bag` and Foxglove open), read in every form that `rosbags` reads.

A recording is a folder as rosbag2 lays it out:

    <name>/<name>_0.mcap     profile "ros2", schemas with ros2msg encoding, CDR messages as they were on the wire
    <name>/metadata.yaml     version 5: Humble reads nothing newer, and later distributions read it as well

While it is written it is called `<name>.incomplete` and has no metadata.yaml; it gets its name when both files are
complete and on the disk. What a killed recorder leaves behind can be read up to the last whole chunk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mcap.records import Channel, Metadata, Schema
from mcap.records import Message as McapMessage
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from rosbags.rosbag2 import Reader

from ros_nodes.messages import typestore
from ros_nodes.node import Endpoint, Quality
from vla.errors import ConfigError, DataError, explain, nearest
from vla.files import write_text

INCOMPLETE = ".incomplete"
COMPRESSIONS = {"none": CompressionType.NONE, "lz4": CompressionType.LZ4, "zstd": CompressionType.ZSTD}
CHUNK_BYTES = 64 * 1024  # what a kill can cost; a picture larger than this is a chunk of its own
METADATA_VERSION = 5
_FINGERPRINT_BYTES = 1 << 16


# ---- writing ----
class BagWriter:
    """Writes one recording into `path`, a folder that must not exist. Not thread-safe; raises OSError from the disk.

    endpoints: what may be written, all types known to `distro`. compression: of chunks, one of COMPRESSIONS; none by
    default, as rosbag2 does, because pictures at full rate leave no time for more.
    """

    def __init__(
        self, path: Path, endpoints: Collection[Endpoint], distro: str = "jazzy", compression: str = "none"
    ) -> None:
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression: {compression!r} is unknown. {nearest(compression, COMPRESSIONS)}")
        self.path, self.folder = path, path.with_name(path.name + INCOMPLETE)
        if path.exists():
            raise ConfigError(explain("bag", "a name that is free", str(path), "Choose another name."))
        self._distro = distro
        self.counts = {endpoint.topic: 0 for endpoint in endpoints}
        self._endpoints = {endpoint.topic: endpoint for endpoint in endpoints}
        self._span: tuple[int, int] | None = None
        self.folder.mkdir(parents=True)
        self._file = f"{path.name}_0.mcap"
        self._stream = (self.folder / self._file).open("wb")
        self._writer = Writer(self._stream, CHUNK_BYTES, COMPRESSIONS[compression])
        self._writer.start(profile="ros2", library="vla-stack")
        self._schemas: dict[str, int] = {}
        self._channels = {endpoint.topic: self._channel(endpoint) for endpoint in endpoints}

    @property
    def size(self) -> int:
        """Bytes of finished chunks."""
        return self._stream.tell()

    def write(self, topic: str, log_ns: int, data: bytes) -> None:
        """One message as it was on the wire. log_ns: when it was received."""
        count = self.counts[topic]
        self._writer.add_message(self._channels[topic], log_ns, data, log_ns, count)
        self.counts[topic] = count + 1
        low, high = self._span or (log_ns, log_ns)
        self._span = (min(low, log_ns), max(high, log_ns))

    def flush(self) -> None:
        """Hand finished chunks to the system: from here on they survive the death of this process."""
        self._stream.flush()

    def close(self, facts: Mapping[str, str] | None = None) -> Path:
        """Complete both files, on the disk, and give the folder its name. facts: kept in the file, see `Bag.facts`."""
        body = yaml.safe_dump(self._metadata(), sort_keys=False)
        self._writer.add_metadata("rosbag2", {"serialized_metadata": body, "ROS_DISTRO": self._distro})
        if facts:
            self._writer.add_metadata(_FACTS, dict(facts))
        self._writer.finish()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        write_text(self.folder / "metadata.yaml", "rosbag2_bagfile_information:\n" + textwrap.indent(body, "  "))
        self.folder.rename(self.path)
        _sync_folder(self.path.parent)
        return self.path

    def abort(self) -> Path:
        """Close what can be closed and leave the folder under its incomplete name, which is returned."""
        with contextlib.suppress(OSError):  # the disk is full: what was written before stays readable
            self._stream.close()
        return self.folder

    def _channel(self, endpoint: Endpoint) -> int:
        store, kind = typestore(self._distro), endpoint.type_name
        if kind not in store.fielddefs:
            raise ConfigError(f"{endpoint.topic}: type {kind!r} is unknown. {nearest(kind, store.fielddefs)}")
        if kind not in self._schemas:
            definition, _ = store.generate_msgdef(kind, ros_version=2)
            self._schemas[kind] = self._writer.register_schema(kind, "ros2msg", definition.encode())
        metadata = {"offered_qos_profiles": _qos(endpoint.quality), "topic_type_hash": store.hash_rihs01(kind)}
        return self._writer.register_channel(endpoint.topic, "cdr", self._schemas[kind], metadata)

    def _metadata(self) -> dict[str, Any]:
        start, stop = self._span or (0, 0)
        count = sum(self.counts.values())

        def time() -> dict[str, Any]:
            return {"duration": {"nanoseconds": stop - start}, "starting_time": {"nanoseconds_since_epoch": start}}

        topics = [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": endpoint.type_name,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": _qos(endpoint.quality),
                },
                "message_count": self.counts[topic],
            }
            for topic, endpoint in self._endpoints.items()
        ]
        return {
            "version": METADATA_VERSION,
            "storage_identifier": "mcap",
            **time(),
            "message_count": count,
            "topics_with_message_count": topics,
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [self._file],
            "files": [{"path": self._file, **time(), "message_count": count}],
        }


_FACTS = "vla_record"


def _qos(quality: Quality) -> str:
    """QoS as metadata up to version 8 has it: YAML in a string, enumerations as the numbers of rmw."""
    lines = [
        "- history: 1",
        f"  depth: {quality.depth}",
        f"  reliability: {1 if quality.reliable else 2}",
        f"  durability: {1 if quality.latched else 2}",
        "  liveliness: 1",
        *(f"  {name}: {{sec: 0, nsec: 0}}" for name in ("deadline", "lifespan", "liveliness_lease_duration")),
        "  avoid_ros_namespace_conventions: false",
    ]
    return "\n".join(lines)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ----
class Topic(NamedTuple):
    type_name: str
    messages: int


class Bag:
    """One recording: a rosbag2 folder, or a bare .mcap or .db3 file. Use as a context.

    topics: {name: Topic}. A topic that has two types is listed with type_name "". facts: what the recorder noted.
    incomplete: "" for a whole recording, else what is missing of it; its messages are there up to that point.
    Raises DataError for what is no rosbag2 recording.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.topics: dict[str, Topic] = {}
        self.facts: dict[str, str] = {}
        self.incomplete = ""
        self._reader: Reader | None = None
        self._files = _storage(self.path)

    @property
    def name(self) -> str:
        """The folder's name, or the file's without its ending."""
        return self.path.name.removesuffix(INCOMPLETE) if self.path.is_dir() else self.path.stem

    def __enter__(self) -> Bag:
        try:
            reader = Reader(self.path if (self.path / "metadata.yaml").is_file() else self._files[0])
            reader.open()
        except Exception as error:  # the reader raises many kinds for a damaged file
            if len(self._files) > 1 or self._files[0].suffix != ".mcap":
                raise _unreadable(self.path, str(error)) from error
            self._scan(str(error))
            return self
        self._reader = reader
        for name, topic in reader.topics.items():
            self.topics[name] = Topic(topic.msgtype or "", topic.msgcount)
        self.facts = _facts(self._files[0])
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def messages(
        self, topics: Collection[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[tuple[str, int, bytes]]:
        """(topic, log_ns, CDR bytes) of these topics with start_ns <= log_ns < stop_ns, in the order of log_ns (of an
        incomplete recording: in the order of arrival)."""
        if self._reader is None:
            low, high = -(2**63) if start_ns is None else start_ns, 2**63 if stop_ns is None else stop_ns
            for item in self._stream():
                if isinstance(item, McapMessage) and low <= item.log_time < high:
                    topic = self._channels[item.channel_id]
                    if topic in topics:
                        yield topic, item.log_time, item.data
            return
        connections = [c for c in self._reader.connections if c.topic in topics]
        if connections:
            try:
                for connection, log_ns, data in self._reader.messages(connections, start=start_ns, stop=stop_ns):
                    yield connection.topic, log_ns, bytes(data)
            except Exception as error:
                raise _unreadable(self.path, str(error)) from error

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the recording: of each file's size, first and last 64 KiB."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                digest.update(f"{size} ".encode() + stream.read(_FINGERPRINT_BYTES))
                stream.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()[:16]

    # ---- a file without its end ----
    def _scan(self, why: str) -> None:
        """List the topics of a file that has no index, and find out where it ends."""
        kinds: dict[int, str] = {}
        counts: dict[int, int] = {}
        self._channels: dict[int, str] = {}
        types: dict[int, str] = {}
        for item in self._stream():
            if isinstance(item, Schema):
                kinds[item.id] = item.name
            elif isinstance(item, Channel):
                self._channels[item.id], types[item.id] = item.topic, kinds.get(item.schema_id, "")
            elif isinstance(item, McapMessage):
                counts[item.channel_id] = counts.get(item.channel_id, 0) + 1
        if not self._channels:
            raise _unreadable(self.path, why)
        self.topics = {topic: Topic(types[key], counts.get(key, 0)) for key, topic in self._channels.items()}
        self.incomplete = f"the file was not finished; {sum(counts.values())} messages can be read"

    def _stream(self) -> Iterator[Any]:
        with self._files[0].open("rb") as stream:
            try:
                yield from StreamReader(stream).records
            except Exception:  # it ends here, in the middle of a record: struct, CRC, EOF, decompression
                return


def _storage(path: Path) -> list[Path]:
    """The storage files of a recording."""
    if path.is_dir():
        files = sorted([*path.glob("*.mcap"), *path.glob("*.db3")])
        if not files:
            raise _unreadable(path, "a folder without .mcap or .db3")
        if len(files) > 1 and not (path / "metadata.yaml").is_file():
            raise _unreadable(path, f"{len(files)} files without metadata.yaml (`ros2 bag reindex` makes it)")
        return files
    if not path.is_file():
        raise _unreadable(path, "no such file")
    if path.suffix not in (".mcap", ".db3"):
        raise _unreadable(path, f"a file that ends with {path.suffix!r}")
    return [path]


def _facts(path: Path) -> dict[str, str]:
    from mcap.reader import make_reader

    if path.suffix != ".mcap":
        return {}
    with path.open("rb") as stream:
        for item in make_reader(stream).iter_metadata():
            if isinstance(item, Metadata) and item.name == _FACTS:
                return dict(item.metadata)
    return {}


def _unreadable(path: Path, got: str) -> DataError:
    return DataError(
        explain(str(path), "a rosbag2 recording: a folder with metadata.yaml, a .mcap or a .db3 file", got,
                "Give a recording of `vla record` or `ros2 bag record`.")
    )  # fmt: skip
