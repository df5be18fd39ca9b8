"""What scripts/tokenizer_study.py counts and concludes, and the rows of the table at 128 px."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from hydra import compose, initialize_config_dir

from vtok.config import instantiate
from vtok.quantize.fsq import FSQ

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import locality, studies, tokenizer_study, tokenizer_table  # noqa: E402

# --- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels, activation", [((5, 3, 7), "ifsq"), ((4, 5, 2), "tanh")])
def test_levels_are_counted_as_the_quantizers_codes_say(levels, activation):
    quantizer = FSQ(levels=levels, activation=activation)
    ids = torch.randint(quantizer.vocab_size, (4, 50), generator=torch.Generator().manual_seed(0))
    counts = studies.bin_counts(ids, levels)
    codes = quantizer.lookup(ids).flatten(0, 1)
    for channel, level in enumerate(levels):
        values = [(i - level // 2) / (level // 2) for i in range(level)]
        want = [int((codes[:, channel] - value).abs().lt(1e-6).sum()) for value in values]
        assert counts[channel].tolist() == want


def test_entropy_in_bits_against_its_definition():
    counts = torch.tensor([3, 0, 5, 1, 0, 7])
    share = np.array([3, 5, 1, 7]) / 16
    assert studies.entropy(counts) == pytest.approx(-sum(p * math.log2(p) for p in share), abs=1e-12)
    assert studies.entropy(torch.full((64,), 9)) == pytest.approx(6, abs=1e-12)
    assert studies.entropy(torch.tensor([0, 4, 0])) == 0


def test_use_of_codes_and_levels_by_hand():
    """Codes 0, 0, 1 and 4 of levels [2, 3]: digits (0, 0), (0, 0), (1, 0), (0, 2)."""
    ids = torch.tensor([[0, 0, 1, 4]])
    counts, bins = torch.bincount(ids.flatten(), minlength=6), studies.bin_counts(ids, [2, 3])
    found = studies.code_use(counts, bins)
    assert found["bins"] == [[0.75, 0.25], [0.75, 0.0, 0.25]]
    assert (found["codebook_usage"], found["bin_usage"]) == (0.5, 0.8)
    assert (found["bin_least"], found["bin_most"]) == (0.0, 0.75)
    assert found["entropy"] == pytest.approx(1.5)
    assert found["bin_entropy"] == pytest.approx(2 - 0.75 * math.log2(3))


def test_a_pass_counts_every_image_once():
    """The whole pass over batches equals one count over all codes."""
    tokenizer = tokenizers.make("cnn_ifsq")
    size = tokenizer.spec.image_size
    pictures = torch.randint(256, (5, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = SimpleNamespace(count=5, batches=lambda _: pictures.split(2))
    found = tokenizer_study.measured_codes(tokenizer, images)
    ids = tokenizer.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert found["codebook_usage"] == len(ids.unique()) / tokenizer.quantizer.vocab_size
    want = studies.code_use(
        torch.bincount(ids.flatten(), minlength=tokenizer.quantizer.vocab_size),
        studies.bin_counts(ids, tokenizer.quantizer.levels),
    )
    assert {key: found[key] for key in want} == want and found["images"] == 5


# --- concluding -----------------------------------------------------------------------------------------------------


def test_ranges_that_overlap_are_no_difference():
    assert studies.compared([3.0, 4.0], [1.0, 2.9]) == "higher"
    assert studies.compared([1.0, 2.0], [2.1, 3.0]) == "lower"
    assert studies.compared([1.0, 3.0], [2.0, 2.5]) == "no difference"
    assert studies.compared([1.0, 2.0], [2.0, 3.0]) == "no difference"
    assert studies.span([1.0, 2.0, 6.0]) == "3.00 (1.00 .. 6.00)"


def test_prefix_lengths():
    assert studies.prefix_lengths(32) == ([1, 4, 16, 32], 8)
    assert studies.prefix_lengths(16) == ([1, 4, 16], 4)
    assert studies.prefix_lengths(256) == ([1, 4, 16, 256], 64)
    # VAR's scales of 1, 2, 4, 8: the nearest whole ones
    assert studies.prefix_lengths(85, [1, 5, 21, 85]) == ([1, 5, 21, 85], 21)


def row(psnr, without):
    other = None if without is None else {"psnr": {"1": 5.0, "8": without, "32": 30.0}, "steps": 7}
    base = {"study": "nested", "family": "restok", "tokens": 32, "steps": 7, "path": [1, 4, 16, 32], "quarter": 8}
    return base | {"psnr": dict(zip(("1", "4", "8", "16", "32"), psnr)), "without": other}


def test_verdicts_on_prefixes():
    rising = [10.0, 12.0, 13.0, 15.0, 16.0]
    assert studies.judged(row(rising, 12.9)) == ["strictly rises", "untrained does not reach it"]
    assert studies.judged(row(rising, 13.0)) == ["strictly rises", "untrained REACHES it"]
    assert studies.judged(row(rising, None)) == ["strictly rises", ""]
    assert studies.judged(row([10.0, 12.0, 13.0, 12.0, 16.0], 9.0))[0] == "does NOT strictly rise"
    assert studies.judged(row([10.0, 12.0, 11.0, 15.0, 16.0], 9.0))[0] == "strictly rises"  # N / 4 is not on the path


def test_a_row_of_two_vocabularies_shows_both_and_its_command():
    shared = {"kind": "cifar10", "psnr_mean": 20.0, "tokens": 80}
    two = {"codebook_usage_part0": 0.906, "codebook_usage_part1": 0.354, "codebook_perplexity_part0": 556.7}
    two |= {"codebook_perplexity_part1": 789.1, "command": "python scripts/tokenizer_table.py hita"}
    one = {"codebook_usage": 1.0, "codebook_perplexity": 997.2, "command": "python scripts/tokenizer_table.py var"}
    kinds = [("hita", two), ("var", one), ("block_mean", {"codebook_usage": None})]
    lines = tokenizer_table.page([shared | more | {"family": name} for name, more in kinds], []).splitlines()
    titles = next(line for line in lines if line.startswith("| family")).split(" | ")
    found = {}
    for line in lines:
        if line.startswith(("| hita", "| var", "| block_mean")):
            values = dict(zip(titles, line.removesuffix(" |").split(" | ")))
            found[values["| family"].removeprefix("| ")] = [values[t] for t in ("usage", "perplexity")]
            command = f"`python scripts/tokenizer_table.py {line.split()[1]}` |"
            assert line.endswith(command) == (not line.startswith("| block_mean"))
    assert found == {"hita": ["0.91 / 0.35", "557 / 789"], "var": ["1.00", "997"], "block_mean": ["", ""]}


def test_the_page_is_that_of_the_rows():
    """As written by `--page`; whoever adds a row writes the page anew."""
    found = tokenizer_table.rows(tokenizer_table.ROWS_AT), tokenizer_table.rows(tokenizer_table.STUDIES_AT)
    assert tokenizer_table.PAGE.read_text() == tokenizer_table.page(*found)


def test_the_page_has_a_section_for_each_study():
    page = tokenizer_table.page([], [row([10.0, 12.0, 13.0, 15.0, 16.0], 9.0)])
    assert "| restok | with nested dropout | 32 | 7 | 1: 10.00, 4: 12.00, 8: 13.00, 16: 15.00, 32: 16.00 |" in page
    assert "| restok | without | 32 | 7 | 1: 5.00, 8: 9.00, 32: 30.00 | untrained does not reach it |" in page
    assert "iFSQ against FSQ" not in page


@pytest.mark.parametrize("name", ["restok", "detailflow"])
@torch.no_grad()
def test_prefixes_are_decoded_as_asked(name):
    """PSNR of k tokens against decode(keep=k) itself; the better of two sides where a family trains at another."""
    tokenizer = tokenizers.make(name)
    size, length = tokenizer.spec.image_size, tokenizer.spec.layout.length
    pictures = torch.randint(256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images = SimpleNamespace(count=3, batches=lambda _: pictures.split(3))
    found = tokenizer_study.prefix_psnr(tokenizer, images, [1, length])
    ids = tokenizer.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    for k in (1, length):
        copies = [tokenizer.decode(ids, keep=k)]
        if name == "detailflow":
            copies.append(tokenizer.pixels(tokenizer.embed(ids[:, :k])))
        made = torch.stack(copies).mul(127.5).add(127.5).clamp(0, 255).round() / 255
        errors = (made - pictures.permute(0, 3, 1, 2) / 255).double().square().mean(dim=(2, 3, 4))
        assert found[str(k)] == pytest.approx(float((-10 * errors.log10()).mean(1).max()), abs=1e-4)


def test_a_change_of_one_level_leaks_where_the_reshape_mixes_latents():
    shape = {"off": 0.0, "on": 1.0}
    for flag, legacy in locality.FLAGS.items():
        tokenizer = tokenizers.make("restok", legacy_reshape=legacy)
        drawn = torch.randn(2, 2, tokenizer.tokens, tokenizer.encoder.trunk.dim)
        changes = locality.by_level(tokenizer.encoder, *drawn)
        assert locality.leaked(changes, tokenizer.encoder.levels) == pytest.approx(shape[flag], abs=0.2)


def test_shares_of_a_change_by_hand():
    changes = torch.tensor([[9.0, 3.0, 4.0], [9.0, 1.0, 0.0]])  # 2 patches; the last 2 latents are theirs
    assert locality.local(changes) == pytest.approx((9 / 25 + 0.0) / 2)
    table = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # levels of 1 and 2 tokens
    assert locality.leaked(table, [1, 2]) == 0.0
    assert locality.leaked(table + 1, [1, 2]) == 1.0


# --- rows -----------------------------------------------------------------------------------------------------------


def built(name, *options):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=[*tokenizer_table.SHARED, *tokenizer_table.FAMILIES[name], *options])
    with torch.device("meta"):
        return instantiate(config.tokenizer, _convert_="all")


@pytest.mark.parametrize("name", tokenizer_table.FAMILIES)
def test_rows_at_128_pixels_build(name):
    large = ["data=imagefolder", "data.folder=x", "data.image_size=128", *tokenizer_table.LARGE[name]]
    tokenizer = built(name, *large)
    assert tokenizer.spec.image_size == 128
    assert 1e6 <= sum(p.numel() for p in tokenizer.parameters()) <= 8e6
    assert name not in tokenizer_table.SECOND or tokenizer.spec.layout.length in (1024, 1040, 1365)
    assert len(tokenizer_table.SECOND) == 8


@pytest.mark.parametrize("name", tokenizer_study.PREFIXED)
def test_every_flexible_family_is_studied_with_and_without_dropout(name):
    flexible = tokenizer_study.PREFIXED[name]
    tokenizer = built(name, "data=cifar10")
    assert tokenizer.prefixes
    if flexible.without is None:
        assert not hasattr(tokenizer, "nested")
        return
    other = built(name, "data=cifar10", *flexible.without)
    dropped = "degradation" if name == "detailflow" else "nested"
    off = 0.0 if name == "detailflow" else "all"
    assert getattr(other, dropped) == off != getattr(tokenizer, dropped)
    assert other.spec.layout == tokenizer.spec.layout


def test_no_flexible_family_is_left_out():
    flexible = {name for name in tokenizer_table.FAMILIES if built(name, "data=cifar10").prefixes}
    assert flexible == set(tokenizer_study.PREFIXED)
