"""At a node: its line to the SuperLink, through the calls that Flower's own SuperNode makes.

The command `flower-supernode` starts a process for every message, which would load model and data, and runs an app in it that
the server sends. Here one process stays, and nothing that a server sends is run.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.flower_records import Message, RecordDict, packed
from fedsim.core.errors import ConfigError, PoolError, one_line

HEARTBEAT_S = 10.0  # the least that Flower takes; after twice as long without one a node has left


class Gone(Exception):
    """The server cannot be reached now."""


@dataclass(frozen=True)
class Server:
    """Where the server is, and how it is spoken to.

    root_certificates: PEM file that the server's certificate is held against (None: those of this system). insecure: without TLS.
    key: file of this node's private key, where the server knows its nodes by their keys.
    Raises ConfigError for what does not go together.
    """

    address: str
    root_certificates: str | None = None
    insecure: bool = False
    key: str | None = None

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise ConfigError(f"--server must be host:port, such as 127.0.0.1:9092, got {self.address!r}")
        if self.insecure and (self.root_certificates or self.key):
            raise ConfigError("--insecure goes with neither --root-certificates nor --key, which are of TLS: leave it out")
        for name, path in (("--root-certificates", self.root_certificates), ("--key", self.key)):
            if path and not Path(path).expanduser().is_file():
                raise ConfigError(f"{name}: there is no file {path}")


class SuperNode:
    """A node that the SuperLink knows of while open. Raises Gone when the server cannot be reached, PoolError when it says no."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._key = _private_key(server.key)
        self._stack, self._stop = contextlib.ExitStack(), threading.Event()

    def __enter__(self) -> SuperNode:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
            from flwr.supercore.primitives.asymmetric import generate_key_pairs
            from flwr.supernode.fleet_http_client import FleetHttpClient
            from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private, public = generate_key_pairs() if self._key is None else (self._key, self._key.public_key())
        roots, plain = self._server.root_certificates, self._server.insecure
        signed: list[Any] = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(private, public)]
        with _reached(), contextlib.ExitStack() as stack:
            client = FleetHttpClient.from_server_address(
                self._server.address, plain, roots and Path(roots).expanduser().read_bytes(), interceptors=signed
            )
            self._client = stack.enter_context(client)
            self._node = stack.enter_context(self._active(public))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    def receive(self) -> Message | None:
        """The next message, if one is there."""
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        with _reached():
            came = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not came.messages_list:
                return None
            tree, run = came.message_object_trees[0], came.messages_list[0].metadata.run_id
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, self._node, run),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, self._node, run),
                return_type=Message,
                initial_backoff=0.05,  # the server may be at sending the parts
            )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def reply(self, message: Message, record: RecordDict) -> None:
        """Answer a message."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        answer = Message(packed(record), reply_to=message)
        run = message.metadata.run_id
        with _reached(), no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            taken = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(answer))],
                    message_object_trees=[get_object_tree(answer)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push = make_push_object_fn_protobuf(self._client.PushObject, self._node, run, taken.session_id)
            push_objects(get_all_nested_objects(answer), push, object_ids_to_push=set(taken.objects_to_push))

    @contextmanager
    def _active(self, public: Any) -> Iterator[Any]:
        """This node as the SuperLink knows it, and its heartbeat."""
        from flwr.proto.fleet_pb2 import (
            ActivateNodeRequest,
            DeactivateNodeRequest,
            RegisterNodeFleetRequest,
            UnregisterNodeFleetRequest,
        )
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        name = public_key_to_bytes(public)
        if self._key is None:
            self._client.RegisterNode(RegisterNodeFleetRequest(public_key=name))
        told = self._client.ActivateNode(ActivateNodeRequest(public_key=name, heartbeat_interval=HEARTBEAT_S))
        node = Node(node_id=told.node_id)
        beat = threading.Thread(target=self._beat, args=(node,), name="fedsim-heartbeat", daemon=True)
        beat.start()
        try:
            yield node
        finally:
            self._stop.set()
            with contextlib.suppress(Exception):  # it may be gone
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
                if self._key is None:
                    self._client.UnregisterNode(UnregisterNodeFleetRequest(node_id=node.node_id))

    def _beat(self, node: Any) -> None:
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_S)
        while not self._stop.wait(HEARTBEAT_S * 0.7):
            with contextlib.suppress(Exception):  # whoever receives next finds that the server is gone
                self._client.SendNodeHeartbeat(request)


@contextmanager
def _reached() -> Iterator[None]:
    """What the HTTP client raises, as one line: Gone for what may pass, PoolError for a no of the server, or of TLS."""
    import httpx
    from flwr.supercore.error import FlowerError

    try:
        yield
    except httpx.HTTPStatusError as e:
        known = FlowerError.from_json(e.response.text)
        said = one_line(e) if known is None else f"{known.message} {known.public_details or ''}".strip()
        code = e.response.status_code
        if code >= 500 or code in (401, 404):  # 401: a SuperLink that was started again knows nobody
            raise Gone(said) from e
        raise PoolError(f"the server does not let this node in: {said} (is its --key among the server's --node-keys?)") from e
    except (httpx.HTTPError, ssl.SSLError) as e:
        if isinstance(e, ssl.SSLError) or "SSL" in str(e).upper():
            raise PoolError(f"no TLS with the server: {one_line(e)} (see --root-certificates and --insecure)") from e
        hint = " (has it TLS? then give --root-certificates)" if isinstance(e, httpx.RemoteProtocolError) else ""
        raise Gone(f"{one_line(e)}{hint}") from e
    except (RuntimeError, ValueError, OSError) as e:  # what Flower makes of answers that it does not expect
        raise Gone(one_line(e)) from e
    except Exception as e:
        if type(e).__module__.startswith("flwr"):
            raise Gone(one_line(e)) from e
        raise


def _private_key(path: str | None) -> Any:
    """A node's private key. Raises ConfigError for a file that holds none of the right kind."""
    if path is None:
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(Path(path).expanduser().read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(
            f"--key: {path} holds no private key without a passphrase: make one with ssh-keygen -t ecdsa -b 384"
        ) from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"--key: {path} must be an elliptic-curve key: make one with ssh-keygen -t ecdsa -b 384")
    return key
