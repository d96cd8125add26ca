"""The emulator that runs CUDA kernels on the CPU does what a device does, and lets no mistake pass."""

import numpy as np
import pytest
import torch

from tests.ops.emulation.build import HERE, EmulationError, emulated, guarded

SEEDS = range(8)
TYPES = {0: torch.bfloat16, 1: torch.float16}
LANE = np.arange(32)
GROUP, PAIR = LANE // 4, LANE % 4 * 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def probes(cache):
    return emulated(HERE / "probes.cuh", cache)


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("half", TYPES)
def test_mma_has_the_fragments_of_the_manual(probes, half):
    """Columns of a fragment that lie side by side share a register; everything else follows from lane and register."""
    rng = torch.Generator().manual_seed(half)
    a, b = (torch.randn(*shape, generator=rng).to(TYPES[half]) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=rng)
    left, right, sums = (np.zeros((32, n), np.uint32) for n in (4, 2, 4))
    for i in range(4):
        rows, columns = GROUP + 8 * (i % 2), PAIR + 8 * (i // 2)
        left[:, i] = bits_of(a)[rows, columns] | bits_of(a)[rows, columns + 1].astype(np.uint32) << 16
    for i in range(2):
        right[:, i] = bits_of(b)[PAIR + 8 * i, GROUP] | bits_of(b)[PAIR + 8 * i + 1, GROUP].astype(np.uint32) << 16
    places = [(GROUP + 8 * (i // 2), PAIR + i % 2) for i in range(4)]
    sums = np.stack([c.numpy()[place] for place in places], axis=1)
    probes.call("probe_mma", left, right, sums, half)
    expected = (c.double() + a.double() @ b.double()).numpy()
    for i, place in enumerate(places):
        np.testing.assert_allclose(sums[:, i], expected[place], atol=1e-5)


@pytest.mark.parametrize("pitch", [8, 24, 64])
def test_load_matrix_gives_rows_and_columns(probes, pitch):
    values = np.arange(256, dtype=np.uint16)
    plain, transposed = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    probes.call("probe_matrix_rows", values, plain, transposed, pitch)
    matrices = values.reshape(4, 8, 8).astype(np.uint32)
    for i, matrix in enumerate(matrices):
        assert (plain[:, i] == (matrix[GROUP, PAIR] | matrix[GROUP, PAIR + 1] << 16)).all()
        assert (transposed[:, i] == (matrix[PAIR, GROUP] | matrix[PAIR + 1, GROUP] << 16)).all()


def test_copies_arrive_when_their_group_is_waited_for(probes):
    """Until then the place is NaN; what is not valid becomes zero; what no group holds is not waited for."""
    source = np.zeros(20, np.float32)
    source = source[-source.ctypes.data // 4 % 4 :][:16]  # aligned to 16 bytes
    source[:] = np.arange(16)
    seen = np.zeros((4, 4), np.float32)
    probes.call("probe_late_copies", source, seen)
    nan = np.nan
    np.testing.assert_array_equal(seen, [[nan] * 4, [0, nan, nan, nan], [0, 4, 0, nan], [0, 4, 0, 12]])


def reversed_by(probes, barrier: int, seed: int) -> np.ndarray:
    values, result = np.arange(384, dtype=np.float32), np.zeros(384, np.float32)
    probes.call("probe_reverse", values, result, 3, 128, barrier, seed=seed)
    return result


def test_a_missing_barrier_shows(probes):
    """With it, every order of threads gives the same; without, some threads read before others have written."""
    expected = np.arange(384).reshape(3, 128)[:, ::-1].ravel()
    raced = [reversed_by(probes, 0, seed) for seed in SEEDS]
    for seed in SEEDS:
        np.testing.assert_array_equal(reversed_by(probes, 1, seed), expected)
        assert np.isnan(raced[seed]).any(), "nobody read too early"
        np.testing.assert_array_equal(reversed_by(probes, 0, seed), raced[seed], "a seed is one order of threads")
    assert len({result.tobytes() for result in raced}) > len(SEEDS) // 2


@pytest.mark.parametrize("seed", range(3))
def test_lanes_and_blocks_agree(probes, seed):
    values = np.random.default_rng(seed).integers(-20, 20, 80).astype(np.int32)
    values[[7, 70]] = [50, -50]
    result = np.zeros((80, 12), np.int64)
    probes.call("probe_agreements", values, result, seed=seed)
    i = np.arange(80)
    first, count = i // 32 * 32, np.where(i < 64, 32, 16)
    segment = i // 8 * 8
    votes = [[values[w * 32 : w * 32 + 32] > limit for w in range(3)] for limit in (0, 40, -40)]
    expected = [
        values[first + 3],
        values[first + ((i - first) ^ 5)],
        values[np.where(i - 2 >= segment, i - 2, i)],
        values[np.where(i + 2 < segment + 8, i + 2, i)].astype(np.int64) << 33,
        np.array([sum(1 << k for k in np.flatnonzero(vote)) for vote in votes[0]])[i // 32],
        np.array([vote.any() for vote in votes[1]])[i // 32],
        np.array([vote.all() for vote in votes[2]])[i // 32],
        np.full(80, (values > 0).sum()), np.ones(80), np.zeros(80), np.full(80, -1), np.full(80, values.sum()),
    ]  # fmt: skip
    assert count[-1] == 16
    np.testing.assert_array_equal(result, np.stack(expected, axis=1))


@pytest.mark.parametrize("half", TYPES)
def test_conversions_are_torch_s(probes, half):
    bits = np.arange(65536, dtype=np.uint16)
    limits = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 3.4e38, 3.39e38, 6e-8, 2.9e-8, 6.1e-5, 1e-41]
    values = np.random.default_rng(half).integers(0, 1 << 32, 65536, dtype=np.uint32).view(np.float32).copy()
    normal = np.random.default_rng(half).normal(size=32768).astype(np.float32)
    values[::2] = normal * 2.0 ** (np.arange(32768) % 48 - 32)
    values[: len(limits)] = limits
    wide, narrow = np.zeros(65536, np.float32), np.zeros(65536, np.uint32)
    probes.call("probe_conversions", bits, wide, values, narrow, 65536, half)
    expected = torch.from_numpy(bits.view(np.int16)).view(TYPES[half]).float().numpy()
    np.testing.assert_array_equal(wide, expected)
    narrow = torch.from_numpy(narrow.astype(np.uint16).view(np.int16)).view(TYPES[half]).float().numpy()
    np.testing.assert_array_equal(narrow, torch.from_numpy(values).to(TYPES[half]).float().numpy())


def test_powers_of_two(probes):
    x = np.array([0, 1, -1, 0.5, -126, -126.5, -200, -np.inf, np.nan, 127], np.float32)
    result = np.zeros_like(x)
    probes.call("probe_powers", x, result, len(x))
    with np.errstate(over="ignore"):
        expected = np.where(x < -126, 0, np.exp2(x.astype(np.float64)))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "kind, message",
    [
        (0, "deadlock: 63 threads wait at __syncthreads .*; 1 threads have ended|1 threads have ended .*; 63 threads"),
        (1, r"which is at __(syncwarp|ballot_sync)"),
        (2, "copy_async_16 of an address that is not a multiple of 16"),
        (3, "copy_async_16 from an address that is not a multiple of 16"),
        (4, "copy_async_16 of 16 bytes that are not shared memory .offset 256 of 256 dynamic bytes"),
        (5, "load_matrix_x4 of an address that is not a multiple of 16"),
        (6, "load_matrix_x4 of 16 bytes that are not shared memory"),
        (7, "dynamic shared memory was written 0 bytes past its end"),
        (8, "a mask that leaves out the calling lane"),
        (9, "is at __syncthreads(_or)? while others are at __syncthreads"),
        (10, "which is at __syncthreads|deadlock|which has ended"),
        (11, "waits for thread .*, which has ended|deadlock"),
    ],
)
def test_mistakes_are_named(probes, kind, message):
    """Every mistake ends the launch, in any order of threads, with block and thread; the next launch is a good one."""
    source = np.zeros(64, np.float32)
    aligned = source[-source.ctypes.data // 4 % 4 :]
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=rf"block \(\d, \d, 0\): .*({message})"):
            probes.call("probe_wrong", kind, aligned, 256, seed=seed)
    reversed_by(probes, 1, 0)


@pytest.mark.parametrize("kind, size", [(12, 64), (13, 64)])
def test_an_access_behind_an_array_is_an_error(probes, kind, size):
    """Copies and plain loads; all of the array itself may be read."""
    probes.call("probe_wrong", kind, guarded(torch.zeros(size)), 256)
    with pytest.raises(EmulationError, match="an address where there is no memory"):
        probes.call("probe_wrong", kind, guarded(torch.zeros(size - 4)), 256)
    reversed_by(probes, 1, 0)


def test_a_launch_that_no_device_takes_is_refused(probes):
    with pytest.raises(EmulationError, match="200000 bytes of shared memory"):
        probes.call("probe_wrong", -1, None, 200_000)
    with pytest.raises(EmulationError, match="1025, 1, 1"):
        probes.call("probe_powers", None, None, 1025)
    probes.call("probe_wrong", -1, None, 256)


@pytest.fixture(scope="module")
def matmul(cache):
    return emulated(HERE / "matmul.cuh", cache)


def product(library, dtype: torch.dtype, m: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(m)
    a, b = torch.randn(m, k, generator=rng).to(dtype), torch.randn(k, n, generator=rng).to(dtype)
    result = torch.full((m, n), float("nan"))
    name = "matmul_bf16" if dtype == torch.bfloat16 else "matmul_f16"
    library.call(name, a, b, result, m, n, k, seed=seed)
    return result, (a.double() @ b.double()).float()


@pytest.mark.parametrize("dtype", TYPES.values())
@pytest.mark.parametrize("shape", [(64, 64, 64), (70, 136, 200), (1, 8, 8)])
def test_a_whole_matmul(matmul, dtype, shape):
    """cp.async in two stages, ldmatrix, mma, edges: right, and the same bits in any order of threads."""
    results = [product(matmul, dtype, *shape, seed) for seed in range(2)]
    torch.testing.assert_close(*results[0], atol=1e-4, rtol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


def test_a_whole_matmul_without_one_barrier(cache):
    """A stage is loaded again while other warps read it: NaN, in at least one of the orders."""
    broken = emulated(HERE / "matmul.cuh", cache, ["DSVLM_WITHOUT_BARRIER"])
    assert any(product(broken, torch.bfloat16, 64, 64, 256, seed)[0].isnan().any() for seed in SEEDS)


def test_code_that_does_not_compile_is_shown(cache):
    with pytest.raises(RuntimeError, match="no_such_name"):
        emulated("int f() { return no_such_name; }", cache)
