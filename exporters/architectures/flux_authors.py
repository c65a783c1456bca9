"""The layers of a FLUX.1 in a file of its authors."""

from __future__ import annotations

from goc_deploy.exporters.architectures.authors import AuthorsLayout

OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{
        f"{ours}_in.{layer}": (f"time_text_embed.{theirs}_embedder.linear_{i}",)
        for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, layer in enumerate(("in_layer", "out_layer"), 1)
    },
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
DOUBLE_NORMS = {
    f"{stream}_attn.norm.{part}_norm": (f"attn.norm_{added}{part[0]}",)
    for stream, added in (("img", ""), ("txt", "added_"))
    for part in ("query", "key")
}
SINGLE_NORMS = {f"norm.{part}_norm": (f"attn.norm_{part[0]}",) for part in ("query", "key")}
LAYOUT = AuthorsLayout(
    outer=OUTER,
    blocks={
        "double_blocks.{}.": ("transformer_blocks.{}.", DOUBLE | DOUBLE_NORMS),
        "single_blocks.{}.": ("single_transformer_blocks.{}.", SINGLE | SINGLE_NORMS),
    },
    joined="double_blocks.0.img_attn.qkv.weight",
    swapped=("norm_out.linear",),
)
