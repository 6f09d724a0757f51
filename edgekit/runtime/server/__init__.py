"""The model over HTTP: Open Inference Protocol, OpenAI's API, pictures, health and metrics. No framework."""

from edgekit.runtime.server.access import Access, Tls, read_tokens
from edgekit.runtime.server.gate import Limits
from edgekit.runtime.server.serving import Options, Running, serve, serve_in_thread

__all__ = ["Access", "Limits", "Options", "Running", "Tls", "read_tokens", "serve", "serve_in_thread"]
