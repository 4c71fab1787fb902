"""At the server: Flower's SuperLink as a process of its own, and the run's line to it.

The command `flower-superlink` is Flower's own, and so are TLS and the authentication of nodes. A run is opened there as by
`flwr run`, with an app that holds nothing; this process then takes the place of the app's ServerApp, and sends messages through
Flower's `Grid`. Not all that is imported of Flower below is what Flower calls public: it is in this file and in `supernode.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.deployment.guests import Reply
from clients.flower_records import Message, MessageType, RecordDict, kind_of, packed, unpacked
from fedsim.core.errors import ConfigError, PoolError, one_line

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.05
LOST = "could not be found"  # what Flower says of a part that does not come any more
LOOK_S = 1.0  # between two looks at who is there
# The process ends when the other end of its standard input does: with the server that started it, however that ends.
COMMAND = """
import os, shutil, sys, threading
def end():
    sys.stdin.buffer.read()
    shutil.rmtree(os.environ["FLWR_HOME"], ignore_errors=True)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
from flwr.superlink.cli import flower_superlink
flower_superlink()
"""
APP = """
[project]
name = "fedsim"
version = "1.0.0"
description = "fedsim serve: nothing is installed or run at a node"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedsim"
[tool.flwr.app.components]
serverapp = "app.app:server"
clientapp = "app.app:client"
"""


@dataclass(frozen=True)
class Address:
    """Where the SuperLink listens, and how.

    ssl_certfile, ssl_keyfile, ssl_ca_certfile: PEM files for TLS, all or none. node_keys: files of public keys (`ssh-keygen -t
    ecdsa`); with any, only their nodes are let in. insecure: without TLS on another address than this machine's own.
    Raises ConfigError for what does not go together.
    """

    host: str = "127.0.0.1"
    port: int = 9092
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certfile: str | None = None
    node_keys: Sequence[str] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        given = {f"--{k.replace('_', '-')}": getattr(self, k) for k in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certfile")}
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port must be in 1..65535, got {self.port}")
        if missing := [name for name, path in given.items() if not path]:
            if len(missing) < len(given):
                raise ConfigError(f"TLS needs three files: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
            if self.node_keys:
                raise ConfigError(f"--node-keys needs TLS: give {', '.join(given)}")
            if not self.insecure and not is_loopback(self.host):
                raise ConfigError(
                    f"--host {self.host} without TLS is open to all who can reach it: give {', '.join(given)}, or --insecure"
                )
        elif self.insecure:
            raise ConfigError("--insecure and TLS exclude each other: leave one out")
        for name, path in {**given, **{f"--node-keys {p}": p for p in self.node_keys}}.items():
            if path and not Path(path).expanduser().is_file():
                raise ConfigError(f"{name}: there is no file {path}")

    @property
    def plain(self) -> bool:
        """Without TLS."""
        return self.ssl_certfile is None

    @property
    def own(self) -> str:
        """The address by which this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return joined(host, self.port)

    def arguments(self) -> list[str]:
        """Of `flower-superlink`."""
        paths = {
            "--ssl-certfile": self.ssl_certfile,
            "--ssl-keyfile": self.ssl_keyfile,
            "--ssl-ca-certfile": self.ssl_ca_certfile,
        }
        tls = ["--insecure"] if self.plain else [word for name, path in paths.items() for word in (name, _whole(str(path)))]
        known = ["--enable-supernode-auth"] if self.node_keys else []
        return ["--host", self.host, "--port", str(self.port), *tls, *known]

    def require_free(self) -> None:
        """Raise PoolError when another process listens there."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as e:
                raise PoolError(
                    f"{joined(self.host, self.port)} cannot be listened on: {e.strerror or e} (choose another --port)"
                ) from e


class SuperLink:
    """A SuperLink that runs while open, with a run of ours in it. Raises PoolError when it does not start, and when it ends."""

    def __init__(self, address: Address) -> None:
        address.require_free()
        self._address, self._stack = address, contextlib.ExitStack()
        self._nodes, self._looked = set[int](), 0.0
        self._coming: dict[str, Any] = {}  # replies of which parts are missing yet, by the message that they answer
        try:
            self._home = Path(self._stack.enter_context(_home()))
            self._process = self._stack.enter_context(self._started())
            self._grid = self._stack.enter_context(self._opened())
        except BaseException:
            self._stack.close()
            raise

    def nodes(self) -> set[int]:
        now = time.monotonic()
        if now - self._looked > LOOK_S:
            with self._errors():
                self._nodes = set(self._grid.get_node_ids())
            self._looked = now
        return self._nodes

    def send(self, node: int, record: RecordDict) -> str:
        kind = MessageType.TRAIN if kind_of(record) == "train" else MessageType.QUERY
        with self._errors():
            (message,) = self._grid.push_messages([Message(packed(record), node, kind)])
        if not message:
            raise PoolError(f"Flower's SuperLink took no message{self._last_words()}")
        return str(message)

    def replies(self, messages: Collection[str]) -> list[Reply]:
        with self._errors():
            return _replies(self._grid, messages, self._coming)

    def close(self) -> None:
        """End the process. May be called twice."""
        self._stack.close()

    @contextmanager
    def _started(self) -> Iterator[subprocess.Popen[bytes]]:
        secret, log = self._home / "secret", self._home / "log"
        secret.touch(mode=0o600)
        secret.write_bytes(secrets.token_bytes(32))
        own = ["--isolation", "process", "--disable-runtime-dependency-installation", "--superexec-auth-secret-file", str(secret)]
        command = [sys.executable, "-P", "-c", COMMAND, *self._address.arguments(), *own]
        with open(log, "wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Flower's Grid of a new run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flwr.common.serde import run_from_proto
            from flwr.proto.runtime_pb2 import PullTaskInputRequest
            from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
            from flwr.supercore.task_identity import TaskIdentity
            from flwr.superlink.grid import HttpGrid

        self._wait_until_up()
        token = self._token()
        grid = HttpGrid(self._address.own, self._address.plain, self._root(), token=token)
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        try:
            heartbeat.start()
            opened = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            grid.set_run(run_from_proto(opened.run))
            TaskIdentity.task_id, TaskIdentity.run_id = opened.task_id, opened.run.run_id
            TaskIdentity.node_id = opened.context.node_id
            yield grid
        finally:
            grid._retry_invoker.max_tries = 1
            heartbeat._stop_event.set()  # `stop` would wait for a call that is under way
            grid.close()

    def _token(self) -> str:
        """Open a run, register the keys of nodes, and take the place of the run's ServerApp: the token that it goes by."""
        from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
        from flwr.proto.fab_pb2 import Fab
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        where: tuple[str, bool, bytes | None] = (self._address.own, self._address.plain, self._root())
        version = RuntimeVersionHttpInterceptor(component_name="flwr")
        secret = (self._home / "secret").read_bytes()
        ours = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        with self._errors():
            control = ControlHttpClient.from_server_address(*where, interceptors=[version])
            for path in self._address.node_keys:
                control.RegisterNode(RegisterNodeRequest(public_key=_public_key(path)))
            app = _app(self._home / "app")
            control.StartRun(StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)))
            control.close()
            runtime = RuntimeHttpClient.from_server_address(*where, interceptors=[version, ours])
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            deadline = time.monotonic() + START_TIMEOUT_S
            while not (token := runtime.AcquireTask(request).token):
                if time.monotonic() > deadline:
                    raise PoolError(f"Flower's SuperLink has not opened a run within {START_TIMEOUT_S:.0f} s{self._last_words()}")
                time.sleep(POLL_S)
            runtime.close()
        return str(token)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        host, _, port = self._address.own.rpartition(":")
        while True:
            self._require_running()
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
                return
            if time.monotonic() > deadline:
                raise PoolError(f"Flower's SuperLink did not start within {START_TIMEOUT_S:.0f} s{self._last_words()}")
            time.sleep(POLL_S)

    def _require_running(self) -> None:
        if self._process.poll() is not None:
            raise PoolError(f"Flower's SuperLink has ended{self._last_words()}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever Flower raises is a broken link."""
        self._require_running()
        try:
            yield
        except PoolError:
            raise
        except Exception as e:
            self._require_running()
            raise PoolError(f"Flower's SuperLink cannot be reached: {one_line(e)}{self._last_words()}") from e

    def _root(self) -> bytes | None:
        """The certificate that the SuperLink's own is held against."""
        return None if self._address.plain else Path(_whole(str(self._address.ssl_ca_certfile))).read_bytes()

    def _last_words(self) -> str:
        """What it logged last as an error."""
        lines = (self._home / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if "ERROR" in line or "Error" in line]
        return f": {' '.join(wrong[-1].split())[-300:]}" if wrong else ""


def _replies(grid: Any, messages: Collection[str], coming: dict[str, Any]) -> list[Reply]:
    """The replies that are there as a whole. Flower's Grid would wait for missing parts, minutes if a node died at sending them.

    coming: heads of replies that are not there as a whole, and the trees of their parts; kept from one look to the next."""
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects

    client, run = grid._runtime_client, grid.run.run_id
    if asked := [message for message in messages if message not in coming]:
        came = client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        for head, tree in zip(came.messages_list, came.message_object_trees, strict=True):
            coming[head.metadata.reply_to_message_id] = tree
    found = []
    for of in [message for message in messages if message in coming]:
        parts = [part.object_id for part in iterate_object_tree(coming[of])]
        try:
            contents = pull_objects(
                parts, make_pull_object_fn_protobuf(client.PullObject, grid.node, run), max_tries_per_object=1
            )
        except ObjectPullError as e:
            if LOST in str(e):
                del coming[of]
                found.append(Reply(of, None, "its reply did not come as a whole"))
            continue
        whole = coming.pop(of).object_id
        client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=grid.node, run_id=run, message_object_id=whole))
        found.append(_reply(of, inflate_object_from_contents(whole, contents)))
    return found


def _reply(of: str, message: Any) -> Reply:
    if message.has_error():
        return Reply(of, None, message.error.reason or "no reason given")
    try:
        return Reply(of, unpacked(message.content))
    except Exception as e:  # whoever is at the other end may send anything
        return Reply(of, None, f"its reply cannot be read ({one_line(e)})")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _whole(path: str) -> str:
    return str(Path(path).expanduser().absolute())


@contextmanager
def _home() -> Iterator[str]:
    """A folder for all that Flower writes, and the environment that says so."""
    told = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_LOG_LEVEL": "WARNING"}
    folder = tempfile.mkdtemp(prefix="fedsim-serve-")
    told["FLWR_HOME"] = folder
    before = {key: os.environ.get(key) for key in told}
    os.environ.update(told)
    try:
        yield folder
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        shutil.rmtree(folder, ignore_errors=True)


def _app(folder: Path) -> bytes:
    """A Flower app that holds nothing, as the archive in which apps travel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.cli.build import build_fab_from_disk

    (folder / "app").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(APP, encoding="utf-8")
    (folder / "app" / "__init__.py").write_text("", encoding="utf-8")
    imports = "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
    (folder / "app" / "app.py").write_text(f"{imports}client, server = ClientApp(), ServerApp()\n", encoding="utf-8")
    return bytes(build_fab_from_disk(folder))


def _public_key(path: str) -> bytes:
    """A node's public key, as Flower registers it. Raises ConfigError for a file that holds none of the right kind."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = load_ssh_public_key(Path(path).expanduser().read_bytes())
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"--node-keys: {path} holds no public key: make a pair with ssh-keygen -t ecdsa -b 384") from e
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"--node-keys: {path} must be an elliptic-curve key: make a pair with ssh-keygen -t ecdsa -b 384")
    return bytes(public_key_to_bytes(key))
