"""Train the `shapes` model: tokenizer, autoencoder, text encoder and UNet, from drawings to a diffusers folder.

Six stages, those that train each resumable from a checkpoint in the work folder:

    vae      AutoencoderKL on drawn scenes; latents are shifted and scaled to one deviation in its 1x1 convolutions
    decoder  the autoencoder's decoder alone, from slightly noisy latents, on whole pictures; can run at any later time
    text     CLIPTextModel under throw-away heads that must read the scene off the caption's tokens; frozen afterwards
    unet     UNet2DConditionModel, epsilon prediction, on latents encoded once and captions worded anew every time
    save     the four parts, the UNet with averaged weights, as fp16 safetensors under --out
    judge    tune the guidance on held-out captions, then count on others how many pictures show what is asked for

The UNet starts from weights that return its input and know where in the picture they are (models/training/start.py). It
first reads captions on a blank input, then the noise rises, then all timesteps take part. On a CPU every worker is a
process of one thread that trains on its own and averages its weights with the others every few steps (local SGD,
arXiv:1805.09767): faster than one process of many threads, and it keeps its pace beside other work.

The weights in models/shapes took 160 minutes on two cores and draw 91 % of held-out captions right: models/README.md.
"""

import argparse
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from models.training.autoencoder import train_decoder, train_vae
from models.training.fit import Worker
from models.training.folder import publish_untrained, save, trained_unet
from models.training.judge import judge
from models.training.text import train_text
from models.training.unet import train_unet

STAGES = ("vae", "decoder", "text", "unet", "save", "judge")


def start_log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def run(rank: int, stage: str, args: argparse.Namespace) -> None:
    start_log()
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["MASTER_PORT"] = str(args.port)
        dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    worker = Worker(rank, args)
    {"vae": train_vae, "decoder": train_decoder, "text": train_text, "unet": train_unet}[stage](worker)
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.train_shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m models.train_shapes --work /tmp/shapes --out models/shapes
  python -m models.train_shapes --work /tmp/shapes --stages unet save --unet-minutes 120   train the UNet on for longer
  python -m models.train_shapes --work /tmp/more --start models/shapes --stages unet save judge   in another folder
  python -m models.train_shapes --work /tmp/shapes --device cuda --workers 1 --batch 256""",
    )
    parser.add_argument(
        "--work", required=True, help="folder for checkpoints, picture grids and `latest`, the model so far"
    )
    parser.add_argument("--out", default="models/shapes", help="where the finished model goes (default: %(default)s)")
    parser.add_argument("--start", metavar="FOLDER", help="go on from an earlier model instead of from nothing")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run (default: all)"
    )
    parser.add_argument("--vae-minutes", type=float, default=20, help="time for the autoencoder (default: %(default)s)")
    parser.add_argument(
        "--decoder-minutes", type=float, default=6, help="time for the decoder alone (default: %(default)s)"
    )
    parser.add_argument(
        "--text-minutes", type=float, default=6, help="time for the text encoder (default: %(default)s)"
    )
    parser.add_argument(
        "--unet-minutes", type=float, default=85, help="time for the UNet, earlier runs included (default: %(default)s)"
    )
    parser.add_argument(
        "--scenes", type=int, default=80_000, help="training scenes encoded for the UNet (default: %(default)s)"
    )
    parser.add_argument("--vae-batch", type=int, default=16, help="pictures per step and worker (default: %(default)s)")
    parser.add_argument(
        "--text-batch", type=int, default=64, help="captions per step and worker (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="latents per UNet step and worker (default: %(default)s)")
    parser.add_argument(
        "--noise-offset",
        type=float,
        default=0.3,
        help="deviation of a constant added to the noise of each channel, so that the mean of a picture cannot be read "
        "through the noise of the last timestep (default: %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak rate of the UNet (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--report-minutes", type=float, default=8, help="between two checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--report-pictures", type=int, default=64, help="held-out captions judged each time (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=29517, help="local port on which workers meet (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    args = parser.parse_args()
    if args.device != "cpu" and args.workers != 1:
        parser.error(f"got --workers {args.workers} with --device {args.device}; one device trains with --workers 1")
    start_log()
    work = Path(args.work)
    publish_untrained(work, args.start)
    for stage in STAGES:
        if stage not in args.stages:
            continue
        if stage == "save":
            save(work, Path(args.out), trained_unet(work))
        elif stage == "judge":
            judge(Path(args.out), torch.device(args.device))
        elif args.workers == 1:
            run(0, stage, args)
        else:
            torch.multiprocessing.spawn(run, (stage, args), args.workers)


if __name__ == "__main__":
    main()
