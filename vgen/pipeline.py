"""From labels and seeds to pictures: a generator with the tokenizer that decodes it.

Computation runs in chunks of one recorded shape, the last one padded, and image i is always in chunk i // chunk: the
same device type gives the same bytes for any world size and after any restart, and for any number of images with the
same chunk. Where none is asked for, the number of images of the whole job decides (`chunk_for`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vgen.conditioning import Cond
from vgen.generator import Canvas, Generator
from vgen.guidance import Guidance, Progress, guidance
from vgen.heads import DrawRule
from vgen.models import FAMILIES
from vgen.samplers.graphs import GraphSampler
from vtok.acceleration import light_weights
from vtok.checkpoint import (
    CheckpointError,
    Weights,
    find_checkpoint,
    is_folder,
    load_module,
    read_checkpoint,
    read_config,
)
from vtok.config import Families
from vtok.data.transforms import to_uint8
from vtok.decoding import channels_last, decode_images, light_tokenizer
from vtok.low_bit import LowBit
from vtok.noise import SampleNoise
from vtok.tokenizer import Tokenizer

AT_ONCE = 64  # images computed at once, at most, where no chunk is asked for


def chunk_for(count: int) -> int:
    """Images computed at once in a job of `count`: as few chunks of at most 64 as hold them, each 1, 2, 4 or a multiple
    of 8 and as small as that allows. 1 for 1, 16 for 10, 40 for 80, 64 for 50,000."""
    each = -(-count // -(-count // AT_ONCE))
    return 1 << (each - 1).bit_length() if each <= 8 else -(-each // 8) * 8


class Pipeline:
    """generator and tokenizer in eval mode on one device. chunk: images computed at once; None goes by how many a job
    has (`chunk_for`).

    class_names: names for the picture's labels, where the run knew them. cuda_graphs: replay recorded steps
    (vgen/samplers/graphs.py); the same tokens. decoder_dtype: bfloat16 decodes images under autocast, convolutions
    channels-last. decode_chunk: images decoded at once, at most, where memory asks for fewer than a chunk.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        chunk: int | None = None,
        class_names: list[str] | None = None,
        cuda_graphs: bool = False,
        decoder_dtype: torch.dtype = torch.float32,
        decode_chunk: int | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one image is computed at once")
        if decode_chunk is not None and decode_chunk < 1:
            raise ValueError(f"decode_chunk={decode_chunk}: at least one image is decoded at once")
        size, spec = generator.spec.image_size, tokenizer.spec
        self.size: int | None = None  # side at which the tokenizer decodes; None: that of its own training
        if size != spec.image_size:
            with contextlib.suppress(ValueError):  # it has one size: then the comparison below decides
                spec, self.size = tokenizer.spec_for(size), size
        if (spec.layout, spec.parts) != (generator.spec.layout, generator.spec.parts):
            raise ValueError(
                f"at {size} px the tokenizer emits {spec}, the generator was trained on {generator.spec}"
                f"{', in another order' if str(spec) == str(generator.spec) else ''}; pass the tokenizer of that run "
                "(tokenizer_from=)"
            )
        self.generator, self.tokenizer = generator.eval(), tokenizer.eval()
        self.chunk, self.class_names = chunk, class_names or []
        # where the weights were read, for records
        self.weight_file: Path | None = None
        self.tokenizer_file: Path | None = None
        self.sampler = GraphSampler(self.generator) if cuda_graphs else generator.sampler
        self.decode_chunk = decode_chunk or chunk or AT_ONCE
        self.decoder_dtype = decoder_dtype
        if decoder_dtype != torch.float32:
            channels_last(self.tokenizer)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        weights: Weights | str | os.PathLike = "ema",
        tokenizer: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int | None = None,
        accept_license: bool = False,
        trust: Sequence[str] = (),
        quant: LowBit | None = None,
        packed: bool | None = False,
        compile: bool = False,
        cuda_graphs: bool = False,
        decoder_dtype: torch.dtype = torch.float32,
        decode_chunk: int | None = None,
    ) -> Pipeline:
        """From a run directory, a .ckpt in it, an exported folder, "hf:<owner>/<name>" (an exported folder on the hub),
        or "zoo:<name>" (a published model, vgen/zoo.py).

        weights: ema or raw; for the zoo also a local file or folder. tokenizer: another place of the tokenizer than the
        folder `tokenizer` beside the generator. dtype: of the trunk; embeddings and logits stay float32.
        accept_license: consent to the terms of a published model that is for research only. trust: modules of yours
        that a run or folder on this machine may name. quant, packed: how weights are stored (vtok/acceleration.py),
        packed those of the tokenizer too; they are for sampling, packed ones on the CPU alone: without gradients, not
        to be saved, and a likelihood needs plain ones. compile: the generator's blocks through torch.compile, at the
        first images. The rest as in the constructor.
        """
        names: list[str] = []
        if str(path).startswith("zoo:"):
            from vgen.published import load_generator

            given = None if weights in ("ema", "raw", None) else weights
            inside = "raw" if weights == "raw" else None
            loaded, shown = load_generator(path, given, tokenizer, inside=inside, accept_license=accept_license)
            generator, decoder, files = loaded.module, shown.module, (loaded.file, shown.file)
        else:
            known = Families(FAMILIES, trust)
            generator, decoder, names, files = _from_disk(local(path), weights, tokenizer, known)
        light_weights(generator.to(device), dtype, quant=quant, packed=packed, compiled=compile)
        decoder.to(device)
        if packed is not False:
            light_tokenizer(decoder, decoder_dtype)
        pipeline = cls(
            generator,
            decoder,
            chunk=chunk,
            class_names=names,
            cuda_graphs=cuda_graphs,
            decoder_dtype=decoder_dtype,
            decode_chunk=decode_chunk,
        )
        pipeline.weight_file, pipeline.tokenizer_file = files
        return pipeline

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def chunk_of(self, count: int) -> int:
        """Images computed at once in a job of `count`."""
        return self.chunk or chunk_for(count)

    def set_sides(self, sides: Sequence[int]) -> None:
        """Write another list of scales, seen in training or not (FlexVAR, which draws those in the generator's
        `greedy_sides` by argmax); an image has the last side times the tokenizer's stride."""
        if not self.tokenizer.layouts:
            name = type(self.tokenizer).__name__
            raise ValueError(f"sides={list(sides)}: {name} decodes no other scales than its own; leave sides away")
        self.generator.set_sides(sides)

    def check(self, guide: Guidance, rule: DrawRule | Callable[[Progress], DrawRule]) -> None:
        """Raise ValueError where this model cannot be drawn from so."""
        if guide.streams > 1 and self.generator.num_classes == 0:
            raise ValueError("guidance needs classes, and this model is unconditional: pass guidance=1")
        if isinstance(rule, DrawRule):
            self.generator.check_rule(rule)

    @torch.no_grad()
    def write(
        self,
        labels: Tensor,
        seeds: Tensor,
        *,
        guide: Guidance,
        rule: DrawRule | Callable[[Progress], DrawRule],
        on_step: Callable[[Canvas, Progress], None] | None = None,
        canvas: Canvas | None = None,
    ) -> Canvas:
        """The finished canvas of labels and seeds [B], in one batch.

        canvas: what is given already (vgen/editing.py); None starts from an empty one.
        """
        generator = self.generator
        labels, seeds = labels.to(self.device), seeds.to(self.device)
        streams = [generator.conditioner(labels)]
        streams += [generator.conditioner.null(len(labels)) for _ in range(guide.streams - 1)]
        start = {} if canvas is None else {"canvas": canvas}
        return self.sampler(
            generator, Cond.cat(streams), noise=SampleNoise(seeds), guide=guide, rule=rule, on_step=on_step, **start
        )

    def tokens(self, labels: Tensor, seeds: Tensor, **options: Any) -> Tensor:
        """Tokens in the tokenizer's order, [B, L], of the canvas that `write` finishes; its arguments."""
        return self.generator.restore(self.write(labels, seeds, **options))

    def decode(self, tokens: Tensor, seeds: Tensor | None = None, *, keep: int | None = None) -> Tensor:
        """Images float32 [B, 3, H, W] of tokens [B, L], `decode_chunk` of them at once.

        seeds int64 [B]: of decoders that draw, such as flows; None starts all images from one noise. keep: tokens of a
        prefix, for tokenizers that decode them.
        """
        noise, free = None if seeds is None else SampleNoise(seeds.to(tokens.device)), self.generator.free_layout
        options = dict(dtype=self.decoder_dtype, at_once=self.decode_chunk, noise=noise, keep=keep)
        place = {"size": self.size} if free is None else {"layout": free}  # which gives the size too
        return decode_images(self.tokenizer, tokens, **options, **place)

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        seeds: Tensor,
        *,
        guidance: Guidance | float = 1.0,
        rule: DrawRule | Callable[[Progress], DrawRule] = DrawRule(),  # noqa: B008 (frozen)
        on_chunk: Callable[[int, Tensor], None] | None = None,
        on_tokens: Callable[[int, Tensor], None] | None = None,
        size: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """uint8 images [N, H, W, 3] of labels and seeds int64 [N].

        labels: 0..num_classes - 1, or num_classes for "no class". guidance: a scale for all steps, or a Guidance.
        on_chunk: called with the first index and the images of every finished chunk; on_tokens: so with its canvas's
        tokens, as the generator wrote them.
        size: side to which the decoded images are brought before rounding (bicubic without antialiasing, as LlamaGen
        does with 384 px models before evaluation); None leaves them as decoded.
        chunk: `chunk_of` the whole job, where these images are a part of one; None: they are all.
        """
        for name, value in (("labels", labels), ("seeds", seeds)):
            if not isinstance(value, Tensor) or value.is_floating_point():
                got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be an int64 tensor [N], as torch.tensor([3, 7]), got {got}")
        if labels.shape != seeds.shape or labels.dim() != 1 or len(labels) == 0:
            shapes = f"{tuple(labels.shape)}, {tuple(seeds.shape)}"
            raise ValueError(f"labels and seeds must be [N] with N >= 1, got {shapes}")
        low, high, known = int(labels.min()), int(labels.max()), self.generator.num_classes
        if low < 0 or high > known:
            raise ValueError(f"classes span {low}..{high}, but the model knows 0..{known - 1} (and {known} for none)")
        guide = _guide(guidance)
        self.check(guide, rule)
        chunk, done = chunk or self.chunk_of(len(labels)), []
        for start in range(0, len(labels), chunk):
            stop = min(start + chunk, len(labels))
            index = torch.arange(start, start + chunk).clamp(max=stop - 1)  # padding repeats the last image
            canvas = self.write(labels[index], seeds[index], guide=guide, rule=rule)
            decoded = self.decode(self.generator.restore(canvas), seeds[index])
            if size is not None:
                decoded = functional.interpolate(decoded.float(), (size, size), mode="bicubic")
            images = to_uint8(decoded)[: stop - start].cpu()
            done.append(images)
            if on_tokens is not None:
                on_tokens(start, canvas.tokens[: stop - start])
            if on_chunk is not None:
                on_chunk(start, images)
        return torch.cat(done)


def local(source: str | os.PathLike) -> str | os.PathLike:
    """The downloaded folder of hf:<owner>/<name>, for which a process asks the hub once: settings, weights and hashes
    are of one revision. Anything else as it is."""
    return _downloaded(str(source)) if str(source).startswith("hf:") else source


@functools.cache
def _downloaded(name: str) -> Path:
    from vgen.hub import download

    return download(name)


def _from_disk(path: str | os.PathLike, weights: str, tokenizer: str | os.PathLike | None, families: Families) -> tuple:
    """(generator, tokenizer, class names, the files of both's weights) of a run, a .ckpt or a folder."""
    generator = load_module(path, families, weights)
    if not isinstance(generator, Generator):
        raise CheckpointError(f"{path} holds a tokenizer ({type(generator).__name__}): give a generator's run")
    if is_folder(path):
        home, described, file = Path(path), read_config(path), Path(path) / "model.safetensors"
    else:
        file = find_checkpoint(path)
        home, described = file.parent.parent, read_checkpoint(file)["module"]
    place = home / "tokenizer" if tokenizer is None else Path(tokenizer)
    if tokenizer is None and not is_folder(place):
        raise CheckpointError(f"{place} is missing: pass tokenizer_from=<run or folder of the tokenizer>")
    decoder = load_module(place, families, "ema")
    if not isinstance(decoder, Tokenizer):
        raise CheckpointError(f"{place} holds a {type(decoder).__name__}, expected a tokenizer")
    files = file, Path(place) / "model.safetensors" if is_folder(place) else find_checkpoint(place)
    return generator, decoder, list(described.get("class_names") or []), files


def _guide(value: Guidance | float) -> Guidance:
    if not callable(value) and not isinstance(value, (int, float)):
        raise ValueError(f"guidance={value!r} must be a number or a Guidance (vgen/guidance.py)")
    return guidance(float(value)) if isinstance(value, (int, float)) else value
