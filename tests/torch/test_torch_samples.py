"""torch's own sample inputs as oracle: what torch.nn gives for them in float64, cubn gives, derivatives included."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # which torch's own test helpers import

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's test helpers
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

import cubn.torch  # noqa: E402
from cubn.torch.functional import batch_norm  # noqa: E402

FLOAT64 = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
BOUND = 2**20 * torch.finfo(torch.float64).eps
"""Of the largest value: with 2 values a channel a second derivative may be of invstd to the third, some 1e6."""

OPERATORS = {op.name: op for op in op_db if "batch_norm" in op.name}
MODULES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


def arguments(name, sample):
    """x, and what torch.nn.functional.batch_norm takes besides."""
    given = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in sample.args]
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    if name == "nn.functional.batch_norm":
        options = dict(zip(names, given, strict=False)) | sample.kwargs
    elif name == "_batch_norm_with_update":  # weight, bias, mean, var, momentum, eps
        weight, bias, mean, var, momentum, eps = given
        options = dict(zip(names, (mean, var, weight, bias, True, momentum, eps), strict=True))
    elif name == "_native_batch_norm_legit" and len(given) == 5:  # without running statistics
        options = dict(zip(names, (None, None, *given), strict=True))
    else:
        weight, bias, mean, var, *rest = given
        options = dict(zip(names, (mean, var, weight, bias, *rest), strict=True))
    if options.get("running_var") is not None:
        options["running_var"] = options["running_var"].abs() + 0.25  # drawn with either sign
    for name in ("weight", "bias"):
        if options.get(name) is not None:
            options[name] = options[name].requires_grad_()
    return sample.input.detach().clone().requires_grad_(), options


def copied(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def everything(function, x, options):
    """y, its gradients, the gradients of these, and the running statistics afterwards."""
    options = {k: copied(v) for k, v in options.items()}
    needed = [x, *(t for k in ("weight", "bias") if (t := options.get(k)) is not None)]
    y = function(x, **options)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first = torch.autograd.grad(y, needed, dy, create_graph=True)
    scalar = sum((g * torch.linspace(-1, 2, g.numel(), dtype=g.dtype).reshape(g.shape)).sum() for g in first)
    second = torch.autograd.grad(scalar, [dy, *needed], allow_unused=True)
    second = [torch.zeros(()) if g is None or not g.any() else g for g in second]
    statistics = [t for k in ("running_mean", "running_var") if (t := options.get(k)) is not None]
    return [y, *first, *second, *statistics]


def assert_agree(got, expected):
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.shape == theirs.shape, i
        scale = theirs.detach().abs().max() if theirs.numel() else 0
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=float(BOUND * max(scale, 1)), msg=lambda m, i=i: f"{i}: {m}"
        )


@pytest.mark.parametrize("name", OPERATORS)
def test_samples_of_torch_s_operators(name):
    compared = refused = 0
    for sample in OPERATORS[name].sample_inputs(**FLOAT64):
        x, options = arguments(name, sample)
        training, momentum = options.get("training", False), options.get("momentum", 0.1)
        if x.ndim < 2 or (training and not 0 <= momentum <= 1):
            with pytest.raises(ValueError, match="momentum" if x.ndim > 1 else "2 axes"):
                batch_norm(x, **options)
            refused += 1
            continue
        assert_agree(everything(batch_norm, x, options), everything(torch.nn.functional.batch_norm, x, options))
        compared += 1
    assert compared >= 5
    assert refused >= 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_inputs_of_torch_s_modules(name, training):
    of = next(info for info in module_db if info.name == f"nn.{name}")
    inputs = of.module_inputs_func(of, **FLOAT64, training=training)
    assert len(inputs) >= 6
    for given in inputs:
        results = []
        for library in (torch.nn, cubn.torch):
            torch.manual_seed(0)
            how = given.constructor_input
            module = getattr(library, name)(*how.args, **how.kwargs).double().train(training)
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0)
            x = copy.deepcopy(given.forward_input.args[0].detach()).requires_grad_()

            def call(x, module=module, **parameters):
                return torch.func.functional_call(module, parameters, (x,))

            parameters = dict(module.named_parameters())
            results.append([*everything(call, x, parameters), *module.buffers()])
        assert_agree(*([t.double() for t in found[: len(results[0])]] for found in results))


SHAPES = {"BatchNorm1d": (5, 3), "BatchNorm2d": (3, 2, 2, 3), "BatchNormReLU2d": (3, 2, 2, 3)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*SHAPES, "BatchNormAddReLU2d"])
def test_first_and_second_derivatives_are_those_of_differences(name, training):
    torch.manual_seed(0)
    shape = SHAPES.get(name, (3, 2, 2, 3))
    module = getattr(cubn.torch, name)(shape[1]).double().train(training)
    module.running_var.uniform_(0.5, 2.0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2 if "Add" in name else 1)]
    parameters = [torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def call(weight, bias, *inputs):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, inputs)

    torch.autograd.gradcheck(call, (*parameters, *inputs))
    torch.autograd.gradgradcheck(call, (*parameters, *inputs))
