"""One picture to compare tokenizers by: originals, and below them the copies of each, with their PSNR.

    python scripts/gallery.py from=[outputs/cifar10_tokenizer,outputs/cifar10_var_tokenizer] in=pictures

A tokenizer that decodes prefixes gets a row for every 1, 2, 4, ... tokens of an image (the ends of its scales, where
only those decode: VAR, FlexVAR). Originals larger than a tokenizer's image size are cut into tiles of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok.cli import check_place, entry  # noqa: E402


def prefixes(tokenizer: Any) -> list[int]:
    """Numbers of tokens to show, ending with all: powers of two, or the ends of the scales where only those decode."""
    from vtok.models.var import VARTokenizer

    if isinstance(tokenizer, VARTokenizer):
        return list(tokenizer.quantizer.bounds[1:])
    length = tokenizer.spec.layout.length
    return [2**k for k in range(length.bit_length()) if 2**k < length] + [length]


@entry("gallery", ROOT / "configs", whole={"count": 1, "size": 1}, lists=("from", "names"))
def main(config: Any) -> None:
    import numpy as np
    import torch

    from eval.pixels import PixelErrors
    from vgen.sampling import labelled_grid, resolve_device
    from vtok.checkpoint import write_atomic
    from vtok.data.codes import frozen
    from vtok.data.files import list_images, read_image
    from vtok.data.tiles import reconstruct
    from vtok.data.transforms import center_crop, to_float, to_uint8

    check_place("out", config.out, endings=(".png",))
    paths = [config["from"]] if isinstance(config["from"], str) else list(config["from"])
    names = [config.names] if isinstance(config.names, str) else config.names
    titles = list(names) if names else [Path(path).name for path in paths]
    if len(titles) != len(paths) or not paths:
        raise ValueError(f"names={titles} must hold one name for each of from={paths}")
    source, device = Path(config["in"]), resolve_device(config.device)
    found = [source] if source.is_file() else [source / name for name in list_images(source, "in")]
    if not found:
        raise ValueError(f"in={source} holds no images; change in")
    if Path(config.out).resolve() in {path.resolve() for path in found}:
        raise ValueError(f"out={config.out} would replace that image of in={source}; give out=<another file>")
    tokenizers = [frozen(path, config.weights, trust=config.trust).to(device) for path in paths]
    chosen = np.linspace(0, len(found) - 1, min(config.count, len(found))).round().astype(int)
    size = config.size or max(t.spec.image_size for t in tokenizers)
    originals = np.stack([np.asarray(center_crop(read_image(found[i], upright=True), size)) for i in chosen])
    images = to_float(originals)

    rows, texts = [originals], ["original"]
    for title, tokenizer in zip(titles, tokenizers):
        keeps = prefixes(tokenizer) if config.prefixes and tokenizer.prefixes else [None]
        for keep in keeps:
            copies = [
                to_uint8(reconstruct(tokenizer, image, keep=keep, seed=config.seed + n)[0])
                for n, image in enumerate(images)
            ]
            errors = PixelErrors(similarity=False)
            errors.add(torch.from_numpy(originals), torch.stack(copies))
            rows.append(torch.stack(copies).numpy())
            name = title if keep is None else f"{title} {keep}/{tokenizer.spec.layout.length}"
            texts.append(f"{name}  {errors.result()['psnr_mean']:.1f} dB")
    labels = [row for row in range(len(rows)) for _ in chosen]
    picture = labelled_grid(np.concatenate(rows), labels, texts, columns=len(chosen))
    write_atomic(config.out, lambda file: picture.save(file, "PNG"))
    print("\n".join(texts[1:]))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
