"""Trained policies on disk: `config.json` and `model.safetensors`, stamped and checked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidsieve._version import __version__
from vidsieve.errors import PolicyError, PolicyMismatchError
from vidsieve.io.files import writing

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is and where it belongs.

    Parameters
    ----------
    type : str
        The method, as registered.
    variant : str
        The variant it was trained as.
    hidden_size : int
        D of the LLM whose tokens it reads.
    family : str
        The adapter family of that LLM.
    network : dict
        Sizes and switches of the network, as its class takes them.
    base_model : str
        Which model it was trained on, for people to read.
    training : dict
        The training record: settings, seed, data, steps, metrics.
    """

    type: str
    variant: str
    hidden_size: int
    family: str
    network: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the file's text: sorted keys, stamped with version and format."""
        stamped = dataclasses.asdict(self) | {"vidsieve_version": __version__, "format": FORMAT}
        return json.dumps(stamped, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> PolicyConfig:
        """Return the configuration in a file's text.

        Raises
        ------
        PolicyError
            If it is not a policy's configuration.
        PolicyMismatchError
            If a newer format wrote it.
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
        if not isinstance(raw.get("hidden_size", 0), int) or not isinstance(raw.get("network", {}), dict):
            raise PolicyError(f"{where} is damaged: hidden_size must be a number and network a table")
        names = {f.name for f in dataclasses.fields(cls)}
        missing = {"type", "variant", "hidden_size", "family"} - raw.keys()
        if missing:
            raise PolicyError(f"{where} lacks {', '.join(sorted(missing))}")
        return cls(**{key: value for key, value in raw.items() if key in names})


class Policy(nn.Module):
    """A network that scores video tokens, with the record of where it came from."""

    method: ClassVar[str]

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config

    @contextmanager
    def serving(self, like: Tensor) -> Iterator[None]:
        """Compute without gradients where `like` lives: on its device, and on a GPU in its precision.

        The policy moves to that device and stays there. On a GPU a half-precision model's tokens are scored in its
        dtype, as in training with precision "bf16"; weights stay as they are, and `in_full` keeps the last layer out
        of it, so that scores do not tie.
        """
        if next(self.parameters()).device != like.device:
            self.to(like.device)
        half = like.is_cuda and like.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.autocast(like.device.type, like.dtype if half else None, enabled=half):
            yield

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each complete or not at all.

        Raises
        ------
        OutputError
            If the folder cannot be written.
        """
        folder = Path(folder)
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        with writing(folder / WEIGHTS) as temporary:
            save_file(weights, temporary, metadata={"format": "pt", "vidsieve_version": __version__})
        with writing(folder / CONFIG) as temporary:
            temporary.write_text(self.config.to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Return the policy in `folder`, in evaluation mode.

        Raises
        ------
        PolicyError
            If the folder holds no readable policy of this type.
        PolicyMismatchError
            If a newer format wrote it.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.type != cls.method:
            raise PolicyError(f"{folder} holds a {config.type} policy, not a {cls.method} policy")
        weights = read_weights(folder)
        try:
            policy = cls(config)
            policy.load_state_dict(weights)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise PolicyError(f"the weights in {folder} do not fit their config.json: {error}") from None
        if not parameters_without_nan(policy):
            raise PolicyError(f"the weights in {folder} are not all finite numbers: train the policy again")
        return policy.eval()

    def served_as(self, variant: str | None) -> str:
        """Return the variant to serve this policy in: its own, or `variant` where the two go together.

        Raises
        ------
        PolicyMismatchError
            For a network of ``"ours"`` under the published rules, or the reverse: its numbers would be nobody's.
        """
        own = self.config.variant
        if variant in (None, own) or {variant, own} == {"paper", "official"}:
            return variant or own
        raise PolicyMismatchError(
            f"this {self.method} policy was trained as variant {own!r}, not {variant!r}: leave variant out, or load "
            f"one that was trained with --variant {'ours' if variant == 'ours' else 'paper'}"
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
    """Return the names of weight files that will not be loaded, because pickles can run code."""
    return sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"})


def read_weights(folder: Path) -> Mapping[str, Tensor]:
    """Return the tensors of the policy in `folder`; only safetensors is ever loaded.

    Raises
    ------
    PolicyError
        If the file is missing, corrupt or of another kind.
    """
    path = folder / WEIGHTS
    if not os.path.isfile(path):
        others = pickles_in(folder)
        advice = f"; {', '.join(others)} will not be loaded, because pickles can run code" if others else ""
        raise PolicyError(f"{WEIGHTS} is missing in {folder}{advice}")
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{path} is no readable safetensors file ({error}); fetch or train it again") from None
    return weights


def mlp(sizes: list[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Return linear layers of the given widths with an activation between, Xavier weights and zero biases."""
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(sizes)):
        linear = nn.Linear(wide, narrow)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if i == len(sizes) - 2 else [linear, activation()]
    return nn.Sequential(*layers)


def in_full(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a last layer makes of `x` in the precision of its own weights, whatever autocast is around it."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return out


def head(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Return what an `mlp` makes of `x`, its last layer `in_full`."""
    return in_full(layers[-1], layers[:-1](x))


def parameters_without_nan(module: nn.Module) -> bool:
    """Return whether every parameter is finite."""
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())
