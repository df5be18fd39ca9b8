"""What each family is made of: its file, its own lines, the shared modules that it uses, and its configurations with
the parts that they put in: several families are one network with other quantizers.

    python scripts/families.py

Then the parts of which there must be one class only, by the end of its name, and every pair of 12 or more equal lines
between two model files. Exit code 1 where a rule is broken.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COPIED = 12  # equal lines in a row that count as a copy
# part -> the one class that it must be, and the file
ONE_OF = {
    "CNN encoder": ("Encoder", "vtok/layers/cnn.py"),
    "CNN decoder": ("Decoder", "vtok/layers/cnn.py"),
    "ViT trunk": ("Trunk", "vtok/layers/trunk.py"),
    "tokenizer training loop": ("LitTokenizer", "vtok/lit.py"),
    "generator training loop": ("LitGenerator", "vgen/lit.py"),
    "PatchGAN discriminator": ("PatchGAN", "vtok/losses/discriminators.py"),
    "StyleGAN discriminator": ("StyleGANDiscriminator", "vtok/losses/discriminators.py"),
    "MaskBit discriminator": ("MaskBitDiscriminator", "vtok/losses/discriminators.py"),
    "DINO discriminator": ("DinoDiscriminator", "vtok/losses/dino.py"),
    "transformer discriminator": ("TransformerDiscriminator", "vtok/losses/transformer_discriminator.py"),
    "transformer block": ("Block", "vtok/layers/block.py"),
}
# a further class whose name ends so is taken for a copy of one above
COPY = re.compile(r"(Encoder|Decoder|Block|Trunk|Discriminator|PatchGAN|LitTokenizer|LitGenerator)$")
# but these, each with what it does that the one class does not
OTHERS = {
    "vtok/layers/cnn.py ResidualBlock": "the convolutions of which Encoder and Decoder are made",
    "vtok/layers/pixel_flow.py FlowBlock": "a Block inside, and the condition that modulates each patch of it",
    "vtok/layers/qformer.py QFormerEncoder": "layers of self- and cross-attention with positions in each: not a Trunk",
    "vtok/layers/qformer.py QFormerDecoder": "as QFormerEncoder, from tokens to a grid",
    "vtok/layers/siglip.py SiglipEncoder": "a Trunk inside, with patches and latents in front",
    "vtok/layers/siglip.py MaskDecoder": "a Trunk inside, with mask tokens in front and pixels behind",
    "vtok/models/restok.py LevelEncoder": "a Trunk inside, whose blocks merge image tokens on the way",
    "vtok/models/restok.py LevelDecoder": "a Trunk inside, with a projection for each level of latents",
    "vtok/models/titok.py LatentEncoder": "a Trunk inside, with patches and latents in front",
    "vtok/models/titok.py LatentDecoder": "a Trunk inside, with mask tokens, latents and text in front",
    "vgen/heads_block_flow.py CrossBlock": "attention to the states between its halves, each half modulated by itself",
    "vgen/heads_continuous.py ResidualBlock": "one token alone, without attention: the head of MAR",
    "vgen/models/maskgit.py MaskedBlock": "its norms also stand behind the sums (BERT), where Block has them in front",
    "vgen/models/maskgit.py PostNormTrunk": "BERT: norms behind the sums, no final norm",
    "vgen/models/maskgit.py SkipTrunk": "U-ViT: its later half also reads the outputs of the earlier one",
}


def code_lines(text: str) -> list[tuple[int, str]]:
    """(line number, stripped line) of the lines that are code: no blank ones, comments or docstrings."""
    hidden: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                hidden |= set(range(first.lineno, first.end_lineno + 1))
    numbered = [(i, line.strip()) for i, line in enumerate(text.splitlines(), start=1)]
    return [(i, line) for i, line in numbered if line and not line.startswith("#") and i not in hidden]


def imported(text: str) -> list[str]:
    """Modules of the toolkit that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("vtok", "vgen"):
            found.add(node.module)
    return sorted(found)


def copies(files: dict[str, str], length: int = COPIED) -> list[tuple[str, int, str, int]]:
    """(file, line, file, line) where `length` code lines in a row are equal, the first place of each pair of files."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, text in sorted(files.items()):
        lines = [(i, line) for i, line in code_lines(text) if not line.startswith(("import ", "from "))]
        for start in range(len(lines) - length + 1):
            places[tuple(line for _, line in lines[start : start + length])].append((name, lines[start][0]))
    found: dict[tuple[str, str], tuple[str, int, str, int]] = {}
    for members in places.values():
        for i, (one, at) in enumerate(members):
            for other, there in members[i + 1 :]:
                if one != other:
                    found.setdefault((one, other), (one, at, other, there))
    return sorted(found.values())


def model_files() -> dict[str, str]:
    """Path from the clone -> text of every model file."""
    paths = sorted((ROOT / "vtok/models").glob("*.py")) + sorted((ROOT / "vgen/models").glob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in paths if p.name != "__init__.py"}


def configurations() -> dict[str, dict[tuple[str, ...], list[str]]]:
    """Path of a model file -> the classes that its configurations put in -> the names of these configurations."""
    found: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((ROOT / "configs/tokenizer").glob("*.yaml")) + sorted((ROOT / "configs/model").glob("*.yaml")):
        model, *parts = re.findall(r"_target_: ([\w.]+)", path.read_text())
        found[model.rpartition(".")[0].replace(".", "/") + ".py"][tuple(dict.fromkeys(parts))].append(path.stem)
    return found


def classes() -> dict[str, list[str]]:
    """Class name -> files of the packages that define it."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in ("vtok", "vgen"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(path.relative_to(ROOT).as_posix())
    return found


def second_classes(known: dict[str, list[str]]) -> list[str]:
    """Sentences on classes (name -> files) whose name says that they are a second one of ONE_OF, and on what OTHERS
    names for nothing."""
    found = {f"{place} {name}" for name, places in known.items() for place in places if COPY.search(name)}
    unknown = found - {f"{place} {name}" for name, place in ONE_OF.values()} - set(OTHERS)
    advice = "use the one class of ONE_OF, or say in OTHERS what it does that this does not"
    return [
        *(f"{one}: {advice}" for one in sorted(unknown)),
        *(f"OTHERS names {one}, which is not there" for one in sorted(set(OTHERS) - found)),
    ]


def broken() -> list[str]:
    """Sentences on every broken rule."""
    known, sentences = classes(), []
    for part, (name, place) in ONE_OF.items():
        if known.get(name) != [place]:
            sentences.append(f"{part}: expected the class {name} in {place} only, found it in {known.get(name, [])}")
    sentences += second_classes(known)
    models = {name: [p for p in places if "/models/" in p] for name, places in known.items()}
    sentences += [
        f"class {name} is defined in {' and '.join(places)}"
        for name, places in sorted(models.items())
        if len(places) > 1
    ]
    for one, at, other, there in copies(model_files()):
        sentences.append(f"{one}:{at} and {other}:{there} share {COPIED} or more lines")
    return sentences


def main() -> int:
    configured = configurations()
    for path, text in model_files().items():
        own = path.removesuffix(".py").replace("/", ".")
        shared = [name for name in imported(text) if name != own]
        print(f"{path}  {len(code_lines(text))} lines of code ({len(text.splitlines())} in all)")
        print(f"    uses {', '.join(shared)}")
        for parts, names in configured.get(path, {}).items():
            print(f"    {', '.join(names)}" + (f": with {', '.join(parts)}" if parts else ""))
    print()
    for part, (name, place) in ONE_OF.items():
        print(f"{part}: {name} in {place}")
    sentences = broken()
    print("\n".join(["", *(sentences or [f"no copies of {COPIED} or more lines of code between model files"])]))
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
