"""How many pools one routing call takes: the promise in Python against what the CUDA source asks of a device."""

from dsvlm.ops import most_pools
from tests.ops.emulation.build import emulated

FITS = """
#include "moe_routing/gate.cuh"
using namespace dsvlm::moe::cuda;
// Whether the sums of as many pools and modalities fit a block of one warp, in the memory that every device has.
extern "C" int fits(int experts, int pools) {
  Route route{};
  route.logits.tokens = 64, route.logits.experts = experts, route.logits.k = 1, route.logits.modalities = pools;
  route.logits.load_sigma = 1, route.pools = pools;
  return with_row(experts, [&](auto row) {
    size_t bytes = 0;
    const int threads = gate_threads(route, decltype(row)::kLanes, bytes);
    return int(threads > 0 && bytes <= kGateShared && route.segments() <= kMaxSegments);
  });
}
"""


def test_as_many_pools_as_promised_fit_any_device(tmp_path):
    """256 of many experts do not: a unit of as many images, or samples, is routed in parts."""
    fits = emulated(FITS, tmp_path).fits
    for experts in range(1, 1025):
        most = most_pools(experts)
        assert fits(experts, most), (experts, most)
        assert most == 256 or not fits(experts, most + 4), "hardly more fit, either"
    assert most_pools(8) == 256 and not fits(32, 256)
