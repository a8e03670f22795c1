"""The demo notices bits that differ; that they do not is what the demo itself checks."""

import numpy as np
import pytest

from cubn.cli import demo


@pytest.fixture
def network(monkeypatch):
    """An untrained network that has seen 20 images, cut in parts of 1, 2 and 17."""
    monkeypatch.setattr(demo, "CUTS", (0, 1, 3))
    rng = np.random.default_rng(0)
    network = demo.Network(rng)
    network.forward(rng.random((20, 8, 8, 1), dtype=np.float32), training=False)
    return network


def test_equal_bits_agree(network, capsys):
    assert demo.compare_bits(network)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5


@pytest.mark.parametrize("run", ["run_nhwc", "run_nchw", "run_in_parts"])
def test_one_bit_more_in_one_input_is_noticed(network, run, monkeypatch):
    honest = getattr(demo, run)

    def perturbed(x, state):
        x = x.copy()
        x[7, 3, 3, 5] = np.nextafter(x[7, 3, 3, 5], np.float32(9))
        return honest(x, state)

    monkeypatch.setattr(demo, run, perturbed)
    assert not demo.compare_bits(network)


needs_mpi = pytest.mark.skipif(demo.launcher() is None, reason="no mpi4py, or no mpiexec")


@needs_mpi
def test_ranks_agree(network, capsys):
    assert demo.compare_ranks(network)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + len(demo.RANKS)


@needs_mpi
def test_one_bit_more_on_the_ranks_is_noticed(network, monkeypatch):
    honest = np.savez

    def perturbed(path, *layers):
        layers = [x.copy() for x in layers]
        layers[2][19, 3, 3, 5] = np.nextafter(layers[2][19, 3, 3, 5], np.float32(9))
        honest(path, *layers)

    monkeypatch.setattr(np, "savez", perturbed)
    assert not demo.compare_ranks(network)


def test_ranks_with_other_running_statistics_are_noticed(network):
    layers = [normalization.input for normalization in network.normalizations]
    one, other = ([demo.step(x, slice(None)) for x in layers] for _ in range(2))
    same = demo.digests_of_steps([one, other])
    other[3][0][1][0] += 1
    assert demo.digests_of_steps([one, other])[0] not in (same[0], demo.digests_of_steps([other, other])[0])


@pytest.mark.parametrize(
    ("mpiexec", "reason"), [(None, "It needs mpi4py"), ("false", "could not be started: status 1")]
)
def test_without_an_mpi_the_demo_says_so(network, mpiexec, reason, monkeypatch, capsys):
    monkeypatch.setattr(demo, "launcher", lambda: mpiexec)
    assert demo.compare_ranks(network)
    out = capsys.readouterr().out
    assert out.startswith("Not shown: the same over MPI ranks. ") and reason in out


def test_gradient_of_the_network_is_that_of_finite_differences(network):
    rng = np.random.default_rng(1)
    images, weights = rng.random((6, 8, 8, 1), dtype=np.float32), rng.standard_normal((6, 10), dtype=np.float32)
    network.forward(images, training=True)
    pairs = list(network.backward(weights))
    assert len(pairs) == 1 + 3 * 5
    for parameter, gradient in pairs:
        direction = np.sign(gradient) / np.float32(np.sqrt(gradient.size))
        step, values, start = 1e-3, [], parameter.copy()
        for sign in (1, -1):
            parameter[...] = start + np.float32(sign * step) * direction
            values.append((network.forward(images, training=True).astype(np.float64) * weights).sum())
        parameter[...] = start
        expected = (gradient * direction).sum()
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=0.05, abs=0.05)
