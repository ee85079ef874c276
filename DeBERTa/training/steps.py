"""One optimiser step: what is computed, in which order, and what is updated.

A batch may be cut into parts to need less memory (`accumulative_update`). Losses are sums over the part divided by the
target count of the whole batch, so that the parts' gradients add up to those of the uncut batch.
"""

import torch
from torch import nn

from DeBERTa.config import TrainConfig
from DeBERTa.data.dataset import Batch
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel, corrupt
from DeBERTa.model.vocabulary import MaskedLoss
from DeBERTa.training.metrics import Sums, add
from DeBERTa.training.optimizer import build_optimizer, schedule, set_learning_rate, warmup_steps
from DeBERTa.training.precision import autocast, loss_scaler
from DeBERTa.training.stability import Stability


class TrainingStep:
    """What both tasks share: precision, learning rate, update."""

    def __init__(self, config: TrainConfig, precision: str, device: torch.device, total_steps: int) -> None:
        self.config, self.precision, self.device = config, precision, device
        self.total_steps = total_steps
        self.scaler = loss_scaler(precision, device)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stability = Stability(config, device)

    def __call__(self, batch: Batch) -> Sums:
        """One step on this process's part of the batch: its sums, and the gradient norms under `*grad_norm`."""
        self.stability.begin_step()
        sums = self.step(batch)
        self.scaler.update()
        self.stability.end_step()
        return sums

    def step(self, batch: Batch) -> Sums:
        raise NotImplementedError

    def state_dict(self) -> dict:
        """All that the next step depends on besides the weights and its number. Called in every process."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "stability": self.stability.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave. Called in every process."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.stability.load_state_dict(state["stability"])

    def learning_rate(self, update: int) -> float:
        """Set every optimiser's rate for update number `update` (from 1); returns the factor on the peaks."""
        warmup = warmup_steps(self.config, self.total_steps)
        factor = schedule(update, self.total_steps, warmup, self.config.lr_schedule_ends)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, factor)
        return factor

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
        limit = self.config.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        sums[f"{prefix}grad_norm"] = norm
        taken = self.stability.allows(sums, losses, norm)
        if taken:
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return taken


class MaskedLMStep(TrainingStep):
    """Masked language modelling (DeBERTa, section 3.2; BERT, section 3.1)."""

    def __init__(
        self, model: MaskedLanguageModel, config: TrainConfig, precision: str, device: torch.device, total_steps: int
    ) -> None:
        super().__init__(config, precision, device, total_steps)
        self.model = model
        self.optimizers["model"] = build_optimizer([(model, config.learning_rate)], config)

    def step(self, batch: Batch) -> Sums:
        targets = max(batch.masked_tokens, 1)
        sums: Sums = {}
        for part in batch.split(self.config.accumulative_update):
            part = part.to(self.device)
            with autocast(self.precision, self.device):
                out = self.model.masked_loss(part, sample=False)
            self.backward(out.loss.sum() / targets)
            add(sums, masked_lm_sums(out, ""))
        self.update("model", sums, "", ("loss",))
        return sums


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
        peak = config.discriminator_learning_rate or config.learning_rate
        parts = {"generator": (model.generator, config.learning_rate), "discriminator": (model.discriminator, peak)}
        if self.decoupled:
            self.optimizers = {name: build_optimizer([part], config) for name, part in parts.items()}
        else:
            self.optimizers = {"both": build_optimizer(list(parts.values()), config)}

    def step(self, batch: Batch) -> Sums:
        return self._decoupled(batch) if self.decoupled else self._joint(batch)

    def _decoupled(self, batch: Batch) -> Sums:
        sums: Sums = {}
        parts = [part.to(self.device) for part in batch.split(self.config.accumulative_update)]
        corrupted = []
        for part in parts:
            loss, corrupted_ids = self._generate(part, sums)
            self.backward(loss / max(batch.masked_tokens, 1))
            corrupted.append(corrupted_ids)
        if not self.update("generator", sums, "generator_", ("generator_loss",)):
            return sums
        for part, corrupted_ids in zip(parts, corrupted, strict=True):
            loss = self._discriminate(part, corrupted_ids, sums)
            self.backward(self.config.rtd_lambda * loss / batch.real_tokens)
        self.update("discriminator", sums, "discriminator_", ("discriminator_loss",))
        return sums

    def _joint(self, batch: Batch) -> Sums:
        sums: Sums = {}
        for part in batch.split(self.config.accumulative_update):
            part = part.to(self.device)
            mlm_loss, corrupted_ids = self._generate(part, sums)
            rtd_loss = self._discriminate(part, corrupted_ids, sums)
            self.backward(
                mlm_loss / max(batch.masked_tokens, 1) + self.config.rtd_lambda * rtd_loss / batch.real_tokens
            )
        self.update("both", sums, "", ("generator_loss", "discriminator_loss"))
        return sums

    def _generate(self, part: Batch, sums: Sums) -> tuple[torch.Tensor, torch.Tensor]:
        """The generator's summed loss, and the ids with its samples in place of the masks."""
        with autocast(self.precision, self.device):
            out = self.model.generator.masked_loss(part, sample=True)
        add(sums, masked_lm_sums(out, "generator_"))
        return out.loss.sum(), corrupt(part.input_ids, part.labels, out.samples)

    def _discriminate(self, part: Batch, corrupted_ids: torch.Tensor, sums: Sums) -> torch.Tensor:
        """The discriminator's summed loss."""
        with autocast(self.precision, self.device):
            out = self.model.detection_loss(corrupted_ids, part.input_mask, part.labels)
        add(
            sums,
            {
                "discriminator_loss": out.loss.detach(),
                "discriminator_correct": out.correct,
                "discriminator_targets": count(part.real_tokens, self.device),
            },
        )
        return out.loss


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
