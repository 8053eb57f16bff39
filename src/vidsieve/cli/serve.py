"""vidsieve serve: vLLM's OpenAI server with pruned videos."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import shlex
import sys
from typing import Annotated

import typer

from vidsieve.cli.output import out
from vidsieve.errors import ModelError, PluginError, UnsupportedCallError
from vidsieve.io.hub import is_repository
from vidsieve.retention import budget_text, parse_budget

SERVER = "vllm.entrypoints.openai.api_server"


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL or Qwen3.5; 'testbed'.")
    ],
    method: Annotated[
        str | None,
        typer.Option(help="A method that acts before the LLM, or name:variant.", show_default="nothing is pruned"),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Folder of a trained policy, or OWNER/NAME on the hub.", show_default=False)
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            help="Fraction of video tokens kept, or a count such as 512t; requests may set another.",
            show_default="0.25",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="0")] = None,
    on_error: Annotated[
        str | None,
        typer.Option(
            help="If the method raises on a video: 'fail' returns an error, 'uniform' prunes uniformly instead.",
            show_default="fail",
        ),
    ] = None,
    dry: Annotated[bool, typer.Option("--print", help="Print vLLM's command without starting it.")] = False,
) -> None:
    """Serve a model with vLLM, with videos pruned before the LLM reads them; further options go to vLLM.

    vidsieve serve Qwen/Qwen2.5-VL-7B-Instruct --method score --policy runs/score/policy --retention 0.25 --port 8000
    """
    command = server_command(model, method, policy, retention, seed, on_error, context.args)
    if dry:
        out.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
        return
    if importlib.util.find_spec("vllm") is None:
        raise PluginError("vLLM is not installed: pip install 'vidsieve[vllm]'")
    out.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
    sys.stdout.flush()
    os.execv(command[0], command)


def server_command(
    model: str,
    method: str | None,
    policy: str | None,
    retention: str | None,
    seed: int | None,
    on_error: str | None,
    extra: list[str],
) -> list[str]:
    """Return vLLM's command line: its own server, with the plug-in's settings in ``--hf-overrides``.

    Raises
    ------
    RetentionError, UnknownNameError, StageError, NeedError, BudgetError, PolicyError
        If the method cannot run before the LLM as vLLM needs it.
    ModelError
        If the model is neither a folder with a model nor of the form of a hub id.
    UnsupportedCallError
        If further options contradict each other or the pruning.
    """
    method = None if method == "full" else method
    _check(extra, pruned=method is not None)
    command = [sys.executable, "-m", SERVER, "--model", _folder(model), "--trust-request-mm-kwargs"]
    if method is None:
        needy = {"--policy": policy, "--retention": retention, "--seed": seed, "--on-error": on_error}
        for name, value in needy.items():
            if value is not None:
                raise UnsupportedCallError(f"{name} {value} needs --method: without one nothing is pruned")
        return [*command, *extra]
    from types import SimpleNamespace

    from vidsieve.loading import is_testbed, policy_name, shipped_policies
    from vidsieve.serving.vllm.shared import settings_of

    kept, (method, _, variant) = parse_budget(retention or "0.25"), method.partition(":")
    settings: dict[str, object] = {"method": method}
    if variant:
        settings["variant"] = variant
    settings |= {"retention": kept if isinstance(kept, float) else budget_text(kept), "seed": seed or 0}
    if on_error is not None:
        settings["on_error"] = on_error
    name = policy_name(f"{method}:{variant}" if variant else method)
    if policy is None and is_testbed(model) and name in shipped_policies(model):
        policy = "testbed"
    if policy is not None:
        settings["policy"] = policy
    settings_of(SimpleNamespace(vidsieve=settings))  # raises before a model is loaded
    overrides, extra = _overrides(extra)
    return [*command, "--hf-overrides", json_module.dumps(overrides | {"vidsieve": settings}), *extra]


_FRAMES = {"--frames": '{"num_frames": N, "video_backend": "opencv"}', "--fps": '{"fps": N}'}
"""Options of other commands, and what says the same to vLLM, whose own sampling for Qwen ignores num_frames."""


def _check(extra: list[str], pruned: bool) -> None:
    """Raise UnsupportedCallError if an option of vLLM's bypasses ours."""
    for option in extra:
        name = option.partition("=")[0].replace("_", "-")
        if name == "--model":
            raise UnsupportedCallError("--model is the first argument here: vidsieve serve MODEL")
        if name == "--methods":
            raise UnsupportedCallError("--methods: a server has one method, give it as --method")
        if name in _FRAMES:
            raise UnsupportedCallError(
                f"{name}: vLLM reads the videos, give it --media-io-kwargs '{{\"video\": {_FRAMES[name]}}}'"
            )
        if pruned and name.startswith("--video-pruning-"):
            raise UnsupportedCallError(f"{name} is vLLM's own pruning: omit it or --method")
        if pruned and name.startswith("--hf-overrides."):
            raise UnsupportedCallError(
                f"{name} would undo the pruning: give one --hf-overrides with a JSON object, --method is added to it"
            )


def _overrides(extra: list[str]) -> tuple[dict[str, object], list[str]]:
    """Return the user's overrides of the configuration, and the options without them."""
    overrides: dict[str, object] = {}
    rest, options = [], iter(extra)
    for option in options:
        name, _, value = option.partition("=")
        if name.replace("_", "-") != "--hf-overrides":
            rest.append(option)
            continue
        text = value or next(options, "")
        try:
            content = json_module.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UnsupportedCallError(f"--hf-overrides must be a JSON object, got {text!r}")
        if "vidsieve" in content:
            raise UnsupportedCallError("--hf-overrides holds vidsieve: omit that key or --method")
        overrides |= content
    return overrides, rest


def _folder(model: str) -> str:
    """Return the model as vLLM is given it; refuse a folder without a model, and what is no model's name."""
    from vidsieve.loading import check_model, is_testbed, shipped_model

    if not (os.path.isdir(model) or is_repository(model) or "://" in model or is_testbed(model)):
        raise ModelError(f"no folder {model}: give a model's folder, a hub id as OWNER/NAME, or 'testbed'")
    if is_testbed(model):
        return str(shipped_model(model))
    if os.path.isdir(model):
        check_model(model)
    return model
