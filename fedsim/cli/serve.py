"""fedsim serve: a config with clients on machines of their own, then the outcome."""

from __future__ import annotations

import argparse

from fedsim.cli.printing import configs_and_overrides, console, fail, line_printer
from fedsim.core.errors import ConfigError

EXAMPLES = """
examples:
  fedsim serve lorm                                     wait for as many nodes as the config has clients, on this machine only
  fedsim serve lorm --wait 2 server.on_client_failure=skip --timeout 600
  fedsim serve lorm --host 0.0.0.0 --ssl-certfile server.pem --ssl-keyfile server.key --ssl-ca-certfile ca.crt

The same command goes on with a run that was stopped. docs/deployment.md: from simulation to deployment.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim serve` takes."""
    configs_and_overrides(command)
    command.epilog, command.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/<name>-<hash of the config>)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    command.add_argument("--port", type=int, default=9092, help="port to listen on (default: 9092)")
    command.add_argument("--wait", type=int, metavar="N", help="nodes to wait for before the first round (default: all clients)")
    command.add_argument("--timeout", type=float, metavar="S", help="seconds that a client has for a round (default: no limit)")
    command.add_argument("--ssl-certfile", metavar="PEM", help="certificate of this server, for TLS")
    command.add_argument("--ssl-keyfile", metavar="PEM", help="its private key")
    command.add_argument("--ssl-ca-certfile", metavar="PEM", help="certificate of whoever signed it")
    command.add_argument("--node-keys", nargs="+", default=[], metavar="PUB", help="public keys of nodes; no other is let in")
    command.add_argument("--insecure", action="store_true", help="listen beyond this machine without TLS")
    command.add_argument("--quiet", action="store_true", help="print the outcome only")


def run(args: argparse.Namespace) -> int:
    """fedsim serve: wait for nodes, run to the end of the stream, then the outcome."""
    if not args.configs:
        raise ConfigError("nothing to serve: name a config, e.g. fedsim serve quickstart")
    from fedsim import deployment

    deployment.require_flower()
    from clients.deployment.superlink import Address
    from fedsim.cli.run import show_results
    from fedsim.core import config as configs
    from fedsim.watch.progress import ProgressDisplay

    tls = (args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certfile)
    address = Address(args.host, args.port, *tls, node_keys=args.node_keys, insecure=args.insecure)
    waiting = deployment.Waiting(args.wait, args.timeout)
    config = configs.load(args.configs, [*args.overrides, deployment.POOL])
    screen = console()
    display = ProgressDisplay(screen, quiet=args.quiet)
    tell = (lambda line: None) if args.quiet else line_printer(screen)
    try:
        with display:
            tell(f"serving on {address.own}{'' if address.plain else ' with TLS'}")
            results = deployment.serve(config, address, waiting, args.output, display, tell)
    except KeyboardInterrupt:
        return fail("stopped; the same command goes on with it", 130)
    show_results(results, screen)
    return 0
