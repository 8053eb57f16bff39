"""Trained policies and their files, `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from vidsieve._version import __version__
from vidsieve.errors import PolicyError, PolicyMismatchError
from vidsieve.io.bounded import parsed, read_bytes
from vidsieve.io.files import writing
from vidsieve.io.hub import download, is_hub_name, is_repository, upload
from vidsieve.io.tensors import load_tensors, save_tensors
from vidsieve.retention import FrameRule, Rule
from vidsieve.types import VideoTokens

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
"""A width or a number of heads: a product of three has no overflow."""
Form = TypeVar("Form", bound=msgspec.Struct)
FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a policy; no other file is read, or fetched from the hub."""
CARD = "README.md"


@dataclass(frozen=True)
class PolicyConfig:
    """The configuration of a policy, and the model that it was trained for.

    Parameters
    ----------
    type : str
        The method, as registered.
    variant : str
        Its variant.
    hidden_size : int
        Width D of the LLM whose tokens it reads.
    family : str
        Adapter family of that LLM.
    network : dict
        Arguments of the network's class.
    base_model : str
        Name of that model, for information only.
    training : dict
        Training record: settings, seed, data, steps, metrics.
    weights : str
        Checksum of the weights that this was saved with; empty in older files.
    calibration : dict
        By variant the rule that `vidsieve calibrate` saved last, see `retention.Rule`.
    frames : dict
        By variant the rule that ``vidsieve calibrate --tokens`` saved last, see `retention.FrameRule`.
    """

    type: str
    variant: str
    hidden_size: Size
    family: str
    network: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    frames: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the file, with the versions of vidsieve and of the format, and a checksum."""
        stamped = dataclasses.asdict(self) | {"vidsieve_version": __version__, "format": FORMAT}
        return json.dumps(stamped | {"checksum": _checksum(stamped)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: Path) -> PolicyConfig:
        """Return the configuration in the text of the file `where`.

        Raises
        ------
        PolicyError
            If it is not the configuration of a policy.
        PolicyMismatchError
            If its format is newer.
        """
        try:
            raw = parsed(text)
        except ValueError as error:
            raise PolicyError(f"{where} {error}") from None
        if not isinstance(raw, dict) or "type" not in raw or type(raw.get("format")) is not int:
            raise PolicyError(f"{where} is not the configuration of a vidsieve policy")
        if raw["format"] > FORMAT:
            raise PolicyMismatchError(
                f"{where} was written by vidsieve {raw.get('vidsieve_version')} in format {raw['format']}, this "
                f"version reads up to {FORMAT}: upgrade vidsieve"
            )
        try:
            config = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise PolicyError(f"{where} is damaged: {error!s:.300}") from None
        if raw.pop("checksum", None) not in (None, _checksum(raw)):
            raise PolicyError(
                f"{where} was damaged or edited after it was written, its checksum differs: fetch or train the policy "
                'again; where the edit is wanted, remove its "checksum"'
            )
        return config


def _checksum(values: dict[str, Any]) -> str:
    """Return the CRC-32 of the values of a configuration, whatever the layout of its text."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


class Policy(nn.Module):
    """A network that scores video tokens, with its configuration."""

    method: ClassVar[str]
    starts: ClassVar[dict[str, dict[str, Any]]] = {}
    """By variant, arguments of the network other than its defaults."""
    serves_all: ClassVar[bool] = False
    """True if one network serves all variants of its method."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def start(
        cls,
        hidden_size: int,
        family: str,
        *,
        variant: str = "ours",
        seed: int = 0,
        base_model: str = "",
        **network: Any,
    ) -> Self:
        """Return an untrained policy whose first weights are drawn from a seed; torch's own draws go on as before.

        `network` are arguments of the network, the other parameters those of `PolicyConfig`.
        """
        network = cls.starts.get(variant, {}) | network
        config = PolicyConfig(cls.method, variant, hidden_size, family, network, base_model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config)

    @contextmanager
    def serving(self, like: Tensor) -> Iterator[None]:
        """Compute without gradients on the device of `like`, on a GPU also in its precision.

        The policy moves to that device and stays there. On a GPU the tokens of a half-precision model are scored in its
        dtype, as in training with precision "bf16"; weights keep their dtype, and the last layer runs `in_full`, so
        that scores do not tie.
        """
        if next(self.parameters()).device != like.device:
            self.to(like.device)
        half = like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.autocast(like.device.type, like.dtype if half else None, enabled=half):
            yield

    def check_width(self, video: VideoTokens) -> None:
        """Raise PolicyError if a video's tokens are of another width than the policy's."""
        if video.embeds.shape[1] != self.config.hidden_size:
            raise PolicyError(f"the policy reads width {self.config.hidden_size}, got {video.embeds.shape[1]}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each complete or not at all.

        Of a save that is cut off between the two, the loader notices that they do not belong together.

        Raises
        ------
        OutputError
            If the folder cannot be written.
        """
        folder = Path(folder)
        weights = save_tensors(folder / WEIGHTS, self.state_dict(), {"vidsieve_version": __version__})
        with writing(folder / CONFIG) as temporary:
            temporary.write_text(dataclasses.replace(self.config, weights=weights).to_json(), encoding="utf-8")

    def push_to_hub(
        self, name: str, *, private: bool = False, measured: str = "", message: str = "Upload a policy"
    ) -> str:
        """Send the policy with a generated model card to the Hugging Face Hub, and return the hash of the commit.

        Parameters
        ----------
        name : str
            ``OWNER/NAME``; the repository is created if it is not there.
        private : bool
            Whether a repository that is created is private.
        measured : str
            Markdown for the card's section of results, such as ``Table.to_markdown()`` of an evaluation.
        message : str
            First line of the commit's message.

        Raises
        ------
        PolicyError
            If the name is of another form, or the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / CARD).write_text(model_card(self.config, name, measured), encoding="utf-8")
            return upload(Path(folder), name, private, message, PolicyError)

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str = "") -> Self:
        """Return the policy in `folder`, in evaluation mode.

        Parameters
        ----------
        folder : str or Path
            As `policy_folder` takes it: a folder, or a name on the hub.
        revision : str
            Branch, tag or commit on the hub; the same as ``@REVISION`` at the end of the name.

        Raises
        ------
        PolicyError
            If the folder holds no readable policy of this type, or the hub has none.
        PolicyMismatchError
            If its format is newer.
        """
        if revision and not is_hub_name(f"{folder}@{revision}"):
            raise PolicyError(f"revision {revision!r} is for a name on the hub, OWNER/NAME, and {folder} is none")
        folder = policy_folder(f"{folder}@{revision}" if revision else folder)
        config = read_config(folder)
        if config.type != cls.method:
            raise PolicyError(f"{folder} holds a {config.type} policy, not a {cls.method} policy")
        try:
            with torch.device("meta"):  # without memory: the configuration may ask for anything
                policy = cls(config)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise PolicyError(f"{folder / CONFIG} describes no network: {error!s:.300}") from None
        fill(policy, read_weights(folder, config.weights), f"the weights in {folder} do not fit their config.json")
        if not parameters_without_nan(policy):
            raise PolicyError(f"the weights in {folder} are not all finite numbers: train the policy again")
        return policy.eval()

    def served_as(self, variant: str | None) -> str:
        """Return the variant to run this policy as: its own, or `variant` if the two are compatible.

        Raises
        ------
        PolicyMismatchError
            For a network of ``"ours"`` under the published rules, or the reverse.
        """
        trained = self.config.variant
        if self.serves_all or variant in (None, trained) or {variant, trained} == {"paper", "official"}:
            return variant or trained
        raise PolicyMismatchError(
            f"this {self.method} policy was trained as variant {trained!r}, not {variant!r}: leave variant out, or "
            f"load one trained with --variant {'ours' if variant == 'ours' else 'paper'}"
        )


def policy_folder(name: str | Path) -> Path:
    """Return the folder of a policy, fetched first if it is on the Hugging Face Hub.

    Parameters
    ----------
    name : str or Path
        The folder itself, the folder of a training run, which holds it as ``policy``, or ``OWNER/NAME`` or
        ``OWNER/NAME@REVISION`` on the hub.

    Raises
    ------
    PolicyError
        If the hub has no such policy, or cannot be reached and the cache does not have it.
    """
    if isinstance(name, str) and is_hub_name(name):
        folder = download(name, (CONFIG, WEIGHTS), PolicyError)
        for file in (CONFIG, WEIGHTS):
            if not os.path.isfile(folder / file):
                raise PolicyError(
                    f"{name} on the hub is no policy: it has no {file}, and no other file is read, pickles never"
                )
        return folder
    path = Path(name)
    inner = path / "policy"
    return inner if os.path.isfile(inner / CONFIG) and not os.path.isfile(path / CONFIG) else path


def save_rule(folder: Path, rule: Rule | FrameRule) -> None:
    """Add a calibrated rule to the `config.json` of the policy in `folder`, in place of an older one of its variant.

    Raises
    ------
    PolicyError, PolicyMismatchError, OutputError
    """
    config = read_config(folder)
    saved = msgspec.to_builtins(rule)
    if isinstance(rule, FrameRule):
        config = dataclasses.replace(config, frames={**config.frames, rule.variant: saved})
    else:
        config = dataclasses.replace(config, calibration={**config.calibration, rule.variant: saved})
    with writing(folder / CONFIG) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


def read_config(folder: Path) -> PolicyConfig:
    """Return the configuration of the policy in `folder`.

    Raises
    ------
    PolicyError, PolicyMismatchError
    """
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise PolicyError(f"no policy in {folder}: {CONFIG} is missing; train one with `vidsieve train`")
    return PolicyConfig.from_json(read_bytes(path, PolicyError), path)


def pickles_in(folder: Path) -> list[str]:
    """Return the names of weight files that are never loaded, because pickles can run code."""
    return sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"})


def read_weights(folder: Path, saved_as: str = "") -> Mapping[str, Tensor]:
    """Return the tensors of the policy in `folder`, from safetensors only.

    Parameters
    ----------
    saved_as : str
        Their checksum in the configuration; empty: not compared.

    Raises
    ------
    PolicyError
        If the file is missing, corrupt, of another kind, or not the one that the configuration was saved with.
    """
    path = folder / WEIGHTS
    if not os.path.isfile(path):
        others = pickles_in(folder)
        advice = f"; {', '.join(others)} will not be loaded, because pickles can run code" if others else ""
        raise PolicyError(f"{WEIGHTS} is missing in {folder}{advice}")
    try:
        _, weights, digest = load_tensors(path)
    except ValueError as error:
        raise PolicyError(f"{path} is no readable safetensors file ({error!s:.300}); fetch or train it again") from None
    if saved_as and digest != saved_as:
        raise PolicyError(
            f"{path} and its {CONFIG} are of different saves: fetch both again, or resume the training that writes them"
        )
    return weights


def fill(policy: nn.Module, weights: Mapping[str, Tensor], misfit: str) -> None:
    """Give a policy without memory copies of weights, float32.

    Raises
    ------
    PolicyError
        If they are others than the policy's, of other shapes or no floating-point numbers; the text begins with
        `misfit`.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise PolicyError(f"{misfit}: {name:.80} is {there.get(name)}, must be {wanted.get(name)}")
        if weights[name].dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise PolicyError(f"{misfit}: {name} is of {weights[name].dtype}, must be of floating-point numbers")
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}  # the file stays mapped
    policy.load_state_dict(copies, assign=True)


# -- model card -------------------------------------------------------------------------------------------------


def model_card(config: PolicyConfig, name: str, measured: str = "") -> str:
    """Return the text of a policy's page on the hub: what it is, how it was trained, what was measured, how to load it.

    Parameters
    ----------
    name : str
        ``OWNER/NAME`` of the repository.
    measured : str
        Markdown of results; empty: the card says that there are none beyond those of training.
    """
    record = dict(config.training)
    warnings, last = dict(record.pop("warnings", {})), dict(record.pop("last_metrics", {}))
    settings = dict(record.pop("settings", {}))
    facts = {
        "method": config.type,
        "variant": config.variant,
        "base model": config.base_model or "not recorded",
        "model family": config.family,
        "width of its video tokens": config.hidden_size,
        "network": json.dumps(config.network, sort_keys=True),
        "vidsieve": __version__,
    }
    rules = {
        f"--retention calibrated, variant {variant}": json.dumps(rule, sort_keys=True)
        for variant, rule in config.calibration.items()
    }
    base = [f"base_model: {config.base_model}"] if is_repository(config.base_model) else []
    none = "Nothing was measured beyond the figures of training above."
    lines = [
        "---",
        "library_name: vidsieve",
        *base,
        "tags:",
        "- vidsieve",
        "- video",
        "- token-pruning",
        "---",
        "",
        f"# {name.partition('/')[2]}",
        "",
        f"A trained `{config.type}` policy for vidsieve: it scores the video tokens of a video language model, and "
        "those with low scores are dropped before the LLM reads them. It is for models of the width and family below.",
        "",
        *_two_columns("policy", facts | rules),
        "",
        "## How to load it",
        "",
        "```python",
        "import vidsieve",
        "",
        f'method = vidsieve.load("{name}", retention=0.25)',
        "with vidsieve.attach(model, method) as session:",
        "    out = model.generate(**inputs)",
        "```",
        "",
        f"`{name}@REVISION` names a branch, a tag or a commit. On the command line: `--method {name}`.",
        "",
        "## Training",
        "",
        *(_two_columns("record", record) if record else ["No training record was saved with this policy."]),
        "",
        *([*_two_columns("setting", settings), ""] if settings else []),
        *([*_two_columns("figure of the last logged step", last), ""] if last else []),
        *(f"- Warning in training, {kind}: {json.dumps(what)}" for kind, what in warnings.items()),
        "",
        "## Measured",
        "",
        measured.strip() or none,
        "",
    ]
    return "\n".join(lines)


def _two_columns(head: str, values: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of names and values; no value breaks out of its cell."""
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    rows = [(key, " ".join(value.split()).replace("|", r"\|").replace("<", "&lt;")) for key, value in cells.items()]
    return [f"| {head} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def network_of(config: PolicyConfig, form: type[Form]) -> Form:
    """Return the arguments of a network as a struct.

    Raises
    ------
    PolicyError
        If one is missing, unknown, of another type, or not a finite number.
    """
    try:
        json.dumps(config.network, allow_nan=False)
        return msgspec.convert(config.network, form)
    except (ValueError, TypeError) as error:
        raise PolicyError(f"the network of a {config.type} policy: {error!s:.300}") from None


def mlp(sizes: list[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Return linear layers of the given widths with activations between them, Xavier weights and zero biases."""
    if min(sizes) < 1:
        raise PolicyError(f"layers of widths {sizes}: the network is too narrow")
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(sizes)):
        linear = nn.Linear(wide, narrow)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if i == len(sizes) - 2 else [linear, activation()]
    return nn.Sequential(*layers)


def in_full(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a last layer's output for `x` in the precision of its weights, outside any autocast."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return out


def head(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Return an `mlp`'s output for `x`, its last layer `in_full`."""
    return in_full(layers[-1], layers[:-1](x))


def parameters_without_nan(module: nn.Module) -> bool:
    """True if every parameter is finite."""
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())
