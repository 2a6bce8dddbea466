"""`vla serve`: a policy for robots that connect over a websocket, with this project's client or openpi's."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla.policy import Policy

OF_THE_ROBOT = ("reuse", "ensembling")  # they remember what one robot did: its client has them
EPILOG = """A robot connects with policies.remote.client.RemotePolicy("ws://HOST:PORT"), `vla eval policy=ws://HOST:PORT`,
`vla demo --policy ws://HOST:PORT`, or openpi-client. Ctrl-C or SIGTERM ends the server.

examples:
  vla serve --policy tabletop
  vla serve --policy outputs/train/bundle --decoder jacobi window=4 --device cuda
  vla serve --policy tabletop --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key key.pem"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from policies.parts import GROUPS

    parser.epilog = EPILOG
    parser.add_argument("--policy", required=True, help="bundle folder, shipped bundle, or 'hold'")
    for group, text in GROUPS.items():
        words = argparse.SUPPRESS if group in OF_THE_ROBOT else text
        parser.add_argument(f"--{group}", nargs="+", default=[], metavar=("NAME", "KEY=VALUE"), help=words)
    parser.add_argument("--embodiment", metavar="ROBOT", help="refuse a policy made for another; needed for 'hold'")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...; auto: the GPU if any")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads (default: 1)")
    where = parser.add_argument_group("who may connect")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    where.add_argument("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    where.add_argument("--token", help="what clients must show; others on this machine see it in the process list")
    where.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the same from a file; default $VLA_POLICY_TOKEN"
    )
    where.add_argument("--no-token", action="store_true", help="allow other machines without a token")
    where.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate, for wss://")
    where.add_argument("--tls-key", type=Path, metavar="PEM", help="its key")
    much = parser.add_argument_group("how much")
    much.add_argument("--max-batch", type=int, default=8, metavar="N", help="observations per inference (default: 8)")
    much.add_argument(
        "--batch-wait", type=float, default=0.002, metavar="S", help="wait for other robots' (default: 0.002)"
    )
    much.add_argument("--max-connections", type=int, default=200, metavar="N", help="default: 200")
    much.add_argument("--max-message", type=float, default=16, metavar="MIB", help="one observation (default: 16)")


def run(args: argparse.Namespace) -> int:
    from policies.remote.server import Limits, PolicyServer, check_access, is_loopback
    from vla.errors import ConfigError, explain

    if not 0 < args.max_message * 2**20 < math.inf:
        expected = "a number of MiB above 0"
        raise ConfigError(explain("max-message", expected, args.max_message, "Leave it out for the default."))
    limits = Limits(
        max_message_bytes=int(args.max_message * 2**20), max_connections=args.max_connections,
        max_batch=args.max_batch, batch_wait_s=args.batch_wait,
    )  # fmt: skip
    token = _token(args.token, args.token_file)
    check_access(args.host, args.port, token, args.no_token)  # before a large model loads
    policy, about = _policy(args)
    server = PolicyServer(
        policy, args.host, args.port, token=token, open_to_all=args.no_token, certificate=args.tls_cert,
        key=args.tls_key, limits=limits, **about,
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def ready() -> None:
        hello = server.hello
        what = f"{hello.policy} {hello.fingerprint[:12]}".strip()
        print(f"serving {what} for {hello.embodiment.name} on {' '.join(server.addresses)}", flush=True)
        if not is_loopback(args.host) and args.tls_cert is None:
            print("note: without TLS, pictures and the token can be read on the way", flush=True)

    server.run(ready)
    return 0


def _policy(args: argparse.Namespace) -> tuple[Policy, Mapping[str, Any]]:
    """The policy, warm, and what the hello says about it."""
    from policies.parts import Parts
    from vla import configs
    from vla.errors import ConfigError, explain
    from vla.resources import bundle_path, load_embodiment

    for group in filter(lambda group: getattr(args, group), OF_THE_ROBOT):
        remedy = f"Say it there: vla demo --policy ws://HOST:PORT --{group} {' '.join(getattr(args, group))}."
        raise ConfigError(explain(group, "on the side of each robot", "on the server", remedy))
    robot = None if args.embodiment is None else load_embodiment(args.embodiment)
    about = {"name": args.policy, "software": _version()}
    names = {"decoder": args.decoder, "pruning": args.pruning}
    if args.policy == "hold":
        from policies.hold import HoldPolicy

        if robot is None or any(names.values()):
            got = "no robot" if robot is None else "parts of a bundle"
            raise ConfigError(explain("embodiment", "'hold' and a robot", got, "Pass --embodiment, and no decoder."))
        return HoldPolicy(robot), about
    parts = Parts.named(names)
    _, policy = parts.load(bundle_path(args.policy), args.device, args.threads)
    if robot is not None:
        robot.require_same(policy.embodiment, f"robot {robot.name!r} and policy {args.policy!r}")
    policy.warm_up()
    described = {"decoder": configs.describe(policy.decoder), "pruning": parts.describe()["pruning"]}
    return policy, {**about, "fingerprint": policy.bundle.fingerprint, "parts": json.loads(json.dumps(described))}


def _token(given: str | None, file: Path | None) -> str:
    from policies.remote.client import TOKEN_VARIABLE
    from vla.errors import ConfigError, explain

    if given is not None and file is not None:
        raise ConfigError(explain("token", "--token or --token-file", "both", "Leave one out."))
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "") if given is None else given
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(explain("token-file", "a readable file", str(error), "Check the path.")) from error
    if not token:
        raise ConfigError(explain("token-file", "a token", "an empty file", f"Write one into {file}."))
    return token


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"vla-stack {version('vla-stack')}"
    except PackageNotFoundError:
        return "vla-stack"
