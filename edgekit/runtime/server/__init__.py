"""The model over HTTP: Open Inference Protocol, OpenAI's API, pictures, health and metrics. No framework."""

from edgekit.runtime.server.serving import Running, serve, serve_in_thread

__all__ = ["Running", "serve", "serve_in_thread"]
