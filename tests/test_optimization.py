"""Noam against its formula, clipping against torch's own on the whole model."""

import copy

import pytest
import torch

from course_utils.optimization import LossScaler, Noam, clip_by_global_norm, gradient_norms


def formula(step: int, d_model: int, warm_up: int) -> float:
    return d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)


def make(warm_up: int = 4) -> tuple[torch.optim.Adam, Noam]:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    return optimizer, Noam(optimizer, d_model=16, warm_up=warm_up)


def test_noam_is_its_formula_and_the_first_step_is_not_zero():
    optimizer, noam = make()
    seen = []
    for _ in range(12):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        noam.step()
    assert seen == pytest.approx([formula(step, 16, 4) for step in range(1, 13)], rel=1e-12)
    assert seen[0] > 0
    assert max(seen) == seen[3] == pytest.approx((16 * 4) ** -0.5)


def test_a_resumed_noam_goes_on_where_it_was():
    optimizer, noam = make()
    for _ in range(7):
        optimizer.step()
        noam.step()
    resumed_optimizer, resumed = make()
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(noam.state_dict()))
    for _ in range(3):
        for one in (optimizer, resumed_optimizer, noam, resumed):
            one.step()
        assert noam.get_last_lr() == resumed.get_last_lr()


def test_noam_factor_and_base_learning_rate_multiply():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    noam = Noam(optimizer, d_model=16, warm_up=4, factor=3.0)
    assert noam.get_last_lr() == pytest.approx([1.5 * formula(1, 16, 4)])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"d_model": 0}, "d_model is 0"), ({"warm_up": 0}, "warm_up is 0"), ({"factor": 0.0}, "factor is 0.0")],
)
def test_noam_refuses_what_makes_no_sense(options, named):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    with pytest.raises(ValueError, match=named):
        Noam(optimizer, **({"d_model": 16, "warm_up": 4} | options))


def parameters_with_gradients(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for size in (1, 7, 64, 300, 1000):
        parameter = torch.nn.Parameter(torch.zeros(size))
        parameter.grad = torch.randn(size, generator=generator) * 10 ** (seed % 3 - 1)
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_clipping_over_stages_is_torch_s_clipping_of_the_whole_model(num_stages):
    """To the last bit, in 200 cases: squares summed per stage would differ in about half of them."""
    for seed in range(200):
        whole, cut = parameters_with_gradients(seed), parameters_with_gradients(seed)
        expected = torch.nn.utils.clip_grad_norm_(whole, 1.0)
        stages = [list(enumerate(cut))[stage::num_stages] for stage in range(num_stages)]
        norms = torch.stack([gradient_norms(stage, len(cut)) for stage in stages]).sum(dim=0)
        for stage in stages:
            assert clip_by_global_norm([p for _, p in stage], norms, 1.0) == expected.item()
        for ours, theirs in zip(cut, whole, strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_a_small_norm_is_left_alone():
    parameters = parameters_with_gradients(1)
    before = [parameter.grad.clone() for parameter in parameters]
    clip_by_global_norm(parameters, gradient_norms(enumerate(parameters), 5), 1e6)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_touches_nothing(value):
    parameters = parameters_with_gradients(2)
    before = [parameter.grad.clone() for parameter in parameters]
    norms = gradient_norms(enumerate(parameters), 6)
    norms[5] = value  # another rank's
    assert not clip_by_global_norm(parameters, norms, 1.0) < float("inf")
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))


def test_parameters_without_a_gradient_count_as_zero():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert gradient_norms([(1, parameter)], 3).tolist() == [0, 0, 0]
    assert clip_by_global_norm([parameter], torch.tensor([0.0, 0.0, 3.0]), 1.0) == 3.0


def test_max_norm_must_be_positive():
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_by_global_norm([], torch.zeros(1), 0)


def test_a_scale_that_was_halved_for_ever_ends_no_run():
    scaler, parameter = LossScaler(65536.0), torch.nn.Parameter(torch.ones(1))
    for _ in range(200):
        parameter.grad = torch.full((1,), float("nan"))
        scaler.unscale([parameter])
        scaler.update(skipped=True)
    assert scaler.scale > 0
