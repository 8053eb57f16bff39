"""Commands about the testbed: build its models, measure the world itself, run the ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vidsieve import registry
from vidsieve.cli import options, output, shared
from vidsieve.cli.progress import Bar
from vidsieve.errors import UnknownNameError
from vidsieve.io.files import writing
from vidsieve.loading import load_model
from vidsieve.retention import parse_retentions
from vidsieve.testbed.world import world_of

TALKER = Path(__file__).with_name("talker")
"""The testbed's model, trained further to count and to say what is not there."""
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run, which the same command resumes.", show_default=False)
]


def build(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and the finished models go.")],
    model: Annotated[
        str, typer.Option(help="'shallow', 'deep' (from the shallow one), 'second' (another deep one), or 'all'.")
    ] = "all",
    seed: Annotated[int, typer.Option(help="Seed of scenes and weights.")] = 11,
    scenes: Annotated[int, typer.Option(help="Training scenes of the language model.", min=1)] = 4000,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of each stage, to see that it runs; no usable model.")
    ] = False,
    threads: options.Threads = 0,
    json: options.Json = None,
) -> None:
    """Train the testbed's models by the committed recipe; goes on where it was stopped."""
    if model not in (names := ("all", "shallow", "deep", "second")):
        raise UnknownNameError("model", model, names)
    output.check_output(json)
    output.check_output(folder / model / model / "config.json")
    shared.set_threads(threads)
    from workbench.testbed.build import build_testbed

    shared.quiet()
    record = build_testbed(
        folder, model, seed=seed, scenes=scenes, quick=quick, log=lambda line: output.out.print(line, highlight=False)
    )
    output.write_json(json, record)


def talker(
    folder: Annotated[Path, typer.Argument(help="Where checkpoints and the finished model go.")],
    seed: Annotated[int, typer.Option(help="Seed of scenes and order.")] = 21,
    scenes: Annotated[int, typer.Option(help="Training scenes.", min=1)] = 2500,
    threads: options.Threads = 0,
    json: options.Json = None,
) -> None:
    """Teach the shipped model to count and to say what is not there, for `python -m workbench open`."""
    output.check_output(json)
    output.check_output(folder / "model" / "config.json")
    shared.set_threads(threads)
    from workbench.testbed.talking import build_talker

    shared.quiet()
    record = build_talker(folder, seed=seed, scenes=scenes, log=lambda line: output.out.print(line, highlight=False))
    output.out.print(f"model in {folder / 'model'}, {record['minutes']:.0f} minutes")
    output.write_json(json, record)


def separation(
    retention: Annotated[str, typer.Option(help="Retention ratios, comma-separated.")] = "0.25,0.1,0.05,0.025",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 9001,
    questions: Annotated[int, typer.Option(help="Questions.", min=2)] = 2400,
    world: Annotated[str, typer.Option(help="dense, dense-b, sparse or sparse-b.")] = "dense",
    model: Annotated[str, typer.Option(help="Folder of a testbed model, or 'testbed'.")] = "testbed",
    attention: Annotated[
        bool, typer.Option("--attention", help="Also the attention of the last prompt token, in every layer (slow).")
    ] = False,
    folder: Out = None,
    threads: options.Threads = 0,
    json: options.Json = None,
) -> None:
    """Measure the world before any policy: oracles that know the scene against heuristics without training."""
    ratios = parse_retentions(retention)
    output.check_output(json)
    world_of(world)
    shared.set_threads(threads)
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.tasks.testbed import ScenesTask
    from workbench.testbed.study import separation_conditions, targets

    shared.quiet()
    network, processor = load_model(model)
    adapter = adapter_for(network)
    task = ScenesTask(adapter, processor, world, seed, questions, model)
    conditions = separation_conditions(adapter, processor, ratios, world=world, seed=seed, attention=attention)
    result = shared.run_task(task, conditions, "scenes", folder=folder).to_json()
    for line in targets(result):
        output.out.print(line, highlight=False)
    output.write_json(json, result | {"targets": targets(result)})


def surrogate(
    folder: Annotated[Path, typer.Argument(help="Folder of the run.")],
    variant: Annotated[str, typer.Option(help="ours, paper or official.")] = "ours",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of `vidsieve train cacovid`.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.", min=1)] = 200,
    model: Annotated[str, typer.Option(help="One of the testbed's models.")] = "testbed",
    threads: options.Threads = 0,
    json: options.Json = None,
) -> None:
    """Search settings of CaCoVID without the LLM: a coin that knows what a question needs answers. No result."""
    output.check_output(json)
    shared.set_threads(threads)
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.cli.train import parsed
    from vidsieve.training.settings import CaCoVIDConfig
    from workbench.testbed.surrogate import search

    settings = parsed(CaCoVIDConfig, set_ or [])
    shared.quiet()
    network, processor = load_model(model)
    figures = search(
        adapter_for(network.requires_grad_(False)),
        processor,
        folder,
        settings,
        variant=variant,
        prompts=prompts,
        report=lambda line: output.out.print(line, highlight=False),
    )
    output.write_json(json, figures)


def open_ended(
    methods: Annotated[str, typer.Option(help="Names, name:variant, policy folders, or 'all'.")] = "all",
    retention: Annotated[str, typer.Option(help="Retention ratios, comma-separated.")] = "0.25,0.1",
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 9001,
    scenes: Annotated[int, typer.Option(help="Scenes, some 35 questions and a caption each.", min=2)] = 60,
    world: Annotated[
        str, typer.Option(help="dense or sparse; dense-b or sparse-b, on which nothing is trained.")
    ] = "dense",
    model: Annotated[str, typer.Option(help="'talker', or the folder of one built anew.")] = "talker",
    earliest: options.Earliest = False,
    folder: Out = None,
    share: options.Share = None,
    threads: options.Threads = 0,
    report: options.Report = None,
    json: options.Json = None,
) -> None:
    """Beyond multiple choice, on the testbed: captions, counting, order, what is not there, a second turn."""
    ratios = parse_retentions(retention)
    output.check_output(json)
    output.check_output(report, output.PAGE)
    world_of(world)
    shard = options.parse_share(share, folder is not None)
    shared.set_threads(threads)
    from vidsieve.adapters.pruning import adapter_for
    from vidsieve.evaluation.conditions import check_prefill, conditions_of, named_methods
    from vidsieve.testbed.world import FRAMES
    from workbench.testbed.open_ended import OpenTask

    names = options.words(methods)
    for name in names:
        registry.check_known(name)
    if "all" not in names and "random" not in names:
        names = ["random", *names]
    shared.quiet()
    chosen = named_methods(names, "testbed:shallow", earliest=earliest, prefill=True)  # the talker's words are its
    check_prefill(chosen)
    network, processor = load_model(str(TALKER) if model == "talker" else model)
    task = OpenTask(adapter_for(network.float()), processor, world, seed, scenes, model)
    conditions = conditions_of(chosen, ratios, [FRAMES])
    shared.run_task(task, conditions, "scenes", folder=folder, share=shard, report=report, lead=model, json=json)


def ablate(
    folder: Annotated[Path, typer.Argument(help="Where runs go; the same folder goes on where it was stopped.")],
    tables: Annotated[str, typer.Option(help="Names of tables, comma-separated.", show_default="all")] = "",
    seeds: Annotated[int, typer.Option(help="Training seeds, at most.", min=1)] = 3,
    questions: Annotated[int, typer.Option(help="Questions each policy is measured on.", min=24)] = 480,
    processes: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 2,
    second: Annotated[
        Path | None,
        typer.Option(help="Folder of a second answerer, of `build --model second`.", show_default=False),
    ] = None,
    json: options.Json = None,
    write: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the tables here.", show_default=False)
    ] = None,
) -> None:
    """Train and measure every condition of the ablation tables (hours for all of them), and print the tables."""
    output.check_output(json)
    output.check_output(write)
    from vidsieve.evaluation import experiment
    from workbench.testbed.ablating import AblationTask, chosen_tables

    chosen = chosen_tables(options.words(tables))
    task = AblationTask(chosen, seeds, questions, folder, processes, second=second)
    with shared.stoppable(folder), Bar("trainings", len(task.units())) as advance:
        table = experiment.run(task, [], command=output.command_line(), progress=advance)
    if table is None:
        raise RuntimeError("a run of one process has a table")
    text = "\n\n".join(one.to_markdown() for one in [table, *table.more])
    output.out.print(text, markup=False, highlight=False)
    if write is not None:
        with writing(write) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    output.write_json(json, table.to_json())
