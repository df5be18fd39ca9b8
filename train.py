"""Train a tokenizer, or a generator on its tokens. `python train.py --help` lists what can be changed."""

from pathlib import Path

from vtok.cli import entry


@entry("train", Path(__file__).resolve().with_name("configs"))
def main(config):
    from vgen.training import train  # heavy imports stay out of --help and --cfg

    return train(config)


if __name__ == "__main__":
    main()
