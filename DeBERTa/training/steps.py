"""Optimizer steps of both tasks: losses, their order, and updates.

A batch may be split into micro-batches to need less memory (`accumulative_update`). Losses are sums over the
micro-batch divided by the target count of the global batch, so that gradients of micro-batches add up to
those of the batch.
"""

import math

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.model.losses import MaskedLoss
from DeBERTa.model.pretraining import (
    DetectionLoss,
    Generated,
    MaskedLanguageModel,
    ReplacedTokenOutput,
    RTDModel,
)
from DeBERTa.model.sharing import SharedTables
from DeBERTa.training.distributed import all_reduce_sum, broadcast_value, get_world_size
from DeBERTa.training.execution import autocast, build_loss_scaler
from DeBERTa.training.guard import UpdateGuard
from DeBERTa.training.metrics import Sums, add
from DeBERTa.training.optimizer import build_optimizer, compute_gradient_norm, compute_lr_factor
from DeBERTa.training.parallel import (
    all_gather_full,
    gather_to_rank_zero,
    load_full_optimizer_state,
    sync_gradients,
    wrap_parallel,
)

Outputs = tuple[Generated, ReplacedTokenOutput | None]  # of the model or generator, and the discriminator


class TrainingStep:
    """Base class of both tasks: precision, learning rate and update."""

    def __init__(
        self,
        model: MaskedLanguageModel | RTDModel,
        config: TrainConfig,
        precision: str,
        device: torch.device,
        total_steps: int,
    ) -> None:
        self.model, self.config, self.precision, self.device = model, config, precision, device
        self.total_steps = total_steps
        self.scaler = build_loss_scaler(precision, device)
        self.guard = UpdateGuard(config, device)
        updates = self.list_updates()
        parts = {name: models[0][0] if len(models) == 1 else model for name, models in updates.items()}
        self.wrapped = wrap_parallel(model, parts, config, device, precision)  # by the name of the update
        self.optimizers = {name: build_optimizer(models, config) for name, models in updates.items()}

    def list_updates(self) -> dict[str, list[tuple[nn.Module, float]]]:
        """Return the models of each update, with their peak learning rates."""
        raise NotImplementedError

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        raise NotImplementedError

    def compute_outputs(self, batch: Batch) -> Outputs:
        """Return losses, samples and logits of a batch on the device.

        Collective: every rank calls it.
        """
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Sums:
        """Take one step on this rank's batch and return its sums.

        They include gradient norms under `*grad_norm`.
        """
        self.guard.begin_step()
        sums = self.step(batch)
        self.scaler.update()
        self.guard.end_step()
        return sums

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Outputs:
        """Return `compute_outputs` without gradients and dropout."""
        was_training = self.model.training
        self.model.eval()
        # Without compiled layers: graphs for other batch sizes and without dropout would serve a few batches,
        # and an evaluation before the first step would make the graph of training dynamic.
        with autocast(self.precision, self.device), torch.compiler.set_stance("force_eager"):
            outputs = self.compute_outputs(batch)
        self.model.train(was_training)
        return outputs

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
        scaler, guard = broadcast_value((state["scaler"], state["stability"]) if state else None)
        self.scaler.load_state_dict(scaler)
        self.guard.load_state_dict(guard)

    def set_learning_rate(self, update: int) -> None:
        """Set the learning rate of every optimizer for update number `update` (from 1)."""
        factor = compute_lr_factor(update, self.total_steps, self.config)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

    def split(self, batch: Batch) -> list[tuple[Batch, bool]]:
        """Return this rank's micro-batches on the device, and whether each is the last."""
        *others, last = (part.to(self.device) for part in batch.split(self.config.accumulative_update))
        return [*((part, False) for part in others), (last, True)]

    def count_targets(self, batch: Batch) -> torch.Tensor:
        """Return the numbers of masked and real tokens per rank, float32 [2].

        They are those of the global batch, divided by the number of ranks. Summed losses are divided by
        these; gradients are averaged over ranks.
        """
        counts = torch.tensor([batch.masked_tokens, batch.real_tokens], dtype=torch.float32)
        return all_reduce_sum(counts.to(self.device, non_blocking=True)).clamp(min=1) / get_world_size()

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
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm or math.inf, norm)
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return is_allowed


class MaskedLMStep(TrainingStep):
    """Masked language modeling (DeBERTa, section 2.2; BERT, section 3.1)."""

    model: MaskedLanguageModel

    def list_updates(self) -> dict[str, list[tuple[nn.Module, float]]]:
        """Return the one update."""
        return {"model": [(self.model, self.config.learning_rate)]}

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        objective = self.wrapped["model"]
        targets, _ = self.count_targets(batch)
        sums: Sums = {}
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(objective, is_last):
                with autocast(self.precision, self.device):
                    masked = objective(self.model.compute_masked_loss, micro_batch, is_sampled=False)
                self.scaler.scale(masked.loss.sum() / targets).backward()
            add(sums, sum_masked_lm(masked, ""))
        self.update("model", sums, "", ("loss",))
        return sums

    def compute_outputs(self, batch: Batch) -> Outputs:
        """Return losses and samples of a batch."""
        return self.wrapped["model"](self.model.generate, batch), None


class ReplacedTokenStep(TrainingStep):
    """Replaced token detection (ELECTRA; DeBERTaV3, section 3).

    Decoupled: the generator's update comes first. The discriminator then sees the tokens sampled before that
    update and, where tables are shared, the generator's updated ones. Joint: one backward pass of mlm +
    lambda * rtd. Under ES both losses train one table, so that the update is always joint.

    Decoupled, when the generator's update is skipped (`UpdateGuard`), so is the discriminator's. The
    generator's update comes before the discriminator's loss is known, and is not undone when the
    discriminator's is skipped.
    """

    model: RTDModel

    @property
    def is_decoupled(self) -> bool:
        """Return whether each model has an update of its own."""
        return self.config.decoupled_training and self.model.config.embedding_sharing != "es"

    def list_updates(self) -> dict[str, list[tuple[nn.Module, float]]]:
        """Return the updates of generator and discriminator, or the joint one."""
        rate = self.config.learning_rate
        generator = (self.model.generator, rate)
        discriminator = (self.model.discriminator, self.config.discriminator_learning_rate or rate)
        if self.is_decoupled:
            return {"generator": [generator], "discriminator": [discriminator]}
        return {"both": [generator, discriminator]}

    def step(self, batch: Batch) -> Sums:
        """Return the sums of one step."""
        return self._step_decoupled(batch) if self.is_decoupled else self._step_joint(batch)

    def _step_decoupled(self, batch: Batch) -> Sums:
        generator, discriminator = self.wrapped.values()
        masked_targets, targets = self.count_targets(batch)
        sums: Sums = {}
        corrupted = []
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(generator, is_last):
                with autocast(self.precision, self.device):
                    masked, corrupted_ids = generator(self.model.generator.generate, micro_batch)
                self.scaler.scale(masked.loss.sum() / masked_targets).backward()
            add(sums, sum_masked_lm(masked, "generator_"))
            corrupted.append((micro_batch, is_last, corrupted_ids))
        if not self.update("generator", sums, "generator_", ("generator_loss",)):
            return sums
        shared = self.gather_shared_tables()
        detect = self.model.discriminator.compute_detection_loss
        for micro_batch, is_last, corrupted_ids in corrupted:
            mask, labels = micro_batch.input_mask, micro_batch.labels
            with sync_gradients(discriminator, is_last):
                with autocast(self.precision, self.device):
                    detected = discriminator(detect, corrupted_ids, mask, labels, shared)
                self.scaler.scale(self.config.rtd_lambda * detected.loss / targets).backward()
            add(sums, sum_detection(detected, micro_batch))
        self.update("discriminator", sums, "discriminator_", ("discriminator_loss",))
        return sums

    def _step_joint(self, batch: Batch) -> Sums:
        both = self.wrapped["both"]
        masked_targets, targets = self.count_targets(batch)
        sums: Sums = {}
        for micro_batch, is_last in self.split(batch):
            with sync_gradients(both, is_last):
                with autocast(self.precision, self.device):
                    (masked, _), detected = both(self.model, micro_batch)
                mlm = masked.loss.sum() / masked_targets
                rtd = self.config.rtd_lambda * detected.loss / targets
                self.scaler.scale(mlm + rtd).backward()
            add(sums, sum_masked_lm(masked, "generator_") | sum_detection(detected, micro_batch))
        self.update("both", sums, "", ("generator_loss", "discriminator_loss"))
        return sums

    def gather_shared_tables(self) -> SharedTables | None:
        """Return the generator's current tables, full and without gradient.

        Collective: every rank calls it.
        """
        shared = self.model.get_shared_tables()
        return SharedTables(*(all_gather_full(table.detach()) for table in shared)) if shared else None

    def compute_outputs(self, batch: Batch) -> Outputs:
        """Return losses, samples and logits of a batch."""
        if not self.is_decoupled:
            return self.wrapped["both"](self.model, batch, is_per_token=True)
        # As `RTDModel.forward`, in two calls: each wrapper all-gathers the parameters of its own update.
        generator, discriminator = self.wrapped.values()
        generated = generator(self.model.generator.generate, batch)
        shared = self.gather_shared_tables()
        return generated, discriminator(
            self.model.discriminator, generated.corrupted_ids, batch.input_mask, batch.labels, shared
        )


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
