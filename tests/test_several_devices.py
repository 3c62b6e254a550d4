"""Models whose layers are on several devices. Here ``meta``, which has shapes and no values, stands for a second GPU."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from toolkit import decode, hooks, phases, sites
from toolkit.sites import KINDS, Site

accelerate = pytest.importorskip("accelerate")
META, CPU = torch.device("meta"), torch.device("cpu")


def test_every_site_is_read_and_written_on_the_device_of_its_layer(tiny):
    """accelerate moves the input of a block to the block's device after the block's own hooks have seen it."""
    model = copy.deepcopy(tiny.model)
    half = len(model.model.layers) // 2
    for module in [*model.model.layers[half:], model.model.norm, model.lm_head]:
        module.to(META)
        align = accelerate.hooks.AlignDevicesHook(execution_device=META, io_same_device=False)
        accelerate.hooks.add_hook_to_module(module, align)
    layout, seen = sites.find(model), {}

    def doubled(site: Site) -> hooks.Rewrite:
        def fn(value, inputs):
            seen[site] = value.device.type
            return 2 * value

        return fn

    chosen = [Site(kind, layer) for kind in KINDS for layer in range(layout.n_layers)]
    with torch.no_grad(), hooks.rewrite(layout, {site: doubled(site) for site in chosen}):
        assert model(input_ids=torch.arange(5, 10)[None]).logits.device == META
    assert all(seen[s] == ("meta" if s.layer >= half else "cpu") for s in chosen if (s.kind, s.layer) != ("resid_pre", half))


def test_rows_of_a_cache_are_selected_on_the_device_of_its_layer():
    devices = []

    class Layer(DynamicLayer):
        def batch_select_indices(self, indices):
            devices.append(indices.device.type)

    layer = Layer()
    for device in (META, CPU):
        layer.keys = torch.empty(2, 1, 3, 4, device=device)
        decode.select_rows(layer, torch.tensor([1, 0]))
    assert devices == ["meta", "cpu"]
    recurrent = SimpleNamespace(reorder_cache=lambda index: devices.append(index.device.type))
    decode.select_rows(recurrent, torch.tensor([1, 0]))
    assert devices[-1] == "cpu"


def test_weights_of_a_scope_are_on_the_device_that_asks():
    tracker = phases.Tracker()
    tracker.now = phases.Now(torch.full((1, 3), phases.THINK), None, None)
    scope = phases.Scope(("think",))
    for device in (CPU, META, CPU):
        assert tracker.weight(scope, device).device == device
    assert tracker.weight(scope, CPU) is tracker.weight(scope, CPU)
