import sys

# `python -m ros_nodes.NAME_node` runs this file first, before imports that may take seconds. Only then, and while it
# looks for the module, is "-m" in the place of the script.
_STARTS = any(word.startswith("ros_nodes.") and word.endswith(("_node", "_shell")) for word in sys.orig_argv)
if sys.argv[:1] == ["-m"] and _STARTS:
    from ros_nodes.entry import end_at_once

    end_at_once()
