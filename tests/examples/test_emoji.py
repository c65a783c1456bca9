"""The emoji example: its captions, its training and its score.

Captions and pictures fit each other, training goes on where it stopped, and the score works.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
TINY = ("--batch", "3", "--depth", "1", "--threads", "1", "--text-steps", "2")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the example as Python does that runs it; nothing of it stays imported."""
    monkeypatch.setattr(sys, "path", [str(EMOJI), *sys.path])
    before = set(sys.modules)

    def imported(name: str) -> ModuleType:
        return __import__(name)

    yield imported
    for name in set(sys.modules) - before:
        if str(EMOJI.parent) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def run(name: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script of the example."""
    line = [sys.executable, str(EMOJI / name), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_held_out_caption_has_words_that_training_knows_and_was_not_trained(script: Any) -> None:
    captions = script("captions")
    entries = captions.read_captions()
    words = set(captions.vocabulary(entries))
    trained = {captions.normalised(text) for entry in entries.values() for text in entry.train}
    for name, entry in entries.items():
        held_out = captions.normalised(entry.held_out)
        assert set(held_out.split()) <= words, name
        assert held_out not in trained, name


def test_a_caption_names_one_emoji(script: Any) -> None:
    captions = script("captions")
    entries = captions.read_captions().values()
    assert all(3 <= len(entry.train) <= 4 for entry in entries)
    counts = Counter(
        captions.normalised(text) for entry in entries for text in (*entry.train, entry.held_out)
    )
    assert max(counts.values()) == 1, counts.most_common(3)


def test_calibration_uses_training_captions_only(script: Any) -> None:
    captions = script("captions")
    trained = {text for entry in captions.read_captions().values() for text in entry.train}
    prompts = (EMOJI / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert set(prompts) <= trained
    assert len(prompts) >= 32


def test_the_tokenizer_normalises_as_the_vocabulary_does(script: Any) -> None:
    captions = script("captions")
    entries = captions.read_captions()
    tokenizer = captions.tokenizer_of_words(captions.vocabulary(entries))
    for text in (
        "Two red CHERRIES!",
        "a four-leaf clover",
        "dogs",
        *(entry.held_out for entry in entries.values()),
    ):
        assert tokenizer.normalizer.normalize_str(text) == captions.normalised(text)
        assert captions.UNKNOWN not in tokenizer.encode(text).ids, text
    assert tokenizer.encode("a fluffy dog").ids.count(captions.UNKNOWN) == 1


def test_no_training_prompt_is_cut(script: Any) -> None:
    captions = script("captions")
    entries = captions.read_captions()
    tokenizer = captions.tokenizer_of_words(captions.vocabulary(entries))
    longest = max(
        (text for entry in entries.values() for text in entry.train),
        key=lambda text: len(text.split()),
    )
    prompts = [template.format(f"little {longest}") for template in captions.TEMPLATES]
    assert max(len(tokenizer.encode(prompt).ids) for prompt in prompts) <= captions.TOKENS


def test_a_mixed_prompt_is_never_the_held_out_caption(script: Any) -> None:
    captions = script("captions")
    entries = list(captions.read_captions().values())
    shared = captions.shared_words(entries)
    assert "green" in shared
    assert "fox" not in shared
    draw = random.Random(0)
    entry = captions.Captions(("puppy", "dog"), "puppy dog")
    prompts = {captions.mixed_prompt(entry, shared, draw) for _ in range(2000)}
    assert "dog puppy" in prompts
    assert any("green" in prompt for prompt in prompts)
    assert "puppy dog" not in prompts


def test_attention_is_that_of_pytorch(script: Any) -> None:
    script("model")  # makes what both examples train with importable
    attention = script("prompted").attention
    queries, keys, values = torch.randn(3, 2, 4, 5, 8).unbind(0)
    kept = torch.rand(2, 1, 1, 5) < 0.7
    kept[..., 0] = True
    for mask in (None, kept):
        torch.testing.assert_close(
            attention(queries, keys, values, mask),
            torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask),
        )


def test_pictures_are_those_of_the_captions_and_the_score_tells_them_apart_under_noise(
    script: Any,
) -> None:
    evaluate, captions = script("evaluate"), script("captions")
    with np.load(EMOJI / "pictures.npz") as arrays:
        images, names = arrays["images"], arrays["names"].tolist()
    assert images.shape == (len(names), 48, 48, 3)
    assert names == list(captions.read_captions())
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert (evaluate.nearest(noisy, images) == np.arange(len(names))).all()


def test_held_out_pairs_are_fixed_and_of_different_emoji(script: Any) -> None:
    evaluate = script("evaluate")
    pairs = evaluate.held_out_pairs(300)
    assert pairs == evaluate.held_out_pairs(300)
    assert len({row for row, _ in pairs}) == 300


def test_an_icon_of_the_package_is_rendered_on_white(script: Any, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="only rendering needs resvg-py")
    render = script("render_pictures")
    body = '<path fill="#ff0000" d="M0 0h16v32H0z"/>'
    content = json.dumps({"width": 32, "height": 32, "icons": {"half": {"body": body}}}).encode()
    package = tmp_path / "icons.tgz"
    with tarfile.open(package, "w:gz") as archive:
        member = tarfile.TarInfo(render.ICONS)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    picture = render.rendered(render.svg(render.read_icons(package), "half"), 48)
    assert (picture[:, :24] == (255, 0, 0)).all()
    assert (picture[:, 24:] == 255).all()


def test_training_in_two_sessions_gives_the_weights_of_one(script: Any, tmp_path: Path) -> None:
    train = script("train")
    entries = train.read_captions()
    pictures = train.load_pictures(EMOJI / "pictures.npz", list(entries))

    def session(folder: str, steps: int) -> Any:
        args = train.parse([*TINY, "--resume", "--folder", str(tmp_path / folder)])
        args.folder.mkdir(exist_ok=True)
        training = train.Training(args, list(entries.values()), pictures)
        if (args.folder / script("resumable").CHECKPOINT).exists():
            training.restore()
        for _ in range(steps):
            training.take_step(1.0)
        training.save()
        return training

    # Blocks get no gradient before the last layer, which starts at zero, has moved: two steps fill
    # no momentum.
    whole, _, second = session("one", 6), session("two", 4), session("two", 2)
    assert second.step == 6
    assert all(momentum.any() for momentum in whole.optimizer.momenta)
    for expected, found in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for expected, found in zip(
        whole.average.parameters(), second.average.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_text_encoder_is_trained_first_and_then_left(script: Any, tmp_path: Path) -> None:
    train = script("train")
    entries = list(train.read_captions().values())
    pictures = torch.rand(len(entries), 3, 48, 48)
    args = train.parse([*TINY, "--folder", str(tmp_path)])
    training = train.Training(args, entries, pictures)
    untrained = training.model.text_encoder.shared.weight.clone()
    training.train_text()
    trained = training.model.text_encoder.shared.weight.clone()
    assert not torch.equal(trained, untrained)
    for _ in range(3):
        training.take_step(1.0)
    assert torch.equal(training.model.text_encoder.shared.weight, trained)
    assert torch.equal(training.average.text_encoder.shared.weight, trained)


def test_principal_components_keep_what_differs(script: Any) -> None:
    script("model")
    components = script("text_training").principal_components
    pictures = torch.randn(5, 3, 4, 4)
    found = components(pictures, 8)
    assert found.shape == (5, 8)
    apart, kept = torch.cdist(pictures.flatten(1), pictures.flatten(1)), torch.cdist(found, found)
    scale = apart[0, 1] / kept[0, 1]
    torch.testing.assert_close(kept * scale, apart, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_other_captions_is_refused(script: Any, tmp_path: Path) -> None:
    train = script("train")
    entries = list(train.read_captions().values())
    pictures = torch.zeros(len(entries), 3, 48, 48)
    args = train.parse([*TINY, "--folder", str(tmp_path)])
    train.Training(args, entries, pictures).save()
    with pytest.raises(ValueError, match="trained with other captions"):
        train.Training(args, entries[::-1], pictures).restore()


def test_the_shipped_weights_draw_what_prompts_name(script: Any, tmp_path: Path) -> None:
    evaluate, engine = script("evaluate"), tmp_path / "engine"
    goc_deploy.export(
        EMOJI / evaluate.CHECKPOINT,
        engine,
        text_encoder=EMOJI / evaluate.TEXT_ENCODER,
        plans=["none"],
        sampler="dpm++",
        prediction="x0",
        num_heads=6,
        steps=10,
    )
    with np.load(EMOJI / "pictures.npz") as arrays:
        images, names = arrays["images"], arrays["names"]
    prompts = {"a cute fox": "fox", "grizzly bear": "bear", "antarctic penguin": "penguin"}
    with goc_deploy.load(engine) as pipe:
        drawn = pipe.generate(prompts=list(prompts), seed=0, cfg_scale=evaluate.CFG_SCALE).images
    assert names[evaluate.nearest(drawn, images)].tolist() == list(prompts.values())


@pytest.mark.slow
def test_what_training_writes_is_exported_drawn_and_scored(tmp_path: Path) -> None:
    folder, out = tmp_path / "training", tmp_path / "out"
    run("train.py", "--folder", folder, "--steps", 2, *TINY)
    assert "--resume" in run("train.py", "--folder", folder, "--steps", 2, *TINY, code=2).stderr
    words = ("--pipeline", folder / "pipeline", "--out", out, "--pairs", 3, "--steps", 4)
    assert "none: 0.0% of 3 pairs" in run("evaluate.py", *words, code=1).stdout
    assert "fora:2+goc: " in run("evaluate.py", *words, "--minimum", 0).stdout
    assert len((out / "none.txt").read_text(encoding="utf-8").split(" | ")) == 3
    assert (out / "none.png").stat().st_size > 0
    assert (out / "fora-2-goc.png").stat().st_size > 0
