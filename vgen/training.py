"""The training command: from the configuration of train.py to a run directory with checkpoints and pictures.

`model` null trains the tokenizer of `tokenizer` on images; otherwise the generator of `model` on the tokens of a frozen
tokenizer. All mistakes in the configuration come up here, before the first step and before an older run is overwritten;
those of a tokenizer that only a pass shows, in a pass without an optimizer.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from vgen.callbacks import Samples
from vgen.corruption import Corruption
from vgen.generator import Generator
from vgen.lit import LitGenerator
from vgen.models import FAMILIES
from vtok import run as runs
from vtok.acceleration import (
    SLOW_BF16,
    checkpoint_blocks,
    compile_blocks,
    cpu_has_bf16,
    keep_memory,
    training_operations,
)
from vtok.callbacks import Progress, Reconstructions, quiet
from vtok.ckpt_files import AtomicCheckpointIO
from vtok.cli import root_of
from vtok.collapse import CodeUse
from vtok.config import Families, describe, instantiate
from vtok.data.codes import OnlineTokens, spec_at
from vtok.data.module import ImageData, micro_batch_size
from vtok.data.shards import read_manifest
from vtok.lit import Lit, LitTokenizer
from vtok.losses.prior import ARPrior
from vtok.noise import key
from vtok.optim import Recipe, memory
from vtok.resume import EXIT_PREEMPTED, Checkpoints, Preempted, ResumeState
from vtok.rng import seed_all
from vtok.tokenizer import TRAINING, TokenSpec
from vtok.warmstart import warm_start
from vtok.watch import DataWatch, PeerWatch, check_restarts

# keys whose change makes a resumed run another one than it was
PART_OF_THE_RUN = (
    "seed",
    "steps",
    "batch_size",
    "accumulate",
    "optimizer",
    "discriminator_optimizer",
    "schedule",
    "final_weight_decay",
    "clip",
)
PART_OF_THE_RUN += ("ema", "precision", "data", "objective", "tokenizer_from", "corruption", "corrections", "teacher")
PART_OF_THE_RUN += ("tokenizer_sides",)
USUAL_SIDE = 256  # px, of codes that are not there yet
TRAINS_ON_IMAGES = "a tokenizer trains on images: choose data=digits, cifar10, imagefolder, ..."


def train(config: DictConfig) -> float | None:
    """Run the command of configs/train.yaml; returns the monitored value, which a sweep compares."""
    check_restarts(os.environ)
    config = settle(config)
    quiet()
    folder, trust = Path(config.run_dir), tuple(config.trust)
    main = _is_main()
    say = functools.partial(print, flush=True) if main else lambda *_: None
    on_cpu = config.trainer.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu:
        keep_memory()
    if config.precision.startswith("bf16") and on_cpu and not cpu_has_bf16():
        say(SLOW_BF16.format("precision=32-true"))
    resumed = runs.resume_from(folder, config.resume, config.ckpt_path, config.overwrite, say=say)
    if resumed and _job() is not None:
        check_job(config, folder)
    seed_all(key(config.seed))
    check_teacher(config, trust)
    check_fit(config, trust)
    data = build_data(config, trust)
    lit = build_module(config, data, trust)
    if config.get("checkpointing", False):
        checkpoint_blocks(lit.module)
    if config.get("compile", False):
        compile_blocks(lit.module)
    known, step = Families(FAMILIES, trust), 0
    if resumed:
        step = runs.check_same(resumed, lit.kind, describe(lit.module), lit.state_dict(), known)
    if config.init_from and resumed is None:
        warm = warm_start(lit.module, config.init_from, known, class_names=data.class_names)
        if isinstance(lit, LitGenerator):
            lit.module.adopt(data.tokenizer)  # the codebook of the data, not that of the earlier run
        if lit.ema is not None:
            lit.ema.load_state_dict(lit.module.state_dict())
        say(warm.table())
    elif resumed is None and isinstance(lit, LitTokenizer) and (told := lit.module.fresh_start()):
        say(f"note: {told}")
    if resumed is None and isinstance(lit, LitTokenizer):
        rehearse(lit, config.data.get("window") or data.image_size, config.batch_size)
    trainer = build_trainer(config, folder, lit, trust, fresh=resumed is None)
    batch = micro_batch_size(config.batch_size, config.accumulate, trainer.world_size)
    plain = OmegaConf.to_container(config, resolve=True)
    if main:  # from here on the run directory changes
        if isinstance(lit, LitGenerator):
            runs.keep_tokenizer(data.tokenizer, folder, resumed=resumed is not None)
        if resumed is not None:
            for line in runs.changes(folder, plain, PART_OF_THE_RUN):
                say(f"note: changed since this run was started, so it is not the run it would have been: {line}")
        runs.prepare(
            folder,
            config=OmegaConf.to_yaml(config, resolve=True),
            overrides=_overrides(),
            resumed=resumed,
            step=step,
            overwrite=config.overwrite,
        )
    say(summary(config, lit, data, trainer, batch, step))
    if note := crowded(config.data.get("workers") or 0):
        say(note)
    for logger in trainer.loggers:
        logger.log_hyperparams({**plain, "versions": runs.versions()})
    if step >= trainer.max_steps:
        say(f"nothing to do: {resumed} already has {step} steps; raise steps")
    try:
        trainer.fit(lit, datamodule=data, ckpt_path=resumed, weights_only=True)
    except SIGTERMException:  # Lightning's, before the first batch: it would leave with code 0, as if all were done
        raise Preempted(EXIT_PREEMPTED) from None
    except Exception as error:
        code = getattr(error, "exit_code", None)  # of a process that Lightning spawned
        if code:
            raise Preempted(code) from None
        raise
    say(f"checkpoints: {folder / 'checkpoints'}\npictures:    {folder / 'pictures'}")
    value = trainer.callback_metrics.get(config.monitor)
    if value is None:
        return None
    say(f"{config.monitor} = {float(value):.6g}")
    return float(value)


def check_job(config: DictConfig, folder: Path) -> None:
    """Raise ValueError where a sweep's job would go on with the run of another job: their folders are numbered, so a
    value that is added in front, or a second sweep of the same name, moves them. Longer trainings are no other run."""
    names = [name for name in PART_OF_THE_RUN if name != "steps"]
    for line in runs.changes(folder, OmegaConf.to_container(config, resolve=True), names)[:1]:
        raise ValueError(
            f"job {_job()} of this sweep would go on with another run, {folder}: {line}; pass another name=, or add "
            "new values behind the old ones, since jobs are numbered in their order"
        )


def settle(config: DictConfig) -> DictConfig:
    """The configuration with the run directory decided, types checked, and `auto` values filled in."""
    from hydra.core.hydra_config import HydraConfig

    config = config.copy()
    if _job() is not None:
        config.run_dir = HydraConfig.get().runtime.output_dir  # every job of a sweep has its own
    if config.get("model") is None and _cached(config):
        raise ValueError(f"{TRAINS_ON_IMAGES} (data=codes trains a generator: pass model=<name>)")
    if config.get("tokenizer") is not None and _cached(config):  # whose image size it could not even read
        raise ValueError(
            f"data=codes comes with the tokenizer that made them: leave tokenizer= away\n{beside_codes(config)}"
        )
    model = config.get("model") or {}
    if model.get("factor_depth") and model.get("factors") is None:  # said here, so that older runs still load
        raise ValueError(
            f"model.factor_depth={model['factor_depth']} is of the sub-codes: give model.factors, or leave it 0"
        )
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no default: pass {missing[0]}=<value>")
    for name in (*runs.TEXTS, *runs.OPTIONAL_TEXTS):
        if isinstance(config[name], (int, float)) and not isinstance(config[name], bool):
            config[name] = str(config[name])  # name=7: Hydra reads a number
    runs.check_values(config)
    if config.get("model") is None and config.get("tokenizer") is None:
        raise ValueError("nothing to train: choose tokenizer=<name> (a tokenizer) or model=<name> (a generator)")
    for name in ("corruption", "teacher", "corrections", "tokenizer_sides"):
        if config.get("model") is None and config.get(name):
            raise ValueError(f"{name}= is for the training of a generator (model=<name>), not of a tokenizer: null")
    if config.precision == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and config.trainer.accelerator != "cpu"
        config.precision = "bf16-mixed" if fast else "32-true"
    if config.precision not in ("32-true", "bf16-mixed", "64-true"):
        # fp16 needs a loss scaler around both optimizers of a GAN; bf16 needs none. bf16-true would round the moving
        # averages' small steps away
        raise ValueError(f"precision={config.precision}: choose auto, 32-true, bf16-mixed or 64-true")
    return config


def _cached(config: DictConfig) -> bool:
    return str(config.data.get("_target_", "")) == "vtok.data.codes.Codes"


def build_data(config: DictConfig, trust: tuple[str, ...]) -> Any:
    """The data module: images for a tokenizer, tokens with their frozen tokenizer for a generator."""
    if config.get("model") is None:
        data = instantiate(config.data, trust=trust, _convert_="all")
        if not isinstance(data, ImageData):
            raise ValueError(TRAINS_ON_IMAGES)
        data.setup()
        return data
    source = config.tokenizer_from
    if _cached(config):
        if source and config.data.tokenizer not in (None, source):
            both = f"data.tokenizer={config.data.tokenizer} and tokenizer_from={source}"
            raise ValueError(f"{both} name two tokenizers: leave one of them away")
        if config.get("corrections", False):
            raise ValueError("corrections=true encodes images anew, data=codes has none: pass data=... of images")
        if config.get("tokenizer_sides") is not None:
            raise ValueError("tokenizer_sides encodes images, data=codes has none: pass data=... of images")
        given = {"tokenizer": source, "weights": config.tokenizer_weights}
        section = OmegaConf.merge(config.data, given) if source else config.data.copy()
        OmegaConf.set_struct(section, False)
        section.trust = list(trust)
        return instantiate(section, trust=trust, _convert_="all")
    if config.data.get("window"):
        raise ValueError(f"data.window={config.data.window} is for tokenizers, a generator needs whole pictures: null")
    if not source:
        raise ValueError("a generator needs tokens: pass tokenizer_from=<run or folder of a tokenizer>, or data=codes")
    data = OnlineTokens(
        data=instantiate(config.data, trust=trust, _convert_="all"),
        tokenizer=source,
        weights=config.tokenizer_weights,
        keep_images=config.get("teacher") is not None,
        corrections=bool(config.get("corrections", False)),
        sides=_listed(config, "tokenizer_sides"),
        ahead=bool(config.get("encode_ahead", True)),
        trust=trust,
    )
    data.setup()
    return data


def _listed(config: DictConfig, name: str) -> list[Any] | None:
    """The list of a key, None where it is null; ValueError for anything else."""
    value = config.get(name)
    if value is None:
        return None
    if not OmegaConf.is_list(value):
        raise ValueError(f"{name}={value}: give a list, as [1,2,4]")
    return list(value)


def crowded(workers: int) -> str | None:
    """What to tell who has more loader workers than cores, for each process that trains; None where there is room."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers <= cores:
        return None
    return (
        f"note: {workers} loader workers share {cores} CPU core{'s' * (cores > 1)}: data.workers={cores} may be faster"
    )


def build_module(config: DictConfig, data: Any, trust: tuple[str, ...]) -> Lit:
    """The Lightning module around a new tokenizer or generator."""
    plain = {k: OmegaConf.to_container(config[k], resolve=True) for k in ("optimizer", "schedule")}
    recipe = Recipe(
        steps=config.steps,
        accumulate=config.accumulate,
        clip=config.clip,
        ema=config.ema,
        log_every=config.log_every,
        on_nan=config.on_nan,
        final_weight_decay=config.get("final_weight_decay"),
        **plain,
    )
    if config.get("model") is None:
        module = instantiate(config.tokenizer, trust=trust, _convert_="all")
        if module.spec.image_size != data.image_size:
            raise ValueError(
                f"the tokenizer is built for {module.spec.image_size} px, the data have {data.image_size} px; "
                "change tokenizer.image_size or data.image_size"
            )
        if window := config.data.get("window"):
            if module.grows == "no" and not module.layouts:
                raise ValueError(
                    f"data.window={window}: a {type(module).__name__} has as many tokens for a part as for the whole "
                    "picture; windows are for families whose tokens are cells. Pass data.window=null"
                )
            if module.layouts:
                module.check_images(torch.empty(1, 3, window, window, device="meta"))
            else:
                spec_at(module, window)
        objective = instantiate(fitted(config.objective, module.spec), trust=trust, _convert_="all")
        adversary = OmegaConf.to_container(config.discriminator_optimizer, resolve=True)
        return LitTokenizer(module, objective, recipe, discriminator_optimizer=adversary)
    if config.get("tokenizer") is not None:
        said = OmegaConf.to_container(config.tokenizer, resolve=True)
        if wrong := contradictions(said, describe(data.tokenizer), "tokenizer"):
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                "tokenizer= contradicts the tokenizer that made the tokens (tokenizer_from): "
                f"{', '.join(wrong[:3])}{more}; leave tokenizer= away, or give a run of that tokenizer"
            )
    make = instantiate(config.model, trust=trust, _convert_="all", _partial_=True)
    if not (isinstance(make.func, type) and issubclass(make.func, Generator)):
        raise ValueError(f"model._target_={config.model._target_} is not a generator")
    make.func.accepts(data.spec)
    for name, part, who in (("teacher", "patches", "LlamaGenREPA"), ("corrections", "corrupted", "DetailFlow")):
        if config.get(name) and part not in make.func.reads_also:
            wrong = make.func.__name__
            raise ValueError(f"{name} is for models that learn from it ({who}), not {wrong}: pass {name}=null")
    module = make(spec=data.spec, num_classes=data.num_classes)
    module.adopt(data.tokenizer)
    corruption = None
    if config.get("corruption") is not None:
        given = OmegaConf.to_container(config.corruption, resolve=True)
        unknown = set(given) - {"kind", "rate", "near", "sigma"}
        if unknown or "kind" not in given:
            raise ValueError(f"corruption={given}: give kind (random, near or noise), and of rate, near and sigma some")
        for name, kind in (("near", "near"), ("sigma", "noise")):
            if name in given and given["kind"] != kind:
                raise ValueError(
                    f"corruption.{name} is of corruption.kind={kind}, not of {given['kind']}: leave it away"
                )
        corruption = Corruption(data.spec, getattr(data.tokenizer, "quantizer", None), **given)
    teacher = None
    if config.get("teacher") is not None:
        from vtok.losses.backbone import Backbone
        from vtok.losses.frozen import Frozen

        backbone = Backbone(**teacher_options(config), remedy="train another model, with teacher=null")
        if (got := backbone.patches) != (want := (module.layout.length, module.channels)):
            raise ValueError(
                f"the teacher gives {got[0]} patches of {got[1]} channels an image, expected {want[0]} of {want[1]}: "
                "change teacher.size, teacher.model or model.channels"
            )
        teacher = Frozen(backbone)
    return LitGenerator(module, recipe, class_names=data.class_names, corruption=corruption, teacher=teacher)


def rehearse(lit: LitTokenizer, side: int, batch_size: int) -> None:
    """A pass on the CPU, before an older run is touched and before the processes meet: all end on a mistake. Of one
    image, since published sizes take some ten seconds of a core for it; batch norms need two."""
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in lit.modules())
    rows = 2 if normed and batch_size > 1 else 1
    images = torch.linspace(-1, 1, rows * 3 * side * side).view(rows, 3, side, side)
    lit.objective.rehearse(lit.module, images, steps=lit.recipe.steps)


def teacher_options(config: DictConfig) -> dict[str, Any]:
    """The keys of `teacher`. Raises ValueError unless they are a model's name, a size and, perhaps, weights_path."""
    given = OmegaConf.to_container(config.teacher, resolve=True) if OmegaConf.is_dict(config.teacher) else {}
    if not {"model", "size"} <= set(given) <= {"model", "size", "weights_path"}:
        raise ValueError(f"teacher={config.teacher}: give {{model: <timm name>, size: <pixels>}}, and weights_path")
    return given


def check_teacher(config: DictConfig, trust: tuple[str, ...]) -> None:
    """Mistakes with `teacher` that show before data are read and networks built: none where the model learns from one
    alone, wrong keys, a name that timm does not know."""
    if config.get("model") is None:
        return
    make = instantiate(config.model, trust=trust, _convert_="all", _partial_=True)
    learns = "patches" in getattr(make.func, "reads_also", ())
    if _cached(config) and (learns or config.get("teacher") is not None):
        raise ValueError("teacher looks at images, data=codes has none: train on images with tokenizer_from=...")
    if not learns:
        return  # build_module refuses a teacher there
    if config.get("teacher") is None:
        name = make.func.__name__
        raise ValueError(f"{name} aligns with a vision model: pass teacher={{model: <timm name>, size: <pixels>}}")
    from vtok.losses.backbone import require_known

    require_known(teacher_options(config)["model"], "teacher.model")


def check_fit(config: DictConfig, trust: tuple[str, ...]) -> None:
    """Where tokenizer= stands beside model= and no trained one is named: that its tokens fit, before data are read.
    Both are built without memory. Raises ValueError with the model's reason, or with what is left to do."""
    if config.get("model") is None or config.get("tokenizer") is None or config.tokenizer_from:
        return
    if not fits(config, trust):
        return  # build_module says it
    raise ValueError(
        f"tokenizer={_choice('tokenizer')} fits, but a generator needs tokens of a trained one: train it without "
        "model=, then pass tokenizer_from=<its run or folder>"
    )


def fits(config: DictConfig, trust: tuple[str, ...]) -> bool:
    """Build model and tokenizer without memory, the one for the other's tokens. ValueError where these do not fit;
    False where the model is no generator."""
    make = instantiate(config.model, trust=trust, _convert_="all", _partial_=True)
    if not (isinstance(make.func, type) and issubclass(make.func, Generator)):
        return False
    with torch.device("meta"):
        tokenizer = instantiate(config.tokenizer, trust=trust, _convert_="all")
        spec = spec_at(tokenizer, config.data.image_size)
        make.func.accepts(spec)
        make(spec=spec, num_classes=1)
    return True


def beside_codes(config: DictConfig) -> str:
    """Whether the tokens of `tokenizer` would fit the model if they took the place of the codes: a sentence."""
    folder = None if OmegaConf.is_missing(config.data, "folder") else config.data.folder
    manifest = Path(str(folder)) / "train" / "manifest.json"
    config = config.copy()
    with open_dict(config.data):
        config.data.image_size = int(read_manifest(manifest.parent)["image_size"]) if manifest.is_file() else USUAL_SIDE
    tokens = f"the tokens of tokenizer={_choice('tokenizer')} at {config.data.image_size} px"
    try:
        if not fits(config, tuple(config.trust)):
            return ""
    except Exception as error:  # Hydra wraps what a constructor raises
        if not isinstance(reason := root_of(error), ValueError):
            raise
        return f"{tokens} would not fit model={_choice('model')}: {reason}"
    return f"{tokens} would fit model={_choice('model')}: encode the images with a run of it (scripts/cache_codes.py)"


def contradictions(said: Any, found: Any, key: str) -> list[str]:
    """Where a configuration with `_target_`s says otherwise of the codes than a module's description
    (vtok.config.describe), as "key=value, not value"; what it leaves out, TRAINING and places of files are none."""
    if isinstance(said, dict) and "_target_" in said and isinstance(found, dict) and "family" in found:
        name, family = said["_target_"].rpartition(".")[2], found["family"].rpartition(":")[2]
        if name != family:
            return [f"{key}={name}, not {family}"]
        unread = set() if ":" in found["family"] else {"weights_path", *TRAINING}
        plain = {n: value for n, value in said.items() if not n.startswith("_") and n not in unread}
        inner = [(n, value, found["arguments"].get(n)) for n, value in plain.items()]
        return [line for n, value, there in inner for line in contradictions(value, there, f"{key}.{n}")]
    if isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        pairs = enumerate(zip(said, found))
        return [line for i, (value, there) in pairs for line in contradictions(value, there, f"{key}[{i}]")]
    if isinstance(said, dict):
        said = {str(name): value for name, value in said.items()}  # as a description has them
    return [] if said == found else [f"{key}={said}, not {found}"]


def fitted(objective: DictConfig, spec: TokenSpec) -> DictConfig:
    """The objective's configuration where priors without `channels`, `length` or `part` take them from the tokens.

    Of several vocabularies the prior predicts the one of most tokens. Raises ValueError for continuous tokens.
    """
    objective = copy.deepcopy(objective)
    for name, term in (objective.get("terms") or {}).items():
        if term is None or term.get("_target_") != f"{ARPrior.__module__}.{ARPrior.__name__}":
            continue
        if not spec.discrete:
            raise ValueError(f"objective.terms.{name} predicts discrete tokens, these are continuous: set it to null")
        part = term.get("part")
        if part is None and len(spec.parts) > 1:
            part = max(range(len(spec.parts)), key=lambda i: spec.parts[i].count)
        if (part or 0) not in range(len(spec.parts)):
            raise ValueError(f"objective.terms.{name}.part={part}: the tokens have {len(spec.parts)} vocabularies")
        chosen = spec.parts[part or 0]
        with open_dict(term):
            term.part = part
            term.channels = chosen.channels if term.get("channels") is None else term.channels
            term.length = chosen.count if term.get("length") is None else term.length
    return objective


def build_trainer(config: DictConfig, folder: Path, lit: Lit, trust: tuple[str, ...], *, fresh: bool) -> L.Trainer:
    """Lightning's Trainer, counting steps, with our callbacks in the order in which they must run."""
    stop = min(config.steps, config.stop_after or config.steps)
    callbacks: list[L.Callback] = [
        ResumeState(seed=config.seed),
        Progress(
            batch_size=config.batch_size,
            stop=stop,
            every=config.log_every,
            bar=config.bar,
            operations=_work(lit),
        ),
        DataWatch(timeout=config.get("data_timeout")),  # before all that may take long while a batch is there
    ]
    sharded = (
        OmegaConf.is_dict(config.trainer.strategy) and config.trainer.strategy.get("_target_") == "vtok.fsdp.Sharded"
    )
    if sharded and getattr(lit, "discriminator", None) is not None:
        raise ValueError("trainer=fsdp has no GAN: tokenizers fit one GPU, so pass trainer=ddp, or objective=plain")
    if sharded and isinstance(lit, LitTokenizer):
        for name, term in lit.objective.terms.items():
            if any(p.requires_grad for p in term.parameters()):
                raise ValueError(
                    f"trainer=fsdp: objective.terms.{name} learns weights of its own, which trainer=ddp alone keeps "
                    f"equal on all processes; pass trainer=ddp, or objective.terms.{name}=null"
                )
    if config.picture_every and not sharded:  # one process draws, and there it has only a part of the weights
        options = OmegaConf.to_container(config.pictures, resolve=True)
        kind = "samples" if isinstance(lit, LitGenerator) else "reconstructions"
        picture = Samples if kind == "samples" else Reconstructions
        callbacks.append(picture(folder / "pictures", every=config.picture_every, **options[kind]))
        if isinstance(lit, LitTokenizer) and lit.module.spec.discrete:
            callbacks.append(CodeUse(folder / "pictures"))
    own = [instantiate(c, trust=trust, _convert_="all") for c in (config.callbacks or {}).values()]
    if sharded and any(getattr(callback, "whole_weights", False) for callback in own):
        raise ValueError(
            "trainer=fsdp: callbacks=fd and rfd need whole weights; pass trainer=ddp, or run eval.fid later"
        )
    known = [f"val/{name}" for name in lit.monitors] + [m for c in own for m in getattr(c, "monitors", ())]
    if config.monitor.removesuffix("_raw") not in known:
        raise ValueError(f"monitor={config.monitor}: choose one of {', '.join(known)}")
    callbacks += own
    if config.save:
        callbacks.append(
            Checkpoints(
                folder / "checkpoints",
                every=config.save_every,
                minutes=config.save_minutes,
                monitor=config.monitor,
                mode=config.monitor_mode,
            )
        )
    callbacks.append(PeerWatch())
    section = config.trainer.copy()
    if OmegaConf.is_dict(section.strategy) and section.strategy.get("find_unused_parameters", True) is None:
        # a GAN's two backward passes each leave the other network out
        section.strategy.find_unused_parameters = isinstance(lit, LitTokenizer)
    make = instantiate(section, trust=trust, _convert_="all", _partial_=True)
    settings = dict(
        max_steps=stop,
        max_epochs=-1,
        precision=config.precision,
        val_check_interval=config.val_every * config.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=config.val_batches,
        num_sanity_val_steps=0,
        inference_mode=not sharded,  # weights gathered in inference mode could not be trained with
        use_distributed_sampler=False,  # the data module slices the global batch itself
        enable_checkpointing=False,  # Checkpoints above
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=build_loggers(config, folder, trust, fresh=fresh),
        plugins=[AtomicCheckpointIO()],
    )
    try:
        return make(**settings)
    except MisconfigurationException as error:
        raise ValueError(f"trainer={_choice('trainer')} does not work here: {error}") from None


def build_loggers(config: DictConfig, folder: Path, trust: tuple[str, ...], *, fresh: bool) -> list[Any]:
    loggers = []
    for section in (config.logger or {}).values():
        section = section.copy()
        if str(section._target_).endswith("WandbLogger"):
            if not section.get("id"):
                section.id = _wandb_id(folder, fresh)
            if _job() is not None:
                section.name = f"{section.name} {_job()}"  # a sweep's runs differ in their names
        loggers.append(instantiate(section, trust=trust, _convert_="all"))
    return loggers


def _wandb_id(folder: Path, fresh: bool) -> str:
    """The run's id at W&B, kept in the run directory, so that a resumed run goes on in the same plot. Only the process
    that logs writes it."""
    file = folder / "wandb_id.txt"
    if not _is_main():
        return "unused"
    if fresh or not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(os.urandom(4).hex() + "\n")
    return file.read_text().strip()


def _is_main() -> bool:
    """Whether this is the process that writes, before a Trainer exists to say so."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _choice(group: str) -> str:
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices.get(group)) if HydraConfig.initialized() else "..."


def _job() -> int | None:
    """The number of this job in a sweep (-m), None where there is none."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return int(HydraConfig.get().job.num) if sweep else None


def _overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def summary(config: DictConfig, lit: Lit, data: Any, trainer: L.Trainer, batch: int, step: int) -> str:
    """The block printed before training."""
    modules = {"module": lit.module, "ema": lit.ema, "discriminator": getattr(lit, "discriminator", None)}
    need = memory(modules, trained=lit.trained)
    count = sum(p.numel() for p in lit.module.parameters())
    trainable = sum(p.numel() for p in lit.module.parameters() if p.requires_grad)
    spec = data.spec if isinstance(lit, LitGenerator) else lit.module.spec
    vocabularies = ", ".join("continuous" if p.vocab_size is None else str(p.vocab_size) for p in spec.parts)
    parts = ", ".join(f"{k} {_size(v)}" for k, v in need.items() if v)
    lines = {
        "sweep": None if _job() is None else f"job {_job()}: {' '.join(_overrides())}",
        "run directory": config.run_dir,
        "trains": f"{type(lit.module).__name__} ({lit.kind}), {count:,} parameters, {trainable:,} trainable",
        "tokens": f"{spec.layout.length} in {spec.layout.steps} steps, vocabulary {vocabularies}, "
        + (f"{spec.bits:.0f} bits" if spec.discrete else f"{spec.parts[0].channels} channels")
        + f" an image of {spec.image_size} px",
        "data": f"{data.train_size:,} training, {data.val_size:,} held out, {data.num_classes} classes",
        "global batch": f"{config.batch_size} = {batch} x {trainer.world_size} devices x {config.accumulate} batches",
        "steps": f"{config.steps:,} = {config.steps * config.batch_size / data.train_size:.1f} epochs"
        + (f", stops after {trainer.max_steps:,}" if trainer.max_steps < config.steps else "")
        + (f", goes on from step {step:,}" if step else ""),
        "memory": f"{_size(sum(need.values()))} and activations ({parts})",
        "operations": _operations(lit),
        "device": f"{trainer.accelerator.__class__.__name__.removesuffix('Accelerator')}, precision {config.precision}",
    }
    return "\n".join(f"{name:>14}  {text}" for name, text in lines.items() if text)


def _operations(lit: Lit) -> str | None:
    """How many operations the progress line's MFU counts, and as what."""
    count = training_operations(lit.module)
    return None if count is None else f"{count / 1e9:.3g} GFLOP an image and step = {lit.module.operations_formula}"


def _work(lit: Lit) -> float | Callable[[Tensor], float] | None:
    """Operations of a training step an image, as a function of the samples' keys where they are drawn."""
    drawn = getattr(lit.module, "drawn_operations", False)
    return lit.module.operations if drawn else training_operations(lit.module)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
