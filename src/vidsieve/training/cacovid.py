"""Training CaCoVID by combinatorial policy optimisation, top to bottom.

Per prompt: draw `token_rollouts` keep-masks by OCSS over token scores and `frame_rollouts` over frame scores,
let the frozen LLM answer under each, turn rewards into group advantages, and take a clipped step on the
log-probability of every keep and drop (Eq. 5-19). With `iterations` > 1 the same prompts come again with fresh
rollouts, earlier ones stay in the group with the log-probabilities that they were drawn with (experience replay), and
`dynamic_ratio` makes a prompt easier or harder from one iteration to the next. With one iteration the importance
ratio is 1 and the clip is inactive.

Variant "ours" differs from the paper in the policy's body (an explicit question path), and in a pull of
`score_decay` towards a fair coin, since scores otherwise grow without limit over prompts.

A rollout whose reward is not finite has no weight in its group; `skipped` counts groups in which none is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.errors import TrainingError
from vidsieve.training import release_sampling, sampling
from vidsieve.training.advantages import BY_NAME, finite_mean, over_finite
from vidsieve.training.controls import choice_loss, gated, softly_selected, teacher_scores
from vidsieve.training.data.samples import Choice
from vidsieve.training.judging import judge
from vidsieve.training.losses import action_log_probs, cpo_loss, distillation_loss, entropy_shortfall, keep_entropy
from vidsieve.training.rewards import choice_reward, margin_reward
from vidsieve.training.rollouts import Rollouts
from vidsieve.training.settings import CaCoVIDConfig
from vidsieve.training.trainer import StepResult, Trainer
from vidsieve.training.warning_signs import WINDOW
from vidsieve.types import Need, VideoTokens

MOST_RATIO = 0.12
"""Largest ratio that the dynamic ratio doubles to."""
RELEASE_LEAST_RATIO = 0.01
"""Smallest ratio that the release halves to; here it is one token a frame."""


@dataclass(frozen=True)
class Memory:
    """Rollouts of one prompt so far: G of them over N tokens (or T frames).

    Parameters
    ----------
    masks : Tensor, (G, N), bool
    log_probs : Tensor, (G, N), float32
        Of the keep or drop of each token, under the policy that drew the mask (Eq. 17).
    rewards, right : Tensor, (G,), float32
        Reward, and if the answer was right.
    """

    masks: Tensor
    log_probs: Tensor
    rewards: Tensor
    right: Tensor

    def __add__(self, other: Memory) -> Memory:
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Memory(*map(torch.cat, pairs))


@dataclass
class Prompted:
    """A prompt during its iterations: its video encoded once, its rollouts so far, its sampling ratio.

    `blind` are the options' logits (options,) without the video, where they are needed.
    """

    sample: Choice
    rollouts: Rollouts
    ratio: float
    blind: Tensor | None = None
    answer: int = 0
    """Number of the option that is rewarded."""
    broken: str = ""
    """Why no rollout of the prompt can be rewarded."""
    asked: bool = True
    """If the policy reads the question while it draws."""
    memory: dict[str, Memory] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    """Logits of the first iteration, from which the release draws in all of them."""


class CaCoVIDTrainer(Trainer[Choice]):
    """CPO on multiple-choice prompts; see the module's text.

    `decode` turns generated ids (G, E) into texts, for the reward "generate".
    """

    policy: CaCoVIDPolicy
    config: CaCoVIDConfig

    def __init__(self, *args: Any, decode: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decode = decode

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with the body at its own rate."""
        body = [p for n, p in self.policy.named_parameters() if n.startswith("layers.") and p.requires_grad]
        rest = [p for n, p in self.policy.named_parameters() if not n.startswith("layers.") and p.requires_grad]
        groups = [{"params": rest, "lr": self.config.head_lr}]
        if body:
            groups.append({"params": body, "lr": self.config.body_lr})
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)

    @property
    def iterations(self) -> int:
        """Iterations over a sample."""
        return self.config.iterations

    @property
    def rollouts(self) -> int:
        """Masks under which the frozen model answers."""
        return 0 if self.distils else self.config.masks

    def prepare(self, sample: Choice) -> Prompted:
        """Return a prompt, its video encoded, and answered without it or with all of it if the reward needs that.

        The first rewarded prompts are also answered without video: the warning about blind answers needs that figure.
        """
        c, rollouts = self.config, Rollouts(self.adapter, sample.inputs, self.packing)
        prompt = Prompted(sample, rollouts, c.ratio, answer=sample.answer)
        if self.distils or not c.answered:
            return prompt
        early = self.step < c.warmup_steps + WINDOW * c.log_every and c.objective == "policy_gradient"
        if c.blind_margin or (early and len(sample.option_ids) > 0):
            prompt.blind = rollouts.blind_logits(sample.option_ids)
        if c.reward == "agreement":
            whole = rollouts.option_logits(rollouts.encoded.everything(), sample.option_ids)[0]  # (options,)
            prompt.answer = int(whole.argmax())
            if not bool(whole.isfinite().all()):
                prompt.broken = "reward 'agreement' is nan, as the answer under all tokens is,"
        return prompt

    def train_step(self, prompt: Prompted) -> StepResult:
        """Return the loss of one prompt in one of its iterations: CPO, or a control without it."""
        if prompt.broken:
            return StepResult(None, {"skipped": 1.0}, broken=prompt.broken)
        c, video = self.config, prompt.rollouts.video(frozenset({Need.QUESTION}))
        if c.rate_high and not prompt.memory:  # one rate for all iterations: a group compares equal budgets
            prompt.ratio = sampling.log_uniform(c.rate_low, c.rate_high, self.generator)
        token_logits, frame_logits = self.policy_logits(prompt, video)  # (N, 2), (T, 2)
        keep = difference(token_logits)  # (N,)
        metrics: dict[str, float] = {}
        if self.distils:
            teacher = teacher_scores(prompt.rollouts, c.teacher, prompt.sample.targets)
            # A warm-up's loss is of the size of CPO's, or Adam would hardly move after it.
            scale = 1 if c.objective == "distil" else video.num_tokens
            loss = self.distil(prompt, video, teacher, token_logits, frame_logits) / scale
        elif c.objective == "soft_topk":
            chosen, constraint = softly_selected(video, keep, prompt.ratio, self.progress)
            answer_loss, right = choice_loss(prompt.rollouts, prompt.sample.option_ids, prompt.answer, [chosen])
            loss = answer_loss + constraint
            metrics = {"right": float(right.mean()), "answer_loss": float(answer_loss.detach())}
            metrics["constraint"] = float(constraint.detach())
        elif c.objective == "straight_through":
            masks = self.token_masks(prompt, video, keep.detach()).to(keep.device)
            kept = gated(video, keep, masks)
            loss, right = choice_loss(prompt.rollouts, prompt.sample.option_ids, prompt.answer, kept)
            metrics = {"right": float(right.mean()), "answer_loss": float(loss.detach())}
            metrics["kept"] = float(masks.float().mean())
        else:
            result = self.cpo(prompt, video, token_logits, frame_logits)
            if result.loss is None:
                return result
            loss, metrics = result.loss, result.metrics
        if c.entropy_floor:
            loss = loss + entropy_shortfall(keep, c.entropy_floor)
        metrics |= {
            "ratio": prompt.ratio,
            "score_spread": float(keep.detach().std()),
            "entropy": keep_entropy(keep),
            "keep_probability": float(keep.detach().sigmoid().mean()),
        }
        return StepResult(loss, metrics)

    def policy_logits(self, prompt: Prompted, video: VideoTokens) -> tuple[Tensor, Tensor]:
        """Return the policy's logits of tokens (N, 2) and of frames (T, 2)."""
        logits: tuple[Tensor, Tensor] = self.run_policy(video)
        return logits

    def distil(
        self, prompt: Prompted, video: VideoTokens, teacher: Tensor, token_logits: Tensor, frame_logits: Tensor
    ) -> Tensor:
        """Return the loss against a teacher's scores of tokens (N,), which tell those of frames too."""
        frames = teacher.softmax(0).reshape(video.grid.frames, -1).sum(1).clamp(min=1e-12).log()  # (T,)
        return distillation_loss(difference(token_logits), teacher) + distillation_loss(
            difference(frame_logits), frames
        )

    def cpo(self, prompt: Prompted, video: VideoTokens, token_logits: Tensor, frame_logits: Tensor) -> StepResult:
        """Return the CPO loss of fresh and remembered rollouts; None where no reward is finite."""
        c = self.config
        drawn = {"tokens": token_logits.detach(), "frames": frame_logits.detach()}
        if c.sampler == "official":
            drawn = prompt.first = prompt.first or drawn
        token_scores, frame_scores = difference(drawn["tokens"]), difference(drawn["frames"])  # (N,), (T,)
        # Masks are drawn on the CPU, so that a seed means the same everywhere.
        device = token_logits.device
        token_masks = self.token_masks(prompt, video, token_scores).to(device)  # (G_t, N)
        frame_masks, kept_by_frames = (
            masks.to(device) for masks in self.frame_masks(prompt, video, token_scores, frame_scores)
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
            fresh = Memory(masks, action_log_probs(drawn[kind], masks), rewards[which], right[which])
            memory = prompt.memory[kind] + fresh if c.replay and kind in prompt.memory else fresh
            prompt.memory[kind] = memory
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
        right_so_far = finite_mean(prompt.memory["tokens"].right if c.sampler == "official" else right)
        if c.dynamic_ratio and math.isfinite(right_so_far):
            prompt.ratio = self.next_ratio(prompt.ratio, right_so_far, video.grid.per_frame)
        # Rollouts of this iteration may all be broken and earlier ones not: then they have no mean.
        means = {"reward": finite_mean(rewards), "right": finite_mean(right)}
        if prompt.blind is not None:
            means["blind"] = finite_mean(choice_reward(prompt.blind[None], prompt.answer))
        figures = {name: value for name, value in means.items() if math.isfinite(value)} | skipped
        figures["kept"] = float(token_masks.float().mean())
        known = prompt.memory["tokens"].rewards
        known = known[known.isfinite()]
        if len(known):
            figures["dead_groups"] = float(bool((known == known[0]).all()))
        return StepResult(torch.stack(losses).sum(), figures)

    def token_masks(self, prompt: Prompted, video: VideoTokens, scores: Tensor) -> Tensor:
        """Return keep-masks (G_t, N) drawn from token scores (N,)."""
        c, draw = self.config, self.generator
        if c.sampler == "official":
            return release_sampling.token_masks(scores.cpu(), video.grid, prompt.ratio, c.token_rollouts, draw)
        return sampling.token_masks(
            scores, video.grid, prompt.ratio, c.token_rollouts, draw, sampler=c.sampler, over=c.over, width=c.width
        )

    def frame_masks(
        self, prompt: Prompted, video: VideoTokens, scores: Tensor, frame_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return frame masks (G_f, T) drawn from frame scores (T,), and their keep-masks (G_f, N)."""
        c, grid, ratio, draw = self.config, video.grid, prompt.ratio, self.generator
        if c.sampler == "official" and c.frame_rollouts:
            embeds = video.embeds.cpu()
            return release_sampling.frame_masks(embeds, frame_scores.cpu(), grid, ratio, c.frame_rollouts, draw)
        return sampling.frame_masks(scores, frame_scores, grid, ratio, c.frame_rollouts, draw, width=c.width)

    def rewards(self, prompt: Prompted, keep_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of each keep-mask (G, N), and how right the model is under it, both (G,) float32."""
        sample = prompt.sample
        if self.config.reward == "generate":
            texts = self.decode(prompt.rollouts.generate(keep_masks, self.config.answer_tokens))
            right = torch.tensor([judge(sample.kind, text, sample.truth) for text in texts], device=keep_masks.device)
            return right, right
        logits = prompt.rollouts.option_logits(keep_masks, sample.option_ids)  # (G, options)
        right = choice_reward(logits, prompt.answer)
        if self.config.reward in ("choice", "agreement"):
            return right, right
        if self.config.reward == "margin":
            return margin_reward(logits, prompt.answer, prompt.blind if self.config.blind_margin else None), right
        raise TrainingError(f"reward {self.config.reward!r} has no branch in CaCoVIDTrainer.rewards")

    def next_ratio(self, ratio: float, right: float, per_frame: int) -> float:
        """Return the sampling ratio of a prompt's next iteration (dynamic sample ratio).

        Halved if more than `ratio_high` of the last rollouts were right, doubled if less than `ratio_low` were, so that
        a group is neither all right nor all wrong; the release counts the thresholds themselves too. The bounds are one
        token a frame, below which the ratio changes nothing, and `MOST_RATIO`; a larger ratio stays.
        """
        c, release = self.config, self.config.sampler == "official"
        least = RELEASE_LEAST_RATIO if release else 1 / per_frame
        ratio = max(ratio, least)
        if right > c.ratio_high or (release and right == c.ratio_high):
            return max(ratio / 2, least)
        if right < c.ratio_low or (release and right == c.ratio_low):
            return max(ratio, min(2 * ratio, MOST_RATIO))
        return ratio


def difference(logits: Tensor) -> Tensor:
    """Return the logit of keep minus that of drop (N,) of logits (N, 2)."""
    return logits[:, 1] - logits[:, 0]
