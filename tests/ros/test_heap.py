"""A node's heap has from the start what it will need, and keeps it."""

import ctypes
import subprocess
import sys

import pytest

PICTURE = 640 * 480 * 3
GROWTH = """
import sys, threading, psutil
from ros_nodes.heap import one_arena, reserve
rss = lambda: psutil.Process().memory_info().rss
one_arena()
held = [None] * 20
def fill(): held[:] = [bytes({picture}) for _ in held]  # pages are in memory only where something is written
def write(): held[:] = [b"x" * {picture} for _ in held]
if {reserved}: reserve(22 * {picture})
before, most = rss(), 0
for _ in range(5):
    for work in (fill, write):
        thread = threading.Thread(target=work); thread.start(); thread.join()
        most = max(most, rss())
        held[:] = [None] * 20
print((most - before) / {picture}, (rss() - before) / {picture})
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
@pytest.mark.parametrize("reserved", [True, False])
def test_pictures_of_another_thread_come_from_what_was_reserved_and_stay_reserved(reserved):
    program = GROWTH.format(picture=PICTURE, reserved=reserved)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    most, end = map(float, out.split())
    if reserved:
        assert -1 < end <= most < 1
    else:
        assert most > 15  # the test can fail


def test_a_policy_reserves_for_the_pictures_it_keeps_and_those_that_wait():
    from policies.hold import HoldPolicy
    from ros_nodes.policy_node import PolicyCore
    from vla.resources import load_embodiment

    robot = load_embodiment("panda")
    assert PolicyCore(HoldPolicy(robot), None).message_bytes == sum(18 * 3 * c.height * c.width for c in robot.cameras)
