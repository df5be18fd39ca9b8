"""Training: the optimizer step, what is measured and written, warm starts, and the command's choices."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from runs import CONFIGS, LLAMAGEN, TOKENIZER, VAR, everything, losses, run, run_all, state, tokenizer_folder
from torch import nn
from torch.utils.data import DataLoader

from vgen.models import FAMILIES
from vgen.models.llamagen import LlamaGen
from vgen.models.var import VAR as VARModel
from vtok import optim
from vtok.checkpoint import load_folder, load_module, save_folder, weights_hash
from vtok.config import instantiate
from vtok.data.fake import Fake
from vtok.data.module import KeyedImages, float_images
from vtok.layout import SequenceLayout
from vtok.lit import LitTokenizer, NotFinite
from vtok.models.cnn import CNNTokenizer
from vtok.resume import Checkpoints
from vtok.tokenizer import Part, Tokenizer, TokenSpec
from vtok.warmstart import warm_start

ROOT = Path(__file__).resolve().parents[1]
# nothing random, nothing that depends on how a batch is cut: only the mean of the losses counts
PLAIN = (
    *(item for item in TOKENIZER if not item.startswith("objective")),
    "objective=plain",
    "tokenizer.dropout=0",
    "tokenizer.quantizer.ema_decay=null",
    "tokenizer.quantizer.restart=0",
)


# --- optimizer, schedule, averaging ---------------------------------------------------------------------------------


def test_the_rate_has_its_closed_form():
    cosine = dict(warmup=10, kind="cosine", final=0.1)
    assert optim.rate(0, 100, **cosine) == pytest.approx(0.1)
    assert optim.rate(9, 100, **cosine) == 1.0 == optim.rate(10, 100, **cosine)
    assert optim.rate(99, 100, **cosine) == pytest.approx(0.1)
    middle = 10 + (99 - 10) / 2
    assert optim.rate(54, 100, **cosine) == pytest.approx(0.55, abs=0.01) and middle == 54.5
    assert optim.rate(32, 100, **cosine) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 89)))
    assert optim.rate(32, 100, warmup=10, kind="linear", final=0.1) == pytest.approx(0.1 + 0.9 * (1 - 22 / 89))
    assert optim.rate(99, 100, warmup=0.1, kind="constant") == 1.0 and optim.rate(4, 100, warmup=0.1) == 0.5
    assert optim.rate(500, 100, **cosine) == pytest.approx(0.1)
    falling = dict(kind="constant", drops=[50, 80])
    assert [optim.rate(step, 100, **falling) for step in (49, 50, 79)] == [1.0, 0.1, 0.1]
    assert optim.rate(80, 100, **falling) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="drops"):
        optim.check_schedule(kind="cosine", drops=[50])


def test_only_matrices_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = optim.make_optimizer([model], lr=1e-3, weight_decay=0.1)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decays.get(id(p)) for n, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": None,
        "2.bias": 0.0,
    }


def test_weight_decay_moves_along_half_a_cosine():
    """Without a gradient AdamW multiplies a matrix by 1 - lr decay_s at step s; VAR's decays, 0.05 to 0.08."""
    recipe = optim.Recipe({"lr": 0.5, "weight_decay": 0.05}, {"kind": "constant"}, 9, final_weight_decay=0.08)
    wanted = [0.08 - 0.03 * math.cos(math.pi * s / 16) ** 2 for s in range(9)]
    assert [recipe.decay(s) for s in range(9)] == pytest.approx(wanted, rel=1e-12)
    assert (recipe.decay(0), recipe.decay(4), recipe.decay(8), recipe.decay(99)) == pytest.approx(
        (0.05, 0.065, 0.08, 0.08)
    )
    layer = nn.Linear(3, 2)
    matrix, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = optim.make_optimizer([layer], **recipe.optimizer)
    for step in range(9):
        layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.zeros(2)
        optim.set_decay(optimizer, recipe.decay(step))
        optimizer.step()
    assert torch.equal(layer.bias, bias)
    torch.testing.assert_close(layer.weight.detach(), matrix * math.prod(1 - 0.5 * d for d in wanted))
    assert optim.Recipe({"lr": 1.0}, {}, 9).decay(5) == 0.05
    for end, begin in ((0.0, 0.05), (0.08, 0.0)):
        with pytest.raises(ValueError, match="final_weight_decay"):
            optim.Recipe({"lr": 0.5, "weight_decay": begin}, {}, 9, final_weight_decay=end)


def test_averages_have_their_closed_form():
    """After s steps of weights w_s: a_s = k_s a_{s-1} + (1 - k_s) w_s with k_s = min(decay, (1 + s) / (10 + s))."""
    module, ema = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    wanted = 1.0
    for step in range(1, 30):
        with torch.no_grad():
            module.weight.fill_(float(step))
            module.running_mean.fill_(step)
            module.num_batches_tracked.fill_(step)
        optim.average(ema, module, step, 0.7)
        keep = min(0.7, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * step
        assert ema.weight.item() == pytest.approx(wanted, rel=1e-5)
    assert ema.running_mean == 29 and ema.num_batches_tracked == 29


def test_accumulated_batches_equal_one_batch(tmp_path):
    for name, accumulate in (("one", 1), ("two", 2)):
        run(*PLAIN, "steps=4", f"accumulate={accumulate}", f"run_dir={tmp_path / name}")
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            if name in one:
                # 1e-5: float32 sums in another order
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-5), name


def test_only_the_generator_counts_as_a_step(tmp_path):
    run(*TOKENIZER, "steps=5", "accumulate=2", f"run_dir={tmp_path}")
    saved = state(tmp_path)
    assert saved["global_step"] == 5
    steps = [{int(s["step"]) for s in o["state"].values()} for o in saved["optimizer_states"]]
    assert steps == [{5}, {3}]  # the GAN starts at step 2
    rows = losses(tmp_path)
    assert ["train/discriminator" in row for row in rows if "train/loss" in row] == [False, False, True, True, True]


def test_the_learning_rate_follows_the_schedule(tmp_path):
    run(*PLAIN, "steps=6", "schedule={warmup: 2, kind: linear, final: 0.5}", f"run_dir={tmp_path}")
    rates = [float(row["train/lr"]) for row in losses(tmp_path) if "train/lr" in row]
    wanted = [1e-3 * optim.rate(s, 6, warmup=2, kind="linear", final=0.5) for s in range(6)]
    assert rates == pytest.approx(wanted, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path, monkeypatch):
    from vtok.losses.objective import TokenizerObjective

    original = TokenizerObjective.generator_loss

    def broken(self, recon, images, last_layer, step, **rest):
        loss, logs = original(self, recon, images, last_layer, step, **rest)
        return loss * (float("nan") if step == 3 else 1.0), logs

    monkeypatch.setattr(TokenizerObjective, "generator_loss", broken)
    with pytest.raises(NotFinite, match=r"step 4.*optimizer\.lr"):
        run(*PLAIN, "steps=6", "save_every=2", f"run_dir={tmp_path}")
    saved = state(tmp_path)
    assert saved["global_step"] == 2 and all(v.isfinite().all() for v in saved["state_dict"].values())
    run(*TOKENIZER, "steps=6", "on_nan=skip", f"run_dir={tmp_path}", "overwrite=true")
    saved = state(tmp_path)
    assert saved["global_step"] == 6 and all(v.isfinite().all() for v in saved["state_dict"].values())


@pytest.mark.parametrize("how", ["stop", "skip"])
@pytest.mark.parametrize("order", ["first=generator", "first=discriminator", "alternate=true"])
def test_a_discriminator_that_is_not_finite_takes_no_step(tmp_path, monkeypatch, how, order):
    """Only its own loss shows it, in the step before the checkpoint."""
    from vtok.losses.objective import TokenizerObjective

    original = TokenizerObjective.discriminator_loss

    def broken(self, real, fakes, step, **rest):
        loss, logs = original(self, real, fakes, step, **rest)
        return loss * (float("nan") if step == 3 else 1.0), logs

    monkeypatch.setattr(TokenizerObjective, "discriminator_loss", broken)
    words = (*TOKENIZER, "steps=6", "save_every=2", f"objective.gan.{order}", f"on_nan={how}")
    if how == "stop":
        with pytest.raises(NotFinite, match=r"step 4.*optimizer\.lr"):
            run(*words, f"run_dir={tmp_path}")
    else:
        run(*words, f"run_dir={tmp_path}")
    saved = state(tmp_path)
    assert saved["global_step"] == (2 if how == "stop" else 6)
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


def test_gradients_are_computed_outside_autocast(tmp_path, monkeypatch):
    """In it the products of float32 parts would be rounded to bfloat16."""
    found = []
    original = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *a, **k: found.append(torch.is_autocast_enabled("cpu")) or original(self)
    )
    run(*TOKENIZER, "steps=3", "precision=bf16-mixed", f"run_dir={tmp_path}")
    assert found == [False] * 4  # three of the tokenizer, one of the discriminator


@pytest.mark.parametrize("own, want", [(False, 1.0), (True, 0.5)])
def test_a_discriminator_on_its_own_schedule_warms_up_from_its_start(tmp_path, own, want):
    run(*TOKENIZER, "steps=3", "schedule={warmup: 2, kind: constant}", f"objective.gan.own_schedule={str(own).lower()}",
        "discriminator_optimizer.lr=1e-3", f"run_dir={tmp_path}")  # fmt: skip
    rates = [group["lr"] for group in state(tmp_path)["optimizer_states"][1]["param_groups"]]
    assert rates == pytest.approx([1e-3 * want] * len(rates))  # the start is step 2: its first one


# --- what is measured -----------------------------------------------------------------------------------------------


def held_out(count: int = 12) -> dict[str, torch.Tensor]:
    data = Fake(image_size=16, batch_size=4, train_images=40, val_images=count).val_dataset()
    items = [data[(0, i)] for i in range(count)]
    return float_images({k: torch.stack([torch.as_tensor(i[k]) for i in items]) for k in ("image", "label", "key")})


def test_tokenizer_metrics_of_both_weights_by_hand(tmp_path):
    """From the final checkpoint, over the whole held-out set at once; the run took it in batches of 4."""
    run(*TOKENIZER, "steps=4", "accumulate=2", "ema=0.5", f"run_dir={tmp_path}")
    row = losses(tmp_path)[-1]
    images = held_out()["image"]
    for weights, suffix in (("ema", ""), ("raw", "_raw")):
        tokenizer = load_module(tmp_path, FAMILIES, weights)
        with torch.no_grad():
            recon = tokenizer(images)
        pixel = (recon.images - images).square().mean()
        z = F.normalize(tokenizer.features(images), dim=-1)
        codes = tokenizer.embed(recon.tokens).view_as(z)
        commitment = 0.25 * (z - codes).square().mean()
        mse = ((recon.images.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
        ids, counts = recon.tokens.unique(return_counts=True)
        share = counts / counts.sum()
        wanted = {
            "loss": pixel + commitment,
            "psnr": (-10 * mse.log10()).mean(),
            "usage": torch.tensor(len(ids) / 32),
            "perplexity": (-(share * share.log()).sum()).exp(),
        }
        for name, value in wanted.items():
            assert float(row[f"val/{name}{suffix}"]) == pytest.approx(value.item(), rel=1e-4), name + suffix
    assert row["val/loss"] != row["val/loss_raw"]


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_generator_loss_of_both_weights_by_hand(tmp_path, family):
    folder = tokenizer_folder(tmp_path / "tokenizer", family)
    base = LLAMAGEN if family == "llamagen" else VAR
    out = tmp_path / "run"
    run(*base, f"tokenizer_from={folder}", "steps=4", "ema=0.5", f"run_dir={out}")
    row, batch = losses(out)[-1], held_out()
    tokens = load_folder(folder, FAMILIES).encode(batch["image"])
    for weights, suffix in (("ema", ""), ("raw", "_raw")):
        model = load_module(out, FAMILIES, weights)
        with torch.no_grad():
            logits = model.head.logits(model(model.arrange(tokens), model.conditioner(batch["label"])))
        logits = logits[0] if isinstance(logits, tuple) else logits
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        assert float(row[f"val/loss{suffix}"]) == pytest.approx(float(nats.mean()), rel=1e-5)
        if family == "var":
            for k, (a, b) in enumerate([(0, 1), (1, 5), (5, 21)]):
                assert float(row[f"val/nats_step_{k:02d}{suffix}"]) == pytest.approx(
                    float(nats[:, a:b].mean()), rel=1e-5
                )
    description = state(out)["module"]
    assert description["kind"] == "generator" and len(description["class_names"]) == 10


def test_best_is_the_best_validation(tmp_path):
    run(
        *PLAIN,
        "steps=8",
        "val_every=1",
        "schedule={warmup: 0, kind: constant}",
        "optimizer.lr=0.3",
        "monitor=val/psnr",
        "monitor_mode=max",
        f"run_dir={tmp_path}",
    )
    scores = {int(row["step"]): float(row["val/psnr"]) for row in losses(tmp_path) if "val/psnr" in row}
    assert state(tmp_path, "best")["global_step"] == max(scores, key=scores.get) < 8
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*.ckpt"))
    assert len(kept) == 2 and "step_8.ckpt" in kept


def test_the_best_value_of_another_metric_is_not_taken(tmp_path):
    first = Checkpoints(tmp_path, every=1, monitor="val/loss", mode="min")
    first.best = 0.12
    for monitor, mode, want in (("val/loss", "min", 0.12), ("val/rfd", "min", None), ("val/loss", "max", None)):
        second = Checkpoints(tmp_path, every=1, monitor=monitor, mode=mode)
        second.load_state_dict(first.state_dict())
        assert second.best == want
    second.load_state_dict({"best": 3.0})  # of a checkpoint from before
    assert second.best == 3.0


def test_pictures_validation_and_saving_leave_no_trace(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    small = ("pictures.samples.classes=2", "pictures.samples.per_class=1")
    steps = {"reconstructions": range(5), "samples": range(5), "code_use": range(1, 5)}  # use is counted in validation
    for kind, names, base in (
        ("tokenizer", ("reconstructions", "code_use"), TOKENIZER),
        ("generator", ("samples",), (*LLAMAGEN, f"tokenizer_from={folder}")),
    ):
        quiet, busy = tmp_path / f"{kind}_quiet", tmp_path / f"{kind}_busy"
        run(*base, "steps=4", "val_every=4", f"run_dir={quiet}")
        run(*base, *small, "steps=4", "val_every=1", "picture_every=1", "save_every=1", f"run_dir={busy}")
        assert everything(busy) == everything(quiet)
        expected = [f"{name}_{step:07d}.png" for name in names for step in steps[name]]
        pictures = sorted(p.name for p in (busy / "pictures").iterdir())
        assert pictures == sorted(expected)
        assert min(Image.open(busy / "pictures" / pictures[-1]).size) > 16


@pytest.mark.parametrize("kind, precision", [("tokenizer", "32-true"), ("tokenizer", "64-true"), ("generator", "")])
def test_images_given_as_floats_train_the_same_run(tmp_path, monkeypatch, kind, precision):
    """The data set's uint8, or floats that numpy made of them, which arrive as they are."""
    given, arrived, original, step = set(), set(), KeyedImages.__getitem__, LitTokenizer.training_step

    def item(self, position, floats):
        found = original(self, position)
        if floats:
            image = found["image"].numpy().transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
            found["image"] = torch.from_numpy(image)
        given.add(found["image"].dtype)
        return found

    def watched(self, batch, batch_idx):
        arrived.add(batch["image"].dtype)
        step(self, batch, batch_idx)

    monkeypatch.setattr(LitTokenizer, "training_step", watched)
    base = (*PLAIN, "picture_every=2", f"precision={precision}")
    if kind == "generator":
        base = (*LLAMAGEN, f"tokenizer_from={tokenizer_folder(tmp_path / 'tokenizer')}")
    for floats in (False, True):
        monkeypatch.setattr(KeyedImages, "__getitem__", functools.partialmethod(item, floats=floats))
        run(*base, "val_every=2", "steps=2", f"run_dir={tmp_path / str(floats)}")
    assert given == {torch.uint8, torch.float32}
    one, two = tmp_path / "False", tmp_path / "True"
    assert everything(one) == everything(two) and losses(one) == losses(two)
    if kind == "tokenizer":
        assert arrived == {torch.float64 if precision == "64-true" else torch.float32}
        sheets = [f / "pictures" / "reconstructions_0000002.png" for f in (one, two)]
        assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_without_averages_only_raw_weights_are_kept(tmp_path):
    run(*PLAIN, "steps=2", "ema=null", "val_every=2", f"run_dir={tmp_path}")
    assert not any(k.startswith("ema.") for k in state(tmp_path)["state_dict"])
    assert "val/loss_raw" not in losses(tmp_path)[-1]
    assert isinstance(load_module(tmp_path, FAMILIES, "raw"), Tokenizer)
    with pytest.raises(ValueError, match="weights=raw"):
        load_module(tmp_path, FAMILIES)


# --- what is written and said ---------------------------------------------------------------------------------------


def test_the_run_directory_and_the_block_before_training(tmp_path, capsys):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    out = tmp_path / "run"
    value = run(*LLAMAGEN, f"tokenizer_from={folder}", "steps=4", "accumulate=2", "seed=3", f"run_dir={out}")
    said = capsys.readouterr().out
    count = sum(p.numel() for p in load_module(out, FAMILIES).parameters())
    for text in (
        f"LlamaGen (generator), {count:,} parameters, {count:,} trainable",
        "8 = 4 x 1 devices x 2 batches",
        "4 = 0.8 epochs",
        "16 in 16 steps, vocabulary 16, 64 bits",
        f"checkpoints: {out / 'checkpoints'}",
        f"pictures:    {out / 'pictures'}",
    ):
        assert text in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["seed"] == config["data"]["seed"] == 3 and config["run_dir"] == str(out)  # resolved
    assert json.loads((out / "versions.json").read_text())["torch"] == torch.__version__
    assert weights_hash(load_folder(out / "tokenizer", FAMILIES).state_dict()) == weights_hash(
        load_folder(folder, FAMILIES).state_dict()
    )
    assert value == pytest.approx(float(losses(out)[-1]["val/loss"]), rel=1e-6)


def test_memory_is_counted():
    """10 x 10 and 10 float32 parameters: weights, as many gradients, twice as much for AdamW."""
    need = optim.memory(
        {"module": nn.Linear(10, 10), "ema": nn.Linear(10, 10), "discriminator": None}, trained=["module"]
    )
    assert need == {"module": 440, "ema": 440, "discriminator": 0, "gradients": 440, "optimizer": 880}


def test_other_tokens_are_refused_with_the_reason(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="residual"):
        run(*VAR, f"tokenizer_from={folder}", "steps=1", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ValueError, match="tokenizer_from"):
        run(*LLAMAGEN, "steps=1", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_trains_on_windows_and_is_judged_on_whole_pictures(tmp_path, monkeypatch):
    seen, forward = set(), CNNTokenizer.forward

    def watched(self, images, **options):
        seen.add((self.training, images.shape[-1]))
        return forward(self, images, **options)

    monkeypatch.setattr(CNNTokenizer, "forward", watched)
    run(*PLAIN, "data.window=8", "steps=2", "val_every=2", f"run_dir={tmp_path / 'run'}")
    assert seen == {(True, 8), (False, 16)}
    for options, words in (
        ((*PLAIN, "data.window=6"), "image_size=6 must be a multiple of the stride"),
        ((*LLAMAGEN, f"tokenizer_from={tokenizer_folder(tmp_path / 'tokenizer')}", "data.window=8"), "whole pictures"),
        (("data=fake", "data.image_size=32", "data.window=8", "tokenizer=var_small"), "whose tokens are cells"),
        (("data=fake", "data.image_size=32", "data.window=6", "tokenizer=flexvar_small"), "multiples of the stride 4"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*options, "steps=2", f"run_dir={tmp_path / 'wrong'}")
    assert not (tmp_path / "wrong" / "checkpoints").exists()


def test_a_resumed_generator_needs_its_tokenizer(tmp_path):
    folder, out = tokenizer_folder(tmp_path / "tokenizer"), tmp_path / "run"
    run(*LLAMAGEN, f"tokenizer_from={folder}", "steps=2", "stop_after=1", f"run_dir={out}")
    other = load_folder(folder, FAMILIES)
    with torch.no_grad():
        other.quantizer.codebook.weight.mul_(-1)
    save_folder(other, folder)
    with pytest.raises(ValueError, match="not the tokenizer that this run started with"):
        run(*LLAMAGEN, f"tokenizer_from={folder}", "steps=2", "resume=last", f"run_dir={out}")


@pytest.mark.parametrize("debug", ["fast", "overfit", "limit", "profiler"])
def test_debug_modes_run(tmp_path, debug, capsys):
    run(*PLAIN, f"debug={debug}", "steps=3", f"run_dir={tmp_path}")
    assert "val/loss" in capsys.readouterr().out or debug == "profiler"


def test_one_batch_is_overfitted(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    quick = (
        "log_every=20",
        "steps=120",
        "model.dropout=0",
        "model.token_dropout=0",
        "data.flip=false",
        "optimizer.lr=1e-2",
    )
    run(*LLAMAGEN, *quick, f"tokenizer_from={folder}", "debug=overfit", "val_every=120", f"run_dir={tmp_path / 'run'}")
    first, last = (float(losses(tmp_path / "run")[i]["train/loss"]) for i in (0, -2))
    # 10 % of the labels are hidden, which leaves a floor of about that share of the start
    assert first == pytest.approx(math.log(16), rel=0.01) and last < 0.25 * first


# --- warm start -----------------------------------------------------------------------------------------------------


def raster(side: int) -> TokenSpec:
    return TokenSpec(SequenceLayout.raster(side, side), (Part(side * side, 16, 4),), 4 * side)


def test_warm_start_takes_common_classes_by_name(tmp_path):
    torch.manual_seed(0)
    old = LlamaGen(raster(4), 3, depth=1, width=16, heads=2)
    save_folder(old, tmp_path, class_names=["cat", "dog", "owl"])
    new = LlamaGen(raster(4), 2, depth=2, width=16, heads=2)
    fresh = {k: v.clone() for k, v in new.state_dict().items()}
    result = warm_start(new, tmp_path, FAMILIES, class_names=["owl", "eel"])
    table, before = new.conditioner.table.weight, old.conditioner.table.weight
    assert torch.equal(table[0], before[2]) and torch.equal(table[2], before[3])
    assert torch.equal(table[1], fresh["conditioner.table.weight"][1])
    assert all(torch.equal(new.state_dict()[k], old.state_dict()[k]) for k in result.loaded)
    assert set(result.new) == {k for k in fresh if ".blocks.1." in k}
    assert all(torch.equal(new.state_dict()[k], fresh[k]) for k in result.new)
    assert "1 of 2 classes by name" in result.table() and "1 resized" in result.table()


def test_warm_start_interpolates_positions(tmp_path):
    """A table that is linear in the cell's place stays linear on the finer grid, away from the border."""

    def spec(sides):
        from vtok.config import describe
        from vtok.quantize.residual import MultiScaleVQ

        quantizer = describe(MultiScaleVQ(vocab_size=16, channels=4, sides=sides))
        count = sum(s * s for s in sides)
        return TokenSpec(SequenceLayout.scales(sides), (Part(count, 16, 4),), 4 * sides[-1], quantizer)

    old = VARModel(spec((1, 8)), 3, depth=1, width=16, heads=2)
    with torch.no_grad():
        place = (torch.arange(8) + 0.5) / 8
        old.position[0, 1:] = (place[:, None] + 2 * place[None]).reshape(64, 1)
    save_folder(old, tmp_path)
    new = VARModel(spec((1, 16)), 3, depth=1, width=16, heads=2)
    result = warm_start(new, tmp_path, FAMILIES)
    place = (torch.arange(16) + 0.5) / 16
    made = new.position[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(made[4:-4, 4:-4], (place[:, None] + 2 * place[None])[4:-4, 4:-4], atol=1e-5, rtol=0)
    assert torch.equal(new.position[0, 0], old.position[0, 0]) and "interpolated" in result.resized["position"]


def test_warm_start_from_the_command(tmp_path, capsys):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    base = (*LLAMAGEN, f"tokenizer_from={folder}")
    run(*base, "steps=2", f"run_dir={tmp_path / 'a'}")
    capsys.readouterr()
    lazy = ("optimizer.lr=1e-12", "steps=1", "data.num_classes=6")
    run(*base, *lazy, f"init_from={tmp_path / 'a'}", f"run_dir={tmp_path / 'b'}")
    said = capsys.readouterr().out
    assert "(ema weights)" in said and "resized  conditioner.table.weight" in said
    old, new = load_module(tmp_path / "a", FAMILIES), load_module(tmp_path / "b", FAMILIES, "raw")
    torch.testing.assert_close(new.head.linear.weight, old.head.linear.weight, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="nothing in it fits"):
        run(*base, "steps=1", f"init_from={folder}", f"run_dir={tmp_path / 'c'}")


# --- configurations, processes, loggers -----------------------------------------------------------------------------


def experiments() -> list[str]:
    """Those that fit a test; published sizes are built on the meta device, next to their recipes' tables."""
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml") if not p.stem.endswith("imagenet256"))


@pytest.mark.parametrize("name", experiments())
def test_experiments_compose_and_build(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}"])
        assert config.name == name
        if config.get("model") is None:
            with torch.device("meta"):  # published sizes
                tokenizer = instantiate(config.tokenizer, _convert_="all")
            assert tokenizer.spec.image_size == config.data.image_size
            return
        source = compose("train", overrides=[f"experiment={Path(config.tokenizer_from).name}"])
    tokenizer = instantiate(source.tokenizer, _convert_="all")
    model = instantiate(config.model, _convert_="all", _partial_=True)(spec=tokenizer.spec, num_classes=10)
    model.adopt(tokenizer)
    batch = {"tokens": torch.zeros(1, tokenizer.spec.layout.length).long(), "label": torch.zeros(1).long()}
    assert model.eval().loss(batch | {"key": torch.zeros(1).long()})["loss"].isfinite()


def command(*overrides: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return forks.command(str(ROOT / "train.py"), *overrides, folder=folder, **environment)


def equal_losses(one: Path, two: Path) -> None:
    """Every loss of two runs, to 1e-5 relative: float32 sums in another order."""
    first, second = losses(one), losses(two)
    assert [set(row) for row in first] == [set(row) for row in second]
    for a, b in zip(first, second):
        for name in a:
            if name.endswith(("loss", "psnr", "nats")):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name


@pytest.mark.slow
def test_two_simulated_processes_equal_one(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    base = (
        *LLAMAGEN,
        f"tokenizer_from={folder}",
        "model.dropout=0",
        "model.token_dropout=0",
        "steps=6",
        "accumulate=2",
    )
    base = (*base, "val_every=3", "picture_every=6", "pictures.samples.per_class=1")
    done = command(*base, f"run_dir={tmp_path / 'two'}", "trainer=ddp_sim")
    assert done.returncode == 0, done.stderr
    assert "8 = 2 x 2 devices x 2 batches" in done.stdout and "val/loss =" in done.stdout
    run(*base, f"run_dir={tmp_path / 'one'}")
    equal_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_of_torchrun_equal_one_and_resume_exactly(tmp_path):
    """A tokenizer with a moving codebook equals one process's; a GAN, whose BatchNorm and adaptive weight see half of a
    batch each, does not, but it resumes bit for bit."""
    plain = (*PLAIN, "tokenizer.quantizer.ema_decay=0.9", "steps=6", "accumulate=2", "val_every=3")
    gan = (*TOKENIZER, "steps=5", "accumulate=2", "val_every=2", "save_every=2")
    simulated = ("trainer=ddp_sim", "trainer.strategy.start_method=popen")  # torchrun has started the processes
    jobs = [
        (*plain, *simulated, f"run_dir={tmp_path / 'two'}"),
        (*gan, *simulated, f"run_dir={tmp_path / 'straight'}"),
        (*gan, *simulated, f"run_dir={tmp_path / 'broken'}", "stop_after=3"),
        (*gan, *simulated, f"run_dir={tmp_path / 'broken'}", "resume=last"),
    ]
    done = forks.torchrun(run_all, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    run(*plain, f"run_dir={tmp_path / 'one'}")
    equal_losses(tmp_path / "one", tmp_path / "two")
    assert len(state(tmp_path / "straight")["callbacks"]["ResumeState"]["rng"]) == 2
    assert everything(tmp_path / "broken") == everything(tmp_path / "straight")
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


@pytest.mark.slow
def test_a_sweep_has_two_run_directories(tmp_path):
    small = (*PLAIN, "steps=2", "val_every=2", "logger=wandb")
    done = command("-m", *small, "name=s", "optimizer.lr=1e-3,2e-3", folder=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    rates = []
    for job in ("0", "1"):
        folder = tmp_path / "outputs" / "sweeps" / "s" / job
        assert state(folder)["global_step"] == 2
        rates.append(yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"])
        (log,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        assert log.stem == f"run-{(folder / 'wandb_id.txt').read_text().strip()}", "a run of its own for every job"
        assert f"\x03s {job}".encode() in log.read_bytes(), "and a name, which stands behind its length"
        assert f"job {job}: " in done.stdout and f"optimizer.lr={rates[-1]}" in done.stdout
    assert rates == [1e-3, 2e-3]
    assert "anonymous" not in done.stdout + done.stderr, "a warning of W&B's about what nobody set"
    assert not (tmp_path / "outputs" / "s").exists()
    again = ("-m", *small, "name=s", "resume=auto", "logger=none")
    done = command(*again, "optimizer.lr=5e-4,1e-3,2e-3", folder=tmp_path)
    assert done.returncode == 2 and "optimizer.lr: 0.001 -> 0.0005; pass another name=" in done.stderr, done.stderr
    done = command(*again, "optimizer.lr=1e-3,2e-3,3e-3", "steps=3", "data.workers=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    reached = [state(tmp_path / "outputs" / "sweeps" / "s" / job)["global_step"] for job in ("0", "1", "2")]
    assert reached == [3, 3, 3], "a longer training by another loader, and a value behind the others"
    assert "steps: 2 -> 3" in done.stdout and "data.workers" not in done.stdout.replace("data.workers=1", "")


def test_more_workers_than_cores_are_said_once(monkeypatch):
    """In one line of ours, where torch warns of every loader that it may freeze."""
    from vgen.training import crowded
    from vtok.callbacks import quiet

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert crowded(1) is None
    assert crowded(2) == "note: 2 loader workers share 1 CPU core: data.workers=1 may be faster"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet()
        DataLoader([1], num_workers=2)
        assert not said
        warnings.simplefilter("always")
        DataLoader([1], num_workers=2)
        assert len(said) == 1, "torch warns no more: then quiet() need not name it"


def test_of_many_processes_one_writes_the_id_of_wandb(tmp_path, monkeypatch):
    from vgen.training import _wandb_id

    kept = _wandb_id(tmp_path, True)
    assert len(kept) == 8 and _wandb_id(tmp_path, False) == kept, "a resumed run goes on in its plot"
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
        _wandb_id(tmp_path, True)
        monkeypatch.delenv(name)
    assert (tmp_path / "wandb_id.txt").read_text().strip() == kept
    assert _wandb_id(tmp_path, True) != kept, "a fresh run in the same folder has its own"


@pytest.mark.slow
def test_wandb_offline_keeps_its_run(tmp_path):
    """Also where the process that starts both runs has W&B's service up: it would hold the first one's id."""
    wandb = pytest.importorskip("wandb")
    wandb.setup()
    assert "WANDB_SERVICE" in os.environ
    base = (*PLAIN, "steps=3", "val_every=1", "picture_every=1", "logger=wandb", f"run_dir={tmp_path}")
    ids = []
    for extra in (("stop_after=2",), ("resume=last",)):
        done = command(*base, *extra, folder=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
        assert done.returncode == 0, done.stderr
        ids.append((tmp_path / "wandb_id.txt").read_text().strip())
    assert ids[0] == ids[1] and len(ids[0]) == 8
    wandb.teardown()
    logs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 2 and all(ids[0] in path.name for path in logs)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/reconstructions_*.png"))
    assert [row["step"] for row in losses(tmp_path) if "val/loss" in row] == ["1", "2", "3"]


@pytest.mark.slow
def test_other_loggers_are_not_imported(tmp_path):
    code = "import sys; sys.path[:0] = ['tests', '.']; from runs import TOKENIZER, run; run(*TOKENIZER, 'steps=1', "
    code += f"'run_dir={tmp_path}'); print([m for m in ('wandb', 'timm', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
