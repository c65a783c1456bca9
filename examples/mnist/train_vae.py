"""Train the small autoencoder of this example on MNIST digits, on a CPU.

It maps 28x28 pixels to 4x7x7 latents and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from autoencoder import CONFIG, Autoencoder, save_folder
from training import batches, load_digits, run_steps, training_parser

from goc_deploy.exporters.companions.vae import vae_config

SCALED = slice(None, None, 5)  # the images, sorted by label, whose latents give the scaling factor


def main(argv: Sequence[str] | None = None) -> int:
    parser = training_parser(__doc__, "vae", minutes=6.0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument(
        "--divergence", type=float, default=1e-3, help="weight of the Kullback-Leibler divergence"
    )
    parser.set_defaults(batch=64)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, _ = load_digits(args.data)
    model = Autoencoder(vae_config(CONFIG, "the example"))
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    order = iter(batches(len(images), args.batch))

    def step_losses(_: int, factor: float) -> dict[str, float]:
        batch = images[next(order)]
        mean, log_variance = model.encode(batch)
        decoded = model.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        mse = F.mse_loss(decoded, batch)
        divergence = (
            0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        )  # per latent, nats
        optimizer.param_groups[0]["lr"] = args.rate * factor
        optimizer.zero_grad(set_to_none=True)
        (mse + args.divergence * divergence).backward()
        optimizer.step()
        return {"mse": mse.item(), "divergence": divergence.item()}

    steps = run_steps(args, step_losses)
    model.eval()
    with torch.inference_mode():
        spread = model.encode(images[SCALED])[0].std().item()
    save_folder(model, 1 / spread, args.out)
    print(f"{steps} steps, scaling factor {1 / spread:.4f}: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
