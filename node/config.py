"""What a person can set on a node: one frozen value, checked when it is made."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import get_args

from covey.partition.choose import Prefer

from .engine.tensors import Quantization
from .engines import ENGINE_CHOICES, QUANTIZATIONS, EngineChoice, check_native_only
from .errors import ConfigError

PREFERENCES: tuple[Prefer, ...] = get_args(Prefer)

_SIZE = re.compile(r"\s*([0-9]{0,20}\.?[0-9]{1,20})\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "4G", "512MiB" or "1000000"; units are powers of 1024.

    Raises:
        ConfigError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"memory: {text!r} is not a size; write it like 512M or 4G")
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Settings of one node. `home` holds its state: identity, swarm, store, api.json."""

    home: Path
    name: str
    models: tuple[str, ...] = ()  # what this node can serve: paths or names, first is the default
    host: str = "0.0.0.0"  # noqa: S104  data plane; every link is authenticated before it answers
    port: int = 0  # 0: any free one
    api_host: str = "127.0.0.1"
    api_port: int = 0
    api_key: str | None = None
    max_blocks: int | None = None  # most blocks this node will hold; 0: head only
    memory_bytes: int | None = None  # most weights and KV cache; None: measured
    engine: EngineChoice = "auto"
    threads: int | None = None  # of the engine; None: `default_threads`
    quantize: Quantization | None = None  # what float matrices become; None: they stay
    speed: float = 1.0  # share of this machine's speed that the engine keeps to
    prefer: Prefer = "balanced"
    context_tokens: int = 2048  # longest session that plans and leases reckon with
    max_sessions: int = 8  # generations at once, as head
    mdns: bool = True
    relay: bool = True  # pass links on between members that cannot reach each other
    map_port: bool = True  # ask the router to forward the data plane's port
    grace_s: float = 10.0  # how long a stopping node lets its generations finish

    def __post_init__(self) -> None:
        _within("max_blocks", self.max_blocks, 0, 1024)
        _within("memory", self.memory_bytes, 0, 1 << 48)
        _within("port", self.port, 0, 65535)
        _within("api_port", self.api_port, 0, 65535)
        _within("threads", self.threads, 1, 256)
        _within("context", self.context_tokens, 16, 1 << 20)
        _within("max_sessions", self.max_sessions, 1, 1024)
        check_exposure(self.api_host, self.api_key)
        _within("grace", self.grace_s, 0, 3600)
        if self.engine not in ENGINE_CHOICES:
            raise ConfigError(f"engine: {self.engine!r} is none of {', '.join(ENGINE_CHOICES)}")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantize: {self.quantize!r} is none of {', '.join(QUANTIZATIONS)}")
        if not 0 < self.speed <= 1:
            raise ConfigError(f"speed: {self.speed} must be above 0 and at most 1")
        check_native_only(self.engine, self.quantize, self.speed)
        if self.prefer not in PREFERENCES:
            raise ConfigError(f"prefer: {self.prefer!r} is none of {', '.join(PREFERENCES)}")
        if not 1 <= len(self.name) <= 64 or not self.name.isprintable():
            raise ConfigError("name: must be 1 to 64 printable characters")


def is_loopback(host: str) -> bool:
    """Whether `host` is an address that only this machine reaches, or its usual name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(api_host: str, api_key: str | None) -> None:
    """Raise ConfigError if other machines could use the API without a key (D12)."""
    if api_key is not None and not api_key.strip():
        raise ConfigError("api_key: is empty; choose a long random one, or none at all")
    if api_key is None and not is_loopback(api_host):
        raise ConfigError(
            f"api_host: {api_host or 'any address'} is open to other machines: "
            "set an --api-key, or listen on 127.0.0.1"
        )


def _within(field: str, value: float | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{field}: {value} is outside {low} to {high}")
