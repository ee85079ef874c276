"""Optimizer steps of both tasks: losses, their order, and updates.

A batch may be split into micro-batches to need less memory (`accumulative_update`). Losses are sums over the
micro-batch divided by the target count of the global batch, so that gradients of micro-batches add up to
those of the batch.
"""

import torch

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.pretraining import DetectionLoss, MaskedLanguageModel, ReplacedTokenOutput, RTDModel
from DeBERTa.model.sharing import SharedTables
from DeBERTa.training.distributed import all_reduce_sum, broadcast_value, get_world_size
from DeBERTa.training.execution import autocast, build_loss_scaler
from DeBERTa.training.guard import UpdateGuard
from DeBERTa.training.metrics import Sums, add
from DeBERTa.training.objectives import DiscriminatorObjective, GeneratorObjective, MaskedLMObjective
from DeBERTa.training.optimizer import (
    build_optimizer,
    clip_gradients,
    compute_gradient_norm,
    compute_lr_factor,
    set_learning_rate,
)
from DeBERTa.training.parallel import (
    all_gather_full,
    gather_to_rank_zero,
    load_full_optimizer_state,
    sync_gradients,
    wrap_parallel,
)


class TrainingStep:
    """Base class of both tasks: precision, learning rate and update."""

    def __init__(self, config: TrainConfig, precision: str, device: torch.device, total_steps: int) -> None:
        self.config, self.precision, self.device = config, precision, device
        self.total_steps = total_steps
        self.scaler = build_loss_scaler(precision, device)
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.guard = UpdateGuard(config, device)

    def __call__(self, batch: Batch) -> Sums:
        """Take one step on this rank's batch and return its sums.

        They include gradient norms under `*grad_norm`.
        """
        self.guard.begin_step()
        sums = self.step(batch)
        self.scaler.update()
        self.guard.end_step()
        return sums

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        raise NotImplementedError

    def compute_outputs(self, batch: Batch) -> tuple[MaskedLoss, ReplacedTokenOutput | None]:
        """Return losses and logits of a batch, for evaluation.

        Collective: every rank calls it.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Return the state of the next step besides weights and step number.

        Collective: every rank calls it. Tensors are full, in host memory, and on rank 0 alone.
        """
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {
            "optimizers": gather_to_rank_zero(optimizers),
            "scaler": self.scaler.state_dict(),
            "stability": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict | None) -> None:
        """Resume from rank 0's `state`, as `state_dict` returned it.

        Collective: every rank calls it.
        """
        for name, optimizer in self.optimizers.items():
            load_full_optimizer_state(optimizer, state["optimizers"][name] if state else None)
        others = {name: state[name] for name in ("scaler", "stability")} if state else None
        others = broadcast_value(others)
        self.scaler.load_state_dict(others["scaler"])
        self.guard.load_state_dict(others["stability"])

    def set_learning_rate(self, update: int) -> float:
        """Set the learning rate of every optimizer for update number `update` (from 1).

        Returns the factor on the peak learning rates.
        """
        factor = compute_lr_factor(update, self.total_steps, self.config)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, factor)
        return factor

    def split(self, batch: Batch) -> list[tuple[Batch, bool]]:
        """Return this rank's micro-batches on the device.

        Each comes with a flag that is true for the last one.
        """
        micro_batches = batch.split(self.config.accumulative_update)
        return [
            (b.to(self.device), number == len(micro_batches))
            for number, b in enumerate(micro_batches, start=1)
        ]

    def count_targets(self, batch: Batch) -> torch.Tensor:
        """Return the numbers of masked and real tokens per rank, float32 [2].

        They are those of the global batch, divided by the number of ranks. Summed losses are divided by
        these; gradients are averaged over ranks.
        """
        counts = torch.tensor([batch.masked_tokens, batch.real_tokens], dtype=torch.float32)
        return all_reduce_sum(counts.to(self.device, non_blocking=True)).clamp(min=1) / get_world_size()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled for float16."""
        self.scaler.scale(loss).backward()

    def update(self, name: str, sums: Sums, prefix: str, losses: tuple[str, ...]) -> bool:
        """Clip gradients by their common norm, step, and clear them.

        Returns whether optimizer `name` took its step. The norm before clipping is added to `sums`. When it
        or one of `losses` is not finite on any rank, the update is skipped on every rank.
        """
        optimizer = self.optimizers[name]
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = compute_gradient_norm(parameters)
        sums[f"{prefix}grad_norm"] = all_gather_full(norm)
        is_allowed = self.guard.allows_update(sums, losses, sums[f"{prefix}grad_norm"])
        if is_allowed:
            clip_gradients(parameters, norm, self.config.max_grad_norm)
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return is_allowed


class MaskedLMStep(TrainingStep):
    """Masked language modeling (DeBERTa, section 3.2; BERT, section 3.1)."""

    def __init__(
        self,
        model: MaskedLanguageModel,
        config: TrainConfig,
        precision: str,
        device: torch.device,
        total_steps: int,
    ) -> None:
        super().__init__(config, precision, device, total_steps)
        self.objective = MaskedLMObjective(model)
        self.wrapped = wrap_parallel(self.objective, config, device)
        self.optimizers["model"] = build_optimizer([(model, config.learning_rate)], config)

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        targets, _ = self.count_targets(batch)
        sums: Sums = {}
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(self.wrapped, is_last):
                with autocast(self.precision, self.device):
                    masked = self.wrapped(micro_batch)
                self.backward(masked.loss.sum() / targets)
            add(sums, sum_masked_lm(masked, ""))
        self.update("model", sums, "", ("loss",))
        return sums

    def compute_outputs(self, batch: Batch) -> tuple[MaskedLoss, None]:
        """Return the losses of a batch, for evaluation.

        Collective: every rank calls it.
        """
        return self.objective(batch), None


class ReplacedTokenStep(TrainingStep):
    """Replaced token detection (ELECTRA; DeBERTaV3, section 3).

    Decoupled: the generator's update comes first. The discriminator then sees the tokens sampled before that
    update and, where tables are shared, the generator's updated ones. Joint: one backward pass of mlm +
    lambda * rtd. Under ES both losses train one table, so that the update is always joint.

    Decoupled, when the generator's update is skipped (`UpdateGuard`), so is the discriminator's. The
    generator's update comes before the discriminator's loss is known, and is not undone when the
    discriminator's is skipped.
    """

    def __init__(
        self, model: RTDModel, config: TrainConfig, precision: str, device: torch.device, total_steps: int
    ) -> None:
        super().__init__(config, precision, device, total_steps)
        self.model = model
        self.is_decoupled = config.decoupled_training and model.config.embedding_sharing != "es"
        peak = config.discriminator_learning_rate or config.learning_rate
        models = {
            "generator": (model.generator, config.learning_rate),
            "discriminator": (model.discriminator, peak),
        }
        if self.is_decoupled:
            self.generator = GeneratorObjective(model.generator)
            self.discriminator = DiscriminatorObjective(model.discriminator)
            self.wrapped_generator = wrap_parallel(self.generator, config, device)
            self.wrapped_discriminator = wrap_parallel(self.discriminator, config, device)
            self.optimizers = {name: build_optimizer([part], config) for name, part in models.items()}
        else:
            self.wrapped = wrap_parallel(model, config, device)
            self.optimizers = {"both": build_optimizer(list(models.values()), config)}

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        return self._step_decoupled(batch) if self.is_decoupled else self._step_joint(batch)

    def _step_decoupled(self, batch: Batch) -> Sums:
        masked_targets, targets = self.count_targets(batch)
        sums: Sums = {}
        corrupted = []
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(self.wrapped_generator, is_last):
                with autocast(self.precision, self.device):
                    generated = self.wrapped_generator(micro_batch)
                self.backward(generated.masked.loss.sum() / masked_targets)
            add(sums, sum_masked_lm(generated.masked, "generator_"))
            corrupted.append((micro_batch, is_last, generated.corrupted_ids))
        if not self.update("generator", sums, "generator_", ("generator_loss",)):
            return sums
        shared = self.gather_shared_tables()
        for micro_batch, is_last, corrupted_ids in corrupted:
            with sync_gradients(self.wrapped_discriminator, is_last):
                with autocast(self.precision, self.device):
                    detected = self.wrapped_discriminator(micro_batch, corrupted_ids, shared)
                self.backward(self.config.rtd_lambda * detected.loss / targets)
            add(sums, sum_detection(detected, micro_batch))
        self.update("discriminator", sums, "discriminator_", ("discriminator_loss",))
        return sums

    def _step_joint(self, batch: Batch) -> Sums:
        masked_targets, targets = self.count_targets(batch)
        sums: Sums = {}
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(self.wrapped, is_last):
                with autocast(self.precision, self.device):
                    (masked, _), detected = self.wrapped(micro_batch)
                self.backward(
                    masked.loss.sum() / masked_targets + self.config.rtd_lambda * detected.loss / targets
                )
            add(sums, sum_masked_lm(masked, "generator_") | sum_detection(detected, micro_batch))
        self.update("both", sums, "", ("generator_loss", "discriminator_loss"))
        return sums

    def gather_shared_tables(self) -> SharedTables | None:
        """Return the generator's current tables, full and without gradient.

        Collective: every rank calls it.
        """
        shared = self.model.get_shared_tables()
        return SharedTables(*(all_gather_full(table.detach()) for table in shared)) if shared else None

    def compute_outputs(self, batch: Batch) -> tuple[MaskedLoss, ReplacedTokenOutput]:
        """Return losses and logits of a batch, for evaluation.

        Collective: every rank calls it.
        """
        if not self.is_decoupled:
            generated, detected = self.model(batch, per_token=True)
        else:
            generated = self.generator(batch)
            shared = self.gather_shared_tables()
            detected = self.discriminator(batch, generated.corrupted_ids, shared, per_token=True)
        return generated.masked, detected


def sum_masked_lm(masked: MaskedLoss, prefix: str) -> Sums:
    """Return summed loss, correct predictions and target count."""
    return {
        f"{prefix}loss": masked.loss.detach().sum(),
        f"{prefix}correct": masked.correct.sum(),
        f"{prefix}targets": make_scalar(masked.loss.numel(), masked.loss.device),
    }


def sum_detection(detected: DetectionLoss, batch: Batch) -> Sums:
    """Return summed loss, correct decisions and target count."""
    return {
        "discriminator_loss": detected.loss.detach(),
        "discriminator_correct": detected.correct,
        "discriminator_targets": make_scalar(batch.real_tokens, detected.loss.device),
    }


def make_scalar(number: int, device: torch.device) -> torch.Tensor:
    """Return a host number as a 0-d tensor without synchronizing with the device."""
    return torch.full((), number, device=device)
