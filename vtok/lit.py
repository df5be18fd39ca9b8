"""Training under Lightning: the optimizer step that tokenizers and generators share, and the tokenizer's two losses.

Optimization is manual because a GAN has two optimizers. Lightning counts every step of every optimizer that it wraps
(its issue 17958), so only the generator's is wrapped and the discriminator's is stepped raw: `global_step` counts
updates of the trained module, and everything (data order, learning rate, saving) is a function of it. Gradient
accumulation, clipping, averaging and the guard against non-finite numbers live in one place, `Lit.training_step`.
Order of a GAN step as in LlamaGen (arXiv 2406.06525): the tokenizer first, then the discriminator on the same images;
or, where the objective says so, the other way round, or by turns. A step in which the discriminator alone learns counts
too: the tokenizer's optimizer steps without gradients, which changes nothing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch import distributed as dist

from vtok import rng
from vtok.config import describe
from vtok.fsdp import is_sharded, shard, whole
from vtok.layout import SequenceLayout
from vtok.optim import Recipe, average, check_arguments, check_optimizer, make_optimizer, rate, set_decay, set_rate
from vtok.quantize.statistics import COUNTED, count_ids, perplexity, usage
from vtok.watch import shown_images

SKIPS_IN_A_ROW = 10  # with on_nan=skip: more non-finite steps than this are not bad luck


class NotFinite(ValueError):
    """The loss or its gradient became infinite or not a number; the message names the step."""


class Lit(L.LightningModule):
    """One optimizer step of `module`, its averaged copy `ema`, and validation of both.

    Checkpoints hold `module.*`, `ema.*` and a plain description of the module under `module`, so that
    vtok.checkpoint.load_module reads them without a configuration.
    """

    kind: str
    monitors: tuple[str, ...] = ("loss",)  # metrics that can choose the best checkpoint
    trained: tuple[str, ...] = ("module",)

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.module, self.recipe = module, recipe
        self.ema = copy.deepcopy(module).requires_grad_(False).eval() if recipe.ema is not None else None
        self._micro = 0  # batches of the current optimizer step that are done; checkpoints are made only at 0
        self._sums: dict[str, Tensor] = {}
        self._skipped = 0
        self._bad: Tensor | None = None
        self._seen: dict[int, list[Tensor]] = {}  # step to the indices of its images, since the last check
        self._totals: dict[str, Tensor] = {}
        self.described: dict[str, Any] | None = None
        self.histograms: dict[str, Tensor] = {}  # of the newest validation, over all processes
        self.latest: dict[str, float] = {}  # the newest value of every metric, for the progress line
        self.began = 0.0

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Loss of a batch, its logs, and whatever `after_backward` needs."""
        raise NotImplementedError

    def after_backward(self, batch: Mapping[str, Tensor], rest: Any) -> dict[str, Tensor]:
        """Backward passes of further losses; returns logs."""
        return {}

    def validate_module(self, module: nn.Module, batch: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
        """Sums over a batch by metric name; names that start with `count_` are histograms."""
        raise NotImplementedError

    def finish_validation(self, means: dict[str, Tensor], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics without the prefix val/, from means over the images and summed histograms."""
        return means

    def learns(self, step: int) -> bool:
        """Whether `module` is updated in optimizer step `step`; its averaged copy stays where it is elsewhere."""
        return True

    def recorded(self, step: int) -> bool:
        """Whether the losses of optimizer step `step` are recorded."""
        return step == 0 or (step + 1) % self.recipe.log_every == 0

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Lit:
        super().train(mode)
        if self.ema is not None:
            self.ema.eval()
        return self

    def configure_model(self) -> None:
        """Under trainer=fsdp cut the module and its averaged copy over the processes, once."""
        if not is_sharded(self.trainer.strategy) or hasattr(self.module, "unshard"):
            return
        self.described = describe(self.module)  # cutting changes its class
        shard([m for m in (self.module, self.ema) if m is not None], self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [make_optimizer([self.module], **self.recipe.optimizer)]

    def on_train_start(self) -> None:
        """A resume restores moments; what optimizer= says of betas, eps and decay is this run's."""
        optimizers = self.optimizers(use_pl_optimizer=False)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, options in zip(optimizers, self.rates()):
            for group in optimizer.param_groups:
                group.update({k: tuple(v) if k == "betas" else v for k, v in options.items() if k in ("betas", "eps")})
                if group["weight_decay"]:
                    group["weight_decay"] = options.get("weight_decay", group["weight_decay"])

    def rates(self) -> list[Mapping[str, Any]]:
        """The options of each optimizer."""
        return [self.recipe.optimizer]

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Outside autocast: inside, the products of what was computed in float32 would get bf16 gradients."""
        with torch.autocast(loss.device.type, enabled=False):
            super().manual_backward(loss, *args, **kwargs)

    def on_fit_start(self) -> None:
        self._micro, self._sums, self._skipped, self._bad, self._seen = 0, {}, 0, None, {}

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.began = time.monotonic()

    @property
    def between_steps(self) -> bool:
        """Whether the next batch starts an optimizer step: the only moments at which a checkpoint is exact."""
        return self._micro == 0

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        last = self._micro == self.recipe.accumulate - 1
        if "index" in batch:
            self._seen.setdefault(self.global_step + 1, []).append(batch["index"])
        strategy = self.trainer.strategy
        waits = not last and hasattr(strategy, "block_backward_sync")
        with strategy.block_backward_sync() if waits else nullcontext():
            loss, logs, rest = self.losses(batch)
            self.manual_backward(loss / self.recipe.accumulate)
            logs |= self.after_backward(batch, rest)
        for name, value in logs.items():
            value = value.detach().float() / self.recipe.accumulate
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro = (self._micro + 1) % self.recipe.accumulate
        if last:
            self._update()
            if self.global_step == self.recipe.steps:
                self.trainer.should_stop = True  # Lightning then validates once more, whatever val_every is

    def _update(self) -> None:
        step = self.global_step
        factor = rate(step, self.recipe.steps, **self.recipe.schedule)
        wrapped = self.optimizers()
        wrapped = wrapped[0] if isinstance(wrapped, list) else wrapped
        norms = self._norms()
        watched = [*norms.values(), *(v for k, v in self._sums.items() if k == "loss")]
        self._guard(step, torch.stack(watched).isfinite().all())
        set_rate(wrapped.optimizer, self.recipe.optimizer["lr"] * factor)
        if self.recipe.final_weight_decay is not None:
            set_decay(wrapped.optimizer, self.recipe.decay(step))
        wrapped.step()
        wrapped.zero_grad(set_to_none=True)
        others = self._update_others(step, norms)
        if self.ema is not None and self.learns(step):
            average(self.ema, self.module, step + 1, self.recipe.ema)
        sums, self._sums = self._sums, {}
        if self.recorded(step):
            self.check_finite()
            found = sums | others
            if self.learns(step):
                found |= {"grad_norm": norms["grad_norm"], "lr": torch.tensor(self.recipe.optimizer["lr"] * factor)}
            self.record({f"train/{k}": v for k, v in found.items()}, reduce=True)

    def _norms(self) -> dict[str, Tensor]:
        """Clip the gradients of everything that is about to be stepped, each network's apart; their norms by name."""
        return {"grad_norm": self._clip([self.module], self.recipe.clip)}

    def _update_others(self, step: int, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Step further optimizers in optimizer step `step`; returns logs."""
        return {}

    def _clip(self, modules: list[nn.Module], most: float | None) -> Tensor:
        parameters = [p for m in modules for p in m.parameters() if p.grad is not None]
        return whole(nn.utils.clip_grad_norm_(parameters, most or float("inf")))

    def _guard(self, step: int, finite: Tensor) -> None:
        """Stop, or drop the gradient. On a GPU the answer is awaited only every `log_every` steps and before saving."""
        if self.recipe.on_nan == "skip":
            if dist.is_available() and dist.is_initialized():  # one process's own loss may be the only sign
                finite = finite.float()
                dist.all_reduce(finite, op=dist.ReduceOp.MIN)
                finite = finite > 0
            if bool(finite):
                self._skipped = 0
                return
            self._skipped += 1
            if self._skipped <= SKIPS_IN_A_ROW:
                images = shown_images(self.trainer.datamodule, self._seen.get(step + 1, ()))
                print(f"note: step {step + 1} is not finite and was skipped{images}", flush=True)
                for parameter in self.parameters():  # the discriminator's too: it saw the same images
                    parameter.grad = None
                return
        self._note(step, finite)

    def _note(self, step: int, finite: Tensor) -> None:
        bad = torch.where(finite, -1, step + 1)
        self._bad = bad if self._bad is None else torch.where(self._bad > 0, self._bad, bad)
        if finite.device.type == "cpu":
            self.check_finite()

    def check_finite(self) -> None:
        """Raise NotFinite if a step since the start was not finite."""
        if self._bad is not None and int(self._bad) > 0:
            images = shown_images(self.trainer.datamodule, self._seen.get(int(self._bad), ()))
            raise NotFinite(
                f"the loss or its gradient is not finite at step {int(self._bad)}: lower optimizer.lr, raise "
                "schedule.warmup, use precision=32-true, or pass on_nan=skip; the last checkpoint is untouched" + images
            )
        self._seen = {k: v for k, v in self._seen.items() if k > self.global_step}

    def record(self, metrics: Mapping[str, Tensor | float], *, reduce: bool = False) -> None:
        """Hand metrics to every logger under the number of finished optimizer steps.

        reduce: average over the processes first. Lightning's own logging counts batches, not optimizer steps.
        """
        names = list(metrics)
        values = torch.stack([torch.as_tensor(metrics[n], dtype=torch.float32).to(self.device) for n in names])
        if reduce and self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        rounded = dict(zip(names, values.tolist()))
        self.latest |= rounded
        for logger in self.trainer.loggers:
            logger.log_metrics(rounded, step=self.global_step)

    # --- validation -------------------------------------------------------------------------------------------------

    def variants(self) -> dict[str, nn.Module]:
        """Metric suffix to module: the averaged weights have the plain names."""
        return {"": self.module} if self.ema is None else {"": self.ema, "_raw": self.module}

    def on_validation_start(self) -> None:
        assert self._micro == 0, "validation within an accumulated step would drop its gradients"
        # fixed draws make two validations comparable, and training must not notice that it was interrupted
        self._rng = rng.get_state()
        rng.seed_all(0)
        self._totals = {}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        rows = next(iter(batch.values())).shape[0]
        found = {"rows": torch.tensor(float(rows), device=self.device)}
        for suffix, module in self.variants().items():
            was_training = module.training
            module.eval()
            found |= self.validate_module(module, batch, suffix)
            module.train(was_training)
        for name, value in found.items():
            value = value.detach().double() if self.device.type != "mps" else value.detach()
            self._totals[name] = self._totals[name] + value if name in self._totals else value

    def on_validation_epoch_end(self) -> None:
        totals = self._totals
        if self.trainer.world_size > 1:
            totals = {k: self.trainer.strategy.reduce(v, reduce_op="sum") for k, v in totals.items()}
        rows = totals.pop("rows")
        counts = {k: v for k, v in totals.items() if k.startswith("count_")}
        self.histograms = counts  # for pictures of them
        means = {k: v / rows for k, v in totals.items() if k not in counts}
        metrics = {f"val/{k}": v.float() for k, v in self.finish_validation(means, counts).items()}
        # for monitors and the value that train.py returns; sync_dist changes nothing, all ranks have the same
        self.log_dict(metrics, logger=False, sync_dist=self.trainer.world_size > 1)
        self.record(metrics)

    def on_validation_end(self) -> None:
        rng.set_state(self._rng)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["module"] = {**(self.described or describe(self.module)), "kind": self.kind}
        # Saved while a batch starts, its counter `ready` is one ahead, and a resumed Lightning would validate one batch
        # too early: in the middle of an accumulated step, whose gradients it then drops.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            count |= dict.fromkeys(("ready", "started", "processed"), count["completed"])


class LitTokenizer(Lit):
    """Trains a vtok.tokenizer.Tokenizer with an objective of vtok.losses.objective.

    discriminator_optimizer: as `optimizer`, for the objective's discriminator.
    """

    kind = "tokenizer"
    monitors = ("loss", "psnr", "pixel", "usage", "perplexity")

    def __init__(
        self, module: nn.Module, objective: nn.Module, recipe: Recipe, *, discriminator_optimizer: Mapping[str, Any]
    ) -> None:
        super().__init__(module, recipe)
        self.objective = objective
        check_arguments("discriminator_optimizer", check_optimizer, discriminator_optimizer)
        self.discriminator_rates = dict(discriminator_optimizer)
        if objective.discriminator is not None:
            self.trained = ("module", "discriminator")
            if objective.gan.first == "discriminator" and recipe.accumulate > 1:
                raise ValueError(
                    f"objective.gan.first=discriminator updates it within each batch, accumulate={recipe.accumulate} "
                    "has several in a step: set accumulate=1 or objective.gan.first=generator"
                )

    @property
    def discriminator(self) -> nn.Module | None:
        return self.objective.discriminator

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = super().configure_optimizers()
        for term in self.objective.terms.values():  # a plug-in's own parameters, at its own multiple of the rate
            if any(p.requires_grad for p in term.parameters()):
                for group in make_optimizer([term], **self.recipe.optimizer).param_groups:
                    optimizers[0].add_param_group({**group, "lr_scale": getattr(term, "lr_scale", 1.0)})
        if self.discriminator is not None:
            optimizers.append(make_optimizer([self.discriminator], **self.discriminator_rates))
        return optimizers

    def learns(self, step: int) -> bool:
        return self.objective.tokenizer_learns(step)

    def recorded(self, step: int) -> bool:
        """Before a recorded step of the discriminator alone, that of the tokenizer too."""
        return super().recorded(step) or (super().recorded(step + 1) and not self.learns(step + 1))

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
        images, step = batch["image"], self.global_step
        progress = step / self.recipe.steps
        if not self.learns(step):
            return *self._of_the_discriminator(batch, progress), None
        keys = {"key": batch["key"], "host_key": batch.get("host_key")}
        recon = self.objective.reconstruct(self.module, images, **keys, progress=progress)
        last_layer = self.module.last_layer if self.discriminator is not None else None
        real, fakes = recon.real(images), None if recon.images is None else recon.images.detach()
        before = self._discriminator_first(batch, real, fakes) if self._leads(step) else {}
        loss, logs = self.objective.generator_loss(
            recon, images, last_layer, step, progress=progress, key=batch["key"], tokenizer=self.module
        )
        stats = {k: v for k, v in recon.stats.items() if v.dim() == 0}
        return loss, {**logs, **before, **stats, "loss": loss.detach()}, (real, fakes)

    def _of_the_discriminator(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Its loss and logs in a step of its own. The tokenizer rests in eval mode, so that no statistics move."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad():
            recon = self.module(batch["image"], key=batch["key"], progress=progress)
        self.module.train(was_training)
        return self.objective.discriminator_loss(
            recon.real(batch["image"]), recon.images, self.global_step, key=batch["key"]
        )

    def _leads(self, step: int) -> bool:
        return self.objective.discriminator_learns(step) and self.objective.gan.first == "discriminator"

    def _discriminator_first(self, batch: Mapping[str, Tensor], real: Tensor, fakes: Tensor) -> dict[str, Tensor]:
        """Update the discriminator before it judges: the order of IBQ (arXiv 2412.02692)."""
        loss, logs = self.objective.discriminator_loss(real, fakes, self.global_step, key=batch["key"])
        self.manual_backward(loss)
        norm = self._clip_discriminator()
        if self.recipe.on_nan != "skip":
            self._note(self.global_step, norm.isfinite())
        elif not bool(norm.isfinite()):
            for parameter in self.discriminator.parameters():
                parameter.grad = None
        return logs | self._step_discriminator(self.global_step, norm)

    def _step_discriminator(self, step: int, norm: Tensor) -> dict[str, Tensor]:
        optimizer = self.optimizers(use_pl_optimizer=False)[1]
        start = self.objective.gan.start if self.objective.gan.own_schedule else 0
        factor = rate(step - start, self.recipe.steps - start, **self.recipe.schedule)
        set_rate(optimizer, self.discriminator_rates["lr"] * factor)
        optimizer.step()  # raw: not counted as a global step
        optimizer.zero_grad(set_to_none=True)
        return {"discriminator_grad_norm": norm}

    def after_backward(self, batch: Mapping[str, Tensor], rest: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        step = self.global_step
        if not self.objective.discriminator_learns(step) or self._leads(step) or not self.learns(step):
            return {}
        loss, logs = self.objective.discriminator_loss(*rest, self.global_step, key=batch["key"])
        self.manual_backward(loss / self.recipe.accumulate)
        return logs

    def _norms(self) -> dict[str, Tensor]:
        found = super()._norms() if self.learns(self.global_step) else {}
        if found and len(self.objective.terms):
            found["terms_grad_norm"] = self._clip([self.objective.terms], self.recipe.clip)  # apart: another rate
        if self._judge_waits():
            found["discriminator_grad_norm"] = self._clip_discriminator()
        return found

    def _clip_discriminator(self) -> Tensor:
        return self._clip([self.discriminator], self.recipe.clip if self.objective.gan.clip else None)

    def _judge_waits(self) -> bool:
        """Whether the discriminator has a gradient to step with; the moving global step does not tell."""
        return self.discriminator is not None and any(p.grad is not None for p in self.discriminator.parameters())

    def _update_others(self, step: int, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._step_discriminator(step, norms["discriminator_grad_norm"]) if self._judge_waits() else {}

    def rates(self) -> list[Mapping[str, Any]]:
        return [*super().rates(), *([] if self.discriminator is None else [self.discriminator_rates])]

    def validate_module(self, module: nn.Module, batch: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
        images = batch["image"]
        recon = self.objective.reconstruct(module, images, key=batch["key"], progress=1.0)
        rows = images.shape[0]
        terms = self.objective.validation(recon, images, key=batch["key"], tokenizer=module)
        found = {k + suffix: v.float() * rows for k, v in terms.items()}
        error = (recon.images.float().clamp(-1, 1) - images.float()).square().flatten(1).mean(1)
        found["psnr" + suffix] = (-10 * torch.log10((error / 4).clamp(min=1e-10))).sum()
        if not module.spec.discrete:
            return found
        ids, start = recon.tokens, 0
        for index, part in enumerate(module.spec.parts):
            if part.vocab_size <= COUNTED:
                chosen = ids[:, start : start + part.count]
                found[f"count_{index}{suffix}"] = count_ids(chosen, part.vocab_size, everywhere=False)
                if module.quantizer.scales and ids.shape[1] == module.spec.layout.length:
                    found |= self._counts_of_scales(chosen, module.spec.layout, part.vocab_size, suffix)
            start += part.count
        return found

    @staticmethod
    def _counts_of_scales(ids: Tensor, layout: SequenceLayout, vocab_size: int, suffix: str) -> dict[str, Tensor]:
        """The histogram of every scale: the coarse ones collapse first, and have few tokens among all."""
        spans = (layout.written(k, k + 1) for k in range(layout.steps))
        counts = (count_ids(ids[:, a:b], vocab_size, everywhere=False) for a, b in spans)
        return {f"count_step_{k:02d}{suffix}": one for k, one in enumerate(counts)}

    def finish_validation(self, means: dict[str, Tensor], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Share of codes in use, perplexity and number of dead codes over the whole held-out set, per part of the
        tokens that is counted; with several the plain names are their means, and the sum of the dead. Of tokens in
        scales also usage and perplexity of each, at most the number of its tokens in that set."""
        for name, histogram in counts.items():
            if name.startswith("count_step_"):
                place = name.removeprefix("count_")  # with _raw
                means |= {f"usage_{place}": usage(histogram), f"perplexity_{place}": perplexity(histogram)}
        counts = {k: v for k, v in counts.items() if not k.startswith("count_step_")}
        for raw in ("", "_raw"):
            parts = {k: v for k, v in counts.items() if k.endswith("_raw") == bool(raw)}
            found = [(usage(h), perplexity(h), (h == 0).sum().float()) for h in parts.values()]
            for name, values in zip(parts, found if len(found) > 1 else ()):
                index = name.removeprefix("count_")  # with _raw
                means |= dict(zip((f"usage_{index}", f"perplexity_{index}", f"dead_{index}"), values))
            if found:
                used, spread, dead = (torch.stack(values) for values in zip(*found))
                means |= {f"usage{raw}": used.mean(), f"perplexity{raw}": spread.mean(), f"dead{raw}": dead.sum()}
        return means
