"""One rank between two steps: its weights, and all that decides how they change next."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from course_utils.checkpoint import Manifest, RankState, collect, restore
from course_utils.devices import place_rank
from course_utils.fingerprints import LOSSES, StageRecord
from course_utils.optimization import LossScaler, Noam, clip_by_global_norm, gradient_norms
from course_utils.pipeline import Pipeline
from course_utils.precision import LOW_PRECISION
from course_utils.recipes import TrainingConfig
from course_utils.schedules import Schedule
from course_utils.stages import CutModel, Stage
from course_utils.ties import Ties
from course_utils.transports import Transport


@dataclass
class Step:
    """What a step of training reports."""

    number: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    skipped: bool
    loss_scale: float


class TrainingState:
    """What changes from step to step on one rank: its weights, and all that decides how they change next.

    Args:
        cut: the whole model.
        stages: those of this rank; there may be none.
        transport: needed if other ranks have stages whose parameters are tied to some of this one.
        rank_of_stage: likewise; all on this rank if it is not given.
    """

    def __init__(
        self,
        config: TrainingConfig,
        cut: CutModel,
        stages: Iterable[Stage],
        transport: Transport | None = None,
        rank_of_stage: Sequence[int] | None = None,
    ):
        self.config, self.steps_done, self.stages = config, 0, list(stages)
        self.skipped_in_a_row = 0
        self.named = [pair for stage in self.stages for pair in stage.named_parameters_globally()]
        self.parameters: list[Tensor] = [parameter for _, parameter in self.named]
        self.place = {name: i for i, name in enumerate(cut.parameter_names)}
        rank_of_stage = rank_of_stage or [0] * cut.num_stages
        rank_of = {name: rank_of_stage[cut.stage_of(name)] for group in config.tie for name in group}
        self.ties = Ties(config.tie, rank_of, dict(self.named), transport)
        self.ties.make_equal(cut, config.seed)
        # Adam with the settings of Vaswani et al. (2017), section 5.3
        self.optimizer = torch.optim.Adam([{"params": self.parameters}], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
        self.noam = Noam(self.optimizer, config.model.d_model, config.warm_up, config.learning_rate_factor)
        is_scaled = config.precision == "fp16" or config.loss_scale is not None
        self.scaler = LossScaler(config.loss_scale or DEFAULT_LOSS_SCALE, enabled=is_scaled)
        self.record = StageRecord()
        self.origin = "weights drawn anew"

    def take_in(self, losses: dict[int, Tensor]) -> Tensor:
        """After the backwards: the norms of this rank's gradients, (number of parameters of the model,) float32."""
        self.ties.add_up()
        self.scaler.unscale(self.parameters)
        self.record.add_losses(losses)
        if self.steps_done < self.config.recorded_steps:
            self.record.add_gradients(self.named)
        own = ((self.place[name], parameter) for name, parameter in self.named if name not in self.ties.repeated)
        return gradient_norms(own, len(self.place))

    def update(self, norms: Tensor, losses: dict[int, Tensor], num_tokens: int) -> Step:
        """Change the weights, or skip the step: all ranks decide alike, because they see the norms of all."""
        learning_rate, loss_scale = float(self.noam.get_last_lr()[0]), self.scaler.scale
        norm = clip_by_global_norm(self.parameters, norms, self.config.max_norm)
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
            self.noam.step()
        # With a loss scale above 1 a skip is how it finds its size.
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped and loss_scale <= 1 else 0
        self.scaler.update(skipped)
        self.steps_done += 1
        loss = sum(loss.item() for loss in losses.values())
        return Step(self.steps_done - 1, loss, norm, learning_rate, num_tokens, skipped, loss_scale)

    def to_save(self) -> RankState:
        """What a checkpoint needs of this rank."""
        return RankState(
            step=self.steps_done,
            stages={s.index: collect(s.named_parameters_globally(), self.optimizer) for s in self.stages},
            record=self.record.summary(),
            shared={"noam": self.noam.state_dict(), "loss_scaler": self.scaler.state_dict()},
            config=asdict(self.config),
        )

    def resume(self, manifest: Manifest) -> None:
        """Go on where a run of any number of stages was saved. Raises CheckpointError."""
        restore(manifest, self.named, self.optimizer)
        self.noam.load_state_dict(dict(manifest.shared["noam"]))
        for group, learning_rate in zip(self.optimizer.param_groups, self.noam.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        self.scaler.load_state_dict(dict(manifest.shared["loss_scaler"]))
        own = [name for name, _ in self.named] + [LOSSES for stage in self.stages if stage.is_last]
        self.record = StageRecord(manifest.record_of(own))
        self.steps_done = manifest.step
        self.origin = f"weights of a checkpoint with {hashlib.sha256(manifest.to_json()).hexdigest()[:12]}"

    def started_as(self) -> str:
        """All that must be the same on every rank when a run begins or is resumed, in words, for `transfer.StepPlan`.

        It says where the weights come from: two ranks with other seeds or other checkpoints would train two models.
        """
        config = {name: value for name, value in asdict(self.config).items() if name != "model"}
        parts = [f"{name} {value}" for name, value in {**config, **asdict(self.config.model)}.items()]
        return "; ".join([*parts, f"begins at step {self.steps_done}", self.origin, f"torch {torch.__version__}"])

    def dropout_key(self) -> tuple[int, int] | None:
        return (self.config.seed, self.steps_done) if self.config.model.dropout > 0 else None


DEFAULT_LOSS_SCALE = 65536.0  # as torch.amp.GradScaler

Engine = TypeVar("Engine", bound=Pipeline)


def build_rank(
    transport: Transport, config: TrainingConfig, cut: CutModel, schedule: Schedule, engine: type[Engine]
) -> tuple[Engine, TrainingState]:
    """The stages that a rank holds, in the engine that runs them and in the state that changes them."""
    device = place_rank(transport, config.device)
    stages = {s: cut.build(s, config.seed, device) for s in schedule.stages_of(transport.rank)}
    low_precision, wire_dtype = (LOW_PRECISION.get(name or "") for name in (config.precision, config.wire_dtype))
    options: dict[str, Any] = {"low_precision": low_precision, "wire_dtype": wire_dtype, "device": device}
    pipeline = engine(stages, schedule, transport, cut.carry_after, **options)
    return pipeline, TrainingState(config, cut, stages.values(), transport, schedule.rank_of_stage)
