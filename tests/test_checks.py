"""Every registered compressor against every contract check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Generator

from vidsieve import registry
from vidsieve.compressors.base import Compressor
from vidsieve.testing import check_compressor, parametrize_with_checks
from vidsieve.testing.checks import CheckFailure
from vidsieve.types import Selection, VideoTokens

METHODS = [registry.compressors.get(name) for name in registry.compressors]


@parametrize_with_checks(METHODS)
def test_contract(method, check):
    check(method)


@pytest.mark.parametrize("name", registry.compressors.names())
def test_registered_under_its_own_name(name):
    assert registry.compressors.get(name).name == name


@dataclass(frozen=True)
class _Broken(Compressor):
    """Breaks one rule of the contract in each subclass, and must be caught by the check that is named there."""

    name: ClassVar[str] = "broken"
    paper: ClassVar[str] = "none"

    def _select(self, video: VideoTokens, budget: int, generator: Generator) -> Selection:
        return Selection(torch.arange(budget))


class _OneTooFew(_Broken):
    __doc__ = _Broken.__doc__

    def _select(self, video, budget, generator):
        return Selection(torch.arange(max(1, budget - 1)))


class _Unseeded(_Broken):
    __doc__ = _Broken.__doc__

    def _select(self, video, budget, generator):
        return Selection(torch.randperm(video.num_tokens)[:budget].sort().values)


class _Mutating(_Broken):
    __doc__ = _Broken.__doc__

    def _select(self, video, budget, generator):
        video.embeds.add_(1)
        return Selection(torch.arange(budget))


class _SecretlyAware(_Broken):
    __doc__ = _Broken.__doc__

    def _select(self, video, budget, generator):
        order = video.prompt.embeds[: video.num_tokens, 0].argsort()
        return Selection(order[:budget].sort().values)


@pytest.mark.parametrize("broken", [_OneTooFew, _Unseeded, _Mutating, _SecretlyAware])
def test_checks_catch_a_broken_method(broken):
    with pytest.raises(CheckFailure):
        check_compressor(broken)


def test_checks_pass_a_sound_method():
    check_compressor(_Broken)


def test_declared_failures_become_strict_xfails():
    class Declared(_OneTooFew):
        expected_failures: ClassVar[dict[str, str]] = {"check_exact_budget": "keeps one too few, for this test"}

    marks = {case.values[1].__name__: case.marks for case in parametrize_with_checks([Declared]).args[1]}
    assert [mark.name for mark in marks["check_exact_budget"]] == ["xfail"]
    assert not marks["check_deterministic"]
