"""vidsieve train: the two trainers; every setting of a trainer is an option here."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vidsieve.cli.progress import Progress
from vidsieve.cli.shared import (
    PAGE,
    Figures,
    Report,
    check_output,
    err,
    out,
    quiet,
    set_threads,
    words,
    write_json,
    write_report,
)
from vidsieve.errors import TrainingError
from vidsieve.training.settings import SETTINGS, CaCoVIDConfig, ScoreConfig

app = typer.Typer(no_args_is_help=True, help="Train a policy for a frozen model.")


def field_docs(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        if not dataclasses.is_dataclass(kind):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        for field, after in zip(body.body, body.body[1:], strict=False):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(str(getattr(after.value, "value", "")).split())
    return docs


def shown_default(config: type, field: dataclasses.Field[Any]) -> str:
    """Return a setting's default, with the values of the variants that change it."""
    method = "cacovid" if config is CaCoVIDConfig else "score"
    values = {
        variant: changed.get(field.name, field.default)
        for (name, variant), changed in sorted(SETTINGS.items())
        if name == method
    }
    if len(set(values.values())) == 1:
        return str(next(iter(values.values())))
    return ", ".join(f"{variant}: {value}" for variant, value in values.items())


def with_settings(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add every field of a training configuration to a command as an option, with its own text as help."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        docs = field_docs(config)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        extra = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    type(field.default) | None,
                    typer.Option(help=docs[field.name], show_default=shown_default(config, field)),
                ],
            )
            for field in dataclasses.fields(config)
        ]

        def run(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in dataclasses.fields(config)}
            command(**values, settings={name: value for name, value in given.items() if value is not None})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*keyword, *extra])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keyword, *extra]}
        return run

    return decorate


Out = Annotated[Path, typer.Argument(help="Folder of the run: metrics, checkpoint, policy.")]
Model = Annotated[str, typer.Option(help="Folder or hub id of the frozen model; 'testbed' for ours.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Videos with questions or captions: Video-R1-260k, LLaVA-Video-178K, Koala-36M, or JSON lines (see "
        "`vidsieve data check`); default: the testbed.",
        show_default=False,
    ),
]
VideoRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder that paths in --data and --eval-data start from; default: that of each file.", show_default=False
    ),
]
Pseudo = Annotated[
    Path | None,
    typer.Option(
        help="Pseudo-videos of `vidsieve data pseudo` for the first pseudo_steps; default: the testbed's.",
        show_default=False,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps the encoded videos of --data, so that later passes and runs neither decode nor encode "
        "them.",
        show_default=False,
    ),
]
EvalData = Annotated[
    Path | None,
    typer.Option(help="As --data, other videos: what the policy is evaluated on.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
Device = Annotated[str, typer.Option(help="Device of torch; 'auto': this process's GPU where there is one.")]
Force = Annotated[bool, typer.Option("--force", help="With --resume: go on although settings or threads changed.")]
LogTo = Annotated[
    str,
    typer.Option(help="Also log to 'tensorboard' or 'wandb', or both, separated by a comma.", show_default=False),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result here.", show_default=False)]
ThreadCount = Annotated[int, typer.Option("--threads", help="CPU threads; 0 = torch's default.", min=0)]
Variant = Annotated[
    str, typer.Option(help="'ours', 'paper', or (cacovid) 'official': which defaults the other settings start from.")
]


def warning(text: str) -> None:
    """Print an early warning."""
    err.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)


def refuse_sharding() -> None:
    """Refuse accelerate's FSDP or DeepSpeed, which would be asked for and not happen.

    Raises
    ------
    TrainingError
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise TrainingError(
                f"accelerate's configuration asks for {name}, which `vidsieve train` does not do: launch it with "
                "torchrun, or share the model out in a script of your own (docs/training.md says how)"
            )


def _run(
    method: str,
    settings: dict[str, Any] | None,
    folder: Path,
    threads: int,
    json: Path | None,
    model: str,
    log_to: str,
    cache: Path | None,
    device: str,
    page: Path | None,
    figures: Path | None,
    **options: Any,
) -> None:
    import torch

    from vidsieve.loading import load_model
    from vidsieve.report.sections import training_sections
    from vidsieve.training.data.encodings import MANIFEST
    from vidsieve.training.loggers import check_trackers
    from vidsieve.training.processes import is_main
    from vidsieve.training.recipes import train_policy

    settings = settings or {}
    refuse_sharding()
    if not is_main():  # what one process of several has to say is said by the main one
        out.quiet = err.quiet = True
    check_output(json)
    check_output(page, PAGE)
    check_output(folder / "policy" / "config.json")
    if cache is not None:
        check_output(cache / MANIFEST)
    check_trackers(words(log_to))
    set_threads(threads)
    quiet()
    network, processor = load_model(
        model, dtype=torch.bfloat16 if settings.get("precision") == "bf16" else None, device=device
    )
    try:
        with Progress(out, float(settings.get("max_minutes", 0.0))) as progress:
            record = train_policy(
                method,
                network,
                processor,
                folder,
                settings,
                model_name=model,
                log_to=words(log_to),
                report=progress.report,
                tick=progress.tick,
                warn=warning,
                cache=cache,
                announce=lambda text: out.print(text, highlight=False, soft_wrap=True),
                **options,
            )
    except KeyboardInterrupt as stop:
        err.print(str(stop) or "interrupted", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None
    out.print(f"policy in {folder / 'policy'}: {record['steps']} steps in {record['minutes']:.1f} minutes")
    if record["best"]:
        best = record["best"]
        out.print(f"best in {folder / 'best'}: step {best['step']}, {best['metric']} {best['value']:.4f}")
    if is_main():
        write_report(
            page, f"Training {method}", lambda: training_sections(folder / "metrics.jsonl"), str(folder), figures
        )
        write_json(json, record)


@app.command("cacovid")
@with_settings(CaCoVIDConfig)
def train_cacovid(
    folder: Out,
    model: Model = "testbed",
    data: Data = None,
    eval_data: EvalData = None,
    video_root: VideoRoot = None,
    cache: Cache = None,
    variant: Variant = "ours",
    resume: Resume = False,
    force: Force = False,
    log_to: LogTo = "",
    device: Device = "auto",
    threads: ThreadCount = 0,
    json: JsonFile = None,
    report: Report = None,
    figures: Figures = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train CaCoVID: question-aware scores by combinatorial policy optimisation on multiple choice."""
    _run(
        "cacovid",
        settings,
        folder,
        threads,
        json,
        model,
        log_to,
        cache,
        device,
        report,
        figures,
        data=data,
        eval_data=eval_data,
        root=video_root,
        variant=variant,
        resume=resume,
        force=force,
    )


@app.command("score")
@with_settings(ScoreConfig)
def train_score(
    folder: Out,
    model: Model = "testbed",
    data: Data = None,
    eval_data: EvalData = None,
    video_root: VideoRoot = None,
    pseudo: Pseudo = None,
    cache: Cache = None,
    variant: Variant = "ours",
    resume: Resume = False,
    force: Force = False,
    log_to: LogTo = "",
    device: Device = "auto",
    threads: ThreadCount = 0,
    json: JsonFile = None,
    report: Report = None,
    figures: Figures = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train SCORE: question-free keep probabilities by group rollouts on captions."""
    _run(
        "score",
        settings,
        folder,
        threads,
        json,
        model,
        log_to,
        cache,
        device,
        report,
        figures,
        data=data,
        eval_data=eval_data,
        root=video_root,
        pseudo=pseudo,
        variant=variant,
        resume=resume,
        force=force,
    )
