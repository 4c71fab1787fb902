"""The Hugging Face hub: whether it can be reached is known within seconds, before its client's half minute of retries."""

from __future__ import annotations

import importlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

WAIT = 4.0  # seconds


@contextmanager
def reached() -> Iterator[str]:
    """While open, a hub that cannot be reached counts as switched off: what is cached is used, and all else fails at once.

    Gives why it cannot be reached, "" if it can. The user's own switch (HF_HUB_OFFLINE) is left alone.
    """
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else _unreachable(constants.ENDPOINT)
    switches = [constants, *_datasets_config()] if why else []
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield why
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _datasets_config() -> list[Any]:
    """The switch that `datasets` keeps for itself, where it is installed."""
    try:
        return [importlib.import_module("datasets.config")]
    except ImportError:
        return []


def _unreachable(endpoint: str) -> str:
    """Why nobody answers at this address, or at the proxy on the way to it; "" if somebody does."""
    url = urlsplit(endpoint)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = through.hostname or "", through.port or 80
    said = [f"no answer within {WAIT:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=WAIT).close()
            said[0] = ""
        except OSError as e:
            said[0] = str(e.strerror or e)

    looking = threading.Thread(target=connect, daemon=True)  # a name that is looked up in vain can take longer than any timeout
    looking.start()
    looking.join(WAIT)
    return f"{host} cannot be reached: {said[0]}" if said[0] else ""
