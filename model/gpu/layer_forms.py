"""Which matrices of a decoder layer the kernels read, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from model.gpu.forms import Form, are_alike, plain_form
from model.quantization.form import Weight


def form_of(weight: Weight) -> Form | None:
    """None where the kernels cannot read it."""
    if not isinstance(weight, Tensor):
        return weight.form()
    return plain_form(weight) if weight.element_size() == 2 else None


class LayerForms(NamedTuple):
    """A decoder layer's matrices as the kernels read them."""

    projections: list[Form]  # of queries, keys and values
    output: Form
    experts: list[list[Form]]  # gate, up and down of each routed expert, then of the dense or shared one
    addresses: list[list[int]]  # (experts + 1, 6): see model.gpu.kernels


def layer_forms(layer: Any) -> LayerForms | None:
    """Of a decoder layer; None where there is something that the kernels cannot read."""
    attention, forward = layer.self_attn, layer.feed_forward
    dense = getattr(forward, "shared_expert", forward)
    projections = _forms([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    output = form_of(attention.o_proj.weight)
    experts = [] if dense is forward else _expert_forms(forward.experts)
    own = _forms([dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight])
    if projections is None or output is None or experts is None or own is None:
        return None
    if not are_alike(projections) or not _are_alike(experts) or not _are_alike([own]):
        return None
    router = None if dense is forward else forward.router.weight
    if router is not None and not (isinstance(router, Tensor) and router.is_contiguous()):
        return None
    experts.append(own)
    return LayerForms(projections, output, experts, [[x for form in of for x in form.addresses] for of in experts])


def _expert_forms(experts: Any) -> list[list[Form]] | None:
    """Gate, up and down of each; the first two may be rows of one matrix."""
    found = []
    if hasattr(experts, "gate_up_proj"):
        matrices = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        every: list[list[Weight]] = [[gate_up.t(), down.t()] for gate_up, down in matrices]
    else:
        names = ("gate_up", "down") if experts.experts[0].is_joined else ("gate", "up", "down")
        every = [[getattr(expert, name) for name in names] for expert in experts.experts]
    for weights in every:
        forms = _forms(weights)
        if forms is None:
            return None
        if len(forms) == 2:
            half = forms[0].shape[0] // 2
            forms[:1] = [forms[0].rows(0, half), forms[0].rows(half, 2 * half)]
        found.append(forms)
    return found


def _forms(weights: Sequence[Weight]) -> list[Form] | None:
    found = [form_of(weight) for weight in weights]
    known = [form for form in found if form is not None]
    return known if len(known) == len(found) else None


def _are_alike(experts: list[list[Form]]) -> bool:
    """Gate and up of all experts, and down of all."""
    if not experts:
        return True
    return are_alike([form for gate, up, _ in experts for form in (gate, up)]) and are_alike([x[2] for x in experts])
