"""Complete training runs: policy, prompts, trackers and trainer put together from a variant's settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_with
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.compressors.sieve import SievePolicy
from vidsieve.compressors.visionselector import VisionSelectorPolicy
from vidsieve.errors import TrainingError, UnknownNameError
from vidsieve.policies import Policy
from vidsieve.testbed.world import world_of
from vidsieve.training.cacovid import CaCoVIDTrainer
from vidsieve.training.data.skipped import Skipped
from vidsieve.training.processes import is_main, joined
from vidsieve.training.score import ScoreTrainer
from vidsieve.training.settings import (
    CaCoVIDConfig,
    ScoreConfig,
    SieveConfig,
    TrainConfig,
    VisionSelectorConfig,
    config_of,
)
from vidsieve.training.sieve import SieveTrainer
from vidsieve.training.sources import Files, held_out, source
from vidsieve.training.trainer import Events, Report
from vidsieve.training.visionselector import VisionSelectorTrainer

SKIPPED = "skipped.jsonl"
"""File in the folder of a run that lists the rows and videos that are not used."""
TRAINERS: dict[type[TrainConfig], Any] = {
    CaCoVIDConfig: CaCoVIDTrainer,
    ScoreConfig: ScoreTrainer,
    SieveConfig: SieveTrainer,
    VisionSelectorConfig: VisionSelectorTrainer,
}
WIDTH = 128
"""Width of the testbed's LLM, for which the default learning rates are chosen."""
TRACKERS = ("tensorboard", "wandb")
"""Each is an extra of the package, with the name of the module it needs."""


def train_policy(
    method: str,
    model: Any,
    processor: Any,
    folder: Path,
    settings: dict[str, Any],
    *,
    variant: str = "ours",
    model_name: str = "",
    files: Files | None = None,
    resume: bool = False,
    force: bool = False,
    log_to: Sequence[str] = (),
    events: Events | None = None,
) -> dict[str, Any]:
    """Train a policy for a frozen model and return its training record; the policy is in ``folder/policy``.

    Under torchrun the processes that it launched share the work.

    Parameters
    ----------
    method : {"cacovid", "score", "sieve", "visionselector"}
    settings : dict
        Fields of the trainer's configuration that differ from the variant's.
    model_name : str
        Name that a resumed run must have in common with the first.
    files : Files, optional
        Default: endless scenes of the testbed.
    resume, force : bool
        As `Trainer.fit` has them.
    log_to : sequence of {"tensorboard", "wandb"}
        Trackers that get the metrics of ``folder/metrics.jsonl`` too.

    Raises
    ------
    UnknownNameError, TrainingError, OutputError
    """
    check_trackers(log_to)
    config = config_of(method, variant, settings)
    folder, files, events = Path(folder), files or Files(), events or Events()
    if not isinstance(files, Files):
        raise TrainingError(f"files must be vidsieve.training.sources.Files(data=…), got {files!r}")
    if files.data is not None and "world" in settings:
        raise TrainingError(
            "world chooses the testbed's scenes, and the videos of --data are read: leave one of them out"
        )
    world_of(config.world)
    model.requires_grad_(False)
    adapter = adapter_with(model, processor)
    config = at_width(config, variant, settings, adapter.hidden_size, events.announce)
    if not resume and is_main() and not os.path.exists(folder / "metrics.jsonl"):
        (folder / SKIPPED).unlink(missing_ok=True)  # of a run that never began
    read = files.data is not None or files.eval_data is not None
    skipped = Skipped(folder / SKIPPED if read else None, lists=is_main())
    prompts = source(adapter, processor, config, files, skipped)
    for line in skipped.lines() + ([prompts.plan()] if files.cache is not None else []):
        events.announce(line)
    with (
        tracking(log_to, folder, asdict(config), events.report) as report,
        joined(model.device.type) as processes,
        prompts.samples() as samples,
    ):
        shared: dict[str, Any] = {
            "origin": {"variant": variant, "model": model_name} | prompts.origin,
            "held_out": held_out(prompts, adapter, processor, config),
            "processes": processes,
            "events": replace(events, report=report),
        }
        if isinstance(config, CaCoVIDConfig):
            shared["decode"] = partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
        policy = new_policy(adapter, config, variant, model_name).to(model.device)
        trainer = TRAINERS[type(config)](adapter, policy, config, samples, folder, **shared)
        record: dict[str, Any] = trainer.fit(resume, force).config.training
        skipped.count_others(processes.gather(skipped.later))
    broken = skipped.videos["broken"]
    if broken:
        events.announce(f"{broken} broken video{'s' * (broken > 1)} skipped: listed in {skipped.path}")
    return record if files.data is None else {**record, "skipped": skipped.as_dict()}


def at_width(
    config: CaCoVIDConfig | ScoreConfig,
    variant: str,
    given: dict[str, Any],
    width: int,
    announce: Callable[[str], None],
) -> CaCoVIDConfig | ScoreConfig:
    """Return a configuration whose learning rates, where they were not given, are those for an LLM of some width.

    They are divided by what it is wider than the testbed's: a step moves every weight by about the rate, whatever its
    gradient, and a score sums over the width.
    """
    left = set(config.rates) - given.keys() - config.idle(variant).keys()
    rates = {name: getattr(config, name) for name in sorted(left)}
    if width <= WIDTH or not rates:
        return config
    scaled = {name: rate * WIDTH / width for name, rate in rates.items()}
    for name, rate in scaled.items():
        announce(
            f"{name} is {rate:.2g}: the default, {rates[name]:g}, is for an LLM of width {WIDTH}; here it is {width}"
        )
    return replace(config, **scaled)


def new_policy(adapter: Adapter, config: TrainConfig, variant: str, model_name: str, blank: bool = False) -> Policy:
    """Return the policy of a configuration's method before training; `blank` as `new_cacovid` has it.

    Raises
    ------
    TrainingError
        If settings and model do not go together.
    """
    if config.objective in ("soft_topk", "straight_through") and adapter.deep_layers:
        raise TrainingError(
            f"objective {config.objective!r} weights what enters the LLM, and {adapter.family} adds other features to "
            f"its first {adapter.deep_layers} layers, past the weights: set objective=policy_gradient or distil"
        )
    start: dict[str, Any] = {"seed": config.seed, "base_model": model_name}
    sizes = adapter.hidden_size, adapter.family
    if isinstance(config, SieveConfig):
        return SievePolicy.start(*sizes, match_width=config.match_width, **start)
    if isinstance(config, CaCoVIDConfig):
        return new_cacovid(adapter, config, variant, model_name, blank)
    if isinstance(config, VisionSelectorConfig):
        return VisionSelectorPolicy.start(*sizes, variant=variant, **start)
    assert isinstance(config, ScoreConfig)
    return ScorePolicy.start(*sizes, variant=variant, hidden=config.hidden, residual=config.residual, **start)


def new_cacovid(
    adapter: Adapter, config: CaCoVIDConfig, variant: str, model_name: str, blank: bool = False
) -> CaCoVIDPolicy:
    """Return CaCoVID's policy before training: the LLM's first layers that see the video, and new heads.

    With `blank` the layers have its shapes and no weights of it, as for a model that has none.

    Raises
    ------
    TrainingError
        If settings and model do not go together.
    """
    first, depth, deepest = adapter.first_full_layer, config.depth, len(adapter.decoder_layers)
    if first + depth > deepest:
        raise TrainingError(f"depth is {depth}, and this model's LLM has {deepest - first} layers to start from")
    if first and variant == "official":
        raise TrainingError(
            f"variant 'official' starts from the LLM's layer 0, which has sliding attention in this model: the first "
            f"layer that sees the whole video is {first}; choose variant 'paper', which starts there"
        )
    question = config.reads_words(variant)
    if config.causal and question:
        raise TrainingError("causal is for bodies that attend over the prompt: choose body layer, attention or local")
    if config.start == "first_look" and not question:
        raise TrainingError("start 'first_look' is for body 'question'; the others start from the LLM's layer anyway")
    scorer = {
        "match": config.match,
        "match_width": config.match_width,
        "first_look": config.start == "first_look",
    }
    network: dict[str, Any] = {"scorer": scorer} if question else {"causal": config.causal}
    # Of a large model a layer is a gigabyte, and this path reads none: any shape of the LLM's width will do.
    apart = question and config.start == "nothing"
    blank = blank or apart
    return CaCoVIDPolicy.of_shape(
        BlockShape.of_width(adapter.hidden_size) if apart else adapter.layer_shape(first),
        adapter.family,
        variant=variant,
        layers=[{} if blank else adapter.layer_state(first + number).weights for number in range(depth)],
        seed=config.seed,
        base_model=model_name,
        body=None if config.body == "variant" else config.body,
        **network,
    )


def check_trackers(names: Sequence[str]) -> None:
    """Raise UnknownNameError or TrainingError for trackers that are unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        if find_spec(name) is None:
            raise TrainingError(f"{name} is not installed: pip install 'vidsieve[{name}]', or leave it out of --log-to")


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: dict[str, Any], report: Report) -> Iterator[Report]:
    """Yield `report`, extended to send metrics to trackers too; none is opened before there is something to send.

    TensorBoard's files are in ``folder/tensorboard``. A run of Weights & Biases is in the project ``vidsieve``, has
    the folder's name, and is resumed when the folder's run is.
    """
    trackers: list[Any] = []

    def open_tracker(name: str, first: int) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState(cpu=True)  # trackers need it to exist; under torchrun it does already
        if name == "tensorboard":  # figures that a killed run logged after its checkpoint are not shown twice
            return TensorBoardTracker("tensorboard", folder, purge_step=first)
        key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        return WandBTracker("vidsieve", name=folder.name, id=key, resume="allow", dir=str(folder), config=config)

    def send(step: int, steps: int, metrics: dict[str, float]) -> None:
        for name in dict.fromkeys(names) if not trackers else ():
            trackers.append(open_tracker(name, step))
            trackers[-1].start()
        for tracker in trackers:
            tracker.log(metrics, step)
        report(step, steps, metrics)

    try:
        yield send
    finally:
        for tracker in trackers:
            tracker.finish()
