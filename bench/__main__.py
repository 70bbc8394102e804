"""python -m bench canon | moe | truth | detection [--out FILE]: every figure of the README that is measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import canon, detection, moe, truth


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("canon", help="the NumPy backend against np.matmul and the read bandwidth, in one run")
    verb.add_argument("--shape", default="qwen3-0.6b", help="a published size, with random weights (default: %(default)s)")
    verbs.add_parser("moe", help="a mixture of experts against a dense model, on the NumPy backend, in one run")
    for each in verbs.choices.values():
        each.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts (default: %(default)s)")
    verbs.add_parser("truth", help="how far the logits are from those of transformers, over tests/truth")
    verb = verbs.add_parser("detection", help="the verification kit: seeded faults that it detects, and false alarms")
    verb.add_argument("--only", default="", metavar="OPERATION", help="one operation (default: all)")
    verb.add_argument("--seed", type=int, help="of the inputs (default: one that nobody has seen)")
    for each in verbs.choices.values():
        each.add_argument("--out", type=Path, help="also write the figures as JSON to this file")
    args = parser.parse_args()
    bench = {"canon": canon, "moe": moe, "truth": truth, "detection": detection}[args.verb]
    figures = bench.run(**{name: value for name, value in vars(args).items() if name not in ("verb", "out")})
    print(bench.table(figures))
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
