"""`python -m eval.reconstruction`: what a tokenizer loses on held-out images, and how it uses its codebook.

    python -m eval.reconstruction from=outputs/digits_tokenizer data=digits

PSNR, SSIM and LPIPS on 8-bit images, rFID (or rFD[name]) between reconstructions and the same originals, codebook usage
and perplexity over the whole set, bits per pixel, and the share of tokens that survive encode(decode(tokens)).

A tokenizer that draws (a KL bottleneck its latents, D-AR and FlexTok the noise that decoding starts from) draws once an
image, keyed by the image's place among those measured, as val/rfd and the pictures of training do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.drawing import results_folder
from eval.features import Extractor, make_extractor
from eval.fid import CONFIGS
from eval.moments import Moments, frechet_distance
from eval.pixels import PixelErrors, codebook_use
from eval.progress import progress_bar
from eval.protocol import Protocol, library_versions, metric_name
from eval.references import statistics_hash
from eval.sources import from_data
from vtok.checkpoint import write_atomic, write_json
from vtok.cli import check_numbers, check_place, entry
from vtok.decoding import encode_images, light_tokenizer
from vtok.noise import SampleNoise, sample_seeds
from vtok.quantize.statistics import COUNTED

GRID = 64  # pairs in the picture
SSIM = "Gaussian window 11 x 11, sigma 1.5, range 1"
NOTHING = "nothing"  # what a tokenizer draws that has the same tokens and copies every time


@dataclass
class Pass:
    """Everything that one pass over the images collects. pairs: (original, copy) batches, if they are kept."""

    errors: PixelErrors
    counts: list[Tensor | None]  # per part of the tokens, [V]; None above COUNTED codes
    originals: Moments
    copies: Moments
    survived: int
    tokens: int
    pairs: list[tuple[Tensor, Tensor]]
    perceptual: float = 0.0  # sum over the images


@torch.inference_mode()
def run_through(
    tokenizer: Any,
    images: Any,
    extractor: Extractor | None,
    *,
    batch_size: int,
    keep: int,
    device: torch.device,
    perceptual: Any | None = None,
    seed: int = 0,
) -> Pass:
    """Encode and decode every image once. keep: how many pairs to hold on to, evenly spaced over the set.

    perceptual: LPIPS of two batches in [-1, 1], if it is to be measured. seed: of tokenizers that draw.
    """
    from vtok.data.transforms import to_float, to_uint8

    dim = extractor.dim if extractor else 1
    parts = tokenizer.spec.parts if tokenizer.spec.discrete else ()
    counts = [torch.zeros(p.vocab_size, dtype=torch.int64) if p.vocab_size <= COUNTED else None for p in parts]
    done = Pass(PixelErrors(), counts, Moments(dim), Moments(dim), 0, 0, [])
    kept = np.linspace(0, images.count - 1, min(keep, images.count)).round().astype(int).tolist()
    seen = 0
    with progress_bar("reconstructing", images.count) as advance:
        for batch in images.batches(batch_size):
            x = to_float(batch.to(device), channels_last=True)
            noise = SampleNoise(sample_seeds(seed, seen, seen + len(batch)).to(device))
            tokens = encode_images(tokenizer, x, noise=noise)
            decoded = tokenizer.decode(tokens, noise=noise)
            copies = to_uint8(decoded).cpu()
            done.errors.add(batch, copies)
            if parts:
                start = 0
                for part, count in zip(parts, done.counts):
                    if count is not None:
                        ids = tokens[:, start : start + part.count].reshape(-1).cpu()
                        count += torch.bincount(ids, minlength=part.vocab_size)
                    start += part.count
                again = encode_images(tokenizer, decoded.clamp(-1, 1), noise=noise)
                done.survived += int((again == tokens).sum())
                done.tokens += tokens.numel()
            if perceptual is not None:
                shown = to_float(copies.to(device), channels_last=True)  # the pictures as one would store them
                done.perceptual += float(perceptual(shown, x).double().sum())
            if extractor is not None:
                done.originals.add(extractor(batch).features)
                done.copies.add(extractor(copies).features)
            own = [i - seen for i in kept if seen <= i < seen + len(batch)]
            if own:
                done.pairs.append((batch[own], copies[own]))
            seen += len(batch)
            advance(len(batch))
    return done


def evaluate(config: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The command: measures, prints, writes JSON (and pairs); returns what it wrote."""
    from vgen.models import FAMILIES
    from vgen.sampling import checkpoint_hash, resolve_device
    from vtok.checkpoint import load_module
    from vtok.config import Families
    from vtok.tokenizer import Tokenizer

    check_numbers(config)
    out = Path(config["out"] or results_folder(str(config["from"])) / "reconstruction.json")
    for name, place in (("out", out), *((name, config.get(name)) for name in ("npz", "grid", "samples"))):
        check_place(name, place)
    device = resolve_device(config["device"])
    tokenizer = load_module(config["from"], Families(FAMILIES, config.get("trust") or ()), config["weights"])
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"from={config['from']} holds a {type(tokenizer).__name__}: give a tokenizer's run")
    tokenizer = tokenizer.to(device).eval()
    images = from_data(data, config["split"], config["images"])
    if data.image_size != tokenizer.spec.image_size:
        raise ValueError(
            f"data.image_size={data.image_size}, but the tokenizer was trained at {tokenizer.spec.image_size}: "
            f"pass data.image_size={tokenizer.spec.image_size}"
        )
    light_tokenizer(tokenizer, torch.float32)
    extractor = None
    if config["extractor"] != "none":
        extractor = make_extractor(config["extractor"], weights_path=config["weights_path"], device=device)
    keep = images.count if config["npz"] or config.get("samples") else GRID if config["grid"] else 0
    lpips = perceptual_distance(config.get("lpips"), config.get("lpips_path"), side=tokenizer.spec.image_size)
    done = run_through(
        tokenizer, images, extractor, batch_size=int(config["batch_size"]), keep=keep, device=device,
        perceptual=lpips.to(device) if lpips else None, seed=config["seed"],
    )  # fmt: skip
    metrics = done.errors.result() | token_figures(tokenizer.spec, done)
    if lpips:
        metrics["lpips_vgg"] = done.perceptual / images.count
    identity: dict[str, Any] = {
        "images": images.count,
        "source": images.name,
        "tokenizer": f"{config['from']} (sha256 {checkpoint_hash(config['from'])})",
        "weights": config["weights"],
        "drawn": drawn(tokenizer),
        "seed": config["seed"],
        "ssim": SSIM if done.errors.windowed else f"none: its window does not fit {tokenizer.spec.image_size} px",
        "rounding": "nearest",
    }
    if extractor is not None:
        reference = done.originals.statistics()
        metrics[metric_name("rFID", extractor.name)] = frechet_distance(done.copies.statistics(), reference)
        identity = {**identity, "protocol": _protocol(config, images, extractor, reference, identity).to_json()}
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    print("\n".join(f"  {key}: {value}" for key, value in identity.items() if key != "protocol"))
    result = {"metrics": metrics, **identity, "command": "python -m eval.reconstruction " + " ".join(sys.argv[1:])}
    write_json(out, result)
    print(f"wrote {out}")
    write_pairs(done.pairs, config["npz"], config["grid"], config.get("samples"))
    return result


def perceptual_distance(wanted: bool | None, weights_path: str | None, *, side: int | None = None) -> Any | None:
    """LPIPS on VGG16. wanted: None takes it where its two files are and all pictures, of that side, are large enough;
    True insists on it."""
    from vtok.losses.frozen import weights_folder
    from vtok.losses.reconstruction import HEADS_FILE, LEAST_SIDE, LPIPS, VGG_FILE

    if side is not None and side < LEAST_SIDE:
        if wanted:
            raise ValueError(f"lpips=true needs at least {LEAST_SIDE} px, these pictures have {side}: pass lpips=false")
        return None
    folder = weights_folder(weights_path)
    there = all((folder / name).is_file() for name in (VGG_FILE, HEADS_FILE))
    if wanted is False or (wanted is None and not there and weights_path is None):
        return None
    try:
        return LPIPS(weights_path=weights_path).eval()
    except ValueError as error:
        raise ValueError(str(error).replace("set perceptual_weight=0", "pass lpips=false")) from None


def token_figures(spec: Any, done: Pass) -> dict[str, float | int]:
    """Usage and perplexity (of up to COUNTED codes), bits and token match; nothing for continuous tokens."""
    if not spec.discrete:
        return {}
    figures: dict[str, float | int] = {}
    for i, counts in enumerate(done.counts):
        suffix = f"_part{i}" if len(done.counts) > 1 else ""
        if counts is not None:
            figures |= {key + suffix: value for key, value in codebook_use(counts).items()}
    return figures | {
        "tokens_per_image": spec.layout.length,
        "bits_per_image": spec.bits,
        "bits_per_pixel": spec.bits / spec.image_size**2,
        "token_match": done.survived / done.tokens,
    }


def drawn(tokenizer: Any) -> str:
    """What a tokenizer draws for every image, as results say it."""
    draws = {"latents of the posterior": tokenizer.encoder_draws, "the decoder's noise": tokenizer.decoder_draws}
    what = " and ".join(name for name, yes in draws.items() if yes)
    return f"{what}, once an image, keyed by the seed and its place" if what else NOTHING


def _protocol(config: Mapping[str, Any], images: Any, extractor: Extractor, reference: Any, identity: dict) -> Protocol:
    return Protocol(
        name="reconstruction",
        images=images.count,
        source=identity["tokenizer"],
        labels="given",
        seed=None if identity["drawn"] == NOTHING else config["seed"],
        guidance=None,
        rule=None if identity["drawn"] == NOTHING else identity["drawn"],
        weights=config["weights"],
        rounding="nearest",
        resize=extractor.resize,
        file_format="direct",
        reference=f"the originals of the same images ({images.name})",
        reference_images=images.count,
        reference_hash=statistics_hash(reference),
        splits=1,
        permutation=0,
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        batch_size=int(config["batch_size"]),
        device=str(config["device"]),
        versions=library_versions(),
    )


def write_pairs(
    pairs: list[tuple[Tensor, Tensor]], npz: str | None, grid: str | None, samples: str | None = None
) -> None:
    """npz with `originals` and `reconstructions`; grid with originals above their reconstructions; samples: an npz as
    eval.fid reads it, with the reconstructions as `arr_0`."""
    if not pairs:
        return
    originals, copies = (torch.cat(side).numpy() for side in zip(*pairs))
    if npz:
        write_atomic(npz, lambda file: np.savez_compressed(file, originals=originals, reconstructions=copies))
        print(f"wrote {npz}")
    if samples:
        write_atomic(samples, lambda file: np.savez_compressed(file, arr_0=copies))
        print(f"wrote {samples}")
    if grid:
        picture = pair_grid(originals, copies)
        write_atomic(grid, lambda file: picture.save(file, "PNG"))
        print(f"wrote {grid}")


def pair_grid(originals: np.ndarray, copies: np.ndarray, *, columns: int = 16):
    """A PIL picture: bands of `columns` originals, each with its reconstruction right below; GRID pairs at most."""
    from PIL import Image

    count = min(len(originals), GRID)
    chosen = np.linspace(0, len(originals) - 1, count).round().astype(int)
    height, width = originals.shape[1:3]
    zoom, gap, seam = max(1, 64 // height), 4, 2
    h, w = height * zoom, width * zoom
    tall = 2 * h + seam + 2 * gap
    bands = -(-count // columns)
    picture = Image.new("RGB", (columns * (w + gap), bands * tall), "white")
    for k, i in enumerate(chosen):
        band, column = divmod(k, columns)
        for part, images in enumerate((originals, copies)):
            tile = Image.fromarray(images[i]).resize((w, h), Image.Resampling.NEAREST)
            picture.paste(tile, (column * (w + gap), band * tall + part * (h + seam)))
    return picture


@entry("eval_reconstruction", CONFIGS)
def main(config: Any) -> None:
    from vtok.config import instantiate

    evaluate(config, instantiate(config.data))


if __name__ == "__main__":
    main()
