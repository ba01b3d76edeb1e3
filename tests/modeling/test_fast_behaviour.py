"""What a program may do with an accelerated model, as with any other."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnext_det.config import add_resnext_config
from resnext_det.modeling.fast import Precision, accelerate

from .test_fast import difference, inputs, model_of, narrow_config, tensors_of

NORMS = ("FrozenBN", "BN", "naiveSyncBN", "GN", "LN", "")
# Of the largest value, after the stem and two blocks.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_norm_in_every_precision(norm: str, precision: Precision) -> None:
    """In evaluation, in training, and in evaluation with the statistics of that training."""
    stock = model_of("FPN", norm).backbone.bottom_up
    fast = accelerate(copy.deepcopy(stock), precision)
    x = torch.randn(2, 3, 64, 96)
    for training in (False, True, False):
        results = []
        for model in (stock, fast):
            features = model.train(training)(x)["res2"]
            results.append([features, *model.stem.buffers(), *model.res2.buffers()])
        for theirs, ours in zip(*results, strict=True):
            assert difference(ours.float(), theirs) < TOLERANCES[precision]
    fast.train()(x)["res5"].float().square().mean().backward()
    gradients = [each.grad for each in fast.parameters() if each.grad is not None]
    assert len(gradients) > 20
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in gradients)


def detections(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(model.eval()(inputs()))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Tell whether all tensors are equal; there must be some numbers to compare."""
    assert sum(each.numel() for each in theirs) > 20
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_compute_the_same(
    copied: Callable[[nn.Module], nn.Module], precision: Precision
) -> None:
    model = accelerate(model_of("Mask"), precision)
    expected = detections(model)
    other = copied(model)
    assert same(detections(other), expected)
    for parameter in other.parameters():
        parameter.detach().mul_(0.99)
    assert not same(detections(other), expected)
    assert same(detections(model), expected)  # a copy shares nothing


def test_a_second_call_replaces_the_precision() -> None:
    model = accelerate(model_of("FPN"))
    expected = detections(model)
    low = detections(accelerate(model_of("FPN"), "bf16"))
    assert not same(low, expected)
    assert same(detections(accelerate(model, "bf16")), low)
    assert same(detections(accelerate(model, "fp32")), expected)


def test_loads_a_checkpoint_after_inference() -> None:
    """Of the stock model, whose detections it then makes."""
    stock, fast = model_of("FPN", "BN"), accelerate(model_of("FPN", "BN"))
    before = detections(fast)
    for tensor in stock.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor * 1.1)
    fast.load_state_dict(stock.state_dict())
    found, expected = detections(fast), detections(stock)
    assert not same(found, before)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and difference(ours, theirs) < 1e-3
    assert len(found[0]) > 5


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_evaluates_the_weights_of_the_last_update(norm: str) -> None:
    """Of the training and of its moving average; nothing prepared for earlier ones is left."""
    model = accelerate(model_of("FPN", norm))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    for _ in range(2):
        before = [detections(each) for each in (model, average.module)]
        model.train()
        optimizer.zero_grad()
        with EventStorage():
            sum(model(inputs(training=True)).values()).backward()
        optimizer.step()
        average.update_parameters(model)
    for trained, old in zip((model, average.module), before, strict=True):
        assert not same(detections(trained), old)
        fresh = accelerate(model_of("FPN", norm))
        fresh.load_state_dict(trained.state_dict())
        assert same(detections(trained), detections(fresh))


def losses_and_gradients(model: nn.Module) -> list[Tensor]:
    model.train()
    torch.manual_seed(2)
    with EventStorage():
        losses = model(inputs(training=True))
    sum(losses.values()).backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return [*losses.values(), *gradients]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["FPN", "C4", "RetinaNet"])
def test_activation_checkpointing_changes_nothing(name: str, precision: Precision) -> None:
    """Bit for bit, with this package's backbones, and with batch norms that learn."""
    results = []
    # The first call profiles Detectron2's scripted focal loss, and rounds differently.
    for stages in ([], [], ["res2", "res3", "res4", "res5"]):
        cfg = narrow_config(name, "BN")
        add_resnext_config(cfg)
        cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = stages
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("resnet", "resnext")
        cfg.MODEL.RPN.HEAD_NAME = "CheckpointedRPNHead" if stages else "StandardRPNHead"
        if name == "C4":
            cfg.MODEL.ROI_HEADS.NAME = "ResNeXtRes5ROIHeads"
        torch.manual_seed(0)
        model = accelerate(build_model(cfg), precision)
        results.append([*losses_and_gradients(model), *model.buffers()])
    assert same(*results[1:])


def test_a_trace_computes_the_same() -> None:
    """Of a whole detector, on another image than it was traced with."""
    model = accelerate(model_of("FPN")).eval()

    def detect(model: nn.Module, batch: list[dict[str, Any]]) -> Any:
        return model.inference(batch, do_postprocess=False)[0]

    first, second = (each["image"] for each in inputs())
    adapter = TracingAdapter(model, [{"image": first}], detect)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for image in (first, second):
            expected = model.inference([{"image": image}], do_postprocess=False)[0]
            found = adapter.outputs_schema(traced(image))
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-2
            )
