"""Released models of the families around PGM: autoregressive ones, and students of SDTT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.api import load_model
from pipeline.config.model import ARConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import CapabilityError, CheckpointError, ConfigError
from pipeline.metrics.continuations import score_continuations
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.released.conversion import translate
from pipeline.sampling.logits import Filters

DATA = Path(__file__).parents[2] / "data"
V, L, H, N, BLOCKS = 13, 12, 32, 4, 2
BOS = V - 1
SECTION = ARConfig(kind="ar", start="bos", hidden=H, heads=N, blocks=BLOCKS, dropout=0)


def ar_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the names of kuleshov-group/mdlm's AR: V ids and a mask, no time map, no adaLN."""
    shapes = {"vocab_embed.embedding": (V + 1, H), "output_layer.norm_final.weight": (H,)}
    shapes |= {"output_layer.linear.weight": (V + 1, H), "output_layer.linear.bias": (V + 1,)}
    for i in range(BLOCKS):
        block = {"norm1.weight": (H,), "norm2.weight": (H,), "attn_qkv.weight": (3 * H, H)}
        block |= {"attn_out.weight": (H, H), "mlp.0.weight": (4 * H, H), "mlp.0.bias": (4 * H,)}
        block |= {"mlp.2.weight": (H, 4 * H), "mlp.2.bias": (H,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    dim = H // N
    weights["rotary_emb.inv_freq"] = 10_000 ** -(torch.arange(0, dim, 2) / dim)
    return {f"backbone.{name}": value for name, value in weights.items()}


def plain_ar(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of what follows every token: the published model, written down densely in float64."""
    w = {name.removeprefix("backbone."): value.double() for name, value in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (H,)) * w[f"{name}.weight"]

    angles = torch.arange(tokens.shape[1])[:, None] * w["rotary_emb.inv_freq"]
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:  # the halves of a head are the two coordinates
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    x = w["vocab_embed.embedding"][tokens]
    for i in range(BLOCKS):
        qkv = norm(x, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn_qkv.weight"].T
        q, k, v = (part.unflatten(-1, (N, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ w[f"blocks.{i}.attn_out.weight"].T
        up = F.linear(
            norm(x, f"blocks.{i}.norm2"), w[f"blocks.{i}.mlp.0.weight"], w[f"blocks.{i}.mlp.0.bias"]
        )
        up = F.gelu(up, approximate="tanh")
        x = x + F.linear(up, w[f"blocks.{i}.mlp.2.weight"], w[f"blocks.{i}.mlp.2.bias"])
    x = norm(x, "output_layer.norm_final")
    return F.linear(x, w["output_layer.linear.weight"], w["output_layer.linear.bias"])[..., :V]


@pytest.fixture
def ar_file(tmp_path: Path) -> Path:
    """A checkpoint of the trainer, with averages that its plain weights are not."""
    weights = ar_weights()
    shadow = [value for name, value in weights.items() if "rotary" not in name]
    stale = {name: value if "rotary" in name else value + 1 for name, value in weights.items()}
    config = {"model": {"length": L, "causal": True, "n_heads": N}, "backbone": "ar"}
    content = {"state_dict": stale, "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": shadow}}
    torch.save(content | {"hyper_parameters": {"config": config}}, tmp_path / "ar.ckpt")
    return tmp_path / "ar.ckpt"


def test_a_released_ar_model_is_exact(ar_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its next-token logits, its likelihood and its greedy samples are those of the published model."""
    model = load_model(ar_file)
    assert "does not say bos: 12 is assumed" in caplog.text
    assert (model.bos, model.denoiser.length, model.denoiser.vocab_size) == (BOS, L, V)
    model.denoiser.double()
    tokens = torch.randint(V, (3, L), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BOS
    expected = plain_ar(ar_weights(), tokens)
    known = torch.arange(L).expand(3, L)
    for length in (1, 5, L - 1):
        lengths = torch.full((3,), length)
        logits = model.predict(tokens[:, :length], known[:, :length], lengths, torch.full((3, 1), length))
        torch.testing.assert_close(
            logits[:, 0], expected[:, length - 1].float(), atol=1e-5, rtol=0, check_dtype=False
        )
    pairs = [(tokens[i, 1:5].tolist(), tokens[i, 5:].tolist()) for i in range(3)]
    scores = score_continuations(model.denoiser, pairs, draws=1, seed=0, bos=BOS)
    nats = -expected.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[:, 4:, 0].sum(1)
    torch.testing.assert_close(
        torch.tensor([score.nats for score in scores]).double(), nats, atol=1e-4, rtol=0
    )
    row = torch.tensor([[BOS]])
    for _ in range(L - 1):
        row = torch.cat([row, plain_ar(ar_weights(), row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.sample(1, filters=Filters(top_k=1)), row)


def test_the_first_position_is_bos(ar_file: Path) -> None:
    model = load_model(ar_file)
    none = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(CapabilityError, match="position 0 of row 0: it holds BOS"):
        model.predict(none, none, torch.tensor([0]), torch.tensor([[0]]))
    with pytest.raises(ConfigError, match=r"model\.start: 'bos' for rows without BOS"):
        build(SECTION, V, L)


def test_a_config_needs_rows_with_bos() -> None:
    tree: dict[str, Any] = {"name": "x", "model": {"kind": "ar", "start": "bos"}}
    tree["sampling"] = {"order": "left_to_right", "steps": 1024}
    says = "model.start: 'bos' for rows without BOS; expected learned, or data.wrap bos_eos"
    assert says in RunConfig.model_validate(tree).conflicts()
    tree["data"], tree["sampling"]["steps"] = {"wrap": "bos_eos"}, 1023
    assert RunConfig.model_validate(tree).conflicts() == []


def test_the_training_form_is_exact_too() -> None:
    weights, tokens = ar_weights(), torch.randint(V, (2, L), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    model = build(SECTION, V, L, BOS).double().eval()
    model.load_state_dict({name: value.double() for name, value in translate(weights, "ar").items()})
    targets = torch.arange(L).expand(2, L) > 0
    loss = model(Batch(tokens, targets, targets, torch.ones(2, L)))
    nats = -plain_ar(weights, tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss.double(), nats.sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lost", ["blocks.1.mlp.0.bias", "output_layer.norm_final.weight"])
def test_what_an_ar_file_lacks_is_named(tmp_path: Path, lost: str) -> None:
    weights = ar_weights()
    del weights[f"backbone.{lost}"]
    save_file(weights, tmp_path / "ar.safetensors")
    with pytest.raises(CheckpointError, match=f"missing {lost}"):
        load_model(tmp_path / "ar.safetensors")


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone."])
def test_students_of_sdtt(tmp_path: Path, prefix: str) -> None:
    """Files as jdeschena/sdtt uploads them; names of students of the hub's MDLM have two prefixes."""
    with safe_open(DATA / "mdlm.safetensors", "pt") as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    weights = {
        name.removeprefix("weights.backbone."): value
        for name, value in recorded.items()
        if name.startswith("weights.")
    }
    config = {
        "mode": "train",
        "model": {
            "name": "small",
            "type": "ddit-orig",
            "hidden_size": H,
            "n_heads": N,
            "length": 16,
            "dropout": 0.1,
        },
        "tokenizer": {"name": "bytes-of-a-test"},
        "data_preprocess": {"seq_len": 16, "legacy_start_end_bos": True},
        "parameterization": {"name": "multi-round-sdtt", "num_distill_steps": 2, "start_from_hf": True},
        "time_conditioning": False,
    }
    if prefix == "backbone.":
        del config["model"]["length"]  # type: ignore[attr-defined]
    save_file(
        {prefix + name: value.clone() for name, value in weights.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = load_model(path)
        assert model.denoiser.length == 16
        model.denoiser.double()
        vocabulary = recorded["logits"].shape[-1] - 1
        masked = recorded["tokens"] == vocabulary
        logits = model.logits(recorded["tokens"].masked_fill(masked, 0), masked)[masked]
        expected = recorded["logits"][masked][:, :vocabulary]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0, check_dtype=False)
