"""vidsieve serve: vLLM's OpenAI server with videos pruned."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import shlex
import sys
from typing import Annotated

import typer

from vidsieve.cli.shared import out, parse_retentions
from vidsieve.errors import PluginError, PolicyError

SERVER = "vllm.entrypoints.openai.api_server"


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a LLaVA-OneVision, Qwen2.5-VL or Qwen3-VL; 'testbed'.")
    ],
    method: Annotated[
        str | None, typer.Option(help="A method that acts before the LLM.", show_default="nothing is pruned")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Folder of a trained policy, for cacovid and score.", show_default=False)
    ] = None,
    retention: Annotated[
        str, typer.Option(help="Fraction of video tokens kept, or a count such as 512t; requests may ask another.")
    ] = "0.25",
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    dry: Annotated[bool, typer.Option("--print", help="Print vLLM's command, start nothing.")] = False,
) -> None:
    """Serve a model by vLLM, videos pruned before the LLM reads them; all further options are vLLM's own.

    vidsieve serve Qwen/Qwen2.5-VL-7B-Instruct --method score --policy runs/score/policy --retention 0.25 --port 8000
    """
    command = server_command(model, method, policy, retention, seed, context.args)
    if dry:
        out.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
        return
    if importlib.util.find_spec("vllm") is None:
        raise PluginError("vLLM is not installed here: pip install 'vidsieve[vllm]'")
    out.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
    sys.stdout.flush()
    os.execv(command[0], command)


def server_command(
    model: str, method: str | None, policy: str | None, retention: str, seed: int, extra: list[str]
) -> list[str]:
    """Return vLLM's command line: its own server, the plug-in's settings in ``--hf-overrides``.

    Raises
    ------
    RetentionError, UnknownNameError, StageError, NeedError, BudgetError, PolicyError
        If the method cannot run before the LLM as vLLM needs it.
    """
    command = [sys.executable, "-m", SERVER, "--model", _folder(model), "--trust-request-mm-kwargs"]
    if method is None:
        if policy is not None:
            raise PolicyError(f"--policy {policy} needs --method, cacovid or score")
        return [*command, *extra]
    from types import SimpleNamespace

    from vidsieve.serving.vllm_shared import settings_of
    from vidsieve.types import Tokens

    (kept,) = parse_retentions(retention)[:1]
    settings = {"method": method, "retention": f"{kept.count}t" if isinstance(kept, Tokens) else kept, "seed": seed}
    if policy is None and model == "testbed" and method in ("cacovid", "score"):
        policy = "testbed"
    if policy is not None:
        settings["policy"] = policy
    settings_of(SimpleNamespace(vidsieve=settings))  # what is wrong is told before a model is loaded
    return [*command, "--hf-overrides", json_module.dumps({"vidsieve": settings}), *extra]


def _folder(model: str) -> str:
    if model != "testbed":
        return model
    from vidsieve.testbed.model import shipped_model

    return str(shipped_model("model"))
