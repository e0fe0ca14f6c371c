"""Train an unconditional diffusion model on pictures and save it as a DDPMPipeline folder.

Example: accelerate launch unit1/train_unconditional.py --source my_pictures --output my_model

The model, the loss and the loop are those of notebook 1.1. What a long run needs around them stands
in `course_utils/training.py`; several GPUs, large data and what they cost in `unit1/SCALING.md`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from course_utils.training import Run, build_optimizer, check_training_arguments, training_parser


def parse_args(argv=None):
    parser = training_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--image_size", type=int, default=32, help="height and width in pixels")
    add("--channels", type=int, default=3, choices=(1, 3), help="1 for grey, 3 for RGB")
    add("--widths", type=int, nargs="+", default=[32, 32, 64, 128],
        help="channels of each UNet level, multiples of 32; each level halves the picture")
    add("--layers", type=int, default=1, help="residual blocks of each UNet level")
    args = parser.parse_args(argv)
    check_training_arguments(parser, args)
    if args.layers < 1:
        parser.error(f"--layers {args.layers} must be at least 1")
    if len(args.widths) < 2:
        parser.error(f"--widths {args.widths}: give at least two levels, both have attention")
    halvings = 2 ** (len(args.widths) - 1)
    if args.image_size < halvings or args.image_size % halvings:
        parser.error(f"--image_size {args.image_size} cannot be halved {len(args.widths) - 1} "
                     f"times: choose a multiple of {halvings} or give fewer --widths")
    if any(width % 32 or width <= 0 for width in args.widths):
        parser.error(f"--widths {args.widths}: each must be a positive multiple of 32")
    return args


def build_unet(image_size, widths, in_channels=3, out_channels=3, **options):
    """A small UNet with attention at its two lowest resolutions."""
    plain = len(widths) - 2
    return UNet2DModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=widths,
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"] * 2,
        up_block_types=["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * plain,
        **options,
    )


def build_model(args):
    """The UNet that the options ask for."""
    small = build_unet(args.image_size, args.widths, args.channels, args.channels)
    return UNet2DModel.from_config(small.config, layers_per_block=args.layers)


def make_scheduler():
    """Cosine schedule, v-prediction, and samplers that start at the last timestep.

    Unit 1 explains the first two; for the third see Lin et al. 2023, "Common diffusion noise
    schedules and sample steps are flawed".
    """
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing")


def draw_timesteps(count, T, generator):
    """Timesteps (count,) from 0 to T - 1, the noisy ones more often."""
    return (torch.rand(count, generator=generator).sqrt() * T).long().clamp(max=T - 1)


def batch_loss(model, scheduler, x0, t, eps):
    """Mean squared error of what the scheduler's model predicts."""
    target = {"epsilon": lambda: eps, "sample": lambda: x0,
              "v_prediction": lambda: scheduler.get_velocity(x0, eps, t)}
    prediction = model(scheduler.add_noise(x0, eps, t), t).sample
    return F.mse_loss(prediction.float(), target[scheduler.config.prediction_type]())


def run_training(args, run, model):
    """Train `model` in place, on as many devices as Accelerate finds; `run` keeps the books."""
    accelerator = run.accelerator
    model.to(run.device, memory_format=run.layout).train()
    optimizer, schedule = build_optimizer(args, model)
    average = EMAModel(model.parameters(), args.ema_decay, use_ema_warmup=True, power=0.75,
                       foreach=True)
    run.begin(model, optimizer, schedule, average)
    spread, optimizer = accelerator.prepare(model, optimizer, device_placement=[True, False])
    for _ in run.steps():                        # each is one step of the optimizer
        for x0, t, eps in run.batches():         # pictures, timesteps, noise
            with accelerator.accumulate(spread):
                loss = batch_loss(spread, run.scheduler, x0, t, eps)
                accelerator.backward(loss)       # divides by the number of accumulated passes
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(spread.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            run.losses.append(loss.detach())
        schedule.step()
        average.step(model.parameters())


def main(argv=None):
    args = parse_args(argv)
    scheduler = make_scheduler()
    run = Run(args, args.image_size, args.channels, scheduler, draw_timesteps)
    with run:
        run_training(args, run, build_model(args))
    run.finish()


if __name__ == "__main__":
    main()
