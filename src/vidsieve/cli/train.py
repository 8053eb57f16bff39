"""vidsieve train: a command for each trainer, with options made from their settings."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape
from typer.models import OptionInfo

from vidsieve.cli.options import MODEL, Device, Json, MaxPixels, MaxRow, Report, Threads, named_model, words
from vidsieve.cli.output import PAGE, check_free, check_output, err, out, table, write_json, write_report
from vidsieve.cli.progress import Progress
from vidsieve.cli.shared import load_model, quiet, set_threads
from vidsieve.errors import TrainingError
from vidsieve.io.files import METRICS
from vidsieve.io.limits import Limits
from vidsieve.training.settings import CONFIGS, SETTINGS, TrainConfig, unknown_setting

app = typer.Typer(no_args_is_help=True, help="Train a policy for a frozen model.")

Out = Annotated[Path, typer.Argument(help="Folder of the run: metrics, checkpoint, policy.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting (docs/training.md lists them); may be repeated."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="config.json of a trained policy: train with its settings.", show_default=False),
]
Model = Annotated[str | None, typer.Option(help=MODEL, show_default="testbed without --data")]
Data = Annotated[
    Path | None,
    typer.Option(help="File of questions, captions or both (see `vidsieve data check`).", show_default="the testbed"),
]
EvalData = Annotated[
    Path | None,
    typer.Option(help="As --data, other videos: the policy is evaluated on them.", show_default=False),
]
VideoRoot = Annotated[
    Path | None,
    typer.Option(help="Folder that paths in --data and --eval-data start from.", show_default="that of each file"),
]
Pseudo = Annotated[
    Path | None,
    typer.Option(help="File of `vidsieve data pseudo` for the first pseudo_steps.", show_default="the testbed's"),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of encoded videos of --data, for later passes and runs.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")]
Force = Annotated[bool, typer.Option("--force", help="With --resume: continue although settings or threads changed.")]
LogTo = Annotated[str, typer.Option(help="Also log to tensorboard, wandb, or both (a,b).", show_default=False)]
DryRun = Annotated[
    str,
    typer.Option(
        metavar="GPU",
        help="Train nothing; predict memory and hours on 'here' (this machine) or a GPU of `vidsieve plan`.",
        show_default=False,
    ),
]


PANELS = {
    "Data": "model device data eval_data video_root pseudo cache frames hold_out world max_row max_pixels",
    "Run": "variant config_ set_ resume force dry_run threads max_minutes precision",
    "Output": "log_to json report log_every save_every eval_every",
}
"""Panels of the help, with their options; all others are in `SETTINGS_PANEL`."""
SETTINGS_PANEL = "Settings of the method"


def panelled(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a command's parameter, an option in its panel of the help."""
    *_, option = get_args(parameter.annotation)
    if not isinstance(option, OptionInfo):
        return parameter
    option = copy(option)
    found = (panel for panel, names in PANELS.items() if parameter.name in names.split())
    option.rich_help_panel = next(found, SETTINGS_PANEL)
    return parameter.replace(annotation=Annotated[get_args(parameter.annotation)[0], option])


def shown_default(method: str, item: Field[Any]) -> str:
    """Return a setting's default, with the variants that change it."""
    values = {v: changed.get(item.name, item.default) for (m, v), changed in sorted(SETTINGS.items()) if m == method}
    if len(set(values.values())) == 1:
        return str(next(iter(values.values())))
    return ", ".join(f"{variant}: {value}" for variant, value in values.items())


def parsed(config: type[TrainConfig], assignments: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a list of ``name=value``.

    Raises
    ------
    UnknownNameError, TrainingError
        If there is no such setting, or its value has another type.
    """
    import msgspec

    defaults = {item.name: item.default for item in fields(config)}
    settings: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name in settings:
            raise TrainingError(f"--set takes NAME=VALUE, each name once; got {text!r}")
        if name not in defaults:
            raise unknown_setting(config, name)
        kind = type(defaults[name])
        try:
            settings[name] = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError:
            raise TrainingError(f"--set {name} takes a value of type {kind.__name__}, got {value!r}") from None
    return settings


def saved_settings(path: Path, method: str, variant: str) -> dict[str, Any]:
    """Return the settings in the `config.json` of a policy that are not the variant's defaults.

    Raises
    ------
    PolicyError, PolicyMismatchError
        If it is not the configuration of a policy.
    TrainingError
        If that is of another method or variant, or has no settings.
    """
    from vidsieve.errors import PolicyError
    from vidsieve.io.bounded import read_bytes
    from vidsieve.policies import PolicyConfig

    saved = PolicyConfig.from_json(read_bytes(path, PolicyError), path)
    if (saved.type, saved.variant) != (method, variant):
        raise TrainingError(
            f"{path} has settings of {saved.type}, variant {saved.variant}, and not of {method}, variant {variant}: "
            f"use `vidsieve train {saved.type} … --variant {saved.variant}`, or leave --config out"
        )
    if not isinstance(saved.training.get("settings"), dict):
        raise TrainingError(f"{path} has no record of a training")
    own = {item.name: item.default for item in fields(CONFIGS[method])}
    defaults, settings = own | SETTINGS.get((method, variant), {}), own | saved.training["settings"]
    return {name: value for name, value in settings.items() if value != defaults.get(name)}


def refuse_sharding() -> None:
    """Raise TrainingError if accelerate's configuration asks for FSDP or DeepSpeed, which would be ignored."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise TrainingError(
                f"accelerate's configuration asks for {name}, which `vidsieve train` does not do: launch it with "
                "torchrun, or shard the model in a script of your own (docs/training.md says how)"
            )


def predicted(method: str, model: str, settings: dict[str, Any], variant: str, gpu: str) -> dict[str, Any]:
    """Print and return what a training would take."""
    import torch

    from vidsieve.serving.dry_run import dry_run
    from vidsieve.serving.plan import Gpu, read_gpu

    half = settings.get("precision") == "bf16"
    card = Gpu.here(torch.bfloat16 if half else torch.float32) if gpu == "here" else read_gpu(gpu)
    found = dry_run(method, model, settings, card, variant=variant)
    units = {"bytes": ("GB", 1e9), "s": ("s", 1.0)}
    lines = []
    for name, value in found.items():
        part, _, last = name.rpartition("_")
        unit, one = units.get(last, ("", 1.0))
        if name.endswith("_per_s"):
            part, unit = f"{name.removesuffix('_per_s')} per second", ""
        elif unit:
            whole = "memory" if last == "bytes" else "time of a prompt"
            part = whole if part in ("memory", "prompt") else f"{whole}: {part}"
        if isinstance(value, (int, float)):
            shown = f"{value:,}" if isinstance(value, int) and one == 1 else f"{value / one:.3g}"
            lines.append(((part if last in units else name).replace("_", " "), f"{shown} {unit}".strip()))
    out.print(table(f"{escape(model)} on {escape(card.name)}", ("", "predicted"), lines, right=[1]))
    out.print("\n".join(f"- {line}" for line in found["assumptions"]), soft_wrap=True, markup=False)
    return found


def add_command(method: str, config: type[TrainConfig], about: str) -> None:
    """Add the command that trains a method, with an option for every setting that has one."""
    options = [item for item in fields(config) if item.metadata["option"] and item.name not in config.fixed]

    def train(
        folder: Out,
        model: Model = None,
        data: Data = None,
        eval_data: EvalData = None,
        video_root: VideoRoot = None,
        pseudo: Pseudo = None,
        cache: Cache = None,
        max_row: MaxRow = Limits.row,
        variant: str = "ours",
        config_: Config = None,
        set_: Set = None,
        resume: Resume = False,
        force: Force = False,
        log_to: LogTo = "",
        device: Device = "auto",
        dry_run: DryRun = "",
        max_pixels: MaxPixels = Limits.pixels,
        threads: Threads = 0,
        json: Json = None,
        report: Report = None,
        **given: Any,
    ) -> None:
        import torch

        from vidsieve.report.sections import training_sections
        from vidsieve.training.data.encodings import MANIFEST
        from vidsieve.training.processes import is_main
        from vidsieve.training.recipes import check_trackers, train_policy
        from vidsieve.training.sources import Files
        from vidsieve.training.trainer import Events

        name = named_model(model or (None if data or pseudo else "testbed"))
        settings = {name: value for name, value in given.items() if value is not None}
        extra = parsed(config, set_ or [])
        if force and not resume:
            raise TrainingError("--force is for runs that are continued: give --resume too, or leave --force out")
        if settings.keys() & extra.keys():
            raise TrainingError(f"{min(settings.keys() & extra.keys())} is given as an option and by --set")
        settings |= extra
        if config_ is not None:
            settings = saved_settings(config_, method, variant) | settings
        if dry_run:
            check_output(json)
            set_threads(threads)
            quiet()
            write_json(json, predicted(method, name, settings, variant, dry_run))
            return
        refuse_sharding()
        if not is_main():  # only the main process of several prints
            out.quiet = err.quiet = True
        check_output(json)
        check_output(report, PAGE)
        check_output(folder / "policy" / "config.json")
        if cache is not None:
            check_output(cache / MANIFEST)
        check_trackers(words(log_to))
        if is_main():
            check_free(folder / METRICS)
        set_threads(threads)
        quiet()
        dtype = torch.bfloat16 if settings.get("precision") == "bf16" else None
        network, processor = load_model(name, dtype=dtype, device=device)
        try:
            with Progress(out, float(settings.get("max_minutes", 0.0))) as progress:
                record = train_policy(
                    method,
                    network,
                    processor,
                    folder,
                    settings,
                    variant=variant,
                    model_name=name,
                    files=Files(data, eval_data, pseudo, cache, video_root),
                    resume=resume,
                    force=force,
                    log_to=words(log_to),
                    events=Events(
                        announce=lambda text: out.print(text, highlight=False, soft_wrap=True),
                        tick=progress.tick,
                        report=progress.report,
                        warn=lambda text: err.print(
                            f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False
                        ),
                    ),
                )
        except KeyboardInterrupt as stop:
            err.print(str(stop) or "interrupted", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from None
        done, asked = record["steps"], record["settings"]["steps"]
        steps = f"{done} step{'s' * (done != 1)}" if done == asked else f"{done} of {asked} steps"
        out.print(f"policy in {folder / 'policy'}: {steps} in {record['minutes']:.1f} minutes")
        if record["best"]:
            best = record["best"]
            out.print(f"best in {folder / 'best'}: step {best['step']}, {best['metric']} {best['value']:.4f}")
        if is_main():
            metrics = folder / "metrics.jsonl"
            write_report(report, f"Training {method}", lambda: training_sections(metrics), f"Run: {folder}")
            write_json(json, record)

    keyword = inspect.Parameter.KEYWORD_ONLY
    unused = {"given"} | ({"pseudo"} if "pseudo_steps" not in {item.name for item in options} else set())
    parameters = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.name not in unused]
    variants = ", ".join(variant for name, variant in SETTINGS if name == method)
    spoken = Annotated[str, typer.Option(help=f"Defaults to start from: {variants}.")]
    parameters = [p.replace(annotation=spoken) if p.name == "variant" else p for p in parameters]
    for item in options:
        shown = {"help": item.metadata["help"], "show_default": shown_default(method, item)}
        annotation: Any = Annotated[type(item.default) | None, typer.Option(**shown)]
        parameters.append(inspect.Parameter(item.name, keyword, default=None, annotation=annotation))
    parameters = [panelled(p) for p in parameters]
    train.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in parameters])  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(method, help=about)(train)


add_command("cacovid", CONFIGS["cacovid"], "Train CaCoVID: question-aware scores, rewarded by right answers.")
add_command(
    "sieve",
    CONFIGS["sieve"],
    "Train sieve: any budget, with or without the question, from captions; no answers needed.",
)
add_command("score", CONFIGS["score"], "Train SCORE: question-free keep probabilities, rewarded by captions.")
add_command(
    "visionselector",
    CONFIGS["visionselector"],
    "Train VisionSelector: question-free scores, through a differentiable top-k instead of rewards.",
)
