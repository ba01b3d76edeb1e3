"""What PyTorch makes of the backbone for other programs gives the eager output."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resnext_det import ResNeXt

STAGES = ["res2", "res3", "res4", "res5"]
BACKENDS = ["aot_eager"]
if shutil.which("c++") or shutil.which("g++"):
    BACKENDS.append("inductor")  # writes C++


@pytest.fixture(params=["grouped", "concatenated", "aggregated"])
def backbone(request: pytest.FixtureRequest) -> ResNeXt:
    torch.manual_seed(1)
    sizes = {"stem_out_channels": 16, "res2_out_channels": 32}
    network = ResNeXt(26, "4x4d", form=request.param, out_features=STAGES, **sizes)
    for module in network.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.2)
    return network.eval()


@torch.no_grad()
def assert_same(
    eager: ResNeXt, other: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, ...]
) -> None:
    """Compare on an image that neither has seen."""
    image = torch.randn(shape)
    expected, got = eager(image), other(image)
    assert list(got) == list(expected) == STAGES
    for name, truth in expected.items():
        torch.testing.assert_close(got[name], truth, rtol=1e-5, atol=1e-5, msg=name)


def test_trace(backbone: ResNeXt) -> None:
    """A trace takes other sizes as well, and survives a file."""
    with torch.no_grad():
        traced = torch.jit.trace(backbone, torch.randn(1, 3, 64, 96), strict=False)
    assert_same(backbone, traced, (1, 3, 64, 96))
    assert_same(backbone, traced, (2, 3, 96, 128))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_same(backbone, torch.jit.load(buffer), (1, 3, 64, 64))


def test_export(backbone: ResNeXt) -> None:
    exported = torch.export.export(backbone, (torch.randn(1, 3, 64, 96),))
    assert_same(backbone, exported.module(), (1, 3, 64, 96))


def test_export_with_sizes_left_open() -> None:
    """Batch, and height and width as multiples of 32, as a detector pads them."""
    network = ResNeXt(26, "4x4d", out_features=STAGES, res2_out_channels=32).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    height = 32 * torch.export.Dim("height", min=2, max=50)
    width = 32 * torch.export.Dim("width", min=2, max=50)
    exported = torch.export.export(
        network,
        (torch.randn(2, 3, 96, 128),),
        dynamic_shapes=({0: batch, 2: height, 3: width},),
    )
    assert_same(network, exported.module(), (3, 3, 64, 160))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str) -> None:
    """In one graph, without a break."""
    torch.manual_seed(2)
    network = ResNeXt(26, "4x4d", out_features=STAGES, res2_out_channels=32).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    assert_same(network, compiled, (1, 3, 64, 96))


@pytest.mark.parametrize("form", ["concatenated", "aggregated"])
def test_compile_of_the_other_forms(form: str) -> None:
    torch.manual_seed(3)
    network = ResNeXt(26, "2x4d", form=form, out_features=STAGES, res2_out_channels=32).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_same(network, compiled, (1, 3, 64, 96))


@pytest.mark.parametrize("checkpoint_stages", [[], STAGES], ids=["plain", "checkpointed"])
def test_a_compiled_backbone_trains(checkpoint_stages: list[str]) -> None:
    torch.manual_seed(4)
    network = ResNeXt(
        26, "4x4d", norm="BN", res2_out_channels=32, checkpoint_stages=checkpoint_stages
    ).train()
    image = torch.randn(2, 3, 64, 64)
    network(image)["res5"].square().mean().backward()
    expected = {name: each.grad.clone() for name, each in network.named_parameters()}
    network.zero_grad()
    torch._dynamo.reset()
    # A checkpointed stage is left out of the graph.
    fullgraph = not checkpoint_stages
    compiled = torch.compile(network, fullgraph=fullgraph, backend="aot_eager")
    compiled(image)["res5"].square().mean().backward()
    for name, each in network.named_parameters():
        scale = expected[name].abs().max()
        assert float((each.grad - expected[name]).abs().max() / scale) < 1e-4, name
