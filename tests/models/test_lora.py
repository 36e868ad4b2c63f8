"""Low-rank adaptation: updates are zero at first, they alone are trained, and merged models compute the same."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline import load_model
from pipeline.config.model import ARConfig, LoraConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import ByteTokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.export import export_model
from pipeline.models import model_folder
from pipeline.models.adapters.folder import Base, hash_of
from pipeline.models.adapters.lora import DOWN, UP, adapt, merged
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import ADAPTER, CONFIG, Background, DataFacts
from pipeline.sampling.sampler import SamplingRequest, sample
from pipeline.trained import placed
from tests.support.small_models import AR, CAUSAL, MDLM, PGM, random_rows, randomised

L, V = 16, 11
LORA = LoraConfig(rank=3, alpha=6.0)
POOLED = PGM.model_copy(
    update={"swap": PGM.swap.model_copy(update={"pooling": "mean", "query": "mlp4"}), "classes": 3}
)
KINDS = {"pgm": PGM, "causal": CAUSAL, "pooled": POOLED, "mdlm": MDLM, "ar": AR}


def adapted(config: PGMConfig | MDLMConfig | ARConfig, lora: LoraConfig = LORA) -> tuple[Denoiser, Denoiser]:
    """A model, and the same one with updates that are not zero."""
    base, model = randomised(config, V, L), randomised(config, V, L)
    adapt(model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in factors_of(model).items():
            if name.endswith(UP):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return base, model


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def logits(model: Denoiser) -> Tensor:
    """Of both groups, or of the next tokens."""
    tokens, groups = random_rows(3, L, V)
    if model.left_to_right:
        state = model.open(3, None)
        model.extend(state, tokens[:, :8].flatten(), torch.arange(8).repeat(3), [8] * 3)
        return model.head(model.hidden(state, torch.tensor([8] * 3), [1] * 3))
    order = torch.arange(L).expand(3, -1) if model.causal else None
    return model.logits(tokens, groups, None, order)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_equals_unmerged(kind: str) -> None:
    """Logits, and whole samples with their caches and folded weights."""
    base, model = adapted(KINDS[kind])
    plain = randomised(KINDS[kind], V, L)
    frozen = {name: value for name, value in model.state_dict().items() if name in base.state_dict()}
    plain.load_state_dict(merged(frozen, factors_of(model), LORA))
    assert (logits(model) - logits(plain)).abs().max() < 1e-5
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    order = "left_to_right" if kind == "ar" else "uniform"
    condition = torch.tensor([0, 1, 2]) if KINDS[kind].classes else None
    request = SamplingRequest(3, L if kind == "ar" else 5, order=order, condition=condition)
    assert torch.equal(sample(model, request), sample(plain, request))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_update_changes_nothing_and_alone_is_trained(kind: str) -> None:
    base, model = randomised(KINDS[kind], V, L), randomised(KINDS[kind], V, L)
    adapt(model, LORA)
    assert torch.equal(logits(model), logits(base))
    logits(model).square().sum().backward()
    state = base.state_dict()
    for name, value in model.named_parameters():
        last = name.rpartition(".")[2]
        assert value.requires_grad == (last in (UP, DOWN))
        assert (value.grad is not None) == (last in (UP, DOWN)), name
        if not value.requires_grad:
            assert torch.equal(value, state[name])
    ups = [value.grad for name, value in factors_of(model).items() if name.endswith(UP)]
    assert all(grad is not None and grad.abs().max() > 0 for grad in ups)


def test_gradients_are_those_of_the_product() -> None:
    """In float64, against a map whose update is applied to its input."""
    torch.manual_seed(0)
    owner = nn.ModuleDict({"out": nn.Linear(6, 5)}).double()
    x, weight = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    adapt(owner, LORA)
    layer = owner["out"]
    layer.get_parameter(UP).data.normal_()
    down, up = (layer.get_parameter(name).detach().clone().requires_grad_() for name in (DOWN, UP))
    (layer(x) * weight).sum().backward()
    original = owner.state_dict()["out.weight"]
    result = x @ original.T + 2.0 * (x @ down.T) @ up.T + owner.state_dict()["out.bias"]
    (result * weight).sum().backward()
    assert torch.allclose(layer(x), result, atol=1e-12)
    for name, value in ((DOWN, down), (UP, up)):
        grad = layer.get_parameter(name).grad
        assert grad is not None
        assert value.grad is not None
        assert torch.allclose(grad, value.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("targets", "maps"),
    [
        (("attention",), {"qkv_proj", "q_proj", "kv_proj", "out", "query"}),
        (("mlp",), {"up", "down"}),
        (("attention", "mlp"), {"qkv_proj", "q_proj", "kv_proj", "out", "query", "up", "down"}),
    ],
)
def test_targets(targets: tuple[str, ...], maps: set[str]) -> None:
    model = randomised(PGM, V, L)
    adapt(model, LoraConfig(rank=2, targets=targets))
    factors = factors_of(model)
    assert {name.split(".")[-2] for name in factors} == maps
    shapes = {name: value.shape for name, value in randomised(PGM, V, L).named_parameters()}
    expected = {name for name in shapes if name.endswith(".weight") and name.split(".")[-2] in maps}
    assert {name.removesuffix(UP) + "weight" for name in factors if name.endswith(UP)} == expected
    assert sum(value.numel() for value in factors.values()) == sum(2 * sum(shapes[name]) for name in expected)


def written(folder: Path, config: ModelConfig = PGM) -> tuple[Path, Path, Denoiser]:
    """A model folder, the folder of an adapter of it, and the model with the adapter."""
    config = config.model_copy(update={"lora": LORA})
    torch.manual_seed(0)
    base, model = randomised(config, 257, L), randomised(config, 257, L)
    adapt(model, LORA)
    with torch.no_grad():
        for value in factors_of(model).values():
            value.add_(0.1 * torch.randn(value.shape))
    facts = DataFacts(257, L, 256, 256)
    model_folder.write(folder / "base", config.merged, facts, base.state_dict(), Background())
    about = Base(str(folder / "base"), hash_of(base.state_dict()))
    factors = {name: value.detach() for name, value in factors_of(model).items()}
    model_folder.write(folder / "adapter", config, facts, factors, Background({"step": 3}), asdict(about))
    for name in ("base", "adapter"):
        ByteTokenizer().save(folder / name)
    return folder / "base", folder / "adapter", model


def test_an_adapter_folder_is_a_model(tmp_path: Path) -> None:
    base, folder, model = written(tmp_path)
    assert {file.name for file in folder.iterdir()} == {ADAPTER, CONFIG, "tokenizer_info.json"}
    assert (folder / ADAPTER).stat().st_size < (base / "model.safetensors").stat().st_size / 2
    loaded = load_model(folder)
    assert loaded.config == PGM
    tokens, groups = random_rows(2, L, 256)
    with torch.no_grad():
        assert (loaded.logits(tokens, groups) - model.logits(tokens, groups)).abs().max() < 1e-5
    assert len(loaded.sample_text(2, steps=4)) == 2
    # Merged on export, and for jobs, which read model folders.
    export_model(folder, str(tmp_path / "merged"))
    place = placed(str(folder), "", str(tmp_path / "imported"), "sampling.model")
    for whole in (tmp_path / "merged", Path(place)):
        state = load_model(whole).denoiser.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.denoiser.state_dict().items())
    assert model_folder.read_background(tmp_path / "merged").figures["step"] == 3
    assert placed(str(folder), "", str(tmp_path / "imported"), "sampling.model") == place


def test_a_base_that_moved_or_changed(tmp_path: Path) -> None:
    base, folder, _ = written(tmp_path)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"base of the adapter .*adapter: .*base': no such folder"):
        load_model(folder)
    moved = load_model(folder, overrides=[f"base={tmp_path / 'elsewhere'}"])
    assert moved.config == PGM
    other = randomised(PGM, 257, L, seed=5).state_dict()
    model_folder.write(base, PGM, DataFacts(257, L, 256, 256), other, Background())
    with pytest.raises(CheckpointError, match="has other weights than the adapter was trained with"):
        load_model(folder)
    with pytest.raises(ConfigError, match=r"override 'length=3': .*expected base=MODEL"):
        load_model(folder, overrides=["length=3"])
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("hash:", "hsh:"))
    with pytest.raises(CheckpointError, match=r"is damaged: base: .*expected its name and hash"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "model.lora: without train.init_from; expected the model that is adapted there"),
        (
            {"distill": {"teacher": "a"}, "train": {"init_from": "a"}},
            "model.lora: together with distill; expected null, since a student trains all weights",
        ),
    ],
)
def test_conflicts(changes: dict[str, object], says: str) -> None:
    tree = {"name": "x", "model": {"kind": "pgm", "lora": {"rank": 4}}, **changes}
    assert says in RunConfig.model_validate(tree).conflicts()


@pytest.mark.parametrize(("lora", "says"), [({"rank": 65}, "lora.rank 65; expected at most hidden, 64")])
def test_rank_beyond_the_width(lora: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PGMConfig(hidden=64, heads=4, lora=lora)  # type: ignore[arg-type]
