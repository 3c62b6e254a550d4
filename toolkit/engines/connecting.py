"""Find out which kind of server runs at an address, and return it as an engine (``connect``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from toolkit.engines.base import Engine, EngineError
from toolkit.engines.client import KEY, Client
from toolkit.engines.inprocess import InProcessVLLM
from toolkit.engines.llama import LlamaServer
from toolkit.engines.loop import OWN_LOOP
from toolkit.engines.ollama import OllamaServer
from toolkit.engines.server import Server
from toolkit.engines.sglang import SGLangServer
from toolkit.engines.vllm import VLLMServer
from toolkit.engines.wire import Wire
from toolkit.lm import LM

WIRES: dict[str, Callable[[str], Wire]] = {
    "llama": lambda model: LlamaServer(),
    "ollama": OllamaServer,
    "sglang": lambda model: SGLangServer(),
    "vllm": lambda model: VLLMServer(),
}
"""Kind of server (also the prefix of an address) -> function that returns its ``Wire``, given a model's name (used for Ollama only)."""


def connect(
    address: str,
    base: LM | None = None,
    *,
    tolerance: float | None = None,
    adapters: Path = Path("runs/adapters"),
    parallel: int | None = None,
) -> Engine:
    """Return the engine at an address: a server, vLLM in this process, or the toolkit's own loop.

    Args:
        address: ``"ours"`` for the toolkit's own loop, ``"vllm"`` for vLLM in this process, else the URL of a server, such as
            ``http://localhost:8000``. The server is queried for its kind, unless a prefix gives it: ``vllm+http://localhost:8000`` (also
            ``llama+``, ``sglang+`` and ``ollama+``). For Ollama, the path of the URL is the name of the model:
            ``http://localhost:11434/my-model``.
        base: Base model of the conditions from which responses will be sampled; see ``Server.base``. Needed for ``"vllm"``.
        tolerance: Largest allowed mean absolute difference between the log-probabilities of the server and of the condition's model, in
            nats per token. ``None`` means the default of the kind of server.
        adapters: Directory in which LoRA adapters are saved for the server to load.
        parallel: Largest number of requests that wait for a reply at the same time. Never more than ``Wire.parallel`` of the kind of
            server, which is also the default, and never more than the slots that the server reports (llama-server).

    Raises:
        EngineError: the address has none of these forms, nothing replies there, the kind of server is unknown, or ``"vllm"`` has no
            ``base``.
    """
    if address == "ours":
        return OWN_LOOP
    if address == "vllm":
        if base is None:
            raise EngineError("--engine vllm needs the base model: connect('vllm', base).")
        return InProcessVLLM(base, 0.05 if tolerance is None else tolerance, adapters)
    prefix, plus, rest = address.partition("+")
    kind, url = (prefix, rest) if plus and "://" in rest else (None, address)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port that is no number
        valid = False
    if not valid or (kind is not None and kind not in WIRES):
        raise EngineError(
            f"--engine {address}: expected ours, vllm, or the address of a server, such as http://localhost:8000 or "
            f"vllm+http://localhost:8000 (kinds: {', '.join(WIRES)})."
        )
    client = Client(url.rstrip("/").removesuffix("/v1"), os.environ.get(KEY) or None)
    root = Client(urlunsplit((parts.scheme, parts.netloc, "", "", "")), client.key)
    kind = kind or _kind(client, root)
    if kind == "ollama":
        client = root  # the path is the name of the model
    if kind == "ollama" and not parts.path.strip("/"):
        raise EngineError(f"--engine {address}: name Ollama's model in the address, such as {address.rstrip('/')}/my-model.")
    wire = WIRES[kind](parts.path.strip("/"))
    client = replace(client, parallel=min(parallel or wire.parallel, wire.parallel))
    return Server(wire, client, base, tolerance, adapters)


def _kind(client: Client, root: Client) -> str:
    """Return the kind of the server at an address: a key of ``WIRES``.

    Each kind is recognised by its reply at one URL path. llama-server is tried before Ollama, because it also replies at some of Ollama's
    paths.

    Args:
        client: Connection to the address as it was given.
        root: Connection to the address without its path. (For Ollama, the path is the name of the model.)

    Raises:
        EngineError: the server is of no known kind.
    """
    props = client.find("/props")
    if isinstance(props, dict) and "default_generation_settings" in props:
        return "llama"
    info = client.find("/get_model_info")
    if isinstance(info, dict) and "model_path" in info:
        return "sglang"
    models = client.find("/v1/models")
    if isinstance(models, dict) and any(m.get("owned_by") == "vllm" for m in models.get("data") or []):
        return "vllm"
    tags = root.find("/api/tags")
    if isinstance(tags, dict) and "models" in tags:
        return "ollama"
    raise EngineError(
        f"The server at {client.url} is none that is known (/props, /get_model_info, /v1/models and /api/tags were asked). Name its kind: "
        f"KIND+{client.url} with KIND one of {', '.join(WIRES)}."
    )
