"""Where `serve` listens, who may ask, and how much one request may cost."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from distributed_rerank.errors import BadInput

TOKEN_VARIABLE = "DISTRIBUTED_RERANK_TOKEN"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Address, token and limits of the service."""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a token."""
    port: int = 8000
    """Port to listen on; 0 = any that is free."""
    token_file: Path | None = None
    """File with the token that clients send as `Authorization: Bearer TOKEN`. Default: $DISTRIBUTED_RERANK_TOKEN."""
    max_documents: int = 200
    """Most documents of one request."""
    max_body_mb: float = 20.0
    """Most megabytes of one request."""
    max_megapixels: float = 25.0
    """Most million pixels of an image that a client sends."""
    max_waiting: int = 64
    """Requests under way; further ones are told to come back (503)."""
    timeout_s: float = 30.0
    """Seconds until a request is given up."""
    metrics_port: int | None = None
    """Port for Prometheus of a Ray that is started here. Whoever reaches it reads the figures without a token."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise BadInput(f"port={self.port} is no port; give 0 to 65535")
        if self.metrics_port is not None and not 0 < self.metrics_port < 1 << 16:
            raise BadInput(f"metrics_port={self.metrics_port} is no port; give 1 to 65535")
        for name in ("max_documents", "max_waiting"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} lets no request through; give at least 1")
        for name in ("max_body_mb", "max_megapixels", "timeout_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise BadInput(f"{name}={getattr(self, name)} must be above 0 and below a million")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def token(self) -> str | None:
        """The token; None = everybody on this machine may ask.

        Raises BadInput for a file that cannot be read, a short token, and where an address that others reach has none.
        """
        source, found = f"${TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
        if self.token_file is not None:
            source = f"--token-file {self.token_file}"
            try:
                found = self.token_file.read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise BadInput(f"{source} cannot be read ({error}); give a file with one line of ASCII") from error
        if found is None:
            if not self.is_local:
                raise BadInput(f"--host {self.host} is reached by others; give --token-file, or set {source}")
            return None
        word = found.strip()
        if len(word) < _SHORTEST_TOKEN or not word.isascii() or not word.isprintable() or " " in word:
            raise BadInput(f"{source} is no token: it needs {_SHORTEST_TOKEN} ASCII letters or more, without spaces")
        return word
