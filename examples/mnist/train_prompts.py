"""Train a small PixArt that draws the digit named in a prompt.

It has a small T5 encoder and works on the latents of a VAE.

Writes ``pixart_mnist.pt`` in PixArt's public layout, and beside it ``text_encoder/`` as
transformers lays a T5 out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from autoencoder import encoded
from prompted import PromptedPixArt, save_text_encoder, without_text_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from training import HERE, add_denoiser_options, load_digits, save, train_denoiser, training_parser

from goc_deploy.exporters.architectures.pixart import NULL_CAPTION
from goc_deploy.spec import ModelSpec

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "a {}",
    "the digit {}",
    "a handwritten {}",
    "draw the number {}",
    "a picture of a {}",
)
PROMPTS = [template.format(digit) for template in TEMPLATES for digit in DIGITS]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
SPACE, END = "\u2581", "</s>"
SPECIAL = ("<pad>", END, "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = 12
TEXT = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 3,
    "num_layers": 2,
    "vocab_size": 64,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": SPECIAL.index("<pad>"),
    "eos_token_id": SPECIAL.index(END),
    "tie_word_embeddings": False,
}
SPEC = ModelSpec(
    depth=6,
    hidden=96,
    heads=4,
    mlp_hidden=384,
    patch=1,
    grid=7,
    channels=4,
    choices=0,
    learn_sigma=False,
    architecture="pixart",
    branches=("attn", "cross", "mlp"),
    guided_channels=4,
    caption_channels=48,
    caption_tokens=TOKENS,
)


def tokenizer() -> Tokenizer:
    """Whole words of the prompts, single letters for everything else."""
    pieces = (
        [(SPACE + word, -2.0) for word in WORDS]
        + [(SPACE, -8.0)]
        + [(letter, -9.0) for letter in LETTERS]
    )
    found = Tokenizer(
        models.Unigram([*((name, 0.0) for name in SPECIAL), *pieces], unk_id=SPECIAL.index("<unk>"))
    )
    found.add_special_tokens(list(SPECIAL))
    found.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))]
    )
    return found


def tokens_and_mask(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(K, L) int64 and (K, L) float32, padded to the model's limit."""
    ids = [tokenizer().encode(prompt).ids for prompt in prompts]
    tokens = torch.tensor([row + [SPECIAL.index("<pad>")] * (TOKENS - len(row)) for row in ids])
    return tokens, (torch.arange(TOKENS) < torch.tensor([[len(row)] for row in ids])).float()


class DigitPainter(PromptedPixArt):
    """Conditions are rows of `PROMPTS`; the row behind the last is the empty prompt."""

    def __init__(self) -> None:
        super().__init__(SPEC, TEXT)
        self.null_condition = len(PROMPTS)
        tokens, mask = tokens_and_mask([*PROMPTS, ""])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Noise in latents (B, C, H, W) at timesteps (B,), of rows of the prompts (B,)."""
        return super().forward(x, t, self.tokens[prompts])


def main(argv: Sequence[str] | None = None) -> int:
    parser = training_parser(__doc__.splitlines()[0], "pixart_mnist.pt", minutes=20.0)
    add_denoiser_options(parser)
    parser.add_argument("--vae", type=Path, default=HERE / "vae", help="folder of train_vae.py")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = load_digits(args.data)

    def prompts(labels: Tensor) -> Tensor:
        return labels + len(DIGITS) * torch.randint(len(TEMPLATES), labels.shape)

    model = train_denoiser(DigitPainter(), encoded(args.vae, images), labels, args, prompts)
    with torch.inference_mode():
        null = model.text_encoder(model.tokens[-1:], model.mask[-1:])[0]
    state = model.state_dict()
    save({**without_text_encoder(state), NULL_CAPTION: null}, args.out)
    save_text_encoder(state, TEXT, tokenizer(), args.out.with_name("text_encoder"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
