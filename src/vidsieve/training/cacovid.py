"""Training CaCoVID by combinatorial policy optimisation, top to bottom.

Per prompt: draw `token_rollouts` keep-masks by OCSS over token scores and `frame_rollouts` over frame scores,
let the frozen LLM answer under each, turn rewards into group advantages, and take a clipped step on the
log-probability of every keep and drop (Eq. 5-19). With `iterations` > 1 the same prompts come again with fresh
rollouts, earlier ones stay in the group with the log-probabilities that they were drawn with (experience replay), and
`dynamic_ratio` makes a prompt easier or harder from one iteration to the next. With one iteration the importance
ratio is 1 and the clip is inactive.

Variant "ours" differs from the paper in the policy's body (an explicit question path), and in a pull of
`score_decay` towards a fair coin, since scores otherwise grow without limit over prompts.

A rollout whose reward is not finite has no weight in its group; `skipped` counts groups where that is so of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.training import official, sampling
from vidsieve.training.advantages import BY_NAME, finite_mean, over_finite
from vidsieve.training.answers import decoded, judge
from vidsieve.training.controls import choice_loss, gated
from vidsieve.training.data.samples import Choice
from vidsieve.training.losses import action_log_probs, cpo_loss, distillation_loss, entropy_shortfall
from vidsieve.training.packing import Packing
from vidsieve.training.replay import Memory, next_ratio
from vidsieve.training.rewards import choice_reward, margin_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.sampling import log_uniform
from vidsieve.training.settings import CaCoVIDConfig
from vidsieve.training.teachers import teacher_scores
from vidsieve.training.trainer import StepResult, Trainer
from vidsieve.training.watch import WINDOW, keep_entropy
from vidsieve.types import Need, VideoTokens


@dataclass
class Prompted:
    """A prompt during its iterations: its video encoded once, its rollouts so far, its sampling ratio.

    `blind` are the options' logits (options,) without the video, where they were asked for.
    """

    sample: Choice
    rollouts: Rollouts
    ratio: float
    blind: Tensor | None = None
    memory: dict[str, Memory] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    """Logits of the first iteration, from which the release draws in all of them."""

    def remember(self, kind: str, fresh: Memory) -> Memory:
        """Return the rollouts of one kind with fresh ones among them."""
        before = self.memory.get(kind)
        self.memory[kind] = fresh if before is None else before.with_more(fresh)
        return self.memory[kind]


class CaCoVIDTrainer(Trainer[Choice]):
    """CPO on multiple-choice prompts; see the module's text."""

    policy: CaCoVIDPolicy
    config: CaCoVIDConfig

    def __init__(self, adapter: Adapter, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        self.adapter, self.tokenizer = adapter, tokenizer
        super().__init__(*args, **kwargs)
        self.packing = Packing(adapter.model, self.config.rollout_tokens)
        if self.held_out is not None:
            self.held_out.packing = self.packing

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the body at its own rate."""
        body = [p for n, p in self.policy.named_parameters() if n.startswith("layers.") and p.requires_grad]
        rest = [p for n, p in self.policy.named_parameters() if not n.startswith("layers.") and p.requires_grad]
        groups = [{"params": rest, "lr": self.config.head_lr}]
        if body:
            groups.append({"params": body, "lr": self.config.body_lr})
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)

    def learning_rate(self, step: int) -> float:
        """Return a cosine from 1 to 0."""
        return 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps)

    @property
    def iterations(self) -> int:
        """Iterations over a sample."""
        return self.config.iterations

    @property
    def rollouts(self) -> int:
        """Masks that the frozen model is asked about: over tokens, and over frames where rewards are compared."""
        c = self.config
        if c.objective == "distil":
            return 0
        return c.token_rollouts + (c.frame_rollouts if c.objective == "policy_gradient" else 0)

    def record(self) -> dict[str, Any]:
        """Return the training record, with what went into one prefill."""
        return super().record() | {"packing": self.packing.record()}

    def prepare(self, sample: Choice) -> Prompted:
        """Return a prompt, its video encoded, and answered without it where the reward asks for that.

        So are the prompts of the first lines of metrics, from which an early warning reads how many need no video.
        """
        c, rollouts = self.config, Rollouts(self.adapter, sample.inputs, self.packing)
        early = self.step < WINDOW * c.log_every and c.objective == "policy_gradient" and len(sample.option_ids) > 0
        blind = rollouts.blind_logits(sample.option_ids) if c.blind_margin or early else None
        return Prompted(sample, rollouts, self.config.ratio, blind)

    def rewards(self, prompt: Prompted, keep_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of each keep-mask (G, N), and how right the model is under it, both (G,) float32."""
        sample = prompt.sample
        if self.config.reward == "generate":
            said = decoded(self.tokenizer, prompt.rollouts.generate(keep_masks, self.config.answer_tokens))
            right = torch.tensor([judge(sample.kind, text, sample.truth) for text in said], device=keep_masks.device)
            return right, right
        logits = prompt.rollouts.option_logits(keep_masks, sample.option_ids)  # (G, options)
        right = choice_reward(logits, sample.answer)
        if self.config.reward == "choice":
            return right, right
        return margin_reward(logits, sample.answer, prompt.blind if self.config.blind_margin else None), right

    def train_step(self, prompt: Prompted) -> StepResult:
        """Return the loss of one prompt in one of its iterations: CPO, or a control without it."""
        video = prompt.rollouts.video(frozenset({Need.QUESTION}))
        token_logits, frame_logits = self.run_policy(video)  # (N, 2), (T, 2)
        keep = token_logits[:, 1] - token_logits[:, 0]  # (N,)
        frame_keep = frame_logits[:, 1] - frame_logits[:, 0]  # (T,)
        if self.config.rate_high and not prompt.memory:  # one rate for all iterations: a group compares equal budgets
            prompt.ratio = log_uniform(self.config.rate_low, self.config.rate_high, self.generator)
        metrics: dict[str, float] = {}
        if self.config.objective == "distil" or self.step < self.config.warmup_steps:
            teacher = teacher_scores(prompt.rollouts, self.config.teacher)
            frames = teacher.softmax(0).reshape(video.grid.frames, -1).sum(1).clamp(min=1e-12).log()
            loss = distillation_loss(keep, teacher) + distillation_loss(frame_keep, frames)
        elif self.config.objective == "straight_through":
            loss, metrics = self._straight_through(prompt, video, keep)
        else:
            result = self._cpo(prompt, video, token_logits, frame_logits)
            if result.loss is None:
                return result
            loss, metrics = result.loss, result.metrics
        if self.config.entropy_floor:
            loss = loss + self.config.entropy_weight * entropy_shortfall(keep, self.config.entropy_floor)
        metrics |= {
            "ratio": prompt.ratio,
            "score_spread": float(keep.detach().std()),
            "entropy": keep_entropy(keep),
            "keep_probability": float(keep.detach().sigmoid().mean()),
        }
        return StepResult(loss, metrics)

    def _straight_through(self, prompt: Prompted, video: VideoTokens, keep: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the answer's loss under token rollouts, with gradients through what they kept."""
        masks = self._token_masks(prompt, video, keep.detach()).to(keep.device)
        loss, right = choice_loss(prompt.rollouts, prompt.sample, gated(video, keep, masks))
        figures = {"right": float(right.mean()), "answer_loss": float(loss.detach())}
        return loss, figures | {"kept": float(masks.float().mean())}

    def _token_masks(self, prompt: Prompted, video: VideoTokens, scores: Tensor) -> Tensor:
        c = self.config
        if c.sampler == "official":
            return official.token_masks(scores.cpu(), video.grid, prompt.ratio, c.token_rollouts, self.generator)
        return sampling.token_masks(
            scores,
            video.grid,
            prompt.ratio,
            c.token_rollouts,
            self.generator,
            sampler=c.sampler,
            over=c.over,
            width=c.width,
        )

    def _frame_masks(
        self, prompt: Prompted, video: VideoTokens, scores: Tensor, frame_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        if c.sampler == "official" and c.frame_rollouts:
            return official.frame_masks(
                video.embeds.cpu(), frame_scores.cpu(), video.grid, prompt.ratio, c.frame_rollouts, self.generator
            )
        return sampling.frame_masks(
            scores, frame_scores, video.grid, prompt.ratio, c.frame_rollouts, self.generator, width=c.width
        )

    def _cpo(self, prompt: Prompted, video: VideoTokens, token_logits: Tensor, frame_logits: Tensor) -> StepResult:
        """Return the CPO loss of fresh rollouts and those remembered; None where no reward is finite."""
        c = self.config
        drawn = {"tokens": token_logits.detach(), "frames": frame_logits.detach()}
        if c.sampler == "official":
            drawn = prompt.first = prompt.first or drawn
        token_scores = drawn["tokens"][:, 1] - drawn["tokens"][:, 0]  # (N,)
        frame_scores = drawn["frames"][:, 1] - drawn["frames"][:, 0]  # (T,)
        # Draws are made on the CPU, so that a seed means the same everywhere.
        device = token_logits.device
        token_masks = self._token_masks(prompt, video, token_scores).to(device)  # (G_t, N)
        frame_masks, kept_by_frames = (
            masks.to(device) for masks in self._frame_masks(prompt, video, token_scores, frame_scores)
        )  # (G_f, T), (G_f, N)

        rewards, right = self.rewards(prompt, torch.cat([token_masks, kept_by_frames]))  # (G,), (G,)
        over_tokens, over_frames = slice(0, c.token_rollouts), slice(c.token_rollouts, None)

        losses, groups = [], 0
        for kind, out, masks, which, balanced in (
            ("tokens", token_logits, token_masks, over_tokens, c.balanced),
            ("frames", frame_logits, frame_masks, over_frames, False),
        ):
            if not len(masks):
                continue
            groups += 1
            # The policy that drew these masks is the current one (the first, in the release); those of earlier
            # iterations keep theirs.
            old = action_log_probs(drawn[kind], masks)
            if not c.replay:
                prompt.memory.pop(kind, None)
            memory = prompt.remember(kind, Memory(masks, old, rewards[which], right[which]))
            if not bool(memory.rewards.isfinite().any()):
                continue
            advantage = over_finite(BY_NAME[c.advantage], memory.rewards)  # (i·G,)
            losses.append(
                cpo_loss(out, memory.log_probs, memory.masks, advantage, balanced=balanced, kl_weight=c.score_decay)
            )
        skipped = {"skipped": float(groups - len(losses))}
        if not losses:
            return StepResult(None, skipped, broken=f"reward {c.reward!r} is {float(rewards[0])}")
        # The release goes by all rollouts over tokens so far, the paper by those of the last iteration.
        so_far = finite_mean(prompt.memory["tokens"].right if c.sampler == "official" else right)
        if c.dynamic_ratio and math.isfinite(so_far):
            # Below one token a frame the ratio changes nothing: steps count from there, or from the release's bound.
            least = c.ratio_least or 1 / video.grid.per_frame
            prompt.ratio = next_ratio(
                max(prompt.ratio, least),
                so_far,
                least=least,
                most=c.ratio_most,
                low=c.ratio_low,
                high=c.ratio_high,
                inclusive=c.sampler == "official",
            )
        # Rollouts of this iteration may all be broken and earlier ones not: then they have no mean.
        means = {"reward": finite_mean(rewards), "right": finite_mean(right)}
        if prompt.blind is not None:
            means["blind"] = finite_mean(choice_reward(prompt.blind[None], prompt.sample.answer))
        figures = {name: value for name, value in means.items() if math.isfinite(value)} | skipped
        figures["kept"] = float(token_masks.float().mean())
        known = prompt.memory["tokens"].rewards
        known = known[known.isfinite()]
        if len(known):
            figures["dead_groups"] = float(bool((known == known[0]).all()))
        return StepResult(torch.stack(losses).sum(), figures)
