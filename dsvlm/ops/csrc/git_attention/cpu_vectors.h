// Vectors of the instruction set that a *_simd.cpp is compiled for: types, 2^x, the matrix product of the attention.
#pragma once

#include <cstdint>

namespace dsvlm::DSVLM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRows = 8;
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif
constexpr int kColumns = 3;  // vectors; kRows * kColumns sums, kColumns factors and one more fit the registers

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kLanes = kVectorBytes / sizeof(float), kMantissa = 23, kBias = 127, kDegree = 6;
  // 2^x on [-1/2, 1/2], the least relative error for its degree: 2e-9, 1.6e-8 with the factors rounded
  static constexpr float kExp2[] = {1.f,           0.693147182f,   0.240226462f,  0.0555032864f,
                                    0.0096184891f, 0.00133999309f, 0.000153458124f};
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kLanes = kVectorBytes / sizeof(double), kMantissa = 52, kBias = 1023, kDegree = 13;
  // ln(2)^n / n!: what is left of the series is below 4e-18 on [-1/2, 1/2]
  static constexpr double kExp2[] = {
      1.,
      0.69314718055994529,
      0.24022650695910072,
      0.055504108664821583,
      0.0096181291076284769,
      0.0013333558146428443,
      0.00015403530393381609,
      1.5252733804059841e-05,
      1.321548679014431e-06,
      1.01780860092397e-07,
      7.0549116208011234e-09,
      4.4455382718708116e-10,
      2.5678435993488206e-11,
      1.3691488853904128e-12,
  };
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline Vec<T>& at(T* data, int64_t vector) {
  return reinterpret_cast<Vec<T>*>(data)[vector];
}

template <class T>
inline const Vec<T>& at(const T* data, int64_t vector) {
  return reinterpret_cast<const Vec<T>*>(data)[vector];
}

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // the subtraction of 0 is exact, and folded
}

// 2^x. Exactly 0 where the result would be below the normal numbers, so that none of them slows what follows;
// NaN stays NaN: a lane of the comparison is false for it.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  constexpr T lowest = -S::kBias, shift = T(3) * (uint64_t(1) << (S::kMantissa - 1));
  x = x < lowest ? splat<T>(lowest) : x;
  const Vec<T> shifted = x + shift, part = x - (shifted - shift);  // rounds to whole numbers, in the low bits
  Vec<T> sum = splat<T>(S::kExp2[S::kDegree]);
#pragma GCC unroll 16
  for (int i = S::kDegree - 1; i >= 0; --i) sum = sum * part + S::kExp2[i];
  return sum * (Vec<T>)(((Bits)shifted + S::kBias) << S::kMantissa);
}

// Turns a square of vectors: kLanes rows of `from` become columns, times a factor.
template <class T>
inline void transpose(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, T factor) {
  constexpr int lanes = Simd<T>::kLanes;
  typename Simd<T>::Int low{}, high{};
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) low[i] = i / 2 + i % 2 * lanes, high[i] = low[i] + lanes / 2;
  Vec<T> square[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) square[i] = at(from + i * from_pitch, 0) * factor;
#pragma GCC unroll 4
  for (int done = 1; done < lanes; done *= 2) {  // each round doubles what lies side by side
    Vec<T> next[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(square[i], square[i + lanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(square[i], square[i + lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) at(to + i * to_pitch, 0) = square[i];
}

// Where the first factor's element (m, k) lies: a[m * lda + k], or a[k * lda + m].
enum class Factor { by_row, by_column };

// c[m, n] = or += sum over k < depth of a(m, k) b[k, n], for kRows rows and `columns` vectors.
template <class T, Factor order, int columns, bool add>
inline void product_tile(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vec<T> sum[kRows][columns];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < columns; ++n) sum[m][n] = add ? at(c + m * ldc, n) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> factor[columns];
#pragma GCC unroll 4
    for (int n = 0; n < columns; ++n) factor[n] = at(b + k * ldb, n);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> x = splat<T>(order == Factor::by_row ? a[m * lda + k] : a[k * lda + m]);
#pragma GCC unroll 4
      for (int n = 0; n < columns; ++n) sum[m][n] += x * factor[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < columns; ++n) at(c + m * ldc, n) = sum[m][n];
}

template <class T, Factor order, int columns, bool add>
inline void product_columns(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                            int64_t ldc) {
  for (int64_t m = 0; m < rows; m += kRows) {
    const T* first = a + (order == Factor::by_row ? m * lda : m);
    product_tile<T, order, columns, add>(depth, first, lda, b, ldb, c + m * ldc, ldc);
  }
}

// c[m, n] = or += sum over k of a(m, k) b[k, n]. rows: rounded up to kRows, a and c have room for that;
// vectors: columns of b and c in vectors.
template <class T, Factor order, bool add>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb,
                    T* c, int64_t ldc) {
  for (; vectors > 0; vectors -= kColumns, b += kColumns * Simd<T>::kLanes, c += kColumns * Simd<T>::kLanes) {
    if (vectors >= kColumns) product_columns<T, order, kColumns, add>(rows, depth, a, lda, b, ldb, c, ldc);
    if (vectors == 2) product_columns<T, order, 2, add>(rows, depth, a, lda, b, ldb, c, ldc);
    if (vectors == 1) product_columns<T, order, 1, add>(rows, depth, a, lda, b, ldb, c, ldc);
  }
}

}  // namespace dsvlm::DSVLM_ISA
