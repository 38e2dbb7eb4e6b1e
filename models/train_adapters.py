"""Train what changes the `shapes` model without touching it: a ControlNet for edges and a LoRA that draws red on white.

Four stages, those that train each resumable from a checkpoint in the work folder:

    edges    ControlNetModel: the hint is the edges of a drawn scene; the caption says shapes and colours, seldom more
    style    LoRA of rank 8 on attention, feed-forward and convolutions: scenes drawn in red on white
    save     both in diffusers' layouts, fp16 safetensors: OUT/shapes-edges and OUT/shapes-red-chalk
    judge    export the model, attach the net, and count with the runtime what held-out captions and hints become

The model itself is frozen; `--model` may be any that `python -m models.train_shapes` wrote.
The weights in models/shapes-edges and models/shapes-red-chalk took 57 and 9 minutes on one core: models/README.md.
"""

import argparse
from pathlib import Path

import torch

from models.train_shapes import start_log
from models.training.adapters.edges import save_edges, train_edges
from models.training.adapters.judge import EDGES, STYLE, judge_adapters
from models.training.adapters.style import save_style, train_style
from models.training.fit import Worker

STAGES = ("edges", "style", "save", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.train_adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m models.train_adapters --work /tmp/adapters
  python -m models.train_adapters --work /tmp/adapters --stages edges save --edges-minutes 60   train the net on
  python -m models.train_adapters --work /tmp/adapters --stages judge                           judge what ships""",
    )
    parser.add_argument("--work", required=True, help="folder for checkpoints, picture grids and the judged bundle")
    parser.add_argument(
        "--model", type=Path, default=Path("models/shapes"), help="what they change (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("models"), help="where both go (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run (default: all)"
    )
    parser.add_argument(
        "--edges-minutes", type=float, default=40, help="time for the ControlNet (default: %(default)s)"
    )
    parser.add_argument("--style-minutes", type=float, default=9, help="time for the LoRA (default: %(default)s)")
    parser.add_argument(
        "--scenes", type=int, default=24_000, help="scenes encoded for the ControlNet (default: %(default)s)"
    )
    parser.add_argument(
        "--style-scenes", type=int, default=8_000, help="scenes encoded for the LoRA (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="latents a step (default: %(default)s)")
    parser.add_argument("--edges-lr", type=float, default=1e-3, help="peak rate of the net (default: %(default)s)")
    parser.add_argument("--style-lr", type=float, default=2e-3, help="peak rate of the LoRA (default: %(default)s)")
    parser.add_argument(
        "--noise-offset", type=float, default=0.3, help="as of models.train_shapes (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, one core of it, or cuda (default: %(default)s)")
    parser.add_argument("--report-minutes", type=float, default=5, help="between checkpoints (default: %(default)s)")
    parser.add_argument(
        "--report-pictures", type=int, default=64, help="held-out captions judged each time (default: %(default)s)"
    )
    parser.add_argument(
        "--captions", type=int, default=256, help="that the judge stage draws in each way (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    args = parser.parse_args()
    args.workers = 1
    start_log()
    torch.set_num_threads(1)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage not in args.stages:
            continue
        if stage == "save":
            for name, write, folder in (("edges", save_edges, EDGES), ("style", save_style, STYLE)):
                if (work / f"{name}.pt").exists():
                    write(work, args.model, args.out / folder)
        elif stage == "judge":
            judge_adapters(args.model, args.out, work, args.captions)
        else:
            {"edges": train_edges, "style": train_style}[stage](Worker(0, args))


if __name__ == "__main__":
    main()
