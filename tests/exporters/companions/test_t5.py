"""Text encoders: the same embeddings and the same tokens as others, and refusals.

The embeddings are those of the formulas and of transformers, the tokens those of SentencePiece.
"""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import goc_deploy
from goc_deploy.conditions.text import TextEncoder
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import GocError, ModelError, SafetyError, UsageError
from goc_deploy.exporters.companions.t5 import (
    T5Encoder,
    position_buckets,
    read_text_encoder,
    t5_config,
)
from goc_deploy.exporters.companions.tokenizer_files import json_from_sentencepiece
from goc_deploy.runtime.loading import load_engines, load_pipelines
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.pixart_reference import SPEC, random_state
from tests.reference import relative_l2
from tests.stand_ins.counted import CountingOrt
from tests.t5_folder import CONFIG, save_encoder, sentencepiece_model

PROMPTS = ("a red three", "the blue seven", "a three")


def encoded_by_hand(state: dict[str, np.ndarray], tokens: list[int], config: Any) -> np.ndarray:
    """A text without padding, head by head, as the paper says it."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * state[f"{name}.weight"]

    def bucket(query: int, key: int) -> int:
        half, distance = config.buckets // 2, abs(key - query)
        exact = half // 2
        far = (
            exact + int(np.log(distance / exact) / np.log(config.furthest / exact) * (half - exact))
            if distance
            else 0
        )
        return (half if key > query else 0) + (distance if distance < exact else min(far, half - 1))

    count, block = (
        len(tokens),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    )
    bias = np.array([[state[block][bucket(q, k)] for k in range(count)] for q in range(count)])
    x = state["shared.weight"][tokens]
    for i in range(config.layers):
        attention, feed = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        h = norm(x, f"{attention}.layer_norm")
        q, k, v = (h @ state[f"{attention}.SelfAttention.{name}.weight"].T for name in "qkv")
        heads = []
        for head in range(config.heads):
            part = slice(head * config.head, (head + 1) * config.head)
            weights = np.exp(q[:, part] @ k[:, part].T + bias[:, :, head])
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + np.concatenate(heads, 1) @ state[f"{attention}.SelfAttention.o.weight"].T
        h, dense = norm(x, f"{feed}.layer_norm"), f"{feed}.DenseReluDense"
        if config.gated:
            a = h @ state[f"{dense}.wi_0.weight"].T
            inner = (
                0.5
                * a
                * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
                * (h @ state[f"{dense}.wi_1.weight"].T)
            )
        else:
            inner = np.maximum(h @ state[f"{dense}.wi.weight"].T, 0)
        x = x + inner @ state[f"{dense}.wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("t5") / "t5")


@pytest.fixture(scope="session")
def engine(encoder: Path) -> Path:
    """A random PixArt with its text encoder and captions from a file of prompts."""
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    (encoder.parent / "prompts.txt").write_text("a red three\n\nthe blue seven\n")
    torch.save(random_state(), encoder.parent / "model.pth")
    manifest = goc_deploy.export(
        encoder.parent / "model.pth",
        encoder.parent / "engine",
        num_heads=3,
        plans=["none", "fora:2"],
        steps=2,
        max_batch=2,
        text_encoder=encoder,
        captions=encoder.parent / "prompts.txt",
    )
    assert manifest.model.choices == 2
    assert (
        next(unit.relative_l2 or 0 for unit in manifest.graphs if unit.name == "text_encoder")
        < 1e-4
    )
    return encoder.parent / "engine"


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_the_module_computes_the_formulas(tmp_path: Path, kind: str) -> None:
    folder = save_encoder(tmp_path / "t5", feed_forward_proj=kind)
    config, state = (
        t5_config({**CONFIG, "feed_forward_proj": kind}, ""),
        load_file(folder / "model.safetensors"),
    )
    module = T5Encoder(config, 14)
    module.load_state_dict(state)
    tokens = [3, 7, 9, 30, 12, 5, 8, 1]
    with torch.inference_mode():
        padded = torch.tensor([[*tokens, *[0] * 6]])
        found = module(padded, (torch.arange(14) < len(tokens)).float()[None])[0, : len(tokens)]
    expected = encoded_by_hand(
        {name: tensor.double().numpy() for name, tensor in state.items()}, tokens, config
    )
    assert relative_l2(found.numpy(), expected) < 1e-5


def test_far_positions_share_buckets() -> None:
    buckets = position_buckets(300, 32, 128)
    assert buckets[0, :4].tolist() == [0, 17, 18, 19]
    assert buckets[4, :5].tolist() == [4, 3, 2, 1, 0]
    assert buckets[0, 128:].unique().tolist() == [31]
    assert buckets[299, :172].unique().tolist() == [15]


def tokens_of(opened: EngineDir, text: str) -> list[int]:
    """Tokens by the library alone, and the one that ends a text."""
    from tokenizers import Tokenizer

    spec = opened.manifest.text
    assert spec is not None
    tokenizer = Tokenizer.from_str(bytes(opened.read(spec.tokenizer)).decode())
    tokenizer.no_padding()
    return [*(token for token in tokenizer.encode(text).ids if token != spec.eos), spec.eos]


def test_prompts_are_encoded_once_and_stand_for_labels(engine: Path, encoder: Path) -> None:
    opened, backend = EngineDir.open(engine), CountingOrt("tokens")
    with load_pipelines(opened, backend, ["none"], None, 1)[0] as pipe:
        runs = backend.runs
        given = pipe.encode(PROMPTS)
        assert runs == [4]  # three prompts and the empty one, in one launch
        again = pipe.generate(prompts=["A red three ", PROMPTS[1]], seed=3).latents
        assert runs == [4]
        np.testing.assert_array_equal(pipe.generate([0, 1], seed=3).latents, again)
        np.testing.assert_array_equal(
            pipe.generate([0, 1], prompt_embeds=given, seed=3).latents, again
        )
        other = pipe.generate(
            [0, 1], prompts=PROMPTS, negative_prompts=["the blue three"], seed=3
        ).latents
        assert relative_l2(other, again) > 1e-3
        with pytest.raises(
            UsageError, match="3 prompts and 2 negative prompts; give one, or one for each"
        ):
            pipe.generate(prompts=PROMPTS, negative_prompts=["a", "b"])
        for wrong in ({"prompts": "a three"}, {"prompts": ["a"], "negative_prompts": "b"}):
            with pytest.raises(
                UsageError, match="lists of texts, got one text; put it into a list"
            ):
                pipe.generate(**wrong)
        with pytest.raises(UsageError, match="half a surrogate pair"):
            pipe.generate(prompts=["a \ud83d three"])
        with pytest.raises(UsageError, match="0 prompts"):
            pipe.generate(prompts=[])
        tokens = tokens_of(opened, "a red three")
        state = {n: t.double().numpy() for n, t in load_file(encoder / "model.safetensors").items()}
        expected = encoded_by_hand(state, tokens, t5_config(CONFIG, ""))
        assert relative_l2(given.prompts.embeds[0, : len(expected)], expected) < 1e-5
        assert given.prompts.mask[0].sum() == len(expected)


def test_prompts_that_share_a_launch_are_encoded_as_alone(engine: Path) -> None:
    words = ["a", "the", "three", "seven", "red", "blue"]
    prompts = [f"{first} {second}" for first in words for second in words for _ in range(2)]
    opened, backend, single = EngineDir.open(engine), CountingOrt("tokens"), CountingOrt("tokens")
    with load_pipelines(opened, backend, ["none"], None, 1)[0] as pipe:
        found = pipe.encode(prompts)
    assert backend.runs == [4] * 9 + [1]  # 36 different prompts and the empty one, 4 at once
    manifest, units = opened.manifest, load_engines(opened, [], single, ["text_encoder"]).units
    assert manifest.text is not None
    tokenizers = {"text_encoder": bytes(opened.read(manifest.text.tokenizer))}
    one_by_one = TextEncoder(
        units, tokenizers, single, manifest.model, manifest.text_encoders, most=1
    )
    alone = one_by_one.prompt_embeds(prompts)
    assert single.runs == [1] * 37
    np.testing.assert_allclose(found.prompts.embeds, alone.prompts.embeds, atol=1e-6)
    np.testing.assert_array_equal(found.prompts.mask, alone.prompts.mask)


class WatchedOrt(CountingOrt):
    """ONNX Runtime with weak references to the text encoders that it loaded."""

    def __init__(self) -> None:
        super().__init__("tokens")
        self.loaded: list[weakref.ref[Any]] = []

    def load(self, *args: Any, **more: Any) -> Any:
        engine = super().load(*args, **more)
        if "tokens" in engine.dtypes:
            self.loaded.append(weakref.ref(engine))
        return engine


def test_offloaded_encoders_are_freed_and_loaded_again(
    engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, command: Command
) -> None:
    opened, backend = EngineDir.open(engine), WatchedOrt()
    with caplog.at_level(logging.INFO):
        pipes = load_pipelines(opened, backend, ["none"], None, 1, offload="text")
    assert "GB of text encoders while they encode, and for each of 1 sessions" in caplog.text
    with pipes[0] as pipe:
        assert not backend.loaded
        found = pipe.encode(PROMPTS).table
        gc.collect()
        assert [loaded() for loaded in backend.loaded] == [None]
        pipe.encode(PROMPTS[:1])  # which is remembered
        assert len(backend.loaded) == 1
        pipe.encode(["a seven"])
        assert len(backend.loaded) == 2
    with load_pipelines(opened, backend, ["none"], None, 1)[0] as pipe:
        np.testing.assert_array_equal(pipe.encode(PROMPTS).table.embeds, found.embeds)
        expected = pipe.generate(prompts=PROMPTS[:1], seed=3).latents
    out = tmp_path / "x.npy"
    words = ("--prompt", PROMPTS[0], "--plan", "none", "--seed", 3, "--offload", "text")
    command("goc-run", engine, *words, "--latents-output", out)
    np.testing.assert_array_equal(np.load(out), expected)


def test_more_prompts_than_are_remembered_are_encoded(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("goc_deploy.conditions.text.KEPT_PROMPTS", 2)
    backend = CountingOrt("tokens")
    with load_pipelines(EngineDir.open(engine), backend, ["none"], None, 1)[0] as pipe:
        assert len(pipe.encode(PROMPTS).prompts.embeds) == len(PROMPTS)
        pipe.encode(PROMPTS[-1:])  # which is remembered, and so is the empty one
        assert backend.runs == [4]
        pipe.encode(PROMPTS[:1])
        assert backend.runs == [4, 1]


def test_a_long_prompt_is_cut_and_the_log_says_what_is_left_out(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with goc_deploy.load(engine, plan="none") as pipe, caplog.at_level(logging.WARNING):
        long = pipe.encode(["a red blue red blue red blue red blue seven three the"])
        assert (
            "a prompt has 13 tokens, the model takes 11; left out: ' three the'"
            in caplog.text.replace("'three the'", "' three the'")
        )
        assert long.prompts.mask.all()
        short = pipe.encode(["a red blue red blue red blue red blue seven"])
        np.testing.assert_array_equal(long.prompts.embeds, short.prompts.embeds)


def test_the_command_line_draws_prompts(engine: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "x.npy"
    command(
        "goc-run",
        engine,
        "--prompt",
        PROMPTS[0],
        "--prompt",
        PROMPTS[1],
        "--latents-output",
        out,
        "--plan",
        "none",
    )
    prompted = np.load(out)
    command("goc-run", engine, "--labels", "0,1", "--latents-output", out, "--plan", "none")
    np.testing.assert_array_equal(np.load(out), prompted)
    more = ("--prompt", "a three", "--negative-prompt", "the blue seven", "--num-images", 3)
    command("goc-run", engine, *more, "--latents-output", out)
    assert np.load(out).shape == (3, 4, 8, 8)
    done = command("goc-run", engine, "--negative-prompt", "x", code=2)
    assert "--negative-prompt goes with --prompt" in done.stderr
    done = command("goc-run", engine, "--prompt", "a three " * 8, "--latents-output", out)
    assert "left out:" in done.stderr


def test_an_engine_without_a_text_encoder_says_so(golden_engine: Path) -> None:
    with goc_deploy.load(golden_engine) as pipe:
        for use in ({"prompts": ["a three"]}, {"prompt_embeds": pipe_captions()}):
            with pytest.raises(
                UsageError,
                match=r"no text encoder; export with `text_encoder`|not captions; give labels",
            ):
                pipe.generate(**use)


def pipe_captions() -> Any:
    from goc_deploy.conditions.captions import blank_captions

    return blank_captions(SPEC)


def test_a_missing_tokenizers_package_is_named(
    engine: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    from goc_deploy.errors import EnvironmentUnsupportedError

    found = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "tokenizers" else found(name, *more)

    monkeypatch.setattr("goc_deploy.api.requirements.find_spec", without)
    monkeypatch.setattr("goc_deploy.runtime.text_loading.find_spec", without)
    with goc_deploy.load(engine, plan="none") as pipe:
        assert np.isfinite(pipe.generate([0], seed=1).latents).all()
        with pytest.raises(EnvironmentUnsupportedError, match=r"pip install 'goc_deploy\[text\]'"):
            pipe.generate(prompts=["a"])
    with pytest.raises(EnvironmentUnsupportedError, match="this needs tokenizers"):
        goc_deploy.export(
            encoder.parent / "model.pth", tmp_path / "e", num_heads=3, text_encoder=encoder
        )


def _pipeline(folder: Path) -> Path:
    """The folder moved into a pipeline's, the tokenizer beside it."""
    top = folder.parent / "pipeline"
    top.mkdir()
    (top / "model_index.json").write_text("{}")
    (top / "tokenizer").mkdir()
    (folder / "spiece.model").rename(top / "tokenizer" / "spiece.model")
    folder.rename(top / "text_encoder")
    return top


def test_folders_and_names_that_libraries_write_are_read(tmp_path: Path) -> None:
    plain = read_text_encoder(save_encoder(tmp_path / "a"), SPEC)
    assert len(plain.checkpoint.sha256) == 64
    whole = read_text_encoder(_pipeline(save_encoder(tmp_path / "b")), SPEC)
    folder = save_encoder(tmp_path / "c")
    state = load_file(folder / "model.safetensors")
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(
        {**state, "decoder.final_layer_norm.weight": torch.ones(2)}, folder / "model.safetensors"
    )
    (folder / "tokenizer.json").write_bytes(plain.tokenizer)
    other = read_text_encoder(folder, SPEC)
    for found in (whole, other):
        assert found.tokenizer == plain.tokenizer
        assert found.checkpoint.tensors.keys() == plain.checkpoint.tensors.keys()
        assert all(
            torch.equal(found.checkpoint.tensors[n], t) for n, t in plain.checkpoint.tensors.items()
        )


def _lie(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _set(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], type[GocError], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        ModelError,
        "has no config.json; give the folder that transf",
    ),
    "another model": (_set(model_type="bert"), ModelError, "model_type is 'bert'"),
    "another function": (
        _set(feed_forward_proj="gated-silu"),
        ModelError,
        "feed_forward_proj 'gated-silu', only 't5' and 'umt5'",
    ),
    "no function": (_set(feed_forward_proj=[]), ModelError, r"\$\.feed_forward_proj: expected str"),
    "a device": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/dev/zero")),
        ModelError,
        "config.json cannot be read: it is not a regular file|has no config.json",
    ),
    "near positions": (
        _set(relative_attention_max_distance=2),
        ModelError,
        "relative_attention_max_distance must be more than a quarter",
    ),
    "another width": (
        _set(d_model=24),
        ModelError,
        "makes embeddings of width 24 but the model takes 20; give the one",
    ),
    "no tokens": (
        _set(eos_token_id=99),
        ModelError,
        "eos_token_id and pad_token_id must be tokens, got 99 and 0",
    ),
    "odd buckets": (_set(relative_attention_num_buckets=6), ModelError, "must be a multiple of 4"),
    "more layers": (_set(num_layers=3), ModelError, "missing: encoder.block.2"),
    "few words": (
        _set(vocab_size=20),
        ModelError,
        "has 36 tokens but the text encoder knows 20; they do not belong",
    ),
    "header lies": (_lie, ModelError, "not a sound safetensors file"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ModelError,
        "nor pytorch_model.bin",
    ),
    "code": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            torch.save({"a": print}, f / "pytorch_model.bin"),
        ),
        SafetyError,
        "asks to run code",
    ),
    "no tokenizer": (
        lambda f: (f / "spiece.model").unlink(),
        ModelError,
        "there is no tokenizer.json or spiece.model",
    ),
    "cut tokenizer": (
        lambda f: (f / "spiece.model").write_bytes(sentencepiece_model()[:-3]),
        ModelError,
        "not a sound SentencePiece model",
    ),
    "a piece without text": (
        lambda f: (f / "spiece.model").write_bytes(sentencepiece_model() + b"\x0a\x02\x08\x05"),
        ModelError,
        "not a sound SentencePiece model",
    ),
    "no end": (
        lambda f: (f / "spiece.model").write_bytes(sentencepiece_model().replace(b"</s>", b"</x>")),
        ModelError,
        "not a sound SentencePiece model with '</s>'",
    ),
    "no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ModelError,
        "tokenizer.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    change, error, message = DAMAGE[damage]
    folder = save_encoder(tmp_path / "t5")
    change(folder)
    with pytest.raises(error, match=message):
        read_text_encoder(folder, SPEC)


def test_a_class_model_takes_no_text_encoder(encoder: Path) -> None:
    with pytest.raises(ModelError, match="the model draws class labels; leave it out"):
        read_text_encoder(encoder, ModelSpec(1, 48, 3, 96, 2, 4, 4, 10, False))


def test_prompts_in_a_file_need_a_text_encoder(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "m.pth")
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(
        UsageError, match="holds texts, which need a text encoder; add `text_encoder`"
    ):
        goc_deploy.export(
            tmp_path / "m.pth", tmp_path / "e", num_heads=3, captions=tmp_path / "p.txt"
        )


def test_tokens_are_those_of_sentencepiece(tmp_path: Path) -> None:
    """A trained model with its character map, read by both libraries."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="sentencepiece comes with the judges extra"
    )
    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    (tmp_path / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    content = (tmp_path / "m.model").read_bytes()
    judge = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = tokenizers.Tokenizer.from_str(json_from_sentencepiece(content, "m").decode())
    for line in [
        "a Diffusion  Transformer",
        "\ufb01ne caf\u00e9 \u2460",
        "",
        *text.splitlines()[:80],
    ]:
        assert ours.encode(line.strip()).ids == [*judge.encode(line.strip()), 1], line


@pytest.mark.filterwarnings("ignore")  # of transformers and diffusers about themselves
@pytest.mark.parametrize(
    ("kind", "name"), [("gated-gelu", "T5"), ("relu", "T5"), ("gated-gelu", "UMT5")]
)
def test_embeddings_are_those_of_transformers(tmp_path: Path, kind: str, name: str) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers comes with the judges extra"
    )
    torch.manual_seed(1)
    config = {**CONFIG, "feed_forward_proj": kind, "model_type": name.lower()}
    config_class = getattr(transformers, f"{name}Config")
    judge = getattr(transformers, f"{name}EncoderModel")(config_class(**config)).eval()
    for parameter in judge.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    judge.save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(sentencepiece_model())
    found = read_text_encoder(tmp_path / "t5", SPEC)
    module = T5Encoder(found.config, 11)
    module.load_state_dict(found.checkpoint.tensors)
    tokens = torch.randint(3, 36, (2, 11))
    mask = (torch.arange(11) < torch.tensor([[4], [11]])).float()
    with torch.inference_mode():
        expected = judge(tokens, attention_mask=mask).last_hidden_state
        embeds = module(tokens, mask)
    if name == "UMT5":  # whose padding Wan's pipeline sets to zero
        assert not embeds[0, 4:].any()
        expected = expected * mask[..., None]
    assert relative_l2(embeds.numpy(), expected.numpy()) < 1e-5
