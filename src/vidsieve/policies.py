"""Trained policies and their files, `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
from torch import Tensor, nn

from vidsieve._version import __version__
from vidsieve.errors import PolicyError, PolicyMismatchError
from vidsieve.io.files import writing
from vidsieve.io.tensors import load_tensors, save_tensors

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


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
    """

    type: str
    variant: str
    hidden_size: int
    family: str
    network: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    weights: str = ""

    def to_json(self) -> str:
        """Return the text of the file, with the versions of vidsieve and of the format, and a checksum."""
        stamped = dataclasses.asdict(self) | {"vidsieve_version": __version__, "format": FORMAT}
        return json.dumps(stamped | {"checksum": _checksum(stamped)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> PolicyConfig:
        """Return the configuration in the text of the file `where`.

        Raises
        ------
        PolicyError
            If it is not the configuration of a policy.
        PolicyMismatchError
            If its format is newer.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise PolicyError(f"{where} is not JSON: {error}") from None
        if not isinstance(raw, dict) or "type" not in raw or "format" not in raw:
            raise PolicyError(f"{where} is not the configuration of a vidsieve policy")
        if raw["format"] > FORMAT:
            raise PolicyMismatchError(
                f"{where} was written by vidsieve {raw.get('vidsieve_version')} in format {raw['format']}, this "
                f"version reads up to {FORMAT}: upgrade vidsieve"
            )
        try:
            config = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise PolicyError(f"{where} is damaged: {error}") from None
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

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config

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

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Return the policy in `folder`, in evaluation mode.

        Raises
        ------
        PolicyError
            If the folder holds no readable policy of this type.
        PolicyMismatchError
            If its format is newer.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.type != cls.method:
            raise PolicyError(f"{folder} holds a {config.type} policy, not a {cls.method} policy")
        weights = read_weights(folder, config.weights)
        try:
            policy = cls(config)
            policy.load_state_dict(weights)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise PolicyError(f"the weights in {folder} do not fit their config.json: {error}") from None
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
        if variant in (None, trained) or {variant, trained} == {"paper", "official"}:
            return variant or trained
        raise PolicyMismatchError(
            f"this {self.method} policy was trained as variant {trained!r}, not {variant!r}: leave variant out, or "
            f"load one trained with --variant {'ours' if variant == 'ours' else 'paper'}"
        )


def read_config(folder: Path) -> PolicyConfig:
    """Return the configuration of the policy in `folder`.

    Raises
    ------
    PolicyError, PolicyMismatchError
    """
    path = folder / CONFIG
    if not os.path.isfile(path):
        raise PolicyError(f"no policy in {folder}: {CONFIG} is missing; train one with `vidsieve train`")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    return PolicyConfig.from_json(text, path)


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
        raise PolicyError(f"{path} is no readable safetensors file ({error}); fetch or train it again") from None
    if saved_as and digest != saved_as:
        raise PolicyError(
            f"{path} and its {CONFIG} are of different saves: fetch both again, or resume the training that writes them"
        )
    return weights


def mlp(sizes: list[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Return linear layers of the given widths with activations between them, Xavier weights and zero biases."""
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
