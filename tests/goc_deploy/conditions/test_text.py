from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from goc_deploy.api import cpu_backend
from goc_deploy.conditions.text import TextEncoder, cleaned
from goc_deploy.errors import EngineDirError
from goc_deploy.exporters.companions.tokenizer_files import json_from_sentencepiece
from goc_deploy.spec import TextSpec
from tests.pixart_reference import SPEC
from tests.stand_ins.silent import SilentEngine
from tests.t5_folder import sentencepiece_model


def encode(content: bytes) -> None:
    text = TextSpec("tokenizer.json", 48, 1, 0)
    backend = cpu_backend()
    engines, contents = {"text_encoder": SilentEngine(backend)}, {"text_encoder": content}
    encoder = TextEncoder(engines, contents, backend, SPEC, {"text_encoder": text}, 2)  # type: ignore[arg-type]
    encoder.prompt_embeds(["a \u00e9"])


def misnamed(tokenizer: dict[str, Any]) -> None:
    """The library panics on the text that it encodes first, which is no ``Exception`` of Python."""
    tokenizer["post_processor"]["single"][1]["SpecialToken"]["id"] = "x"


def without_unknown(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["unk_id"] = None


@pytest.mark.parametrize("damage", [misnamed, without_unknown, dict.clear])
def test_a_damaged_tokenizer_is_a_damaged_engine(damage: Callable[[Any], None]) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")
    tokenizer = json.loads(json_from_sentencepiece(sentencepiece_model(), ""))
    encode(json.dumps(tokenizer).encode())
    damage(tokenizer)
    with pytest.raises(EngineDirError, match="the tokenizer cannot be used"):
        encode(json.dumps(tokenizer).encode())


def test_prompts_of_umt5_keep_their_case_and_lose_extra_space() -> None:
    assert cleaned("  A&amp;amp;B \n Cat ", lower_case=False) == "A&B Cat"
    assert cleaned(" A&amp;B Cat ", lower_case=True) == "a&amp;b cat"
