"""Activation checkpointing: the same gradients and statistics, with less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import Tensor, nn

from resnext_det import ResNeXt, add_resnext_config, build_resnext_backbone
from resnext_det.errors import ConfigError
from resnext_det.modeling.checkpointing import CheckpointedStage

STAGES = ["res2", "res3", "res4", "res5"]


def network(checkpoint_stages: list[str], **arguments: Any) -> ResNeXt:
    torch.manual_seed(1)
    sizes = {"stem_out_channels": 32, "res2_out_channels": 64, "norm": "BN"}
    return ResNeXt(
        26,
        "32x1d" if arguments.get("form", "grouped") == "grouped" else "4x8d",
        out_features=STAGES,
        checkpoint_stages=checkpoint_stages,
        **{**sizes, **arguments},
    ).train()


def step(model: ResNeXt, image: Tensor) -> dict[str, Tensor]:
    """Return outputs, gradients and what training leaves in the buffers."""
    image = image.clone().requires_grad_()
    features = model(image)
    sum(feature.square().mean() for feature in features.values()).backward()
    return {
        **{f"out {name}": feature.detach() for name, feature in features.items()},
        **{f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
        **{f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()},
        "pixels": image.grad,
    }


@pytest.mark.parametrize(
    ("norm", "form"),
    [
        *[(norm, "grouped") for norm in ("BN", "SyncBN", "naiveSyncBN", "GN", "FrozenBN")],
        *[("BN", form) for form in ("concatenated", "aggregated")],
    ],
)
@pytest.mark.parametrize("stages", [STAGES, ["res4"]], ids=["all", "res4"])
def test_outputs_gradients_and_statistics_are_the_same(
    stages: list[str], norm: str, form: str
) -> None:
    """To the last bit; a batch norm that counted twice would leave other running statistics."""
    image = torch.randn(2, 3, 64, 64)
    expected = step(network([], norm=norm, form=form), image)
    got = step(network(stages, norm=norm, form=form), image)
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        assert torch.equal(got[name], truth), name


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    image = torch.randn(2, 3, 64, 64)
    buffers = []
    gradients = []
    for stages in ([], STAGES):
        model = network(stages)
        loss = model(image)["res5"].square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        buffers.append(dict(model.named_buffers()))
        gradients.append({name: each.grad for name, each in model.named_parameters()})
    for name, truth in {**buffers[0], **gradients[0]}.items():
        assert torch.equal({**buffers[1], **gradients[1]}[name], truth), name


def test_running_statistics_go_on_after_a_step() -> None:
    """The norms are at rest only while a block is computed again."""
    model = network(STAGES)
    step(model, torch.randn(2, 3, 64, 64))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, int(norm.num_batches_tracked)) for norm in norms} == {(0.1, 1)}
    before = model.res4[0].conv2.norm.running_mean.clone()
    step(model, torch.randn(2, 3, 64, 64))
    assert not torch.equal(model.res4[0].conv2.norm.running_mean, before)
    assert int(model.res4[0].conv2.norm.num_batches_tracked) == 2


def saved_bytes(stages: list[str]) -> int:
    """Return how many bytes autograd keeps for the backward pass, parameters left out."""
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


def test_less_is_kept_for_the_way_back() -> None:
    """By what autograd asks to be saved; tools/complexity.py measures the process."""
    everything = saved_bytes([])
    some, none = saved_bytes(["res2", "res3"]), saved_bytes(STAGES)
    assert none < some < everything
    assert none < 0.6 * everything


def test_nothing_is_computed_twice_without_gradients() -> None:
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


def test_names_and_stages_stay() -> None:
    plain, checkpointed = network([]), network(["res3", "res5"], freeze_at=3)
    assert list(plain.state_dict()) == list(network(["res3"]).state_dict())
    kinds = [type(getattr(checkpointed, name)) for name in STAGES]
    assert kinds == [nn.Sequential, CheckpointedStage, nn.Sequential, CheckpointedStage]
    assert checkpointed.stages[1] is checkpointed.res3
    frozen = [each.requires_grad for each in checkpointed.res3.parameters()]
    assert frozen
    assert not any(frozen)


def test_instance_norms_that_keep_statistics_rest_as_well() -> None:
    def norm(channels: int) -> nn.Module:
        return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)

    image = torch.randn(2, 3, 64, 64)
    expected, got = (step(network(stages, norm=norm), image) for stages in ([], STAGES))
    assert all(torch.equal(got[name], truth) for name, truth in expected.items())


def test_the_config_key() -> None:
    cfg = get_cfg()
    add_resnext_config(cfg)
    cfg.merge_from_list(["MODEL.RESNEXT.CHECKPOINT_STAGES", "['res3', 'res4']"])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    with torch.device("meta"):
        built = build_resnext_backbone(cfg, ShapeSpec(channels=3))
    assert isinstance(built.res3, CheckpointedStage)
    assert isinstance(built.res4, CheckpointedStage)
    assert not isinstance(built.res2, CheckpointedStage)


@pytest.mark.parametrize("stages", [["stem"], ["res6"], ["res2", 3], "res4", [4]])
def test_what_is_no_stage_is_refused(stages: Any) -> None:
    with pytest.raises(ConfigError, match=r"CHECKPOINT_STAGES is .*res2, res3, res4, res5"):
        network(stages)


def test_detectron2s_own_synchronised_norm_rests_as_well() -> None:
    """In several processes it updates its statistics itself, by its momentum."""
    model = network(STAGES, norm="naiveSyncBN")
    norm = model.res4[0].conv2.norm
    assert isinstance(norm, NaiveSyncBatchNorm)
    seen = []
    norm.register_forward_hook(lambda module, *_: seen.append(module.momentum))
    step(model, torch.randn(2, 3, 64, 64))
    assert seen == [0.1, 0.0]
