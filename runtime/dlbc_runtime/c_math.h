/* What pointwise ops of the IR call in C (dlbc/backends/c/table.py), for float (_f32), double (_f64) and integers.

   Nothing branches where both sides are cheap, and nothing of float calls the C library where a polynomial will do: so
   compilers turn loops over these functions into vector instructions. Double is the C library's, one number at a time.
   Compile with -fno-math-errno -ffp-contract=off, without -ffast-math: NaN, infinities and rounding count here. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#define dlbc_fn static inline __attribute__((unused, always_inline))

/* A number of bytes, rounded up so that what lies behind them is aligned for every vector. */
dlbc_fn size_t dlbc_bytes(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* Integers wrap, as torch's do; in C overflow of signed ones is undefined. */
#define dlbc_integers(S, T, U) \
  dlbc_fn T dlbc_add_##S(T a, T b) { return (T)((U)a + (U)b); } \
  dlbc_fn T dlbc_sub_##S(T a, T b) { return (T)((U)a - (U)b); } \
  dlbc_fn T dlbc_mul_##S(T a, T b) { return (T)((U)a * (U)b); } \
  dlbc_fn T dlbc_abs_##S(T x) { return x < 0 ? (T)(0 - (U)x) : x; } \
  /* Towards minus infinity; b is neither 0 nor -1. */ \
  dlbc_fn T dlbc_floor_divide_##S(T a, T b) { return a / b - ((a % b != 0) & ((a % b < 0) != (b < 0))); } \
  /* Of the sign of b, which is neither 0 nor -1. */ \
  dlbc_fn T dlbc_remainder_##S(T a, T b) { return a % b + ((a % b != 0) & ((a % b < 0) != (b < 0)) ? b : 0); } \
  /* 1 / a ** -b cut to an integer where b < 0. */ \
  dlbc_fn T dlbc_pow_##S(T a, T b) { \
    if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0; \
    U found = 1; \
    for (U x = (U)a; b; b >>= 1, x *= x) found *= b & 1 ? x : 1; \
    return (T)found; \
  }
dlbc_integers(i64, int64_t, uint64_t)
dlbc_integers(i32, int32_t, uint32_t)

/* a b + c, rounded once where that is fast. Elsewhere products are rounded before they are added, as torch does
   (-ffp-contract=off): else a b - c d of equal products is not 0, and what is divided by a stabiliser then is large. */
#ifdef __FP_FAST_FMAF
#define dlbc_mad_f32(a, b, c) __builtin_fmaf(a, b, c)
#else
#define dlbc_mad_f32(a, b, c) ((a) * (b) + (c))
#endif
#ifdef __FP_FAST_FMA
#define dlbc_mad_f64(a, b, c) __builtin_fma(a, b, c)
#else
#define dlbc_mad_f64(a, b, c) ((a) * (b) + (c))
#endif

/* --- float: e ** x, tanh, erf and log by polynomials, within 2.5 units of the last place ----------------------------

   Coefficients are fitted by least maximum error (relative, in double precision), over the ranges named. */

dlbc_fn float dlbc_as_float(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
dlbc_fn uint32_t dlbc_as_bits(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

/* Adding it to a number rounds that to an integer, which then stands in the last bits. */
#define dlbc_rounder 12582912.0f

/* e ** r - 1, |r| <= ln(2) / 2. */
dlbc_fn float dlbc_expm1_near_0(float r) {
  float p = 1.99150323e-4f;
  p = dlbc_mad_f32(p, r, 1.39420596e-3f);
  p = dlbc_mad_f32(p, r, 8.33327137e-3f);
  p = dlbc_mad_f32(p, r, 4.16663401e-2f);
  p = dlbc_mad_f32(p, r, 1.66666672e-1f);
  p = dlbc_mad_f32(p, r, 0.5f);
  return dlbc_mad_f32(p, r * r, r);
}

/* x - n ln(2), with ln(2) in two parts, the first of which n multiplies without rounding. */
dlbc_fn float dlbc_less_ln2(float x, float n) {
  return dlbc_mad_f32(n, 2.12194440e-4f, dlbc_mad_f32(n, -0.693359375f, x));
}

dlbc_fn float dlbc_exp_f32(float x) {
  float y = x < -104.0f ? -104.0f : x;  /* 0 from there on */
  y = y > 89.0f ? 89.0f : y;            /* infinite from there on */
  float t = dlbc_mad_f32(y, 1.44269504f, dlbc_rounder);
  float p = dlbc_expm1_near_0(dlbc_less_ln2(y, t - dlbc_rounder)) + 1.0f;
  uint32_t n = dlbc_as_bits(t) - dlbc_as_bits(dlbc_rounder), half = (uint32_t)((int32_t)n >> 1);
  return p * dlbc_as_float((half + 127u) << 23) * dlbc_as_float((n - half + 127u) << 23);  /* 2 ** n may be too small */
}

dlbc_fn float dlbc_expm1_f32(float x) {
  float y = x < -20.0f ? -20.0f : x;  /* -1 from there on */
  y = y > 89.0f ? 89.0f : y;
  float t = dlbc_mad_f32(y, 1.44269504f, dlbc_rounder);
  float p = dlbc_expm1_near_0(dlbc_less_ln2(y, t - dlbc_rounder));
  float s = dlbc_as_float((dlbc_as_bits(t) - dlbc_as_bits(dlbc_rounder) + 126u) << 23);  /* 2 ** (n - 1) */
  float z = 2.0f * dlbc_mad_f32(s, p, s - 0.5f);
  return x == 0.0f ? x : z;
}

dlbc_fn float dlbc_tanh_f32(float x) {
  float e = dlbc_expm1_f32(-2.0f * fabsf(x));
  return copysignf(e / (2.0f + e), x);
}

dlbc_fn float dlbc_erf_f32(float x) {
  float s = x * x, t = fabsf(x);
  float p = 8.34522507e-5f;  /* erf(x) / x - 1 where |x| < 0.93 */
  p = dlbc_mad_f32(p, s, -8.13743740e-4f);
  p = dlbc_mad_f32(p, s, 5.20063424e-3f);
  p = dlbc_mad_f32(p, s, -2.68592704e-2f);
  p = dlbc_mad_f32(p, s, 1.12836942e-1f);
  p = dlbc_mad_f32(p, s, -3.76126349e-1f);
  p = dlbc_mad_f32(p, s, 1.28379166e-1f);
  float u = t > 4.0f ? 4.0f : t;  /* 1 from there on */
  float q = 1.12314656e-5f;  /* -log(1 - erf(u)) / u */
  q = dlbc_mad_f32(q, u, -3.22805397e-4f);
  q = dlbc_mad_f32(q, u, 3.64246499e-3f);
  q = dlbc_mad_f32(q, u, -2.37620752e-2f);
  q = dlbc_mad_f32(q, u, 1.06236890e-1f);
  q = dlbc_mad_f32(q, u, 6.35151327e-1f);
  q = dlbc_mad_f32(q, u, 1.12864852f);
  return t > 0.93f ? copysignf(1.0f - dlbc_exp_f32(-(q * u)), x) : dlbc_mad_f32(p, x, x);
}

/* log(x) + more, for 0 < x < infinity: x = m 2 ** n with 2/3 <= m < 4/3. */
dlbc_fn float dlbc_log_plus(float x, float more) {
  int small = x < 1.17549435e-38f;
  float y = small ? x * 8388608.0f : x;
  uint32_t above = dlbc_as_bits(y) - 0x3f2aaaabu;
  float n = (float)((int32_t)above >> 23) - (small ? 23.0f : 0.0f);
  float f = dlbc_as_float((above & 0x007fffffu) + 0x3f2aaaabu) - 1.0f;
  float p = -1.31916463e-1f;  /* (log(1 + f) - f + f**2 / 2) / f**3 */
  p = dlbc_mad_f32(p, f, 1.39624506e-1f);
  p = dlbc_mad_f32(p, f, -1.21151261e-1f);
  p = dlbc_mad_f32(p, f, 1.40109196e-1f);
  p = dlbc_mad_f32(p, f, -1.66854665e-1f);
  p = dlbc_mad_f32(p, f, 2.00100437e-1f);
  p = dlbc_mad_f32(p, f, -2.49996886e-1f);
  p = dlbc_mad_f32(p, f, 3.33332241e-1f);
  float rest = dlbc_mad_f32(dlbc_mad_f32(p, f, -0.5f), f * f, dlbc_mad_f32(n, -2.12194440e-4f, more));
  return dlbc_mad_f32(n, 0.693359375f, rest + f);
}

dlbc_fn float dlbc_log_f32(float x) {
  float y = dlbc_log_plus(x, 0.0f);
  y = x < INFINITY ? y : x;  /* NaN too */
  y = x == 0.0f ? -INFINITY : y;
  return x < 0.0f ? NAN : y;
}

dlbc_fn float dlbc_log1p_f32(float x) {
  float u = 1.0f + x, back = u - 1.0f;
  float lost = (1.0f - (u - back)) + (x - back);  /* what rounding took from 1 + x */
  float y = dlbc_log_plus(u, lost / u);
  y = u < INFINITY ? y : x;
  y = u == 0.0f ? -INFINITY : y;
  y = x == 0.0f ? x : y;
  return u < 0.0f ? NAN : y;
}

/* --- double: the C library --------------------------------------------------------------------------------------- */

dlbc_fn double dlbc_exp_f64(double x) { return exp(x); }
dlbc_fn double dlbc_expm1_f64(double x) { return expm1(x); }
dlbc_fn double dlbc_tanh_f64(double x) { return tanh(x); }
dlbc_fn double dlbc_erf_f64(double x) { return erf(x); }
dlbc_fn double dlbc_log_f64(double x) { return log(x); }
dlbc_fn double dlbc_log1p_f64(double x) { return log1p(x); }

/* --- both: S is the suffix, T the type --------------------------------------------------------------------------- */

#define dlbc_floats(S, T) \
  /* NaN where a or b is. */ \
  dlbc_fn T dlbc_maximum_##S(T a, T b) { return (a > b) | (a != a) ? a : b; } \
  dlbc_fn T dlbc_minimum_##S(T a, T b) { return (a < b) | (a != a) ? a : b; } \
  /* 0 where b is, for a finite. */ \
  dlbc_fn T dlbc_safe_div_##S(T a, T b) { return a / (b == 0 ? (T)INFINITY : b); } \
  /* m |y| / (|y| + eps), exactly 0 where y is, however large m is there. */ \
  dlbc_fn T dlbc_damp_##S(T m, T y, T eps) { return m / (1 + eps * (1 / fabs(y))); } \
  dlbc_fn T dlbc_sigmoid_##S(T x) { return 1 / (1 + dlbc_exp_##S(-x)); } \
  dlbc_fn T dlbc_silu_##S(T x) { return x / (1 + dlbc_exp_##S(-x)); } \
  dlbc_fn T dlbc_log_sigmoid_##S(T x) { return (x < 0 ? x : 0) - dlbc_log1p_##S(dlbc_exp_##S(-fabs(x))); } \
  dlbc_fn T dlbc_softplus_##S(T x, T beta, T threshold) { \
    T y = dlbc_log1p_##S(dlbc_exp_##S(x * beta)) / beta; \
    return x * beta > threshold ? x : y; \
  } \
  /* x tanh(log(1 + e)) with e = exp(x); large e overflows, and says nothing any more. */ \
  dlbc_fn T dlbc_mish_##S(T x) { \
    T e = dlbc_exp_##S(x > 40 ? 40 : x), n = e * (e + 2); \
    return x * (n / (n + 2)); \
  } \
  /* min(max(x + 3, 0), 6). */ \
  dlbc_fn T dlbc_hard_##S(T x) { \
    T y = x + 3; \
    y = y < 0 ? 0 : y; \
    return y > 6 ? 6 : y; \
  } \
  dlbc_fn T dlbc_gelu_##S(T x) { return x * (T)0.5 * (1 + dlbc_erf_##S(x * (T)0.70710678118654752440)); } \
  dlbc_fn T dlbc_gelu_tanh_##S(T x) { \
    T inner = (T)0.79788456080286535588 * (x + (T)0.044715 * (x * x * x)); \
    return (T)0.5 * x * (1 + dlbc_tanh_##S(inner)); \
  } \
  dlbc_fn T dlbc_gelu_quick_##S(T x) { return x * dlbc_sigmoid_##S((T)1.702 * x); } \
  dlbc_fn T dlbc_elu_##S(T x, T alpha, T scale, T input_scale) { \
    T below = dlbc_expm1_##S(x * input_scale) * (alpha * scale); \
    return x > 0 ? x * scale : below; \
  } \
  dlbc_fn T dlbc_floor_divide_##S(T a, T b) { \
    T rest = fmod(a, b), n = (a - rest) / b; \
    n -= (rest != 0) & ((b < 0) != (rest < 0)); \
    T whole = floor(n); \
    whole += n - whole > (T)0.5; \
    whole = n != 0 ? whole : copysign((T)0, a / b); \
    return b == 0 ? a / b : whole; \
  } \
  dlbc_fn T dlbc_remainder_##S(T a, T b) { \
    T rest = fmod(a, b); \
    return rest + ((rest != 0) & ((b < 0) != (rest < 0)) ? b : 0); \
  }
dlbc_floats(f32, float)
dlbc_floats(f64, double)
