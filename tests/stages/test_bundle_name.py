"""What a bundle is called: after the checkpoint, however that is named."""

import pytest

from stages.bundle import Bundle


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("my model", "my model"),
        ("examples/tiny-qwen", "tiny-qwen"),
        ("/models/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("/hub/models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef", "Qwen3-0.6B"),
        ("hf://Qwen/Qwen3-0.6B@c0ffee", "Qwen3-0.6B"),
        ("https://host/models/qwen3.gguf#sha256=abc", "qwen3.gguf"),
        ("/", "model"),
    ],
)
def test_a_path_is_reduced_to_a_name(given: str, name: str) -> None:
    stage = Bundle()
    assert stage.resolve(stage.Params(target="llvm", name=given)).name == name
