"""CPU time per message of one node: the DDS wheel, our rclpy shell, and a plain rclpy node, on the same work.

    source /opt/ros/jazzy/setup.bash && python benchmarks/ros_shells.py [--seconds 20]

The work: two 640x480 images at 30 Hz and joint states at 500 Hz come in, commands of eight joints go out at 100 Hz. The
same sender (on the wheel) serves all three, one after the other, over loopback. Plain rclpy is what its tutorials
write: typed subscriptions, a timer, `numpy` pixels. CPU time is that of the node's process between its first message
and its last, so start-up does not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ros_nodes.messages import Image, JointState, Message, Text, Values, encode
from ros_nodes.node import SENSOR, STATE, Effects, Endpoint, Now, Periodic, Send

CAMERAS = [Endpoint(f"/camera/{name}/image_raw", Image.type_name, SENSOR) for name in ("front", "wrist")]
JOINTS = Endpoint("/joint_states", JointState.type_name, STATE)
COMMANDS = Endpoint("/arm_controller/commands", Values.type_name, STATE)
END = Endpoint("/end", Text.type_name)
NAMES = tuple(f"joint{i}" for i in range(8))


class Meter:
    """CPU seconds and messages between the first message and the end."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.received = self.sent = 0
        self.pixels = 0

    def count(self, pixels: np.ndarray | None = None) -> None:
        if self.begin is None:
            self.begin = cpu_s()
        self.received += 1
        if pixels is not None:
            self.pixels += int(pixels[0, 0, 0])

    def report(self) -> None:
        spent = cpu_s() - (self.begin or 0.0)
        print(json.dumps({"cpu_s": spent, "received": self.received, "sent": self.sent}), flush=True)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class LoadCore:
    """Takes everything, sends commands at 100 Hz, and reports at the word on /end."""

    name = "load"
    subscriptions = (*CAMERAS, JOINTS, END)
    publications = (COMMANDS,)

    def __init__(self) -> None:
        self.meter, self.timer = Meter(), Periodic(10_000_000)

    @property
    def next_tick_ns(self) -> int:
        return self.timer.next_ns

    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        if topic == END.topic:
            self.meter.report()
            os._exit(0)
        self.meter.count(message.pixels if isinstance(message, Image) else None)
        return ()

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        return ()

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        return ()

    def tick(self, now: Now) -> Effects:
        self.timer.due(now.steady_ns)
        self.meter.sent += self.meter.begin is not None
        return (Send(COMMANDS.topic, Values(np.zeros(8))),)

    def close(self, now: Now) -> Effects:
        return ()

    def summary(self) -> dict[str, Any]:
        return {}


# ---- the node under measure, each in a process of its own ----
def run_wheel(domain: int) -> None:
    from ros_nodes.wheel_shell import WheelShell

    WheelShell(LoadCore(), domain).run()


def run_shell(domain: int) -> None:
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from ros_nodes.rclpy_shell import NodeShell
    from ros_nodes.settings import NodeKind
    from ros_nodes.shell import SWITCH_INTERVAL_S

    module = types.ModuleType("load_module")
    module.build = lambda options: LoadCore()  # type: ignore[attr-defined]
    sys.modules["load_module"] = module
    rclpy.init()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    shell = NodeShell(NodeKind("load", "load_module", ()))
    executor = SingleThreadedExecutor()
    executor.add_node(shell)
    shell.trigger_configure()
    shell.trigger_activate()
    executor.spin()


def run_plain(domain: int) -> None:
    import rclpy
    import sensor_msgs.msg
    import std_msgs.msg
    from rclpy.qos import QoSProfile, qos_profile_sensor_data

    rclpy.init()
    node, meter = rclpy.create_node("load"), Meter()

    def on_image(message: Any) -> None:
        pixels = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        meter.count(pixels)

    def on_joints(message: Any) -> None:
        np.array(message.position)
        meter.count()

    def on_timer() -> None:
        meter.sent += meter.begin is not None
        publisher.publish(std_msgs.msg.Float64MultiArray(data=np.zeros(8).tolist()))

    def on_end(message: Any) -> None:
        meter.report()
        os._exit(0)

    for camera in CAMERAS:
        node.create_subscription(sensor_msgs.msg.Image, camera.topic, on_image, qos_profile_sensor_data)
    node.create_subscription(sensor_msgs.msg.JointState, JOINTS.topic, on_joints, QoSProfile(depth=50))
    node.create_subscription(std_msgs.msg.String, END.topic, on_end, 10)
    publisher = node.create_publisher(std_msgs.msg.Float64MultiArray, COMMANDS.topic, QoSProfile(depth=50))
    node.create_timer(0.01, on_timer)
    rclpy.spin(node)


SIDES = {"wheel": run_wheel, "rclpy shell": run_shell, "plain rclpy": run_plain}
LOOPBACK = (
    "<CycloneDDS><Domain><General><Interfaces><NetworkInterface name='lo'/></Interfaces><AllowMulticast>false"
    "</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex><Peers><Peer Address='127.0.0.1'/>"
    "</Peers></Discovery></Domain></CycloneDDS>"
)


def measure(side: str, seconds: float) -> dict[str, float]:
    """CPU microseconds per message (received and sent), and the share of messages that came."""
    from ros_nodes.graph import free_domain
    from ros_nodes.wire import Participant

    domain = free_domain()
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}
    if side != "wheel":
        environment["CYCLONEDDS_URI"] = LOOPBACK
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--domain", str(domain)]
    node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with Participant("sender", domain=domain) as sender:
        commands: list[int] = []
        sender.subscribe(COMMANDS.topic, COMMANDS.type_name, STATE, lambda data, at: commands.append(at))
        cameras = [sender.publisher(e.topic, e.type_name, e.quality) for e in CAMERAS]
        joints = sender.publisher(JOINTS.topic, JOINTS.type_name, JOINTS.quality)
        end = sender.publisher(END.topic, END.type_name, END.quality)
        sender.start()
        deadline = time.monotonic() + 120
        while not all(p.readers for p in (*cameras, joints, end)):
            if node.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{side}: the node did not come up")
            time.sleep(0.05)
        picture = encode(Image(1, "camera", "rgb8", np.zeros((480, 640, 3), np.uint8)))
        state = encode(JointState(1, NAMES, np.zeros(8), np.zeros(8), np.zeros(8)))
        sent = 0
        begin = time.monotonic()
        stop = threading.Event()
        for number in range(int(seconds * 500)):
            stop.wait(max(0.0, begin + number / 500 - time.monotonic()))
            joints.publish(state)
            sent += 1
            if number * 30 // 500 != (number - 1) * 30 // 500:
                for camera in cameras:
                    camera.publish(picture)
                    sent += 1
        time.sleep(0.5)
        end.publish(encode(Text("end")))
        out, _ = node.communicate(timeout=60)
    facts = json.loads(out.strip().splitlines()[-1])
    messages = facts["received"] + facts["sent"]
    share = facts["received"] / sent
    return {"us": 1e6 * facts["cpu_s"] / messages, "received": share, "cpu_s": facts["cpu_s"], "sent": facts["sent"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of traffic, per node and round (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="each node this often, in turn (default: 3)")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--domain", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        SIDES[options.side](options.domain)
        return
    sides = [side for side in SIDES if side == "wheel" or importlib.util.find_spec("rclpy")]
    rounds = [{side: measure(side, options.seconds) for side in sides} for _ in range(options.rounds)]
    print(f"{'node':<12} {'us/message':>10} {'of plain':>9} {'received':>9} {'sent':>6}")
    plain = sides[-1] if len(sides) > 1 else ""
    for side in sides:
        cost = float(np.median([r[side]["us"] for r in rounds]))
        ratio = f"{np.median([r[side]['us'] / r[plain]['us'] for r in rounds]):.2f}" if plain else "-"
        share = min(r[side]["received"] for r in rounds)
        print(f"{side:<12} {cost:>10.1f} {ratio:>9} {share:>9.1%} {rounds[-1][side]['sent']:>6.0f}")
    if not plain:
        print("the wheel alone, compared with nothing: rclpy is not importable here, source a ROS 2 installation")


if __name__ == "__main__":
    main()
