"""fedsim join: this process becomes a client of a server."""

from __future__ import annotations

import argparse
import time

from fedsim.cli.printing import configs_and_overrides, console, fail, line_printer

EXAMPLES = """
examples:
  fedsim join --server 127.0.0.1:9092 --data source=npz path=mine.npz      data of its own; the server says the rest
  fedsim join --server 127.0.0.1:9092 --client 3                           shard 3 of the config's split
  fedsim join lorm --server fl.example.org:9092 --root-certificates ca.crt --data source=npz path=mine.npz

With a CONFIG, a server that runs another one is refused. docs/deployment.md: from simulation to deployment.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim join` takes."""
    configs_and_overrides(command, "; without any, what the server runs")
    command.epilog, command.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    command.add_argument("--server", required=True, metavar="HOST:PORT", help="where fedsim serve listens")
    command.add_argument(
        "--data", nargs="+", metavar="KEY=VALUE", help="the client's own data, as a config's data section has it"
    )
    command.add_argument(
        "--client", type=int, metavar="K", help="which client this is; without --data it holds this shard of the split"
    )
    command.add_argument(
        "--memory", default="fedsim-memory", metavar="DIR", help="folder of what the client remembers from round to round"
    )
    command.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="seconds to wait for a server that is away (600)"
    )
    command.add_argument("--root-certificates", metavar="PEM", help="what the server's certificate is held against, for TLS")
    command.add_argument("--key", metavar="FILE", help="private key of this node, where the server knows its nodes by their keys")
    command.add_argument("--insecure", action="store_true", help="without TLS (a server on this machine is taken so anyway)")


def run(args: argparse.Namespace) -> int:
    """fedsim join: train whenever the server asks, until the run is over."""
    from fedsim import deployment

    deployment.require_flower()
    from clients.deployment.superlink import is_loopback
    from clients.deployment.supernode import Server
    from fedsim.core import config as configs

    tls = args.root_certificates or args.key
    insecure = args.insecure or (not tls and is_loopback(args.server.rpartition(":")[0]))
    server = Server(args.server, args.root_certificates, insecure, args.key)
    config = configs.load(args.configs, args.overrides) if args.configs or args.overrides else None
    own = deployment.Own(config, args.client, args.data)
    print_line = line_printer(console())

    def tell(line: str) -> None:
        print_line(f"{time.strftime('%H:%M:%S')} {line}")

    try:
        deployment.join(server, own, args.memory, args.patience, tell)
    except KeyboardInterrupt:
        return fail("left; the same command joins again", 130)
    return 0
