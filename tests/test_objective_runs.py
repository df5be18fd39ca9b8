"""Training runs with the options of the objective: exact resume, update order, plug-ins, pictures."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import dino_state
from forks import torchrun
from PIL import Image
from runs import TOKENIZER, digest, everything, losses, run, run_all, state
from tokenizers import make

from vtok.collapse import POINTS, CodeUse, curve
from vtok.lit import Lit, LitTokenizer
from vtok.losses.dino import FILE
from vtok.losses.objective import TokenizerObjective
from vtok.optim import Recipe
from vtok.tokenizer import Reconstruction

DIFF_AUG = "{_target_: vtok.losses.augment.DiffAug, prob: 0.5}"
STRONG = "{_target_: vtok.losses.augment.DiffAug, prob: 1.0, cutout: 0.5}"
PRIOR = "{_target_: vtok.losses.prior.ARPrior, channels: 4, length: 16, width: 16, depth: 1, heads: 2, lr_scale: 5}"
OPTIONS = (
    *TOKENIZER,
    "objective.gan.first=discriminator",
    "objective.gan.lecam_weight=0.1",
    "objective.gan.ramp=3",
    f"objective.gan.augment={DIFF_AUG}",
    f"objective.gan.strong={STRONG}",
    "objective.gan.consistency_weight=0.5",
    "objective.gan.generator_loss=non_saturating",
    f"+objective.terms.prior={PRIOR}",
    "steps=6",
    "val_every=2",
    "picture_every=3",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    run(*OPTIONS, f"run_dir={folder}")
    return folder


def test_interrupted_equals_uninterrupted_with_every_option(straight, tmp_path):
    run(*OPTIONS, f"run_dir={tmp_path}", "stop_after=4")
    run(*OPTIONS, f"run_dir={tmp_path}", "resume=last")
    ours, theirs = everything(tmp_path), everything(straight)
    assert ours == theirs and losses(tmp_path) == losses(straight)
    assert any(k.startswith("objective.gan.lecam") for k in ours)
    assert any(k.startswith("objective.terms.prior") for k in ours)
    pictures = [sorted(p.name for p in (f / "pictures").glob("code_use_*")) for f in (straight, tmp_path)]
    assert pictures[0] == pictures[1] == [f"code_use_{s:07d}.png" for s in (2, 4, 6)]
    last = [np.asarray(Image.open(f / "pictures" / "code_use_0000006.png")) for f in (straight, tmp_path)]
    assert np.array_equal(*last)  # the curves of the first steps came out of the checkpoint


def test_the_dino_discriminator_resumes_exactly(tmp_path):
    """Spectral norm's vectors move at every look, the tokenizer's too; the frozen network is in no checkpoint."""
    torch.save(dino_state(seed=1, width=32, depth=2), tmp_path / FILE)
    critic = (
        f"{{_target_: vtok.losses.dino.DinoDiscriminator, weights_path: {tmp_path}, size: 32, depths: [0, 1], "
        "kernel: 3, width: 32, depth: 2, heads: 2}"
    )
    base = (*(item for item in TOKENIZER if not item.startswith("objective.gan.discriminator")), "steps=5")
    base = (*base, "~objective.gan.discriminator", f"+objective.gan.discriminator={critic}")
    run(*base, f"run_dir={tmp_path / 'a'}")
    run(*base, f"run_dir={tmp_path / 'b'}", "stop_after=3")
    run(*base, f"run_dir={tmp_path / 'b'}", "resume=last")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    kept = [name for name in state(tmp_path / "a")["state_dict"] if name.startswith("objective.")]
    assert kept and all(name.startswith("objective.gan.discriminator.heads.") for name in kept)


def test_what_is_logged(straight):
    rows = losses(straight)
    trained = [row for row in rows if "train/loss" in row]
    assert ["train/discriminator" in row for row in trained] == [False, False, True, True, True, True]
    names = {"consistency", "lecam", "adversarial", "prior", "discriminator_grad_norm", "commitment", "perplexity"}
    assert all(f"train/{name}" in trained[-1] for name in names)
    weighed = [float(row["train/prior"]) for row in trained]
    assert weighed[0] == pytest.approx(0.06 * math.log(32), rel=0.2)
    held = [row for row in rows if "val/loss" in row][-1]
    assert float(held["val/dead"]) == pytest.approx(32 * (1 - float(held["val/usage"])))
    assert "val/prior" in held and "val/adversarial" not in held


def test_the_priors_rate_is_a_multiple(straight):
    groups = state(straight)["optimizer_states"][0]["param_groups"]
    lr = next(float(row["train/lr"]) for row in losses(straight)[::-1] if "train/lr" in row)
    scaled = [g["lr"] for g in groups if g.get("lr_scale") == 5]
    assert len(scaled) == 2 and scaled == pytest.approx([5 * lr] * 2) and groups[0]["lr"] == pytest.approx(lr)


def test_the_discriminator_goes_first(tmp_path, monkeypatch):
    """The tokenizer is judged by the discriminator as it is after its update of the same step."""
    seen: list[tuple[str, float]] = []

    def note(name):
        original = getattr(TokenizerObjective, name)

        def noted(self, *arguments, **options):
            if self.gan is not None:
                seen.append((name, float(sum(p.detach().double().sum() for p in self.discriminator.parameters()))))
            return original(self, *arguments, **options)

        monkeypatch.setattr(TokenizerObjective, name, noted)

    note("generator_loss")
    note("discriminator_loss")
    base = (*TOKENIZER, "steps=4", "val_every=100")
    run(*base, "objective.gan.first=discriminator", f"run_dir={tmp_path / 'first'}")
    assert [name for name, _ in seen] == ["generator_loss"] * 2 + ["discriminator_loss", "generator_loss"] * 2
    assert seen[3][1] != seen[2][1] and seen[4][1] == seen[3][1]
    seen.clear()
    run(*base, f"run_dir={tmp_path / 'second'}")
    assert [name for name, _ in seen] == ["generator_loss"] * 2 + ["generator_loss", "discriminator_loss"] * 2
    assert seen[2][1] == seen[3][1] != seen[4][1]
    with pytest.raises(ValueError, match=r"accumulate=2.*objective\.gan\.first"):
        run(*base, "objective.gan.first=discriminator", "accumulate=2", f"run_dir={tmp_path / 'third'}")


def test_it_learns_in_every_second_step(tmp_path):
    run(*TOKENIZER, "steps=6", "objective.gan.every=2", f"run_dir={tmp_path}")
    rows = [row for row in losses(tmp_path) if "train/loss" in row]
    assert ["train/discriminator" in row for row in rows] == [False, False, True, False, True, False]
    assert ["train/adversarial" in row for row in rows] == [False, False, True, True, True, True]


def test_by_turns_one_network_learns_in_a_step_and_a_resume_is_exact(tmp_path, monkeypatch):
    """From step 2 on the discriminator in odd steps. The other network keeps every number: weights, the average, the
    codebook's statistics, which train mode moves, and the moments of its optimizer. Both kinds of rows are written."""
    parts = {"module": "module.", "ema": "ema.", "discriminator": "objective.gan.discriminator."}
    seen: list[dict[str, str]] = []
    original = Lit._update

    def noted(self):
        original(self)
        kept = self.state_dict()
        seen.append({n: digest({k: v for k, v in kept.items() if k.startswith(p)}) for n, p in parts.items()})

    monkeypatch.setattr(Lit, "_update", noted)
    base = (*TOKENIZER, "objective.gan.alternate=true", "objective.gan.adaptive=false", "steps=8", "log_every=4")
    run(*base, f"run_dir={tmp_path / 'a'}")
    moved = {n: [s for s in range(1, 8) if seen[s][n] != seen[s - 1][n]] for n in parts}
    assert moved == {"module": [1, 2, 4, 6], "ema": [1, 2, 4, 6], "discriminator": [2, 3, 4, 5, 6, 7]}
    counted = [{float(v["step"]) for v in o["state"].values()} for o in state(tmp_path / "a")["optimizer_states"]]
    assert counted == [{5.0}, {3.0}]  # the discriminator changes in even steps too: batch norms that see the fakes
    rows = [(row["step"], "train/loss" in row, "train/discriminator" in row) for row in losses(tmp_path / "a")]
    trained = [row for row in rows if row[1] or row[2]]
    assert trained == [("1", True, False), *((s, s in "37", s in "48") for s in "3478")]
    run(*base, f"run_dir={tmp_path / 'b'}", "stop_after=3")
    run(*base, f"run_dir={tmp_path / 'b'}", "resume=last")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert losses(tmp_path / "a")[-1] == losses(tmp_path / "b")[-1]


@pytest.mark.parametrize("clip", [True, False])
def test_whether_the_discriminator_is_clipped(tmp_path, clip):
    """Its first moments after one update are half of the gradient (betas 0.5): of norm 1e-3, or of the logged one."""
    run(*TOKENIZER, "steps=3", "clip=1e-3", f"objective.gan.clip={clip}", f"run_dir={tmp_path}")
    moments = [v["exp_avg"].flatten() for v in state(tmp_path)["optimizer_states"][1]["state"].values()]
    found = float(next(r["train/discriminator_grad_norm"] for r in losses(tmp_path)[::-1] if "train/loss" in r))
    assert found > 2e-3  # the logged norm is the one before clipping
    assert float(2 * torch.cat(moments).norm()) == pytest.approx(1e-3 if clip else found, rel=1e-4)


def test_two_processes_train_as_one_does(tmp_path):
    """Adaptive weight, LeCam, augmentation and the prior's draws: nothing depends on how a batch is cut.

    Not PatchGAN, whose BatchNorm does, nor dropout and restarts of codes.
    """
    critic = "{_target_: vtok.losses.discriminators.MaskBitDiscriminator, width: 8, stages: 1, groups: 4, patches: 4}"
    depends = ("objective.gan.discriminator", "tokenizer.dropout", "+tokenizer.quantizer", "trainer=")
    base = (
        *(item for item in TOKENIZER if not item.startswith(depends)),
        "~objective.gan.discriminator",
        f"+objective.gan.discriminator={critic}",
        "objective.gan.start=1",
        "objective.gan.lecam_weight=0.1",
        f"objective.gan.augment={DIFF_AUG}",
        f"+objective.terms.prior={PRIOR.replace('}', ', dropout: 0.0}')}",
        "steps=4",
        "val_every=2",
    )
    orders = {"first": "discriminator", "alternate": "true"}
    two = ("trainer=ddp_sim", "trainer.strategy.start_method=popen")  # torchrun has started the processes
    jobs = [(*base, f"objective.gan.{k}={v}", f"run_dir={tmp_path / 'two' / k}") for k, v in orders.items()]
    done = torchrun(run_all, [(*job, *two) for job in jobs])
    assert done.returncode == 0, done.stderr[-2000:]
    for order, value in orders.items():
        run(*base, f"objective.gan.{order}={value}", "trainer=cpu", f"run_dir={tmp_path / 'one' / order}")
        for one, two in zip(losses(tmp_path / "one" / order), losses(tmp_path / "two" / order), strict=True):
            assert set(one) == set(two)
            for name in one:
                # 1e-4: float32 sums in another order, through four optimizer steps
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4, abs=1e-6), (order, name)


# --- the figure of code use ----------------------------------------------------------------------------------------


def test_the_curve_by_hand():
    counts = torch.zeros(4 * POINTS)
    counts[7], counts[9] = 6.0, 2.0
    found = curve(counts)
    assert found[0] == 6 / 8 * len(counts) and found[1:].sum() == 0  # the next place of 1,024 codes is the fifth
    flat = curve(torch.full((300,), 5.0))
    torch.testing.assert_close(flat, torch.ones(POINTS))
    assert curve(torch.zeros(8)).sum() == 0


def test_dead_codes_leave_the_right_of_the_figure_empty(tmp_path):
    shares = []
    for alive in (1.0, 0.25):
        callback = CodeUse(tmp_path)
        used = torch.where(torch.arange(1024) < alive * 1024, 3.0, 0.0)
        callback.history = {10: [{"curve": curve(used), "usage": alive, "perplexity": 1.0, "dead": 0}]}
        sheet = callback.draw()
        colourful = (sheet.max(2).astype(int) - sheet.min(2)) > 40
        line = colourful[colourful.sum(1).argmax()]  # the row of the level curve; the legend's sample is shorter
        shares.append(np.ptp(np.flatnonzero(line)) / sheet.shape[1])
    assert shares[0] > 0.8 and shares[1] == pytest.approx(shares[0] / 4, rel=0.1)


def test_scales_are_counted_apart_and_drawn(tmp_path):
    """One code at the coarsest scale of all pictures: among 21 tokens an image it shows in its own curve only."""
    torch.manual_seed(0)
    tokenizer = make("var").eval()
    ids = torch.randint(32, (6, 21))
    ids[:, 0] = 7
    tokenizer.forward = lambda images, **options: Reconstruction(images, ids)
    rates = {"lr": 1e-3}
    objective = TokenizerObjective(perceptual_weight=0.0)
    lit = LitTokenizer(tokenizer, objective, Recipe(rates, {}, 9), discriminator_optimizer=rates)
    found = lit.validate_module(tokenizer, {"image": torch.zeros(6, 3, 16, 16), "key": torch.arange(6)}, "")
    lit.histograms = {k: v for k, v in found.items() if k.startswith("count_")}
    named = lit.finish_validation({}, lit.histograms)
    assert {k for k in named if "step" not in k} == {"usage", "perplexity", "dead"}
    for k, (a, b) in enumerate(((0, 1), (1, 5), (5, 21))):
        _, times = np.unique(ids[:, a:b].numpy(), return_counts=True)
        share = times / times.sum()
        assert float(named[f"usage_step_{k:02d}"]) == pytest.approx(len(times) / 32)
        assert float(named[f"perplexity_step_{k:02d}"]) == pytest.approx(
            np.exp(-(share * np.log(share)).sum()), rel=1e-5
        )
    assert float(named["perplexity_step_00"]) == 1 and float(named["perplexity"]) > 20
    callback, again = CodeUse(tmp_path), CodeUse(tmp_path)
    callback.on_validation_end(SimpleNamespace(global_step=10, is_global_zero=True, loggers=[]), lit)
    sheet = np.asarray(Image.open(tmp_path / "code_use_0000010.png"))
    again.load_state_dict(callback.state_dict())
    assert (again.draw() == sheet).all()
    again.load_state_dict({"history": callback.history})  # of an earlier version: all codes alone
    assert 2 * again.draw().shape[1] == sheet.shape[1]
