"""Activation checkpointing: the same gradients and statistics in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor, nn

from resnext_det import ResNeXt
from resnext_det.modeling.activation_checkpointing import CheckpointedRPNHead, CheckpointedStage
from resnext_det.modeling.resnext import STAGES


def network(checkpoint_stages: tuple[str, ...], **arguments: Any) -> ResNeXt:
    torch.manual_seed(1)
    defaults = {"stem_out_channels": 32, "res2_out_channels": 64, "norm": "BN"}
    return ResNeXt(
        26,
        "32x1d" if arguments.get("form", "grouped") == "grouped" else "4x8d",
        out_features=STAGES,
        checkpoint_stages=checkpoint_stages,
        **{**defaults, **arguments},
    ).train()


def step(model: ResNeXt, image: Tensor) -> dict[str, Tensor]:
    """Return outputs, gradients of two backward passes, and what training leaves in the buffers."""
    image = image.clone().requires_grad_()
    features = model(image)
    loss = sum(feature.square().mean() for feature in features.values())
    loss.backward(retain_graph=True)
    loss.backward()
    return {
        **{f"out {name}": feature.detach() for name, feature in features.items()},
        **{f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        **{f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()},
        "pixels": image.grad,
    }


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


@pytest.mark.parametrize(
    ("norm", "form"),
    [
        *[(norm, "grouped") for norm in ("BN", "SyncBN", "naiveSyncBN", "GN", "FrozenBN")],
        *[("BN", form) for form in ("concatenated", "aggregated")],
        (instance_norm, "grouped"),
    ],
)
@pytest.mark.parametrize("stages", [STAGES, ("res4",)], ids=["all", "res4"])
def test_same_outputs_gradients_and_statistics(
    stages: tuple[str, ...], norm: Any, form: str
) -> None:
    """Bit for bit; norms that counted the second pass would leave other statistics."""
    model = network(stages, norm=norm, form=form)
    plain = network((), norm=norm, form=form)
    assert list(model.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        image = torch.randn(2, 3, 64, 64)
        expected, got = step(plain, image), step(model, image)
        assert got.keys() == expected.keys()
        for name, truth in expected.items():
            assert torch.equal(got[name], truth), name


def saved_bytes(stages: tuple[str, ...]) -> int:
    """Return how many bytes autograd keeps for backward, without parameters."""
    model = network(stages)
    kept: dict[int, int] = {}
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(torch.randn(2, 3, 128, 128))
    assert features
    return sum(kept.values())


def test_keeps_less_for_backward() -> None:
    everything, some, none = (saved_bytes(each) for each in ((), ("res2", "res3"), STAGES))
    assert none < some < everything
    assert none < 0.35 * everything


def test_keeps_the_input_of_every_few_blocks() -> None:
    """Of res4's 23 blocks, those of the first, sixth, eleventh, sixteenth and twenty-first."""
    model = ResNeXt(101, "32x1d", stem_out_channels=8, res2_out_channels=32, norm="BN")
    stage = CheckpointedStage(*model.res4).train()
    x = torch.randn(1, 64, 8, 8).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        stage(x)
    assert kept == [x.shape, *[(1, 128, 4, 4)] * 4]


def test_recomputes_only_for_gradients() -> None:
    model = network(STAGES)
    calls = []
    model.res3[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))
    assert len(calls) == 2
    model(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    assert len(calls) == 4


def test_checkpoints_the_named_stages_only_and_freezes_them() -> None:
    model = network(("res3", "res5"), freeze_at=3)
    kinds = [type(getattr(model, name)) for name in STAGES]
    assert kinds == [nn.Sequential, CheckpointedStage, nn.Sequential, CheckpointedStage]
    assert model.stages[1] is model.res3
    assert not any(each.requires_grad for each in model.res3.parameters())


def test_rpn_head_computes_its_hidden_maps_twice() -> None:
    """And gives Detectron2's outputs and gradients, bit for bit."""
    results, calls = [], []
    for kind in (StandardRPNHead, CheckpointedRPNHead):
        torch.manual_seed(0)
        head = kind(in_channels=8, num_anchors=3).train()
        head.conv.register_forward_hook(lambda *_, kind=kind: calls.append(kind))
        pyramid = [torch.randn(2, 8, side, side).requires_grad_() for side in (16, 8)]
        scores, deltas = head(pyramid)
        sum(output.square().sum() for output in (*scores, *deltas)).backward()
        results.append([*scores, *deltas, *(each.grad for each in (*pyramid, *head.parameters()))])
        head.eval()(pyramid)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (calls.count(StandardRPNHead), calls.count(CheckpointedRPNHead)) == (4, 6)
