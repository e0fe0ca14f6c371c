"""Fine-tune an unconditional diffusion pipeline on new pictures and save it as a folder.

Example: accelerate launch unit2/finetune_model.py --base anton-l/ddpm-butterflies-128 \\
    --source my_pictures --batch_size 4 --accumulation 4 --output my_model
"""

import sys
from pathlib import Path

from diffusers import DDPMPipeline, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit1"))
from train_unconditional import draw_timesteps, run_training

from course_utils.training import Run, check_training_arguments, training_parser

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv=None):
    parser = training_parser(
        __doc__.splitlines()[0], source="flowers", output="my-finetuned-model", steps=500,
        learning_rate=2e-3, schedule="cosine", ema_decay=0.995)
    parser.add_argument("--base", default=str(ROOT / "course_utils/pretrained/butterflies-32"),
                        help="trained pipeline to start from: a folder or a Hub id")
    parser.add_argument("--image_size", type=int,
                        help="height and width in pixels; the base model's if not given")
    args = parser.parse_args(argv)
    check_training_arguments(parser, args)
    base, output = Path(args.base).expanduser(), Path(args.output).expanduser()
    if base.resolve() == output.resolve():
        parser.error(f"--output {args.output} is the base model itself: give another folder")
    args.base = str(base) if base.exists() else args.base
    return args


def load_base(base, image_size):
    """Model and scheduler of a DDPM pipeline, set to `image_size`, or one sentence."""
    if not Path(base).exists() and Path(base).is_absolute():
        sys.exit(f"The base model {base!r} does not exist: give a pipeline folder or a Hub id.")
    try:
        pipeline = DDPMPipeline.from_pretrained(base, use_safetensors=True)
        model, scheduler = pipeline.unet, pipeline.scheduler
        right_kind = isinstance(model, UNet2DModel) and hasattr(scheduler, "get_velocity")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f"Could not load {base!r} as an unconditional diffusion pipeline ({reason}): give "
                 "a folder or Hub id that DDPMPipeline can load, with safetensors weights.")
    config = model.config
    channels = config.in_channels, config.out_channels
    if not right_kind or channels not in ((1, 1), (3, 3)):
        sys.exit(f"{base!r} is not an unconditional model of grey or RGB pictures but a "
                 f"{type(model).__name__} with {channels[0]} channels in and {channels[1]} out: "
                 "give a DDPM pipeline.")
    size = image_size or config.sample_size
    multiple = 2 ** (len(config.block_out_channels) - 1)
    if size < multiple or size % multiple:
        sys.exit(f"--image_size {size} does not fit the base model, which halves the picture "
                 f"{len(config.block_out_channels) - 1} times: choose a multiple of {multiple}.")
    model.register_to_config(sample_size=size)   # sample grids and pipeline use the given size
    return model.float().train(), scheduler


def main(argv=None):
    args = parse_args(argv)
    model, scheduler = load_base(args.base, args.image_size)
    config = model.config
    run = Run(args, config.sample_size, config.in_channels, scheduler, draw_timesteps)
    with run:
        run_training(args, run, model)
    run.finish(f"fine-tuned\nfrom `{args.base}` on")


if __name__ == "__main__":
    main()
