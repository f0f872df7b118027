"""Engines of `--endpoint`: the key from the environment, and options that mean nothing for a server."""

import os
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING

from lvctx.config import refuse_options
from lvctx.errors import UsageError
from lvctx.inference.endpoint_config import UNUSED_OPTIONS, VideoEndpointConfig

if TYPE_CHECKING:
    from lvctx.inference.endpoint_engine import EndpointEngine

KEY_VARIABLES = ("LVCTX_API_KEY", "OPENAI_API_KEY")
"""Where a server's key is read from, the first that is set."""


def open_endpoint(config: VideoEndpointConfig, model: str, *, jobs: int = 1) -> "EndpointEngine":
    """The engine of a model on a server, with the key of the environment; makes no request.

    Raises MissingError without the openai package, UsageError for a key that is none.
    """
    from lvctx.inference.chat_client import ChatClient
    from lvctx.inference.endpoint_engine import EndpointEngine

    keys = ((name, os.environ.get(name, "").strip()) for name in KEY_VARIABLES)
    name, key = next((pair for pair in keys if pair[1]), ("", ""))
    if not (key.isascii() and (key.isprintable() or not key)):
        raise UsageError(f"{name} is not a key: it has characters that a header may not have")
    return EndpointEngine(ChatClient(config, model, api_key=key or None), config, jobs=jobs)


def refuse_unused_options(
    given: Collection[str], server: VideoEndpointConfig, *local: type, more: Collection[str] = ()
) -> None:
    """Raise UsageError for options that the user gave and that mean nothing with --endpoint.

    Those of the `local` configurations and `more` decide how a model runs in this process; others are of images that
    are not sent.
    """
    names = [field.name for config_class in local for field in fields(config_class)]
    names += [*more, "use_generation_config"]
    refuse_options(given, names, there="with --endpoint", fix=": the server decides how the model runs")
    refuse_options(given, UNUSED_OPTIONS.get(server.send, ()), there=f"with --send {server.send}")
