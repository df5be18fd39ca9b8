"""Every small tokenizer with every small generator: the pair trains and samples, or says from its spec why not."""

import functools
import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vgen.conditioning import Cond
from vgen.generator import Generator
from vgen.guidance import guidance
from vgen.heads import DrawRule
from vgen.pipeline import Pipeline
from vgen.training import build_module, contradictions
from vtok.checkpoint import save_folder
from vtok.config import build, describe, instantiate
from vtok.data.codes import unlike
from vtok.layout import SequenceLayout
from vtok.models import FAMILIES
from vtok.noise import SampleNoise, sample_seeds
from vtok.optim import make_optimizer
from vtok.tokenizer import TRAINING, Part, TokenSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CLASSES = 10
# one core, 300 pairs: the same modules, thin, with as few steps as they allow; set where a config has the key
TINY = {"depth": 1, "width": 16, "heads": 2, "hidden": 32, "multiple_of": 8, "head_depth": 1, "head_width": 32}
TINY |= {"solver_steps": 2, "steps": 2, "repeats": 1, "levels": 2, "buffer": 2}
# what a message tells to set where a key of the model, not its family, does not suit the tokens
ADVICE = {"position": "rope_1d", "factors": None}


def facts(spec: TokenSpec) -> list[str]:
    """What is so of these tokens, as reasons put it: each must say one of them, and not only what the model wants."""
    layout, part = spec.layout, spec.parts[0]
    made_by = "none" if spec.quantizer is None else spec.quantizer["family"]
    found = [f"are {'ids' if spec.discrete else 'continuous'}", f"have {len(spec.parts)} part"]
    found += [f"{layout.length} tokens", f"these are {layout.length}", f"have {part.vocab_size} codes"]
    found += [f"lie on {len(layout.sides)} scales", f"lie on {layout.sides}", f"quantizer {made_by}"]
    return found + [f"{height} x {width} grid" for height, width in layout.sides]


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*_small.yaml"))


def make_thin(model) -> None:
    """Few layers of little width in a configuration of a generator, in place; all else stays."""
    for key, value in TINY.items():
        if key in model:
            model[key] = value
    if "alignment" in model:  # the aligned state is one between two blocks
        model["depth"], model["block"] = 2, 1


@functools.cache
def section(group: str, name: str):
    """The configuration of train.py with that choice, thin; shared: copy it before a change."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["data=cifar10", "trainer=cpu", f"{group}={name}"])
    OmegaConf.set_struct(config, False)
    if group == "model":
        make_thin(config.model)
    if "steps" in config[group]:  # of a flow decoder
        config[group].steps = 2
    return config


@functools.cache
def data_of(name: str) -> SimpleNamespace:
    """What build_module reads of a data module on the tokens of that tokenizer."""
    torch.manual_seed(0)
    tokenizer = instantiate(section("tokenizer", name).tokenizer, _convert_="all").eval()
    return SimpleNamespace(spec=tokenizer.spec, num_classes=CLASSES, tokenizer=tokenizer, class_names=[])


def drawn(spec: TokenSpec, rows: int) -> torch.Tensor:
    """Random tokens in the spec's range."""
    drawer = torch.Generator().manual_seed(1)
    if not spec.discrete:
        return torch.randn(rows, spec.layout.length, spec.parts[0].channels, generator=drawer)
    runs = [torch.randint(part.vocab_size, (rows, part.count), generator=drawer) for part in spec.parts]
    return torch.cat(runs, dim=1)


def patches_for(model: Generator) -> dict[str, torch.Tensor]:
    """What a teacher says of two images, for the models that read it."""
    if "patches" not in model.reads_also:
        return {}
    return {"patches": torch.randn(2, model.layout.length, model.channels, generator=torch.Generator().manual_seed(2))}


def train_and_sample(config, data: SimpleNamespace) -> None:
    torch.manual_seed(0)
    lit = build_module(config, data, ())
    model = lit.module.train()
    tokens = drawn(data.spec, 2)
    data.spec.check(tokens)
    batch = {"tokens": tokens, "label": torch.tensor([0, 3]), "key": sample_seeds(0, 0, 2)}
    loss, _, _ = lit.losses(batch | patches_for(model))
    loss.backward()
    assert loss.isfinite()
    before = [p.detach().clone() for p in model.parameters()]
    make_optimizer([model], lr=1e-2, weight_decay=0.0).step()  # decay would change weights without any gradient
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters())), "a step must change something"
    pipeline = Pipeline(model, data.tokenizer, chunk=2)
    seeds, labels = sample_seeds(1, 0, 2), torch.tensor([0, CLASSES])
    found = pipeline.tokens(labels, seeds, guide=guidance(1.5), rule=DrawRule())
    data.spec.check(found)
    with torch.no_grad():
        images = data.tokenizer.decode(found)
    assert images.shape == (2, 3, data.spec.image_size, data.spec.image_size) and images.isfinite().all()


def reason(call, *arguments) -> str | None:
    """The message of a ValueError, None where there is none; anything else is raised."""
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return None


def test_every_pair_fits_or_says_why(capsys):
    """Reasons of the tokens come from `accepts`. A key of the configuration that asks too much of them is named, and
    the value that the message names makes the pair fit.
    """
    warnings.simplefilter("ignore")
    models, tokenizers = names("model"), names("tokenizer")
    datas, configs = {name: data_of(name) for name in tokenizers}, {name: section("model", name) for name in models}
    families = {n: instantiate(c.model, _convert_="all", _partial_=True).func for n, c in configs.items()}
    fit, refused, wrong = [], [], []
    for model, (tokenizer, data) in itertools.product(models, datas.items()):
        pair, config = f"model={model} tokenizer={tokenizer}", configs[model]
        why, said = reason(families[model].accepts, data.spec), reason(build_module, config, data, ())
        if said is not None:
            refused.append(pair)
            if said.count("\n") or not any(fact in said for fact in facts(data.spec)):
                wrong.append(f"{pair}: the reason says nothing of these tokens: {said!r}")
        if why is not None:
            if said != why:
                wrong.append(f"{pair}: accepts says {why!r}, train.py {said!r}")
            continue
        try:
            for key, value in ADVICE.items():
                if said is not None and key in said:
                    config = config.copy()
                    config.model[key] = value
                    said = reason(build_module, config, data, ())
            train_and_sample(config, data)
        except Exception as error:  # collected: the report names every pair at once
            wrong.append(f"{pair}: {type(error).__name__}: {error}")
            continue
        if pair not in refused:
            fit.append(pair)
    total = len(models) * len(tokenizers)
    skipped = total - len(fit) - len(refused)
    with capsys.disabled():
        print(f"\n{total} pairs: {len(fit)} fit, {len(refused)} say why not, {skipped} skipped or failed", end=" ")
    assert not wrong, "\n".join(wrong)
    assert skipped == 0
    for kind, listed in (("model", models), ("tokenizer", tokenizers)):
        alone = [name for name in listed if not any(f"{kind}={name}" in pair.split() for pair in fit)]
        assert not alone, f"{kind} that fits nothing: {alone}"


def spec_of(layout: SequenceLayout, vocab_size: int | None = 24) -> TokenSpec:
    return TokenSpec(layout, (Part(layout.length, vocab_size, 6),), 32)


@pytest.mark.parametrize("name", names("tokenizer"))
def test_a_tokenizers_configuration_agrees_with_what_is_made_of_it(name):
    """Beside a model, tokenizer= is compared with the tokenizer of its tokens; only a change is a contradiction."""
    said = OmegaConf.to_container(section("tokenizer", name).tokenizer, resolve=True)
    found = describe(data_of(name).tokenizer)
    assert contradictions(said, found, "tokenizer") == []
    other = said | {"_target_": "vtok.models.other.Other"}
    assert contradictions(other, found, "tokenizer") == [f"tokenizer=Other, not {found['family']}"]


OTHER = {"beta": 0.5, "codebook_weight": 0.5, "entropy_weight": 0.2, "entropy_temperature": 0.5, "sample_weight": 0.5}
OTHER |= {"batch_weight": 0.5, "temperature": 0.5, "entropy_groups": 2, "ema_decay": 0.9, "restart": 0.1}
OTHER |= {"rotation": True, "stochastic": 0.5, "kl_weight": 0.1, "dropout": 0.3, "checkpointing": True, "init": "paper"}
OTHER |= {"gate": 0.5, "stage": "decoder", "nested": "all", "null_drop": 0.3, "time": [0.0, 1.0], "draw_sides": True}
OTHER |= {"scale_weight": 0.5, "degradation": 0.5, "auxiliary_until": 0.1, "feature_weight": 0.5}
OTHER |= {"alignment_power": 2.0, "alignment_decay": 1.0, "alignment_depth": 1, "alignment_channels": 8, "semantic": 8}
OTHER |= {"global_width": 8, "vision": 2, "vision_channels": 8, "repa_block": 0, "repa_width": 8, "repa_side": 2}


def trained_otherwise(described):
    """A description with every argument of TRAINING at another value."""
    if isinstance(described, list):
        return [trained_otherwise(part) for part in described]
    if not (isinstance(described, dict) and "family" in described):
        return described
    given = {name: OTHER.get(name, trained_otherwise(value)) for name, value in described["arguments"].items()}
    if "stochastic" in given and not given["l2_norm"]:
        del given["stochastic"]
    if "entropy_groups" in given:
        given["entropy_groups"] = [2, given["bits"] - 2]
    return described | {"arguments": given}


def as_configuration(described):
    if isinstance(described, list):
        return [as_configuration(part) for part in described]
    if not (isinstance(described, dict) and "family" in described):
        return described
    given = {name: as_configuration(value) for name, value in described["arguments"].items()}
    return given | {"_target_": f"vtok.{described['family']}"}


@torch.no_grad()
@pytest.mark.parametrize("name", names("tokenizer"))
def test_what_acts_in_training_alone_is_no_contradiction(name):
    """The same weights under other arguments of training: the same tokens and pictures, bit for bit."""
    tokenizer = data_of(name).tokenizer
    found = describe(tokenizer)
    changed = trained_otherwise(found)
    assert contradictions(as_configuration(changed), found, "tokenizer") == [] and changed != found
    assert not unlike(changed, found)
    other = build(changed, FAMILIES).eval()
    other.load_state_dict(tokenizer.state_dict(), strict=False)  # what alignment alone uses may be new
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = SampleNoise(sample_seeds(0, 0, 2))
    tokens = tokenizer.encode(images, noise=noise)
    assert torch.equal(other.encode(images, noise=noise), tokens)
    assert torch.equal(other.decode(tokens, noise=noise), tokenizer.decode(tokens, noise=noise))


def test_every_training_argument_is_tried():
    """Every name is an argument of some small tokenizer or a part of it, and set otherwise above."""
    found = {name for tokenizer in names("tokenizer") for name in arguments(describe(data_of(tokenizer).tokenizer))}
    assert set(OTHER) == TRAINING and found >= TRAINING


def arguments(described):
    if isinstance(described, list):
        return {name for part in described for name in arguments(part)}
    if not (isinstance(described, dict) and "family" in described):
        return set()
    return set(described["arguments"]) | {n for value in described["arguments"].values() for n in arguments(value)}


LINES = SequenceLayout.line(8)
ODD = {  # what no small tokenizer emits
    "wide": spec_of(SequenceLayout.raster(2, 6)),
    "uneven": spec_of(SequenceLayout.raster(3, 3)),
    "one row": spec_of(SequenceLayout.raster(1, 6)),
    "two tokens": spec_of(SequenceLayout.line(2)),
    "tiles": spec_of(SequenceLayout.tiles(4, 4, 2, 2)),
    "wide latents": spec_of(SequenceLayout.raster(4, 6), None),
    "uneven latents": spec_of(SequenceLayout.raster(3, 3), None),
    "a line of latents": spec_of(LINES, None),
    "tiles of latents": spec_of(SequenceLayout.tiles(4, 4, 2, 2), None),
    "scales of latents": spec_of(SequenceLayout.scales([1, 2, 4]), None),
    "codes and latents": TokenSpec(LINES, (Part(4, None, 6), Part(4, 9, 5)), 32),
}


@pytest.mark.parametrize("name", names("model"))
def test_odd_tokens_fit_or_are_refused_at_once(name):
    """Nothing goes wrong later than in the constructor: what it takes also trains and samples."""
    config = section("model", name)
    make = instantiate(config.model, _convert_="all", _partial_=True)
    for spec in ODD.values():
        torch.manual_seed(0)
        try:
            model = make(spec=spec, num_classes=CLASSES)
        except ValueError:
            continue
        batch = {"tokens": drawn(spec, 2), "label": torch.tensor([0, 3]), "key": sample_seeds(0, 0, 2)}
        model.train().loss(batch | patches_for(model))["loss"].backward()
        cond = Cond.cat([model.eval().conditioner(torch.tensor([0, 3])), model.conditioner.null(2)])
        noise = SampleNoise(sample_seeds(1, 0, 2))
        canvas = model.sampler(model, cond, noise=noise, guide=guidance(1.5), rule=DrawRule())
        spec.check(model.restore(canvas))


def test_the_command_says_why(tmp_path):
    """Through the entry point of train.py, as a mistake of the user: the reason and an exit code of 2."""
    tokenizer = data_of("kl_small").tokenizer
    save_folder(tokenizer, tmp_path / "tokenizer")
    options = ["data=fake", "data.image_size=32", "model=llamagen_small", "trainer=cpu"]
    places = [f"tokenizer_from={tmp_path / 'tokenizer'}", f"run_dir={tmp_path / 'run'}"]
    done = command("train.py", *options, *places)
    assert done.returncode == 2 and not (tmp_path / "run" / "checkpoints").exists()
    assert done.stderr.startswith("error: LlamaGen predicts ids, but these tokens are continuous; choose a tokenizer")
