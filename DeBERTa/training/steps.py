"""One optimiser step: what is computed, in which order, and what is updated.

A batch may be cut into parts to need less memory (`accumulative_update`). Losses are sums over the part divided by the
target count of the whole batch, so that the parts' gradients add up to those of the uncut batch.
"""

import math

import torch

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.model.pretraining import (
    DetectionLoss,
    MaskedLanguageModel,
    ReplacedTokenOutput,
    RTDModel,
    corrupt,
)
from DeBERTa.model.sharing import SharedTables
from DeBERTa.model.vocabulary import MaskedLoss
from DeBERTa.training.distributed import all_reduce_sum, broadcast_object, get_world_size
from DeBERTa.training.guard import Stability
from DeBERTa.training.metrics import Sums, add
from DeBERTa.training.optimizer import (
    AdamW,
    build_optimizer,
    gradient_norm,
    schedule,
    set_learning_rate,
    warmup_steps,
)
from DeBERTa.training.parallel import (
    DetectionObjective,
    JointObjective,
    MaskedLMObjective,
    all_gather_full,
    gather_to_rank_zero,
    load_full_optimizer_state,
    sync_gradients,
    wrap_parallel,
)
from DeBERTa.training.precision import autocast, loss_scaler


class TrainingStep:
    """What both tasks share: precision, learning rate, update."""

    def __init__(self, config: TrainConfig, precision: str, device: torch.device, total_steps: int) -> None:
        self.config, self.precision, self.device = config, precision, device
        self.total_steps = total_steps
        self.scaler = loss_scaler(precision, device)
        self.optimizers: dict[str, AdamW] = {}
        self.guard = Stability(config, device)

    def __call__(self, batch: Batch) -> Sums:
        """One step on this process's part of the batch: its sums, and the gradient norms under `*grad_norm`."""
        self.guard.begin_step()
        sums = self.step(batch)
        self.scaler.update()
        self.guard.end_step()
        return sums

    def step(self, batch: Batch) -> Sums:
        raise NotImplementedError

    def outputs(self, part: Batch) -> tuple[MaskedLoss, ReplacedTokenOutput | None]:
        """Losses and logits on a batch, for evaluation. Called in every process alike."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Return what the next step depends on besides weights and step number.

        Called on every rank. Tensors are full, in host memory, and on rank 0 alone.
        """
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {
            "optimizers": gather_to_rank_zero(optimizers),
            "scaler": self.scaler.state_dict(),
            "stability": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict | None) -> None:
        """Resume from rank 0's `state`, as `state_dict` returned it. Called on every rank."""
        for name, optimizer in self.optimizers.items():
            load_full_optimizer_state(optimizer, state["optimizers"][name] if state else None)
        others = {name: state[name] for name in ("scaler", "stability")} if state else None
        others = broadcast_object(others)
        self.scaler.load_state_dict(others["scaler"])
        self.guard.load_state_dict(others["stability"])

    def learning_rate(self, update: int) -> float:
        """Set every optimiser's rate for update number `update` (from 1); returns the factor on the peaks."""
        warmup = warmup_steps(self.config, self.total_steps)
        factor = schedule(update, self.total_steps, warmup, self.config.lr_schedule_ends)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, factor)
        return factor

    def parts(self, batch: Batch) -> list[tuple[Batch, bool]]:
        """The parts of this process's batch on the device, and whether each is the last."""
        parts = batch.split(self.config.accumulative_update)
        return [(part.to(self.device), number == len(parts)) for number, part in enumerate(parts, start=1)]

    def global_counts(self, batch: Batch) -> torch.Tensor:
        """What to divide summed losses by, float32 [2]: masked and real tokens of the global batch.

        Divided by the number of processes, because gradients are averaged over them.
        """
        counts = torch.tensor([batch.masked_tokens, batch.real_tokens], dtype=torch.float32)
        return all_reduce_sum(counts.to(self.device, non_blocking=True)).clamp(min=1) / get_world_size()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, name: str, sums: Sums, prefix: str, losses: tuple[str, ...]) -> bool:
        """Clip the gradient of one optimiser's parameters as one vector, step, clear; whether the step was taken.

        The norm before clipping goes to `sums`. When it or one of `losses` is not finite in any process, all that the
        optimiser holds is left unchanged in every process.
        """
        optimizer = self.optimizers[name]
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters)
        sums[f"{prefix}grad_norm"] = all_gather_full(norm)
        taken = self.guard.allows(sums, losses, sums[f"{prefix}grad_norm"])
        if taken:
            optimizer.clip(norm, self.config.max_grad_norm or math.inf)
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return taken


class MaskedLMStep(TrainingStep):
    """Masked language modelling (DeBERTa, section 3.2; BERT, section 3.1)."""

    def __init__(
        self,
        model: MaskedLanguageModel,
        config: TrainConfig,
        precision: str,
        device: torch.device,
        total_steps: int,
    ) -> None:
        super().__init__(config, precision, device, total_steps)
        self.objective = MaskedLMObjective(model, sample=False)
        self.trained = wrap_parallel(self.objective, config, device)
        self.optimizers["model"] = build_optimizer([(model, config.learning_rate)], config)

    def step(self, batch: Batch) -> Sums:
        targets, _ = self.global_counts(batch)
        sums: Sums = {}
        for part, last in self.parts(batch):
            with sync_gradients(self.trained, last):
                with autocast(self.precision, self.device):
                    out = self.trained(part)
                self.backward(out.loss.sum() / targets)
            add(sums, masked_lm_sums(out, ""))
        self.update("model", sums, "", ("loss",))
        return sums

    def outputs(self, part: Batch) -> tuple[MaskedLoss, None]:
        """For evaluation. Called in every process alike."""
        return self.objective(part), None


class ReplacedTokenStep(TrainingStep):
    """Replaced token detection (ELECTRA; DeBERTaV3, section 3).

    Decoupled: the generator's update comes first; the discriminator then sees the tokens sampled before that update
    and, where tables are shared, the generator's updated ones. Joint: one backward pass of mlm + lambda * rtd. Under ES
    both losses train one table, so that the update is always joint.

    Decoupled, when the generator's update is left out (`Stability`), so is the discriminator's. The generator's update
    comes before the discriminator's loss is known, and stands when the discriminator's is left out.
    """

    def __init__(
        self, model: RTDModel, config: TrainConfig, precision: str, device: torch.device, total_steps: int
    ) -> None:
        super().__init__(config, precision, device, total_steps)
        self.model = model
        self.decoupled = config.decoupled_training and model.config.embedding_sharing != "es"
        if self.decoupled:
            self.generator = MaskedLMObjective(model.generator, sample=True)
            self.discriminator = DetectionObjective(model.discriminator)
            self.trained_generator = wrap_parallel(self.generator, config, device)
            self.trained_discriminator = wrap_parallel(self.discriminator, config, device)
        else:
            self.both = JointObjective(model)
            self.trained_both = wrap_parallel(self.both, config, device)
        peak = config.discriminator_learning_rate or config.learning_rate
        parts = {
            "generator": (model.generator, config.learning_rate),
            "discriminator": (model.discriminator, peak),
        }
        if self.decoupled:
            self.optimizers = {name: build_optimizer([part], config) for name, part in parts.items()}
        else:
            self.optimizers = {"both": build_optimizer(list(parts.values()), config)}

    def step(self, batch: Batch) -> Sums:
        return self._decoupled(batch) if self.decoupled else self._joint(batch)

    def _decoupled(self, batch: Batch) -> Sums:
        masked_targets, targets = self.global_counts(batch)
        sums: Sums = {}
        corrupted = []
        for part, last in self.parts(batch):
            with sync_gradients(self.trained_generator, last):
                with autocast(self.precision, self.device):
                    out = self.trained_generator(part)
                self.backward(out.loss.sum() / masked_targets)
            add(sums, masked_lm_sums(out, "generator_"))
            corrupted.append((part, last, corrupt(part.input_ids, part.labels, out.samples)))
        if not self.update("generator", sums, "generator_", ("generator_loss",)):
            return sums
        shared = self.shared_tables()
        for part, last, corrupted_ids in corrupted:
            with sync_gradients(self.trained_discriminator, last):
                with autocast(self.precision, self.device):
                    found = self.trained_discriminator(part, corrupted_ids, shared)
                self.backward(self.config.rtd_lambda * found.loss / targets)
            add(sums, self.detection_sums(found, part))
        self.update("discriminator", sums, "discriminator_", ("discriminator_loss",))
        return sums

    def _joint(self, batch: Batch) -> Sums:
        masked_targets, targets = self.global_counts(batch)
        sums: Sums = {}
        for part, last in self.parts(batch):
            with sync_gradients(self.trained_both, last):
                with autocast(self.precision, self.device):
                    out, found = self.trained_both(part)
                self.backward(out.loss.sum() / masked_targets + self.config.rtd_lambda * found.loss / targets)
            add(sums, masked_lm_sums(out, "generator_") | self.detection_sums(found, part))
        self.update("both", sums, "", ("generator_loss", "discriminator_loss"))
        return sums

    def shared_tables(self) -> SharedTables | None:
        """The generator's tables as they are now, whole and without gradient. Called in every process."""
        shared = self.model.shared_tables()
        return SharedTables(*(all_gather_full(table.detach()) for table in shared)) if shared else None

    def outputs(self, part: Batch) -> tuple[MaskedLoss, ReplacedTokenOutput]:
        """For evaluation. Called in every process alike."""
        if not self.decoupled:
            return self.both(part, whole=True)
        out = self.generator(part)
        corrupted_ids = corrupt(part.input_ids, part.labels, out.samples)
        return out, self.discriminator(part, corrupted_ids, self.shared_tables(), whole=True)

    def detection_sums(self, found: DetectionLoss, part: Batch) -> Sums:
        """Summed loss, correct decisions and target count."""
        return {
            "discriminator_loss": found.loss.detach(),
            "discriminator_correct": found.correct,
            "discriminator_targets": count(part.real_tokens, self.device),
        }


def masked_lm_sums(out: MaskedLoss, prefix: str) -> Sums:
    """Summed loss, correct predictions and target count."""
    return {
        f"{prefix}loss": out.loss.detach().sum(),
        f"{prefix}correct": out.correct.sum(),
        f"{prefix}targets": count(out.loss.numel(), out.loss.device),
    }


def count(number: int, device: torch.device) -> torch.Tensor:
    """A number known to the host as a tensor, without waiting for the device."""
    return torch.full((), number, device=device)
