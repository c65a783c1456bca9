"""Train a small PixArt that draws the digit named in a prompt, with a small T5 encoder, on the latents of a VAE.

Writes ``pixart_mnist.pt`` in PixArt's public layout, and beside it ``text_encoder/`` as transformers lays a T5 out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import encoded
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from training import HERE, add_denoiser_options, initialise, load_digits, save, train_denoiser, training_parser

from goc_deploy.exporters.dit import modulate, unpatchify
from goc_deploy.exporters.pixart import NULL_CAPTION, CrossAttention, PublicLayout
from goc_deploy.exporters.t5 import T5Encoder, t5_config
from goc_deploy.spec import ModelSpec

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "a {}", "the digit {}", "a handwritten {}", "draw the number {}", "a picture of a {}")
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
    depth=6, hidden=96, heads=4, mlp_hidden=384, patch=1, grid=7, channels=4, classes=0, learn_sigma=False,
    architecture="pixart", branches=("attn", "cross", "mlp"), guided_channels=4, caption_channels=48, caption_tokens=TOKENS,
)  # fmt: skip


def tokenizer() -> Tokenizer:
    """Whole words of the prompts, single letters for everything else."""
    pieces = [(SPACE + word, -2.0) for word in WORDS] + [(SPACE, -8.0)] + [(letter, -9.0) for letter in LETTERS]
    found = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *pieces], unk_id=SPECIAL.index("<unk>")))
    found.add_special_tokens(list(SPECIAL))
    found.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))])
    return found


def tokens_and_mask(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(K, L) int64 and (K, L) float32, padded to the model's limit."""
    ids = [tokenizer().encode(prompt).ids for prompt in prompts]
    tokens = torch.tensor([row + [SPECIAL.index("<pad>")] * (TOKENS - len(row)) for row in ids])
    return tokens, (torch.arange(TOKENS) < torch.tensor([[len(row)] for row in ids])).float()


def attended(layers: CrossAttention, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
    """Cross-attention of tokens (B, T, D) to captions (B, L, D), of which ``mask`` (B, L) counts."""

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (SPEC.heads, -1)).transpose(1, 2)

    keys, values = layers.kv_linear(caption).chunk(2, dim=-1)
    mixed = F.scaled_dot_product_attention(
        heads(layers.q_linear(x)), heads(keys), heads(values), attn_mask=mask.bool()[:, None, None]
    )
    return layers.proj(mixed.transpose(1, 2).flatten(2))


class PromptedPixArt(PublicLayout):
    """A PixArt and its text encoder. Conditions are rows of `PROMPTS`; the row behind the last is the empty prompt."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.spec, self.null_condition = SPEC, len(PROMPTS)
        initialise(self, lambda name: name.endswith("cross_attn.proj") or name == "final_layer.linear")
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=SPEC.hidden**-0.5)
        self.text_encoder = T5Encoder(t5_config(TEXT, "the example"), TOKENS)
        for name, parameter in self.text_encoder.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 if name == "shared.weight" else parameter.shape[1] ** -0.5)
        tokens, mask = tokens_and_mask([*PROMPTS, ""])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Noise in latents (B, C, H, W) at timesteps (B,), of rows of the prompts (B,)."""
        captions = self.y_embedder["y_proj"](self.text_encoder(self.tokens, self.mask))[prompts]  # (B, L, D)
        mask = self.mask[prompts]
        condition = self.t_embedder(t)  # (B, D)
        shared = self.t_block(condition).unflatten(-1, (6, -1))
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (shared + block.scale_shift_table).unbind(1)
            h = h + gate_a[:, None] * block.attn(modulate(h, shift_a, scale_a))
            h = h + attended(block.cross_attn, h, captions, mask)
            h = h + gate_m[:, None] * block.mlp(modulate(h, shift_m, scale_m))
        shift, scale = (condition[:, None] + self.final_layer.scale_shift_table).unbind(1)
        return unpatchify(self.final_layer.linear(modulate(h, shift, scale)), self.spec)


def save_text_encoder(encoder: T5Encoder, folder: Path) -> None:
    """Write the folder that ``T5EncoderModel.from_pretrained`` and ``goc-export --text-encoder`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TEXT, indent=1) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, folder / "model.safetensors"
    )
    tokenizer().save(str(folder / "tokenizer.json"))


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

    model = train_denoiser(PromptedPixArt(), encoded(args.vae, images), labels, args, prompts)
    with torch.inference_mode():
        null = model.text_encoder(model.tokens[-1:], model.mask[-1:])[0]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("text_encoder.")}
    save({**state, NULL_CAPTION: null}, args.out)
    save_text_encoder(model.text_encoder, args.out.with_name("text_encoder"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
