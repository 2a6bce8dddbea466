"""`vla record`: the topics of a robot into a rosbag2 recording, until Ctrl-C."""

from __future__ import annotations

import argparse

from vla.errors import TransportError, explain

EPILOG = """Marks of episodes are words on /vla/record (std_msgs/String): start, stop, discard. `vla record --say start`
sends one without ROS; with ROS, `ros2 topic pub --once /vla/record std_msgs/msg/String "data: start"` does.

examples:
  vla record --robot tabletop                      one recording until Ctrl-C, in recordings/
  vla record --robot so101 --wait                  one recording per episode, from start to stop
  vla record --robot panda --topic /tf:tf2_msgs/msg/TFMessage --without /camera/wrist/image_raw
  vla record --say start --instruction "fold the towel"   the words first, then the mark"""
MATCH_S = 5.0  # how long `--say` waits for a recorder to hear it
LEAVE_S = 0.2  # leaving at once would take the message along


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ros_nodes import settings, wheel_shell

    parser.epilog = EPILOG
    parser.add_argument("--say", metavar="WORD", help="send start, stop or discard to a running recorder, and end")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="with --say: the words, said before the mark")
    parser.add_argument("--robot", help="embodiment: a shipped name or a YAML file")
    settings.add_arguments(parser, [setting for setting in settings.RECORDER if not setting.required])
    wheel_shell.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.say:
        return say(args)
    from ros_nodes import recorder_node, wheel_shell
    from vla.errors import ConfigError
    from vla.resources import embodiment_names

    if not args.robot:
        known = f"one of {', '.join(embodiment_names())}, or a YAML file"
        raise ConfigError(explain("--robot", known, "nothing", "Say whose topics to record."))
    args.embodiment = args.robot
    core = recorder_node.build(args)
    wheel_shell.run(core, args)
    return recorder_node.report(core)


def say(args: argparse.Namespace) -> int:
    """Publish the instruction and one mark, once a recorder listens; TransportError when none does."""
    import time

    from ros_nodes.messages import Text, encode
    from ros_nodes.node import INSTRUCTION, RECORD
    from ros_nodes.recorder_node import read_mark
    from ros_nodes.wire import Participant

    said = [(INSTRUCTION, args.instruction)] if args.instruction else []
    said.append((RECORD, read_mark(args.say)))
    with Participant("vla_record_say", domain=args.domain, network=args.network, distro=args.distro) as participant:
        publishers = [participant.publisher(e.topic, e.type_name, e.quality) for e, _ in said]
        participant.start()
        deadline = time.monotonic() + MATCH_S
        while not all(publisher.readers for publisher in publishers):
            if time.monotonic() > deadline:
                got = "none in this domain"
                raise TransportError(explain(RECORD.topic, "a recorder that listens", got, "Start `vla record` first."))
            time.sleep(0.05)
        for publisher, (_, text) in zip(publishers, said):
            publisher.publish(encode(Text(text), args.distro))
            time.sleep(LEAVE_S)
    return 0
