"""See `python -m tests.export --help` and the docstring of the package."""

import argparse

import torch
import transformers

from . import TRUTH
from .blocks import write_blocks
from .cases import CASES
from .models import write_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.export", description="Makes tests/truth from PyTorch.")
    parser.add_argument("--only", action="append", choices=[*CASES, "blocks"], metavar="CASE", help="may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases and what each is for")
    wanted = parser.parse_args()
    if wanted.list:
        print("\n".join(f"{name:28} {case.notes}" for name, case in CASES.items()))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in wanted.only or [*CASES, "blocks"]:
        if name == "blocks":
            print(*write_blocks(TRUTH / "blocks"), sep="\n")
        else:
            print(write_model(name, CASES[name], TRUTH / "models" / name))


if __name__ == "__main__":
    main()
