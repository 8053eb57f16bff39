"""vidsieve ui: a page to try methods on a video."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vidsieve.cli.options import MODEL, Device, Dtype, MaxPixels, Threads, words
from vidsieve.cli.output import note, out
from vidsieve.cli.shared import load_model, quiet, set_threads
from vidsieve.errors import OutputError, PluginError
from vidsieve.io.limits import Limits
from vidsieve.registry import check_known


def ui(
    model: Annotated[str, typer.Option(help=MODEL)] = "testbed",
    methods: Annotated[
        str, typer.Option(help="Methods and policies to choose from, comma-separated; 'full' is always among them.")
    ] = "",
    frames: Annotated[int, typer.Option(help="Frames taken evenly from a video.", min=1)] = 16,
    device: Device = "auto",
    dtype: Dtype = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=0, max=65535)] = 7860,
    max_pixels: MaxPixels = Limits.pixels,
    threads: Threads = 0,
) -> None:
    """Serve a page: choose a video, ask, move the retention; see answer, kept tokens and times."""
    if importlib.util.find_spec("gradio") is None:
        raise PluginError("gradio is not installed: pip install 'vidsieve[ui]'")
    for name in words(methods):
        check_known(name)
    _check_address(host, port)
    set_threads(threads)
    quiet()
    from starlette.middleware import Middleware

    from vidsieve.evaluation.conditions import named_methods
    from vidsieve.loading import is_testbed, shipped_policies
    from vidsieve.serving.page import WAITING, Desk, build
    from vidsieve.serving.visitors import Visitors

    trained = [name for name in ("cacovid", "sieve", "score") if is_testbed(model) and name in shipped_policies(model)]
    names = words(methods) or ([*trained, "divprune", "uniform"] if trained else ["divprune"])
    chosen = named_methods(names, model)
    desk = Desk(*load_model(model, dtype=dtype, device=device), {**chosen, "full": None}, frames=frames)
    if host not in ("127.0.0.1", "localhost", "::1"):
        note(f"everyone who reaches {host}:{port} can use this page and upload videos")
    out.print(f"http://{host}:{port}", highlight=False)
    with suppress(OSError, AttributeError):  # glibc's M_ARENA_MAX: what one thread frees, another can use
        ctypes.CDLL(None).mallopt(-8, 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that uploads are deleted
    with tempfile.TemporaryDirectory(prefix="vidsieve-ui-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_RUN_HISTORY": "False"}
        visitors = Visitors(Path(folder), _hosts(host), desk.forget)
        app = {"middleware": [Middleware(visitors.around)]}
        build(desk, model).queue(max_size=WAITING).launch(
            server_name=host, server_port=port, share=False, quiet=True, show_error=True, app_kwargs=app, ssr_mode=False
        )


def _hosts(host: str) -> set[str]:
    """Return the names by which a server that listens on an address may be asked."""
    names = {host.lower(), "localhost", "127.0.0.1", "::1"}
    return names | {"*", socket.gethostname().lower(), socket.getfqdn().lower()} if host in ("0.0.0.0", "::") else names


def _check_address(host: str, port: int) -> None:
    """Raise OutputError if nobody can listen on an address, before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OutputError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or a --host of this machine"
        ) from None
