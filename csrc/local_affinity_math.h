// Affinity of a pixel with one neighbour, and its slopes: the arithmetic of local_affinity on the CPU and in
// CUDA.
#pragma once

#include "scalar_math.h"

namespace fastuda {

template <class S>
FASTUDA_HOST_DEVICE S clamp_probability(S x) {
  x = x < S(1e-4) ? S(1e-4) : x;
  return x > S(1) ? S(1) : x;
}

// 1 where clamp_probability passes a gradient, else 0.
template <class S>
FASTUDA_HOST_DEVICE S inside(S x) {
  return x >= S(1e-4) && x <= S(1) ? S(1) : S(0);
}

// Logarithms of the clamped p and 1 - p of a pixel.
template <class S>
struct OwnLogs {
  S one, zero;
};
template <class S>
FASTUDA_HOST_DEVICE OwnLogs<S> own_logs(S p) {
  return {fast_log(clamp_probability(p)), fast_log(clamp_probability(S(1) - p))};
}

// p r of a pixel and its neighbour and 1 - p r, clamped, and the logarithms of their ratios to the pixel's
// own clamped p and 1 - p. For probabilities, if p r is not clamped then neither are p and r: the ratio to p
// is r, whose logarithm is known.
template <class S>
struct Joint {
  S value, one, zero, gain_one, gain_zero;
};
template <class S>
FASTUDA_HOST_DEVICE Joint<S> joint_of(S p, S r, const OwnLogs<S>& own, S other_one) {
  const S value = p * r, one = clamp_probability(value), zero = clamp_probability(S(1) - value);
  const S gain_one = value >= S(1e-4) ? other_one : S(-9.210340371976182) - own.one;
  return {value, one, zero, gain_one, fast_log(zero) - own.zero};
}

// KL(Bern(joint) || Bern(p)).
template <class S>
FASTUDA_HOST_DEVICE S affinity_of(const Joint<S>& joint) {
  return joint.one * joint.gain_one + joint.zero * joint.gain_zero;
}

// Its derivative with respect to p r; a clamped quantity passes no gradient.
template <class S>
FASTUDA_HOST_DEVICE S slope_by_joint(const Joint<S>& joint) {
  return inside(joint.value) * (joint.gain_one + S(1)) -
         inside(S(1) - joint.value) * (joint.gain_zero + S(1));
}

// Its derivative with respect to the p of Bern(p) alone.
template <class S>
FASTUDA_HOST_DEVICE S slope_by_own(const Joint<S>& joint, S p) {
  return inside(S(1) - p) * joint.zero / clamp_probability(S(1) - p) -
         inside(p) * joint.one / clamp_probability(p);
}

}  // namespace fastuda
