"""Draw images from a trained generator: a labelled grid, an npz file, or a folder. See configs/sample.yaml."""

from pathlib import Path

from vtok.cli import entry


@entry("sample", Path(__file__).parent / "configs")
def main(config) -> None:
    from vgen.sampling import sample

    sample(config)


if __name__ == "__main__":
    main()
