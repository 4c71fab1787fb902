"""A deployment as it is: a SuperLink, a server and three nodes, each a process of its own, on loopback."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from clients.deployment.supernode import Gone, Server, SuperNode
from fedsim.core.errors import PoolError
from fedsim.runs.results import Results
from tests import interrupts
from tests.clients.test_deployment import with_failures
from tests.tiny import final_state, plain_vit, same_bits, tiny

pytestmark = pytest.mark.processes
TLS = ("--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt", "--node-keys", "node.pub")
ROOT = ("--root-certificates", "ca.crt")
PATIENCE_S = 240.0  # until the test gives up waiting for a line
TIMEOUT_S = 10  # of a client, which is how long the round with the killed node takes


class Process:
    """A `fedsim` command in a session of its own, and what it has printed so far."""

    def __init__(self, folder: Path, name: str, *words: str) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", "TMPDIR": str(folder)}
        with open(self._log, "wb") as out, interrupts.heard_by_children():
            command = [sys.executable, "-m", "fedsim.cli", *words]
            self._popen = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=environment, start_new_session=True)

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.printed, f"has said {text!r}")

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            assert self._popen.poll() is None or there(), f"{self.name} has ended before it {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"waited in vain until {self.name} {what}:\n{self.printed}"
            time.sleep(0.02)

    def ends(self) -> int:
        return self._popen.wait(PATIENCE_S)

    def send(self, what: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, what)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._popen.wait()


@contextmanager
def processes(folder: Path) -> Iterator[Callable[..., Process]]:
    """Starts processes, and ends all of them however the test ends."""
    started: list[Process] = []

    def start(name: str, *words: str) -> Process:
        started.append(Process(folder, name, *words))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_free(port: int) -> None:
    """The SuperLink ends with the server that started it, however that ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise AssertionError("the SuperLink outlives its server")


def test_three_nodes_one_late_one_killed_and_a_server_that_is_killed(tmp_path: Path) -> None:
    """LoRM and SCAFFOLD over two tasks. Client 2 comes after the first round, the server is killed and started again by the same
    command, client 1 is killed in the second task. What comes out are the bits of a simulation in which the same jobs fail."""
    config = tiny(
        "client.learners=[scaffold]", "server.on_client_failure=skip", output=tmp_path / "runs", model=plain_vit(), name="three"
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    port = free_port()
    serving = ("serve", "config.yaml", "--port", str(port), "--timeout", str(TIMEOUT_S), "--output", "run")
    with processes(tmp_path) as start:
        server = start("server", *serving, "--wait", "2")
        nodes = [start(f"node-{k}", "join", "--server", f"127.0.0.1:{port}", "--client", str(k)) for k in range(2)]
        server.wait_until((tmp_path / "run" / "checkpoint.pt").exists, "has saved a round")
        server.kill()
        wait_until_free(port)
        assert not list(tmp_path.glob("fedsim-serve-*"))  # nor is there anything left of it
        nodes.append(start("node-2", "join", "config.yaml", "--server", f"127.0.0.1:{port}", "--client", "2"))
        server = start("server-again", *serving, "--wait", "3")
        nodes[1].wait_for("task 1, round 0: done")
        nodes[1].kill()
        assert server.ends() == 0, server.printed
        assert [nodes[0].ends(), nodes[2].ends()] == [0, 0]
        wait_until_free(port)
    assert "[1/4]" not in server.printed  # it went on
    assert "the server is there again" in nodes[0].printed and "the run is over" in nodes[0].printed
    state = final_state(tmp_path / "run", config)
    failed = [(f.client_id, f.task, f.round) for f in state.failures]
    assert (2, 0, 0) in failed and (1, 1, 1) in failed
    assert same_bits(dict(state.params), dict(with_failures(config, failed, tmp_path)))
    assert Results.load(tmp_path / "run").finished


def certify(folder: Path) -> None:
    """A certificate of this machine, signed by an authority of its own (server.pem, server.key, ca.crt), and a node's key pair
    (node, node.pub)."""
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("ca", "us")]
    authority, own, of_node = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, what: x509.ExtensionType) -> bytes:
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(key.public_key())
        built = (
            built.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(1))
        )
        return built.add_extension(what, critical=True).sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)

    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (folder / "ca.crt").write_bytes(certificate(names[0], authority, x509.BasicConstraints(ca=True, path_length=None)))
    (folder / "server.pem").write_bytes(certificate(names[1], own, here))
    (folder / "server.key").write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "node").write_bytes(of_node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / "node.pub").write_bytes(of_node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def test_tls_and_keys_and_ctrl_c_on_either_side(tmp_path: Path) -> None:
    """Over TLS, with a node that the server knows by its key. A server that waits and a node that waits end with one line each,
    and nothing is left behind."""
    config = tiny(output=tmp_path / "runs", model=plain_vit())
    certify(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    port = free_port()
    with processes(tmp_path) as start:
        server = start("server", "serve", "config.yaml", "--port", str(port), *TLS)
        node = start("node", "join", "--server", f"127.0.0.1:{port}", "--client", "1", *ROOT, "--key", "node")
        server.wait_for("waiting for nodes")
        address, root = f"127.0.0.1:{port}", str(tmp_path / ROOT[1])
        with pytest.raises(PoolError, match=r"SuperNode authentication is enabled.*--node-keys"):
            SuperNode(Server(address, root)).__enter__()
        with pytest.raises(PoolError, match=r"no TLS with the server.*CERTIFICATE_VERIFY_FAILED"):
            SuperNode(Server(address, certifi.where())).__enter__()
        with pytest.raises(Gone, match=r"has it TLS\? then give --root-certificates"):
            SuperNode(Server(address, insecure=True)).__enter__()
        server.wait_for("client 1 has joined")
        node.send(signal.SIGINT)
        assert node.ends() == 130 and node.printed.endswith("fedsim: left; the same command joins again\n")
        server.wait_for("client 1: its node has left")
        server.send(signal.SIGINT)
        assert server.ends() == 130 and server.printed.endswith("fedsim: stopped; the same command goes on with it\n")
        wait_until_free(port)
